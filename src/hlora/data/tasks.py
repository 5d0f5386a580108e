"""Domain tasks: how a row becomes a prompt and an answer. rendering.py makes token ids of them.

Prompts of multiple-choice tasks are those of lm-evaluation-harness.
"""

from __future__ import annotations

import glob
import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet

from hlora.system.errors import DataError

Row = Mapping[str, Any]
Message = Mapping[str, Any]

_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlevel = 60, 60, 3
_short = _SHORT.repr


@dataclass(frozen=True)
class Example:
    """One domain row. `prompt` is text, or chat messages that the tokenizer's template renders."""

    prompt: str | list[dict[str, Any]]
    answer: str
    """What the model should say: the completion, the right choice, or the content of the last message."""
    choices: tuple[str, ...] = ()
    """The options, for a multiple-choice row; `answer` is one of them."""
    join: str = ""
    """Between a text prompt and its answer."""
    turn: Message = field(default_factory=dict)
    """What else the last message holds, such as tool_calls."""
    tools: list[Any] | None = None
    """Tools that the template presents to the model."""

    def messages(self) -> list[dict[str, Any]]:
        """The whole conversation of a row of messages."""
        assert not isinstance(self.prompt, str)
        return [*self.prompt, {"role": "assistant", "content": self.answer, **self.turn}]

    def as_json(self) -> str:
        """All that is trained of the row, for a digest."""
        return json.dumps([self.prompt, self.join, self.answer, dict(self.turn), self.tools], default=str)


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
    listed = _with_listed_choices(row)
    choices = [_text({"choices": choice}, "choices") for choice in listed["choices"]]
    return _choose(f"Question: {_text(row, 'question')}\nAnswer:", choices, listed["label"])


def _with_listed_choices(row: Row) -> dict[str, Any]:
    """The row with its choices as a list. ARC, QASC and others have {"text": [...], "label": [...]} on the hub."""
    choices, label = row["choices"], row["label"]
    if not isinstance(choices, Mapping):
        return {**row, "choices": _listed(choices, "choices")}
    texts, names = (_listed(choices.get(part), f"choices.{part}") for part in ("text", "label"))
    if len(texts) != len(names) or names.count(label) != 1:
        raise DataError(f"wrong label: {_short(label)}, expected one of choices.label, {_short(names)}, one for a text")
    return {**row, "choices": texts, "label": names.index(label)}


def _rows(row: Row) -> Example:
    """A row of prompt and completion, of messages, or of a format known by its columns.

    A null is an absent column, and so is an empty cell of a CSV.
    """
    there = {name: cell for name, cell in row.items() if cell is not None and cell != ""}
    if "messages" in there:
        return _conversation(_listed(there["messages"], "messages"), there)
    if "conversations" in there:  # ShareGPT
        return _conversation([_sharegpt_turn(turn) for turn in _listed(there["conversations"], "conversations")], there)
    if isinstance(there.get("prompt"), list):  # TRL's conversational prompt and completion
        completion = there.get("completion")
        return _conversation([*there["prompt"], *(completion if isinstance(completion, list) else [])], there)
    if "prompt" not in there and {"instruction", "output"} <= there.keys():
        return _alpaca(there)
    return Example(_text(row, "prompt"), _text(row, "completion", str))


def _alpaca(row: Row) -> Example:
    """An Alpaca row, in the layout of its own prompt, after the system prompt if the row has one."""
    if row.get("history") not in (None, []):
        raise DataError(f"wrong history: {_short(row['history'])}, expected none. Write earlier turns as messages")
    system = f"{_text(row, 'system', str)}\n\n" if "system" in row else ""
    further = f"### Input:\n{row['input']}\n\n" if str(row.get("input", "")).strip() else ""
    prompt = f"{system}### Instruction:\n{_text(row, 'instruction')}\n\n{further}### Response:\n"
    return Example(prompt, _text(row, "output", str))


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


def _sharegpt_turn(turn: Any) -> Any:
    if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
        return turn
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {**others, "role": _SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}


_TRAINED = ("weight", "train", "training", "loss")  # as OpenAI, Axolotl and ms-swift mark the turns to learn


def _conversation(messages: list[Any], beside: Row) -> Example:
    """A conversation, with the system prompt and the tools that stand in columns beside it."""
    tools = _listed(beside["tools"], "tools") if beside.get("tools") else None
    if "system" in beside:
        messages = _after_system(_text(beside, "system", str), messages)
    turns = [_turn(turn) for turn in messages]
    if not all(turns):
        raise DataError(
            f"wrong messages: {_short(messages)}, expected a list of role and content, both texts; "
            "the content may be a list of texts, or absent beside tool_calls"
        )
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise DataError("wrong messages: they must end with an answer of the assistant to something")
    last = dict(turns[-1])
    for mark in _TRAINED:
        if last.get(mark) in (0, False):
            raise DataError(f"not to be trained: the last message has {mark} {last[mark]}, and it is the one trained")
    answer, _ = last.pop("content"), last.pop("role")
    if not isinstance(answer, str):
        raise DataError(f"wrong messages: the last content is {_short(answer)}, expected text")
    if not last.get("tool_calls"):
        _text({"answer": answer}, "answer")
    return Example(turns[:-1], answer, turn=last, tools=tools)


def _after_system(system: str, messages: list[Any]) -> list[Any]:
    first = _turn(messages[0]) if messages else {}
    if first.get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    if first["content"] != system:
        raise DataError(f"wrong system: {_short(system)}, but the messages begin with {_short(first['content'])}")
    return messages


def _turn(turn: Any) -> dict[str, Any]:
    """The message without nulls, as Parquet fills them in; empty where it is none."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        return {}
    found = {key: value for key, value in turn.items() if value is not None}
    if found.get("tool_calls"):
        found["tool_calls"] = calls = _listed(found["tool_calls"], "tool_calls")
        if not all(isinstance(call, Mapping) and isinstance(call.get("function", call), Mapping) for call in calls):
            raise DataError(f"wrong tool_calls: {_short(calls)}, expected objects with a function")
        found.setdefault("content", "")
    content = found.get("content")
    if isinstance(content, list) and all(map(_is_text_part, content)):
        if len(content) == 1:  # as OpenAI and Gemma 3 write a text
            found["content"] = content[0]["text"]
        return found
    return found if isinstance(content, str) else {}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _listed(cell: Any, column: str) -> list[Any]:
    """A list, or the JSON of one, as a CSV cell holds it."""
    found = cell
    if isinstance(cell, str):
        with suppress(ValueError, RecursionError):
            found = json.loads(cell)
    if not isinstance(found, list):
        raise DataError(f"wrong {column}: {_short(cell)}, expected a list")
    return found


def _text(row: Row, column: str, kind: Any = str | int | float) -> str:
    """A cell that holds text, or a number where that will do."""
    cell = row[column]
    if not isinstance(cell, kind) or isinstance(cell, bool) or (isinstance(cell, float) and not math.isfinite(cell)):
        raise DataError(f"wrong cell: {column} is {_short(cell)}, expected text")
    if not str(cell).strip():
        raise DataError(f"empty cell: {column} is {_short(cell)}")
    return str(cell)


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
        raise DataError(f"wrong label: {_short(label)}, expected 0 to {count - 1}, or a letter from A on")
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
    texts = {n: list(map(str, value)) if isinstance(value, list) else str(value) for n, value in needed.items()}
    return texts | ({task.label: _index(row[task.label], count)} if task.label else {})


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
