"""Prints the tables of what hlora works with: `python tests/matrix/tables.py [architectures] [runs] [trainers] …`.

A cell is right against an independent dense computation, or refused in a sentence of hlora, or of the library that is
named. Exits with 1 if a cell is neither. All tables take some ten minutes on one core; test_matrix.py takes a few rows
of each.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
import textwrap
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from architectures import ARCHITECTURES, VOCABULARY, Architecture
from dense import ALPHA, RANK, check, check_squares
from made_tokenizers import made_tokenizer
from peft import LoraConfig, get_peft_model
from trainers import TRAINERS, of_trainer
from variants import METHODS, OPTIMIZERS, VARIANTS, of_optimizer, of_variant

from hlora import pipeline
from hlora.config.reading import parse_config
from hlora.config.run import RunConfig
from hlora.system.errors import HloraError, first_line

_OTHERS = ("peft", "trl", "transformers", "lomo_optim")


def token_ids(rows: int = 16) -> torch.Tensor:  # (rows, 12)
    """Rows for four steps of four."""
    return torch.randint(3, VOCABULARY - 4, (rows, 12), generator=torch.Generator().manual_seed(2))


def cell(work: Callable[[], str]) -> str:
    """What `work` came to: its verdict, hlora's refusal, or the error of the library that cannot do it."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Trainer prints its log
            return work()
    except HloraError as error:
        return f"refused: {textwrap.shorten(str(error), 400, placeholder=' …')}"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        caller = [frame.filename for frame in frames if "/torch/" not in frame.filename][-1]
        theirs = next((name for name in _OTHERS if f"/{name}/" in caller), None)
        if theirs is None or any("/hlora/" in frame.filename for frame in frames):
            return f"WRONG: {first_line(error)}"
        return f"{theirs} cannot: {first_line(error)}"


def adapt(architecture: Architecture, modules: Any) -> Any:
    """The architecture with a fresh LoRA adapter on `modules`."""
    base = architecture.build()
    torch.manual_seed(1)
    parameters = list(architecture.parameters) if modules == "all-linear" else None
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules, target_parameters=parameters)
    model = get_peft_model(base, config)
    loss(model, token_ids()[:1])  # where this fails, PEFT's layers do not fit the model
    return model


def loss(model: Any, rows: torch.Tensor) -> torch.Tensor:
    return model(input_ids=rows, labels=rows).loss


def of_architecture(name: str) -> list[str]:
    """Recording and penalty, and squared gradients: with the modules that fit, and with all-linear."""
    architecture, rows = ARCHITECTURES[name], token_ids()
    cells = [
        cell(lambda modules=modules: check(adapt(architecture, modules), rows, loss))  # type: ignore[misc]
        for modules in (architecture.modules, "all-linear")
    ]
    if name in ("t5", "bert"):  # squared gradients are of the next token
        return [*cells, "–", "–"]
    return cells + [
        cell(lambda modules=modules: check_squares(adapt(architecture, modules), rows))  # type: ignore[misc]
        for modules in (architecture.modules, "all-linear")
    ]


def of_run(name: str, directory: Path, **arguments: float) -> list[str]:
    """`hlora run`, without a plain arm: record, tune, evaluate. arguments: further ones of SFTConfig."""
    base = directory / name
    ARCHITECTURES[name].build().save_pretrained(base)
    made_tokenizer().save_pretrained(base)
    (directory / "general.txt").write_text("The cat sat on the mat.\nIt looked at the rain.\n\n" * 40, encoding="utf-8")
    for file, first in (("train", 0), ("test", 50)):
        rows = [f'{{"prompt": "What is {n} plus one?", "completion": " {n + 1}"}}\n' for n in range(first, first + 6)]
        (directory / f"{file}.jsonl").write_text("".join(rows), encoding="utf-8")
    fields = {
        "model": {"name": str(base), "device": "cpu"},
        "general": {"paths": [str(directory / "general.txt")]},
        "domain": {
            "task": "rows",
            "train": str(directory / "train.jsonl"),
            "test": str(directory / "test.jsonl"),
        },
        "training": {
            "common": {"per_device_train_batch_size": 2, "report_to": [], **arguments},
            "record": {"max_steps": 1, "max_length": 16},
            "tune": {"max_steps": 1, "max_length": 48},
        },
        "evaluation": {"max_tokens": 32, "window": 16, "stride": 16, "accuracy": False, "generate": 0},
    }

    def run(config: RunConfig) -> str:
        pipeline.run(config)
        return "ok"

    cells = []
    for number, modules in enumerate((ARCHITECTURES[name].modules, "all-linear")):
        lora = {"rank": RANK, "alpha": ALPHA, "target_modules": modules}
        config = parse_config({**fields, "output": str(directory / f"{name}-{number}"), "lora": lora})
        cells.append(cell(lambda config=config: run(config)))  # type: ignore[misc]
    return cells


def trained(name: str, directory: Path, wrapped: bool = True) -> str:
    """One cell of the trainers' table."""
    return cell(lambda: of_trainer(name, made_tokenizer(), token_ids(), directory / name, wrapped))


Table = tuple[list[str], list[str], Callable[[str, Path], list[str]]]
TABLES: dict[str, Table] = {
    "architectures": (
        ["recorded and held", "all-linear", "squared gradients", "all-linear"],
        list(ARCHITECTURES),
        lambda name, directory: of_architecture(name),
    ),
    "runs": (["hlora run", "all-linear"], list(ARCHITECTURES), of_run),
    "trainers": (
        ["wrapped before", "peft_config="],
        list(TRAINERS),
        lambda name, directory: [
            trained(name, directory),
            "–" if name in ("Trainer", "Seq2Seq") else trained(name, directory, wrapped=False),
        ],
    ),
    "variants": (
        ["recorded and held", "starts at the general adapter", "anchor base"],
        [*VARIANTS, *METHODS],
        lambda name, directory: of_variant(name, token_ids(), loss, cell),
    ),
    "optimizers": (
        ["ω"],
        list(OPTIMIZERS),
        lambda name, directory: [cell(lambda: of_optimizer(name, token_ids(), loss))],
    ),
}


def main() -> int:
    """Print the tables that the command line names, all by default; returns the exit status."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    wrong = 0
    for title in sys.argv[1:] or TABLES:
        columns, rows, cells_of = TABLES[title]
        print(f"\n| {title} | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1), flush=True)
        for name in rows:
            with tempfile.TemporaryDirectory() as directory:
                cells = [" ".join(each.split()) for each in cells_of(name, Path(directory))]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
            wrong += sum(each.startswith("WRONG") for each in cells)
    print(f"\n{wrong} cells are wrong" if wrong else "\nEvery cell is right, or refused in a sentence")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
