"""What gpu_day.sh runs: env, right, times, steps, job. `--dry`: the same on the CPU, on tiny shapes.

On a GPU, dense operations are compiled by PyTorch and factored ones run as they are (hlora.numerics.ops).
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hlora import Importance, ImportancePenalty, ImportanceRecorder
from hlora.numerics import encodings, equations, ops
from hlora.numerics.types import Step

DRY = "--dry" in sys.argv
DEVICE = torch.device("cpu" if DRY else "cuda")
Shapes = list[tuple[int, int, int]]  # d_out, d_in, how many
GEOMETRIES: dict[str, tuple[Shapes, int]] = {  # and the rank
    "LLaMA-3.2-3B q and v, r 8": ([(3072, 3072, 28), (1024, 3072, 28)], 8),
    "4096×14336, r 16": ([(4096, 14336, 8)], 16),
    "SmolLM2-135M q and v, r 8": ([(576, 576, 30), (192, 576, 30)], 8),
}
RIGHT: Shapes = [(3072, 3072, 1), (1024, 3072, 1), (4099, 1008, 1)]
if DRY:
    GEOMETRIES, RIGHT = {"tiny": ([(96, 64, 2), (40, 64, 1)], 8)}, [(96, 64, 1), (35, 20, 1)]


def env() -> None:
    """Versions, the card, and what copying and bfloat16 products reach."""
    for name in ("torch", "triton", "transformers", "accelerate", "peft", "trl", "datasets", "lm_eval"):
        try:
            print(f"{name:14s} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:14s} absent")
    if DRY:
        return
    print(torch.cuda.get_device_properties(0))
    print(f"copying, bytes read and written: {copied_bytes_a_second() / 1e12:.2f} TB/s")
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    print(f"8192³ bfloat16: {2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9:.0f} TFLOP/s")


def copied_bytes_a_second(size: int = 8_000_000 if DRY else 2_000_000_000) -> float:
    source = torch.randn(size // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2e3 * size / milliseconds(lambda: target.copy_(source))


def milliseconds(run: Callable[[], Any], rounds: int = 15) -> float:
    """Median time on the device alone: each call waits behind a nap, so the host's time is not in it."""
    found = []
    for number in range(3 if DRY else rounds + 3):
        if DRY:
            started = time.perf_counter()
            run()
            found.append(1e3 * (time.perf_counter() - started))
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(12_000_000)  # 6 to 7 ms, more than any of these calls takes on the host
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:  # the first ones compile
            found.append(start.elapsed_time(end))
    return statistics.median(found)


def drawn(shapes: Shapes, rank: int, times: float = 1.0) -> tuple[list[Step], list[tuple[Tensor, Tensor]]]:
    """A step and an anchor of each matrix, random, `times` as large as those of a training."""

    def normal(*shape: int, size: float) -> Tensor:
        return times * size * torch.randn(*shape, device=DEVICE)

    steps, anchors = [], []
    for d_out, d_in in [(d_out, d_in) for d_out, d_in, count in shapes for _ in range(count)]:
        A, B = normal(rank, d_in, size=0.05), normal(d_out, rank, size=0.01)
        gradients = normal(rank, d_in, size=1e-3), normal(d_out, rank, size=1e-3)
        after = A + normal(rank, d_in, size=1e-3), B + normal(d_out, rank, size=1e-3)
        steps.append(Step(A, B, *gradients, 1e-3, *after))
        anchors.append((normal(rank, d_in, size=0.05), normal(d_out, rank, size=0.01)))
    return steps, anchors


def omegas(shapes: Shapes, encoding: str) -> list[Any]:
    """Random ω ≥ 0.01 of each matrix."""
    found: list[Any] = []
    for d_out, d_in in [(d_out, d_in) for d_out, d_in, count in shapes for _ in range(count)]:
        dense = torch.rand(d_out, d_in, device=DEVICE) + 0.01
        found.append(dense if encoding == "float32" else encodings.Factored(dense.sum(1), dense.sum(0)))
    return found


def right() -> None:
    """Every operation against the equations in float64 on the same device; exits with 1 if one is wrong."""
    wrong = 0

    def say(name: str, mine: Tensor, exact: Tensor, bound: float) -> None:
        nonlocal wrong
        off = float((mine.double() - exact).norm() / exact.norm())
        wrong += not off <= bound
        print(f"{'ok   ' if off <= bound else 'WRONG'} {name:52s} {off:.1e} (at most {bound:.0e})")

    counted = torch.ones((), dtype=torch.bool, device=DEVICE)
    for rank in (8, 64):
        steps, anchors = drawn(RIGHT, rank, 100.0)  # else the change of ω is lost in its rounding
        scales = [1.7 + number for number in range(len(steps))]
        for encoding in encodings.ENCODINGS:
            mine = omegas(RIGHT, encoding)
            before = [[part.double().clone() for part in encodings.parts(each).values()] for each in mine]
            ops.accumulate_all_(mine, steps, scales, counted=counted)
            for s, scale, omega, kept in zip(steps, scales, mine, before, strict=True):
                A, B, g, h, a, b = (t.double() for t in (s.A, s.B, s.grad_A, s.grad_B, s.A_next, s.B_next))
                gradient = equations.effective_gradient(A, B, g, h, lr=s.lr, scale=scale)
                change = gradient * equations.movement(A, B, a, b, scale=scale)
                exact = [change] if encoding == "float32" else [change.sum(1), change.sum(0)]
                for part, old, each in zip(encodings.parts(omega).values(), kept, exact, strict=True):
                    say(f"recording {encoding} r{rank} {tuple(omega_shape(omega))}", part, old - each, 1e-5)
            mine = omegas(RIGHT, encoding)
            As, Bs = [s.A for s in steps], [s.B for s in steps]
            found = ops.penalties_with_gradients(mine, As, Bs, anchors=anchors, scales=scales)
            for number, (value, grad_A, grad_B) in enumerate(zip(*found, strict=True)):
                A, B = (t[number].double().requires_grad_() for t in (As, Bs))
                theta_nu = scales[number] * anchors[number][1].double() @ anchors[number][0].double()
                omega = mine[number]
                wide = omega.double() if isinstance(omega, Tensor) else omega.dense().double()
                loss = equations.layer_penalty(wide, scales[number] * B @ A, theta_nu)
                loss.backward()
                name = f"penalty {encoding} r{rank} {tuple(omega_shape(omega))}"
                for what, part, exact in (("", value, loss.detach()), (" ∂A", grad_A, A.grad), (" ∂B", grad_B, B.grad)):
                    say(name + what, part, exact, 1e-4)
    print(f"{wrong} wrong")
    sys.exit(bool(wrong))


def omega_shape(omega: Any) -> tuple[int, ...]:
    return tuple(omega.shape) if isinstance(omega, Tensor) else (len(omega.row), len(omega.column))


def times() -> None:
    """Recording and penalty of all matrices of a model, on the device alone, beside copying as many bytes."""
    speed = copied_bytes_a_second()
    counted = torch.ones((), dtype=torch.bool, device=DEVICE)
    print("| matrices | operation | encoding | ms | share of copying's speed |\n|---|---|---|---|---|")
    for geometry, (shapes, rank) in GEOMETRIES.items():
        steps, anchors = drawn(shapes, rank)
        scales, As, Bs = [4.0] * len(steps), [s.A for s in steps], [s.B for s in steps]
        for encoding in encodings.ENCODINGS:
            mine = omegas(shapes, encoding)
            size = sum(map(encodings.nbytes, mine))
            runs: dict[str, tuple[Callable[[], Any], int]] = {
                "recording": (lambda: ops.accumulate_all_(mine, steps, scales, counted=counted), 2 * size),  # noqa: B023
                "penalty": (
                    lambda: ops.penalties_with_gradients(mine, As, Bs, anchors=anchors, scales=scales),  # noqa: B023
                    size,
                ),
            }
            for name, (run, moved) in runs.items():
                ms = milliseconds(run)
                share = f"{100 * moved / (ms / 1e3) / speed:.0f} %" if encoding == "float32" else "–"
                print(f"| {geometry} | {name} | {encoding} | {ms:.3f} | {share} |", flush=True)


def steps() -> None:
    """Whole training steps of LLaMA-3.2-3B of random weights in bfloat16, in random order; waits; peak memory."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "head_dim": 128}
    sizes |= {"num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True}
    if DRY:
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if DRY else torch.bfloat16)
    with DEVICE:
        base = LlamaForCausalLM(LlamaConfig(**sizes))
    torch.set_default_dtype(torch.float32)
    base.requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])).train()
    ids = torch.randint(3, sizes["vocab_size"], (2, 8) if DRY else (16, 128), device=DEVICE)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=8e-4)

    def step(around: Callable[[], Any] | None = None, recorder: ImportanceRecorder | None = None) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        if around is not None:
            around()
        if recorder is not None:
            recorder.capture(8e-4)
        optimizer.step()
        if recorder is not None:
            recorder.integrate()
        optimizer.zero_grad()

    kinds: dict[str, Callable[[], None]] = {"plain": step, "plain again": step}
    ours: dict[str, Callable[[], Any]] = {}
    for encoding in encodings.ENCODINGS:
        recorder = ImportanceRecorder(model, encoding, method="path_integral")
        for _ in range(2):
            step(recorder=recorder)
        penalty = ImportancePenalty(model, recorder.consolidate(), 1.0)
        kinds[f"recording {encoding}"] = lambda recorder=recorder: step(recorder=recorder)  # type: ignore[misc]
        kinds[f"penalty {encoding}"] = lambda penalty=penalty: step(penalty.add_gradients_)  # type: ignore[misc]
        ours[f"recording {encoding}"] = lambda r=recorder: (r.capture(8e-4), r.integrate())  # type: ignore[misc]
        ours[f"penalty {encoding}"] = penalty.add_gradients_
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    peak = dict.fromkeys(kinds, 0.0)
    draw = random.Random(0)
    for turn in range(2 if DRY else 10):
        for kind in draw.sample(list(kinds), len(kinds)):
            if not DRY:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            started = time.perf_counter()
            kinds[kind]()
            if not DRY:
                torch.cuda.synchronize()
                peak[kind] = torch.cuda.max_memory_allocated() / 2**20
            if turn:  # the first one compiles
                found[kind].append(1e3 * (time.perf_counter() - started))
    print("| step | ms | of a plain one | peak, MiB | waits of ours |\n|---|---|---|---|---|")
    for kind, ms in found.items():
        ratio = statistics.median(a / b for a, b in zip(ms, found["plain"], strict=True))
        waits = waits_of(ours[kind], step) if kind in ours and not DRY else "–"
        print(f"| {kind} | {statistics.median(ms):.2f} | {ratio:.3f} | {peak[kind]:.0f} | {waits} |", flush=True)


def waits_of(call: Callable[[], Any], step: Callable[..., None]) -> str:
    """How often a call of ours waits for the device, and where."""

    def watched() -> None:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(watched)
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return f"{len(places)} {' '.join(places[:3])}"


def job() -> None:
    """`hlora run` on a tiny random Llama on the CPU and on the device; Ω of both compared."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
    from made_tokenizers import made_model, made_tokenizer

    from hlora import pipeline
    from hlora.config.reading import parse_config

    root = Path(tempfile.mkdtemp())
    model = made_model(root / "model", made_tokenizer())
    (root / "general.txt").write_text("The cat sat on the mat.\nIt looked at the rain.\n\n" * 40, encoding="utf-8")
    for file, first in (("train", 0), ("test", 50)):
        rows = [{"prompt": f"What is {n} plus one?", "completion": f" {n + 1}"} for n in range(first, first + 8)]
        (root / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recorded = {}
    for name, device in (("cpu", "cpu"), ("device", str(DEVICE))):
        for encoding in encodings.ENCODINGS:  # squared gradients, the default, are always factored
            method = "squared_gradients" if encoding == "factored" else "path_integral"
            fields = {
                "output": str(root / f"{name}-{encoding}"),
                "model": {"name": model, "device": device, "dtype": "float32"},
                "lora": {"rank": 4, "alpha": 8},
                "importance": {"method": method, "encoding": encoding},
                "general": {"paths": [str(root / "general.txt")]},
                "domain": {"task": "rows", "train": str(root / "train.jsonl"), "test": str(root / "test.jsonl")},
                "training": {
                    "common": {"per_device_train_batch_size": 2, "report_to": []},
                    "record": {"max_steps": 2, "max_length": 16},
                    "tune": {"max_steps": 2, "max_length": 48},
                },
                "evaluation": {"max_tokens": 32, "window": 16, "stride": 16, "accuracy": False, "generate": 0},
            }
            results = pipeline.run(parse_config(fields))
            recorded[name, encoding] = Importance.load(root / f"{name}-{encoding}" / "importance").norms()
            print(f"{name} {encoding}: loss {results['history']['tune'][-1]['loss']:.4f}", flush=True)
    for encoding in encodings.ENCODINGS:
        mine, other = recorded["device", encoding], recorded["cpu", encoding]
        worst = max(abs(mine[matrix] / other[matrix] - 1) for matrix in other)
        print(f"‖Ω‖ {encoding}: {worst:.1e} from the CPU's; AdamW's first steps magnify rounding")


if __name__ == "__main__":
    {"env": env, "right": right, "times": times, "steps": steps, "job": job}[sys.argv[1]]()
