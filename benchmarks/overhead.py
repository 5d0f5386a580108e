"""Time and peak memory of recording and of the penalty beside those of plain LoRA training, in one run.

    python benchmarks/overhead.py [--model DIR] [--rounds 7] [--length 128] [--encodings factored float32 squares]
    python benchmarks/overhead.py --model llama-3.2-3b --batch 20      # of random weights, for a GPU

Each round makes two plain steps, one recorded step per encoding and one protected step per encoding, in random order,
on the same random tokens. "squares" records squared gradients, in the backward pass; the other encodings are of the
path integral. Two figures for each: the median over rounds of the time spent inside hlora's calls divided by that
round's plain step, and the ratio of whole steps, which carries the noise of the step itself: the second plain step
shows how much. Then each kind of step runs alone in a process of its own; its peak memory, what PyTorch has allocated
beyond the model and the tokens, is compared with the plain one's.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hlora import Importance, ImportancePenalty, ImportanceRecorder
from hlora.config.sections import LoraSettings, ModelConfig
from hlora.model.base import load_base
from hlora.model.lora import attach_lora
from hlora.numerics import encodings

LLAMA_3B = LlamaConfig(
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128_256,
    tie_word_embeddings=True,
)
STEPS = 2  # of a process whose peak memory is measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--encodings", nargs="+", default=["factored", "float32", "squares"])
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # what the processes of their own are called with
    options = parser.parse_args()
    if options.peak:
        print(json.dumps(peak(options.model, options.batch, options.length, *options.peak)))
        return
    model, tokens = prepared(options.model, options.batch, options.length)
    with tempfile.TemporaryDirectory() as directory:
        times(model, tokens, options, Path(directory))
        del model
        memory(options, Path(directory))


def prepared(name: str, batch: int, length: int) -> tuple[PeftModel, Tensor]:
    base: PreTrainedModel
    if name == "llama-3.2-3b":
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            base = LlamaForCausalLM(LLAMA_3B).to(torch.bfloat16)
        base.requires_grad_(False)
    else:
        base, _ = load_base(ModelConfig(name=name))
    model = attach_lora(base, LoraSettings(), seed=0).train()
    generator = torch.Generator().manual_seed(0)
    return model, torch.randint(3, model.config.vocab_size, (batch, length), generator=generator).to(model.device)


def adamw(model: PeftModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=8e-4)


def backward(model: PeftModel, tokens: Tensor) -> None:
    model(input_ids=tokens, labels=tokens).loss.backward()


def recorder_of(model: PeftModel, name: str) -> ImportanceRecorder:
    """The recorder of that name; one of squared gradients that does not watch yet."""
    if name != "squares":
        return ImportanceRecorder(model, name, method="path_integral")
    recorder = ImportanceRecorder(model)
    squares: Any = recorder._recording
    squares.listening.close()
    squares._add = Timed(squares._add)
    return recorder


class Timed:
    """A function, and the seconds inside it so far."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any) -> None:
        started = _now()
        self.function(*arguments)
        self.seconds += _now() - started


def recording_step(
    recorder: ImportanceRecorder, optimizer: torch.optim.Optimizer, model: PeftModel, tokens: Tensor
) -> float:
    """A whole training step, recorded; seconds inside of the recording."""
    if recorder.method == "path_integral":
        backward(model, tokens)
        return recorded(recorder, optimizer)
    squares: Any = recorder._recording
    squares._add.seconds = 0.0
    squares.listen()
    backward(model, tokens)
    squares.listening.close()
    return float(squares._add.seconds) + recorded(recorder, optimizer)


def recorded(recorder: ImportanceRecorder, optimizer: torch.optim.Optimizer) -> float:
    """An optimizer step and its recording; seconds inside of the recording."""
    started = _now()
    recorder.capture_from(optimizer)
    inside = _now() - started
    optimizer.step()
    started = _now()
    recorder.integrate()
    return inside + _now() - started


def protected(penalty: ImportancePenalty, optimizer: torch.optim.Optimizer) -> float:
    started = _now()
    penalty.add_gradients_()
    inside = _now() - started
    optimizer.step()
    return inside


def times(model: PeftModel, tokens: Tensor, arguments: argparse.Namespace, directory: Path) -> None:
    """The table of times; leaves an importance in each encoding in the directory."""
    optimizer = adamw(model)
    recorders = {name: recorder_of(model, name) for name in arguments.encodings}

    def plain() -> float:
        backward(model, tokens)
        optimizer.step()
        return 0.0

    def under(penalty: ImportancePenalty) -> float:
        backward(model, tokens)
        return protected(penalty, optimizer)

    for recorder in recorders.values():  # warm-up, and the steps that the penalties below need
        recording_step(recorder, optimizer, model, tokens)
        optimizer.zero_grad()
    importances: dict[str, Importance] = {name: recorder.consolidate() for name, recorder in recorders.items()}
    for name, importance in importances.items():
        importance.save(directory / name)
    penalties = {name: ImportancePenalty(model, importance, 9.0) for name, importance in importances.items()}

    steps: dict[tuple[str, str], Callable[[], float]]
    steps = {("plain", ""): plain, ("plain again", ""): plain}  # the second shows what of a ratio is noise
    for name, recorder in recorders.items():
        steps["recording", name] = partial(recording_step, recorder, optimizer, model, tokens)
    steps |= {("penalty", name): partial(under, p) for name, p in penalties.items()}
    whole: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    inside: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    draw = random.Random(0)
    for _ in range(arguments.rounds):
        for key in draw.sample(list(steps), len(steps)):  # no kind of step always follows the same other
            started = _now()
            inside[key].append(steps[key]())
            whole[key].append(_now() - started)
            optimizer.zero_grad()

    size = f"{arguments.batch}x{arguments.length} tokens"
    table = Table(title=f"{arguments.model}, {size}, {arguments.rounds} rounds, {model.device}, {model.dtype}")
    for heading in (
        "step",
        "encoding",
        "median s",
        "hlora ms",
        "share of plain step %",
        "spread %",
        "whole-step ratio",
    ):
        table.add_column(heading, justify="right")
    base_times = whole[("plain", "")]
    for key, times in whole.items():
        shares = [100 * own / step for own, step in zip(inside[key], base_times, strict=True)]
        table.add_row(
            *key,
            f"{statistics.median(times):.3f}",
            f"{1e3 * statistics.median(inside[key]):.1f}",
            f"{statistics.median(shares):.2f}",
            f"{min(shares):.2f}-{max(shares):.2f}",
            f"{statistics.median(times) / statistics.median(base_times):.3f}",
        )
    Console(width=120).print(table)


def memory(arguments: argparse.Namespace, directory: Path) -> None:
    """The table of peak memory, and whether it is at most the stored importance and 64 MiB above the plain one."""
    table = Table(title=f"peak memory, {STEPS} steps in a process of its own")
    for heading in ("step", "encoding", "peak MiB", "above plain", "importance MiB", "of it beyond"):
        table.add_column(heading, justify="right")
    plain = 0.0
    kinds = [("plain", "-"), ("plain again", "-")]
    kinds += [(kind, name) for kind in ("recording", "penalty") for name in arguments.encodings]
    for kind, name in kinds:
        command = [sys.executable, __file__, "--model", arguments.model, "--batch", str(arguments.batch)]
        command += ["--length", str(arguments.length)]
        argument = name if kind == "recording" else str(directory / name)
        done = subprocess.run([*command, "--peak", kind, argument], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        plain = plain or found["peak"]
        above, stored = (found["peak"] - plain) / 2**20, found["importance"] / 2**20
        table.add_row(
            kind, name, f"{found['peak'] / 2**20:.0f}", f"{above:+.0f}", f"{stored:.1f}", f"{above - stored:+.0f}"
        )
    Console(width=120).print(table)


def peak(name: str, batch: int, length: int, kind: str, argument: str) -> dict[str, int]:
    """Bytes at the peak of a few steps of one kind, and of ω or Ω. argument: an encoding, or where an importance is."""
    model, tokens = prepared(name, batch, length)
    stored = 0

    def steps() -> None:
        nonlocal stored
        optimizer = adamw(model)
        recorder = recorder_of(model, argument) if kind == "recording" else None
        penalty = ImportancePenalty(model, Importance.load(argument), 9.0) if kind == "penalty" else None
        for _ in range(STEPS):
            if recorder is not None:
                recording_step(recorder, optimizer, model, tokens)
            else:
                backward(model, tokens)
                if penalty is not None:
                    protected(penalty, optimizer)
                else:
                    optimizer.step()
            optimizer.zero_grad()
        if recorder is not None:
            stored = sum(encodings.nbytes(omega) for omega in recorder.omega.values())
        elif penalty is not None:
            stored = sum(encodings.nbytes(omega) for omega in penalty._omega.values())

    if torch.cuda.is_available():
        steps()
        return {"peak": torch.cuda.max_memory_allocated(), "importance": stored}
    return {"peak": allocated(steps), "importance": stored}


def allocated(run: Callable[[], None]) -> int:
    """Bytes of PyTorch's on the CPU at the peak of `run`, above those before it: exact, by PyTorch's profiler.

    Resident memory cannot tell 64 MiB: with the same work it differed by 134 MiB between two processes.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
