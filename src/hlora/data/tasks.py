"""Domain tasks: how a row becomes a prompt and an answer.

Prompts of multiple-choice tasks are those of lm-evaluation-harness.
"""

from __future__ import annotations

import glob
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet

from hlora.data.cells import from_json, is_absent, listed, short, text
from hlora.data.conversations import conversation, sharegpt_turn, turns_in
from hlora.data.example import Example, Row
from hlora.system.errors import DataError


def _sciq(row: Row) -> Example:
    choices = [text(row, name) for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    support = row["support"] if row["support"] == "" else text(row, "support")
    return _choose(f"{support.lstrip()}\nQuestion: {text(row, 'question')}\nAnswer:", choices, 3)


def _piqa(row: Row) -> Example:
    return _choose(f"Question: {text(row, 'goal')}\nAnswer:", [text(row, "sol1"), text(row, "sol2")], row["label"])


def _medmcqa(row: Row) -> Example:
    letters = "ABCD"
    options = "".join(
        f"{letter}. {text(row, key)}\n" for letter, key in zip(letters, ("opa", "opb", "opc", "opd"), strict=True)
    )
    return _choose(f"Question: {text(row, 'question')}\nChoices:\n{options}Answer:", letters, row["cop"])


def _multiple_choice(row: Row) -> Example:
    found = _with_listed_choices(row)
    choices = [text({"choices": choice}, "choices") for choice in found["choices"]]
    return _choose(f"Question: {text(row, 'question')}\nAnswer:", choices, found["label"])


def _with_listed_choices(row: Row) -> dict[str, Any]:
    """The row with its choices as a list.

    On the hub, ARC, QASC and others have {"text": [...], "label": [...]}, MedQA has {"A": ..., "B": ...}.
    """
    choices, label = from_json(row["choices"]), row["label"]
    if not isinstance(choices, Mapping):
        return {**row, "choices": listed(row["choices"], "choices")}
    if "text" in choices:
        texts, names = (listed(choices.get(part), f"choices.{part}") for part in ("text", "label"))
    else:
        there = {name: choice for name, choice in choices.items() if not is_absent(choice)}
        texts, names = list(there.values()), list(there)
    if len(texts) != len(names) or names.count(label) != 1:
        raise DataError(f"wrong label: {short(label)}, expected one of the choices' names, {short(names)}, each once")
    return {**row, "choices": texts, "label": names.index(label)}


def _rows(row: Row) -> Example:
    """A row of prompt and completion, of messages, or of a format known by its columns.

    A null is an absent column, and so are NaN and an empty cell of a CSV.
    """
    there = {name: cell for name, cell in row.items() if not is_absent(cell)}
    for mark in ("label", "kto_tag"):
        if row.get(mark) is False:
            raise DataError(
                f"not to be trained: {mark} is false, which marks an unwanted answer (KTO). Keep the rows with true, "
                "or take the column out"
            )
    if "messages" in there:
        return conversation(listed(there["messages"], "messages"), there)
    if "conversations" in there:  # ShareGPT
        return conversation([sharegpt_turn(turn) for turn in listed(there["conversations"], "conversations")], there)
    if (prompt := turns_in(there.get("prompt"))) is not None:
        return conversation([*prompt, *_completion_of(prompt, there)], there)
    if {"instruction", "output"} <= there.keys() and not {"prompt", "completion"} <= there.keys():
        return _alpaca(there)
    return Example(_after_system(there, text(row, "prompt")), text(row, "completion", str))


def _completion_of(prompt: list[Any], row: Row) -> list[Any]:
    """The messages of TRL's conversational completion; none where the prompt ends with the answer itself."""
    last = prompt[-1] if prompt else None
    if "completion" not in row and isinstance(last, Mapping) and last.get("role") == "assistant":
        return []
    completion = turns_in(row["completion"])
    if completion is None:
        raise DataError(f"wrong completion: {short(row['completion'])}, expected a list of messages, as prompt is one")
    return completion


def _alpaca(row: Row) -> Example:
    """An Alpaca row, in the layout of its own prompt, after the system prompt if the row has one."""
    if row.get("history") not in (None, []):
        raise DataError(f"wrong history: {short(row['history'])}, expected none. Write earlier turns as messages")
    is_blank = not str(row.get("input", "")).strip()
    further = "" if is_blank else f"### Input:\n{text(row, 'input')}\n\n"
    prompt = f"### Instruction:\n{text(row, 'instruction')}\n\n{further}### Response:\n"
    return Example(_after_system(row, prompt), text(row, "output", str))


def _after_system(row: Row, prompt: str) -> str:
    """A prompt of text after the system prompt, if the row has one. Raises DataError for tools, which have no place."""
    for column in ("tools", "functions"):
        tools = from_json(row.get(column))
        if tools and isinstance(tools, list | dict):
            raise DataError(
                f"wrong {column}: a text prompt has no place for them. Write messages, or take the column out"
            )
    return f"{text(row, 'system', str)}\n\n{prompt}" if "system" in row else prompt


def _choose(prompt: str, choices: Sequence[str], label: Any) -> Example:
    return Example(prompt, choices[_index(label, len(choices))], tuple(choices), join=" ")


def _index(label: Any, count: int) -> int:
    """The index that a label means: a whole number, also as text, or a letter from A on. Raises DataError."""
    found = -1
    if isinstance(label, str) and re.fullmatch(r"\s*[A-Z]\s*", label):
        found = ord(label.strip()) - ord("A")
    elif isinstance(label, str | int | float) and not isinstance(label, bool):
        try:
            number = float(label)
        except (ValueError, OverflowError):
            number = math.nan
        found = int(number) if number.is_integer() else -1  # neither NaN nor inf is
    if not 0 <= found < count:
        raise DataError(f"wrong label: {short(label)}, expected 0 to {count - 1}, or a letter from A on")
    return found


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
    "rows": Task(_rows, "prompt and completion, or messages (or columns of ShareGPT or Alpaca)"),
}


def read_example(task: str, row: Row, join: str | None = None) -> Example:
    """The example in a row. Raises DataError that says what is wrong with it; place and remedy are the caller's.

    join: between a text prompt and its answer. None: one space for multiple choice, as in lm-evaluation-harness, and
    nothing for other rows.
    """
    try:
        example = TASKS[task].read(row)
    except KeyError as error:
        raise DataError(f"missing column: {error}, it has {', '.join(map(str, row)) or 'nothing'}") from None
    return example if join is None else replace(example, join=join)


def _typed(task: Task, row: Row) -> dict[str, Any]:
    """The columns that the task needs, all of them text but the label."""
    count = len(task.read(row).choices)
    row = _with_listed_choices(row) if task.read is _multiple_choice else row
    needed = {name: row[name] for name in re.findall(r"\w+", task.columns) if name in row}
    cells = {n: list(map(str, value)) if isinstance(value, list) else str(value) for n, value in needed.items()}
    return cells | ({task.label: _index(row[task.label], count)} if task.label else {})


def write_harness_task(task: str, rows: list[dict[str, Any]], directory: Path, join: str = " ") -> str:
    """Write rows and a task that scores them into a directory for `lm_eval.tasks.TaskManager`; returns the task's name.

    join: between prompt and answer. Raises DataError for a task without choices.
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
        "dataset_kwargs": {"data_files": {"test": glob.escape(str(data))}, "cache_dir": str(directory / "cache")},
        "target_delimiter": join,
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    (directory / "task.yaml").write_text(json.dumps(definition), encoding="utf-8")  # JSON is YAML
    return name
