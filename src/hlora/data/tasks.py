"""Domain tasks: how a row becomes a prompt and an answer, for training, scoring and lm-evaluation-harness alike.

Prompts are those of lm-evaluation-harness, and a model is trained on exactly the continuation that the harness scores.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hlora.system.errors import DataError, first_line

Row = Mapping[str, Any]
Messages = list[dict[str, str]]

_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlevel = 60, 60, 3
_short = _SHORT.repr


@dataclass(frozen=True)
class Example:
    """One domain row. `prompt` is text, or chat messages that the tokenizer's template renders."""

    prompt: str | Messages
    answer: str
    """What the model should say, without the space that joins it to a text prompt."""
    choices: tuple[str, ...] = ()
    """The options, for a multiple-choice row; `answer` is one of them."""

    def training_row(self) -> dict[str, Any]:
        """As TRL reads it: loss on the completion only."""
        if isinstance(self.prompt, str):
            return {"prompt": self.prompt, "completion": f" {self.answer}"}
        return {"prompt": self.prompt, "completion": [{"role": "assistant", "content": self.answer}]}


def _sciq(row: Row) -> Example:
    choices = [_text(row, name) for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    support = row["support"] if row["support"] == "" else _text(row, "support")
    return _choose(f"{support.lstrip()}\nQuestion: {_text(row, 'question')}\nAnswer:", choices, 3)


def _piqa(row: Row) -> Example:
    return _choose(f"Question: {_text(row, 'goal')}\nAnswer:", [_text(row, "sol1"), _text(row, "sol2")], row["label"])


def _medmcqa(row: Row) -> Example:
    letters = "ABCD"
    options = "".join(
        f"{letter}. {_text(row, key)}\n" for letter, key in zip(letters, ("opa", "opb", "opc", "opd"), strict=True)
    )
    return _choose(f"Question: {_text(row, 'question')}\nChoices:\n{options}Answer:", letters, row["cop"])


def _multiple_choice(row: Row) -> Example:
    if not isinstance(row["choices"], list):  # text from a CSV would be taken for a list of its letters
        raise DataError(f"wrong choices: {_short(row['choices'])}, expected a list of texts")
    choices = [_text({"choices": choice}, "choices") for choice in row["choices"]]
    return _choose(f"Question: {_text(row, 'question')}\nAnswer:", choices, row["label"])


def _rows(row: Row) -> Example:
    if "messages" not in row:
        return Example(_text(row, "prompt"), _text(row, "completion", str).strip())
    messages = row["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    ):
        raise DataError(f"wrong messages: {_short(messages)}, expected a list of role and content, both texts")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError("wrong messages: they must end with an answer of the assistant to something")
    return Example(messages[:-1], _text({"answer": messages[-1]["content"]}, "answer").strip())


def _text(row: Row, column: str, kind: Any = str | int | float) -> str:
    """A cell that holds text, or a number where that will do."""
    cell = row[column]
    if not isinstance(cell, kind) or isinstance(cell, bool) or (isinstance(cell, float) and not math.isfinite(cell)):
        raise DataError(f"wrong cell: {column} is {_short(cell)}, expected text")
    if not str(cell).strip():
        raise DataError(f"empty cell: {column} is {_short(cell)}")
    return str(cell)


def _choose(prompt: str, choices: Sequence[str], label: Any) -> Example:
    whole = not isinstance(label, bool) and (not isinstance(label, float) or label.is_integer())  # inf is none
    try:
        index = int(label) if whole else -1
    except (TypeError, ValueError):
        index = -1
    if not 0 <= index < len(choices):
        raise DataError(f"wrong label: {_short(label)}, expected 0 to {len(choices) - 1}")
    return Example(prompt, choices[index], tuple(choices))


@dataclass(frozen=True)
class Task:
    """A reader of rows and, for multiple choice, what its lm-evaluation-harness task says."""

    read: Callable[[Row], Example]
    columns: str
    """The columns that a row needs, and what they hold where the name does not say it."""
    harness: Mapping[str, Any] | None = None
    """lm-evaluation-harness task: one of its own definitions to include, or a definition of ours."""
    label: str | None = None
    """Column with the index of the right choice; the harness finds no answer right where it holds "1" and not 1."""


TASKS: dict[str, Task] = {
    "sciq": Task(
        _sciq,
        "question, correct_answer, distractor1, distractor2, distractor3, support",
        {"include": "sciq/sciq.yaml"},
    ),
    "piqa": Task(_piqa, "goal, sol1, sol2, label", {"include": "piqa/piqa.yaml"}, "label"),
    "medmcqa": Task(_medmcqa, "question, opa, opb, opc, opd, cop", {"include": "medmcqa/medmcqa.yaml"}, "cop"),
    "multiple_choice": Task(
        _multiple_choice,
        "question, choices (a list), label (index of the right choice)",
        {
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
            ],
        },
        "label",
    ),
    "rows": Task(_rows, "prompt and completion, or messages"),
}


def read_example(task: str, row: Row) -> Example:
    """The example in a row. Raises DataError that says what is wrong with it; place and remedy are the caller's."""
    try:
        return TASKS[task].read(row)
    except KeyError as error:
        raise DataError(f"missing column: {error}, it has {', '.join(map(str, row)) or 'nothing'}") from None


def prompt_text(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """The prompt as the model reads it. Raises DataError for messages that the tokenizer's template does not take."""
    if isinstance(example.prompt, str):
        return example.prompt
    if tokenizer.chat_template is None:
        raise DataError(
            "no chat template: rows of messages need a tokenizer that has one, and this model's has none; "
            "use prompt and completion columns instead"
        )
    try:
        return str(tokenizer.apply_chat_template(example.prompt, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise DataError(f"wrong messages: the model's chat template refuses them ({first_line(error)})") from None


def _typed(task: Task, row: Row) -> dict[str, Any]:
    """The columns that the task needs, all of them text but the label."""
    needed = {name: row[name] for name in re.findall(r"\w+", task.columns) if name in row}
    texts = {n: list(map(str, value)) if isinstance(value, list) else str(value) for n, value in needed.items()}
    return texts | ({task.label: int(row[task.label])} if task.label else {})


def write_harness_task(task: str, rows: list[dict[str, Any]], directory: Path) -> str:
    """Write rows and a task that scores them into a directory for `lm_eval.tasks.TaskManager`; returns the task's name.

    Raises DataError for a task without choices.
    """
    import lm_eval.tasks

    harness = TASKS[task].harness
    if harness is None:
        raise DataError(f"task {task!r} has no choices to score; accuracy needs a multiple-choice task")
    definition = dict(harness)
    if "include" in definition:
        definition["include"] = str(Path(lm_eval.tasks.__file__).parent / definition["include"])
    # Parquet, for `datasets` would make a time stamp of each text that looks like one in JSON.
    data = directory / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([_typed(TASKS[task], row) for row in rows]), data)
    name = f"hlora_{task}"
    definition |= {
        "task": name,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(directory / "cache")},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    (directory / "task.yaml").write_text(json.dumps(definition), encoding="utf-8")  # JSON is YAML
    return name
