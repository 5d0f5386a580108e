"""What recording and the penalty send in a group of processes, beside what training sends, and the memory of each.

    python benchmarks/communication.py [--processes 2 4] [--steps 5]

SmolLM2-135M, LoRA on q_proj and v_proj at r 8, importance in float32, so many steps of recording and so many under
the penalty, alone and in groups of processes over gloo on this machine, under DDP and under FSDP2 (`fully_shard`). All
have the same 4 × 32 tokens a step in all. Collectives are counted as they are called, hlora's apart from the
training's: the bytes that leave a process when each goes by a ring, the mean over processes. The time of hlora's
collectives is what its calls wait for them, for slower processes too; median step, the first left out. Losses, Ω and
adapter are compared with those of one process.
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
from torch.nn.parallel import DistributedDataParallel

from hlora import ImportancePenalty, ImportanceRecorder, distributed, encodings
from hlora.config import LoraSettings, ModelConfig
from hlora.models import attach_lora, load_base

ROWS, LENGTH = 4, 32
LR = 8e-4


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
        distributed._all_gather = self.counting("all_gather", distributed._all_gather)

    def counting(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
            if name == "all_to_all_single":
                away = sum(args[3]) - args[3][distributed.rank()]
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
        self.bytes[self.by] += rounds * size * (distributed.world() - 1) / distributed.world()

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


def process(number: int, processes: int, kind: str, port: int, steps: int, results: str) -> None:
    """Record and tune as one of so many; the first writes what was found."""
    torch.set_num_threads(1)
    if processes > 1:
        where = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=where, rank=number, world_size=processes)
    counted = Counted()
    base, _ = load_base(ModelConfig(name="smollm2-135m"))
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
    tokens = torch.randint(3, model.config.vocab_size, (2 * steps, ROWS, LENGTH), generator=generator)
    found: dict[str, Any] = {"losses": []}

    def phase(name: str, batches: Tensor, recorder: ImportanceRecorder | None, penalty: Any) -> None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
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
            optimizer.zero_grad()
            total = loss.detach().clone()
            if processes > 1:
                dist.all_reduce(total)
            found["losses"].append(float(total) / processes)
        found[name] = {what: statistics.median(each[what] for each in of_steps[1:]) for what in of_steps[0]}

    recorder = ImportanceRecorder(running, "float32")
    phase("record", tokens[:steps], recorder, None)
    found["recorded"] = sum(map(encodings.nbytes, recorder.omega.values()))
    importance = recorder.consolidate()
    penalty = ImportancePenalty(running, importance, phi=1.0)
    phase("tune", tokens[steps:], None, penalty)
    found["held"] = sum(map(encodings.nbytes, penalty._omega.values()))
    tensors = {
        f"omega.{name}": encodings.parts(m.omega)["dense"].contiguous() for name, m in importance.matrices.items()
    }
    for m in penalty.matrices:
        pair = {"A": distributed.whole(m.A.detach()), "B": distributed.whole(m.B.detach())}
        tensors |= {f"adapter.{m.name}.{which}": factor.clone().contiguous() for which, factor in pair.items()}
    everyone = [found]
    if processes > 1:
        everyone = [json.loads(text) for text in distributed.exchange(json.dumps(found))]
    if number == 0:
        save_file(tensors, f"{results}.safetensors")
        Path(f"{results}.json").write_text(json.dumps(everyone), encoding="utf-8")
    if processes > 1:
        dist.destroy_process_group()


def computed(kind: str, processes: int, steps: int, directory: Path) -> tuple[list[Any], dict[str, Tensor]]:
    """What each process found, and the tensors that all of them have."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = str(directory / f"{kind}-{processes}")
    processes_of.start_processes(process, (processes, kind, port, steps, results), processes, start_method="fork")
    return json.loads(Path(f"{results}.json").read_text(encoding="utf-8")), load_file(f"{results}.safetensors")


def mean(everyone: list[Any], phase: str, what: str) -> float:
    return statistics.fmean(each[phase][what] for each in everyone)


def largest_differences(mine: dict[str, Tensor], other: dict[str, Tensor], kind: str) -> tuple[float, float]:
    """Of an element, as a share of the largest of its tensor; and of a tensor, as a share of its norm."""
    pairs = [(mine[name] - tensor, tensor) for name, tensor in other.items() if name.startswith(kind)]
    return tuple(max(float(size(d) / size(t)) for d, t in pairs) for size in (lambda t: t.abs().max(), torch.norm))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    sent = Table("", "processes", "phase", "hlora, kB", "training, kB", "hlora / DDP's", "waited, ms", "of the step")
    held = Table("", "processes", "ω, bytes of each", "Ω, bytes of each")
    same = Table("", "processes", "losses", "Ω, element", "Ω, norm", "adapter, element", "adapter, norm")
    with tempfile.TemporaryDirectory() as scratch:
        (alone,), tensors_alone = computed("alone", 1, options.steps, Path(scratch))
        held.add_row("alone", "1", f"{alone['recorded']:,}", f"{alone['held']:,}")
        for processes in options.processes:
            of_ddp = 0.0
            for kind in ("DDP", "FSDP2"):
                everyone, tensors = computed(kind, processes, options.steps, Path(scratch))
                for phase in ("record", "tune"):
                    ours, training = (mean(everyone, phase, who) for who in ("hlora", "training"))
                    of_ddp = training if kind == "DDP" else of_ddp
                    waited, step = (mean(everyone, phase, what) for what in ("waited", "step"))
                    figures = f"{ours / 1e3:,.0f}", f"{training / 1e3:,.0f}", f"{ours / of_ddp:.2f}"
                    sent.add_row(kind, str(processes), phase, *figures, f"{1e3 * waited:.1f}", f"{waited / step:.1%}")
                ranges = (sorted({each[what] for each in everyone}) for what in ("recorded", "held"))
                held.add_row(kind, str(processes), *(" to ".join(f"{n:,}" for n in each) for each in ranges))
                losses = max(abs(a - b) for a, b in zip(everyone[0]["losses"], alone["losses"], strict=True))
                pairs = (largest_differences(tensors, tensors_alone, what) for what in ("omega", "adapter"))
                differences = [each for pair in pairs for each in pair]
                same.add_row(kind, str(processes), f"{losses:.1e}", *(f"{each:.1e}" for each in differences))
    console = Console(width=120)
    for title, table in (
        (f"Sent by a process in a step of {ROWS} × {LENGTH} tokens", sent),
        ("Importance in float32", held),
        (
            "Largest difference from one process; of Ω and adapter as a share of each matrix's largest element or norm",
            same,
        ),
    ):
        table.title = title
        console.print(table)


if __name__ == "__main__":
    main()
