"""Time of recording and of the penalty as a share of the plain LoRA training step, in one run.

    python benchmarks/overhead.py [--model DIR] [--rounds 7] [--encodings factored float32 bfloat16]

Each round makes two plain steps, one recorded step per encoding and one protected step per encoding, in random order,
on the same 8×128 random tokens. Two figures for each: the median over rounds of the time spent inside hlora's calls
divided by that round's plain step, and the ratio of whole steps, which carries the noise of the step itself: the second
plain step shows how much.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from hlora import Importance, ImportancePenalty, ImportanceRecorder
from hlora.config import LoraSettings, ModelConfig
from hlora.models import attach_lora, load_base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--encodings", nargs="+", default=["factored", "float32", "bfloat16"])
    arguments = parser.parse_args()

    base, _ = load_base(ModelConfig(name=arguments.model))
    model = attach_lora(base, LoraSettings(), seed=0).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=8e-4)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, model.config.vocab_size, (8, 128), generator=generator).to(model.device)
    recorders = {name: ImportanceRecorder(model, name) for name in arguments.encodings}

    def backward() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()

    def plain() -> float:
        backward()
        optimizer.step()
        return 0.0

    def recorded(recorder: ImportanceRecorder) -> float:
        backward()
        started = _now()
        recorder.capture_from(optimizer)
        inside = _now() - started
        optimizer.step()
        started = _now()
        recorder.integrate()
        return inside + _now() - started

    def protected(penalty: ImportancePenalty) -> float:
        backward()
        started = _now()
        penalty.add_gradients_()
        inside = _now() - started
        optimizer.step()
        return inside

    for recorder in recorders.values():  # warm-up, and the steps that the penalties below need
        recorded(recorder)
        optimizer.zero_grad()
    importances: dict[str, Importance] = {name: recorder.consolidate() for name, recorder in recorders.items()}
    penalties = {name: ImportancePenalty(model, importance, 9.0) for name, importance in importances.items()}

    steps = {("plain", ""): plain, ("plain again", ""): plain}  # the second shows what of a ratio is noise
    steps |= {("recording", name): lambda r=recorder: recorded(r) for name, recorder in recorders.items()}
    steps |= {("penalty", name): lambda p=penalty: protected(p) for name, penalty in penalties.items()}
    whole: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    inside: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    draw = random.Random(0)
    for _ in range(arguments.rounds):
        for key in draw.sample(list(steps), len(steps)):  # no kind of step always follows the same other
            step = steps[key]
            started = _now()
            inside[key].append(step())
            whole[key].append(_now() - started)
            optimizer.zero_grad()

    table = Table(title=f"{arguments.model}, 8x128 tokens, {arguments.rounds} rounds, {model.device}, {model.dtype}")
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


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
