"""What recording and the penalty send in a group of processes, beside what training sends, and the memory of each.

    python benchmarks/communication.py [--processes 2 4] [--steps 5] [--dtype float64] [--data data]

SmolLM2-135M, LoRA on q_proj and v_proj at r 8, importance in float32, so many steps of recording and so many under
the penalty, alone and in groups of processes over gloo on this machine, under DDP and under FSDP2 (`fully_shard`). All
have the same 4 × 32 tokens a step in all. Collectives are counted as they are called, hlora's apart from the
training's: the bytes that leave a process when each goes by a ring, the mean over processes. The time of hlora's
collectives is what its calls wait for them, for slower processes too; median step, the first left out. Losses, ω, Ω,
adapter and what `hlora.evaluation` then says of held-out text and domain rows are compared with those of one process.

AdamW's first step is as large as the learning rate and goes against the gradient's sign, however small that gradient:
elements that differ by more than such a step are counted, and those whose first gradient had another sign.
`--dtype float64` takes the rounding away that gives it one. `threads` is one process with two threads in place of one.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes_of
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, rms_norm
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hlora import ImportancePenalty, ImportanceRecorder
from hlora.config.sections import EvaluationConfig, LoraSettings, ModelConfig
from hlora.data.tasks import read_example
from hlora.evaluation.answers import answer_nll
from hlora.evaluation.likelihood import text_likelihood
from hlora.importance import shares
from hlora.model.base import load_base
from hlora.model.lora import attach_lora
from hlora.numerics import encodings
from hlora.parallel.dtensor import full_tensor
from hlora.parallel.group import all_gather_text, rank, world_size

ROWS, LENGTH = 4, 32
LR = 8e-4
TEXTS = ("wikitext2/test.txt", "shakespeare/test.txt")
EVALUATION = EvaluationConfig(max_tokens=512, window=256, stride=128, batch_size=4)
QUESTIONS = 16


class Counted:
    """Bytes and seconds of the collectives called so far, hlora's and the training's."""

    def __init__(self) -> None:
        self.bytes = {"hlora": 0.0, "training": 0.0}
        self.seconds = 0.0
        self.by = "training"
        names = ("all_reduce", "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor")
        for name in (*names, "reduce_scatter_single", "all_to_all_single", "broadcast"):
            if hasattr(dist, name):
                setattr(dist, name, self.counting(name, getattr(dist, name)))
        shares._all_gather = self.counting("all_gather", shares._all_gather)

    def counting(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
            if name == "all_to_all_single":
                away = sum(args[3]) - args[3][rank()]
                self.bytes[self.by] += away * tensors[0].element_size()
            else:
                self.sent(name, max(each.nbytes for each in tensors))
            started = time.perf_counter()
            work = collective(*args, **kwargs)
            self.waited(started)
            return work if work is None else Waited(work, self)

        return counted

    def sent(self, name: str, size: int) -> None:
        """size: bytes of what the processes have together afterwards, or had before."""
        rounds = 2 if name == "all_reduce" else 1
        self.bytes[self.by] += rounds * size * (world_size() - 1) / world_size()

    def waited(self, started: float) -> None:
        self.seconds += (time.perf_counter() - started) * (self.by == "hlora")

    @contextmanager
    def hlora(self) -> Iterator[None]:
        self.by = "hlora"
        yield
        self.by = "training"


class Waited:
    """A collective under way, the wait for which is timed."""

    def __init__(self, work: Any, counted: Counted) -> None:
        self.work, self.counted = work, counted

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)

    def wait(self) -> None:
        started = time.perf_counter()
        self.work.wait()
        self.counted.waited(started)


def all_in_float64(base: Any) -> None:
    """Norms and loss too, which Transformers' Llama takes in float32 whatever its weights are."""

    def loss(logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    base.double().loss_function = loss
    for module in base.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = lambda x, m=module: rms_norm(x, m.weight.shape, m.weight, m.variance_epsilon)


def evaluated(model: Any, tokenizer: Any, data: Path) -> list[float]:
    """Nats a token of each text, and nats an answer of the first questions."""
    texts = ((data / name).read_text(encoding="utf-8") for name in TEXTS)
    nats = [text_likelihood(model, tokenizer, text, EVALUATION)["nll"] for text in texts]
    lines = (data / "qasc/test.jsonl").read_text(encoding="utf-8").splitlines()[:QUESTIONS]
    rows = [read_example("multiple_choice", json.loads(line)) for line in lines]
    return [*nats, statistics.fmean(answer_nll(model, tokenizer, rows, EVALUATION.batch_size))]


def process(number: int, processes: int, kind: str, port: int, options: argparse.Namespace, results: str) -> None:
    """Record, tune and evaluate as one of so many; the first writes what was found."""
    torch.set_num_threads(2 if kind == "threads" else 1)
    if processes > 1:
        where = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=where, rank=number, world_size=processes)
    counted = Counted()
    base, tokenizer = load_base(ModelConfig(name="smollm2-135m"))
    if options.dtype == "float64":
        all_in_float64(base)
    model = attach_lora(base, LoraSettings(), seed=0).train()
    running: Any = model
    if kind == "DDP":
        running = DistributedDataParallel(model)
        running.register_comm_hook(None, allreduce_hook)  # what DDP does by itself, called where it is counted
    elif kind == "FSDP2":
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, model.config.vocab_size, (2 * options.steps, ROWS, LENGTH), generator=generator)
    found: dict[str, Any] = {"losses": []}
    tensors: dict[str, Tensor] = {}

    def phase(name: str, batches: Tensor, recorder: ImportanceRecorder | None, penalty: Any) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR)
        of_steps = []
        for batch in batches:
            counted.bytes, counted.seconds = dict.fromkeys(counted.bytes, 0.0), 0.0
            started = time.perf_counter()
            if penalty is not None:
                with counted.hlora():
                    penalty.begin()
            mine = batch[number::processes]
            loss = running(input_ids=mine, labels=mine).loss
            loss.backward()
            with counted.hlora():
                if recorder is not None:
                    recorder.capture_from(optimizer)
                if penalty is not None:
                    penalty.add_gradients_()
            optimizer.step()
            with counted.hlora():
                if recorder is not None:
                    recorder.integrate()
            of_steps.append({**counted.bytes, "waited": counted.seconds, "step": time.perf_counter() - started})
            if len(of_steps) == 1:
                for m in (recorder or penalty).matrices:
                    pair = {"A": full_tensor(m.A.grad), "B": full_tensor(m.B.grad)}
                    tensors.update({f"{name}.{m.name}.{which}": gradient for which, gradient in pair.items()})
            optimizer.zero_grad()
            total = loss.detach().clone()
            if processes > 1:
                dist.all_reduce(total)
            found["losses"].append(float(total) / processes)
        found[name] = {what: statistics.median(each[what] for each in of_steps[1:]) for what in of_steps[0]}

    recorder = ImportanceRecorder(running, "float32", method="path_integral")
    phase("record", tokens[: options.steps], recorder, None)
    found["recorded"] = sum(map(encodings.nbytes, recorder.omega.values()))
    omega = {f"ω.{name}": t for name, t in recorder.state_dict()["tensors"].items() if ".omega." in name}
    importance = recorder.consolidate()
    penalty = ImportancePenalty(running, importance, phi=1.0)
    phase("tune", tokens[options.steps :], None, penalty)
    found["held"] = sum(map(encodings.nbytes, penalty._omega.values()))
    found["evaluated"] = evaluated(model, tokenizer, options.data)
    tensors |= omega | {f"Ω.{n}": encodings.parts(m.omega)["dense"] for n, m in importance.matrices.items()}
    for m in penalty.matrices:
        pair = {"A": full_tensor(m.A.detach()), "B": full_tensor(m.B.detach())}
        tensors |= {f"adapter.{m.name}.{which}": factor.clone() for which, factor in pair.items()}
    everyone = [found]
    if processes > 1:
        everyone = [json.loads(text) for text in all_gather_text(json.dumps(found))]
    if number == 0:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{results}.safetensors")
        Path(f"{results}.json").write_text(json.dumps(everyone), encoding="utf-8")
    if processes > 1:
        dist.destroy_process_group()


def computed(
    kind: str, processes: int, options: argparse.Namespace, directory: Path
) -> tuple[list[Any], dict[str, Tensor]]:
    """What each process found, and the tensors that all of them have."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = str(directory / f"{kind}-{processes}")
    processes_of.start_processes(process, (processes, kind, port, options, results), processes, start_method="fork")
    return json.loads(Path(f"{results}.json").read_text(encoding="utf-8")), load_file(f"{results}.safetensors")


def mean(everyone: list[Any], phase: str, what: str) -> float:
    return statistics.fmean(each[phase][what] for each in everyone)


def largest_differences(mine: dict[str, Tensor], other: dict[str, Tensor], kind: str) -> tuple[float, float]:
    """Of an element, as a share of the largest of its tensor; and of a tensor, as a share of its norm."""
    pairs = [(mine[name] - tensor, tensor) for name, tensor in other.items() if name.startswith(kind)]
    return tuple(max(float(size(d) / size(t)) for d, t in pairs) for size in (lambda t: t.abs().max(), torch.norm))


def of_first_steps(mine: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[int, int, int, str]:
    """Elements that differ by more than a step; of those, and of all, with another sign of a phase's first gradient.

    And the largest of these gradients, as a share of its matrix's root mean square.
    """
    far_off = both = turned = 0
    largest = 0.0
    for name in (name.removeprefix("adapter.") for name in other if name.startswith("adapter.")):
        far = (mine[f"adapter.{name}"] - other[f"adapter.{name}"]).abs() > LR
        another = torch.zeros_like(far)
        for phase in ("record", "tune"):
            gradient = other[f"{phase}.{name}"]
            here = gradient.sign() != mine[f"{phase}.{name}"].sign()
            another |= here
            if here.any():
                largest = max(largest, float(gradient[here].abs().max() / gradient.square().mean().sqrt()))
        far_off, both, turned = far_off + int(far.sum()), both + int((far & another).sum()), turned + int(another.sum())
    return far_off, both, turned, f"{largest:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--data", type=Path, default=Path("data"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads of this process would not be in its forks
    sent = Table("", "processes", "phase", "hlora, kB", "training, kB", "hlora / DDP's", "waited, ms", "of the step")
    held = Table("", "processes", "ω, bytes of each", "Ω, bytes of each")
    kinds = ("ω", "Ω", "adapter")
    same = Table("", "processes", "losses", *(f"{k}, {of}" for k in kinds for of in ("element", "norm")), "evaluated")
    first = Table(
        "", "processes", "differ by more than a step", "of those, another sign", "another sign", "gradient / rms"
    )
    with tempfile.TemporaryDirectory() as scratch:
        (alone,), tensors_alone = computed("alone", 1, options, Path(scratch))
        elements = sum(t.numel() for name, t in tensors_alone.items() if name.startswith("adapter."))
        held.add_row("alone", "1", f"{alone['recorded']:,}", f"{alone['held']:,}")

        def compared(kind: str, processes: int) -> list[Any]:
            everyone, tensors = computed(kind, processes, options, Path(scratch))
            pairs = (largest_differences(tensors, tensors_alone, f"{what}.") for what in kinds)
            losses, after = (
                max(abs(a - b) for each in everyone for a, b in zip(each[what], alone[what], strict=True))
                for what in ("losses", "evaluated")
            )
            figures = [losses, *(each for pair in pairs for each in pair), after]
            same.add_row(kind, str(processes), *(f"{each:.1e}" for each in figures))
            first.add_row(kind, str(processes), *map(str, of_first_steps(tensors, tensors_alone)))
            return everyone

        compared("threads", 1)
        for processes in options.processes:
            of_ddp = 0.0
            for kind in ("DDP", "FSDP2"):
                everyone = compared(kind, processes)
                for phase in ("record", "tune"):
                    ours, training = (mean(everyone, phase, who) for who in ("hlora", "training"))
                    of_ddp = training if kind == "DDP" else of_ddp
                    waited, step = (mean(everyone, phase, what) for what in ("waited", "step"))
                    figures = f"{ours / 1e3:,.0f}", f"{training / 1e3:,.0f}", f"{ours / of_ddp:.2f}"
                    sent.add_row(kind, str(processes), phase, *figures, f"{1e3 * waited:.1f}", f"{waited / step:.1%}")
                ranges = (sorted({each[what] for each in everyone}) for what in ("recorded", "held"))
                held.add_row(kind, str(processes), *(" to ".join(f"{n:,}" for n in each) for each in ranges))
    console = Console(width=120)
    for title, table in (
        (f"Sent by a process in a step of {ROWS} × {LENGTH} tokens", sent),
        ("Importance in float32", held),
        (
            f"In {options.dtype}: largest difference from one process; of ω, Ω and adapter as a "
            "share of each matrix's largest element or norm; evaluated: nats",
            same,
        ),
        (f"Elements of the adapter, of {elements:,}, and AdamW's first steps", first),
    ):
        table.title = title
        console.print(table)
    losses, after = (", ".join(f"{each:.4f}" for each in alone[what]) for what in ("losses", "evaluated"))
    console.print(f"One process: losses {losses}; evaluated {after}.")


if __name__ == "__main__":
    main()
