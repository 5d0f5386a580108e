"""Whole runs of SmolLM2-135M in several processes, launched as the guide says, beside one process with the same rows.

    python benchmarks/launches.py [--data data] [--output runs/launches]

`hlora run` in one process of one thread, in one of two threads, by torchrun in two and four, and by accelerate in two:
eight steps of recording on WikiText-2 and eight on QASC, four rows of at most 64 tokens a step in all; perplexity of
two texts, likelihood and accuracy of 16 questions. A run that is there is not made again. Prints the largest difference
of each from the first; of Ω and adapter as a share of each matrix's largest element and norm.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

ROWS = 4
TORCHRUN = ["torch.distributed.run", "--standalone"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_machines=1"]
WAYS: dict[str, tuple[int, list[str]]] = {  # processes, and what `python -m` gets before `hlora`
    "one process": (1, []),
    "one process, two threads": (1, []),
    "torchrun, 2": (2, [*TORCHRUN, "--nproc-per-node=2", "-m"]),
    "torchrun, 4": (4, [*TORCHRUN, "--nproc-per-node=4", "-m"]),
    "accelerate, 2": (2, [*ACCELERATE, "--num_processes=2", "-m"]),
}
ARMS = ("base", "after_general", "hlora")


def fields(data: Path, output: Path, processes: int) -> dict[str, Any]:
    return {
        "output": str(output),
        "model": {"name": "smollm2-135m"},
        "general": {"paths": [f"{data}/wikitext2/valid.txt"]},
        "domain": {
            "task": "multiple_choice",
            "train": f"{data}/qasc/train.jsonl",
            "test": f"{data}/qasc/test.jsonl",
        },
        "importance": {"method": "path_integral", "encoding": "float32"},
        "training": {
            "common": {
                "learning_rate": 8e-4,
                "max_steps": 8,
                "logging_steps": 1,
                "per_device_train_batch_size": ROWS // processes,
                "max_length": 64,
            }
        },
        "evaluation": {
            "texts": {name: f"{data}/{name}/test.txt" for name in ("wikitext2", "shakespeare")},
            "max_tokens": 1024,
            "window": 256,
            "stride": 128,
            "max_rows": 16,
            "generate": 4,
            "max_new_tokens": 8,
            "batch_size": 4,
        },
    }


def ran(way: str, data: Path, output: Path) -> Path:
    """Directory of the run."""
    processes, launcher = WAYS[way]
    directory = output / way.replace(", ", "-").replace(" ", "-")
    if not (directory / "results.json").is_file():
        output.mkdir(parents=True, exist_ok=True)
        config = directory.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(fields(data, directory, processes), sort_keys=False), encoding="utf-8")
        threads = {"OMP_NUM_THREADS": "2" if "threads" in way else "1"}
        command = [sys.executable, "-m", *launcher, "hlora", "run", str(config)]
        subprocess.run(command, env={**os.environ, **threads}, check=True)
    return directory


def losses(results: dict[str, Any]) -> list[float]:
    return [entry["loss"] for phase in ("record", "tune") for entry in results["history"][phase]]


def shares(results: dict[str, Any], measure: str) -> list[float]:
    return [results["arms"][arm]["domain"][measure] for arm in ARMS]


def perplexities(results: dict[str, Any]) -> list[float]:
    return [text["perplexity"] for arm in ARMS for text in results["arms"][arm]["texts"].values()]


def of_files(mine: Path, other: Path, file: str) -> Iterator[float]:
    """Largest difference of an element, as a share of the largest of its tensor; and of a tensor, of its norm."""
    one, two = load_file(mine / file), load_file(other / file)
    for size in (lambda t: t.abs().max(), torch.norm):
        yield max(float(size(one[name] - tensor) / size(tensor)) for name, tensor in two.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, default=Path("runs/launches"))
    options = parser.parse_args()
    directories = {way: ran(way, options.data, options.output) for way in WAYS}
    found = {
        way: json.loads((directory / "results.json").read_text(encoding="utf-8"))
        for way, directory in directories.items()
    }
    first = next(iter(WAYS))
    alone = found.pop(first)
    columns = ("losses", "perplexity, relative", "answer NLL", "acc", "acc_norm")
    table = Table("", *columns, "Ω, element", "Ω, norm", "adapter, element", "adapter, norm")
    for way, results in found.items():
        figures = [max(abs(a - b) for a, b in zip(losses(results), losses(alone), strict=True))]
        figures.append(max(abs(a / b - 1) for a, b in zip(perplexities(results), perplexities(alone), strict=True)))
        for measure in ("answer_nll", "acc", "acc_norm"):
            pairs = zip(shares(results, measure), shares(alone, measure), strict=True)
            figures.append(max(abs(a - b) for a, b in pairs))
        for file in ("importance/importance.safetensors", "adapter/adapter_model.safetensors"):
            figures += of_files(directories[way], directories[first], file)
        table.add_row(way, *(f"{each:.1e}" for each in figures))
    console = Console(width=160)
    console.print(table)
    console.print(f"One process: losses {', '.join(f'{each:.4f}' for each in losses(alone))}")
    console.print(f"Perplexities {', '.join(f'{each:.4f}' for each in perplexities(alone))}")
    for measure in ("answer_nll", "acc", "acc_norm"):
        console.print(f"{measure} {', '.join(f'{each:.4f}' for each in shares(alone, measure))}")


if __name__ == "__main__":
    main()
