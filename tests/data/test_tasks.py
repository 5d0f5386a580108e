"""A row's prompt, choices and answer are those that lm-evaluation-harness scores, and a wrong row is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

from hlora.data.example import Example
from hlora.data.tasks import read_example, write_harness_task
from hlora.system.errors import DataError

ROWS: dict[str, list[dict[str, Any]]] = {
    "sciq": [
        {
            "question": "What do plants make?",
            "correct_answer": "sugar",
            "distractor1": "salt",
            "distractor2": 'sand\'s "grains"',
            "distractor3": "iron",
            "support": "  Plants make sugar.\n",
        },
        {
            "question": "{{question}} & <b>?",
            "correct_answer": "a",
            "distractor1": "b",
            "distractor2": "c",
            "distractor3": "d",
            "support": "",
        },
    ],
    "piqa": [
        {"goal": "To cut {paper}", "sol1": "use scissors", "sol2": "use 'soup'", "label": 0},
        {"goal": "Boil an egg\n", "sol1": "freeze it", "sol2": "heat water ", "label": 1},
    ],
    "medmcqa": [
        {"question": 'Which "vitamin"?', "opa": "A", "opb": "B12", "opc": "C: ascorbic", "opd": "None", "cop": 2},
        {"question": "Où?", "opa": "1", "opb": "2", "opc": "3", "opd": "4", "cop": 0},
    ],
    "multiple_choice": [
        {"question": "Which one?", "choices": ["it's", 'a "b"', "[c]"], "label": 1},
        {"question": "2 + 2", "choices": ["3", "4"], "label": 1},
    ],
}


def harness_task(task: str, rows: list[dict[str, Any]], directory: Path) -> Any:
    name = write_harness_task(task, rows, directory)
    loaded = TaskManager(include_path=str(directory), include_defaults=False).load(name)["tasks"][name]
    docs = list(loaded.test_docs())
    assert len(docs) == len(rows)
    return loaded, docs


def assert_same_as_the_harness(task: str, rows: list[dict[str, Any]], directory: Path) -> None:
    loaded, docs = harness_task(task, rows, directory)
    for row, doc in zip(rows, docs, strict=True):
        example = read_example(task, row)
        assert loaded.doc_to_text(doc) == example.prompt
        assert loaded.doc_to_choice(doc) == list(example.choices)
        target = loaded.doc_to_target(doc)
        assert isinstance(target, int) and example.choices[target] == example.answer
        scored = [request.args for request in loaded.construct_requests(doc, example.prompt, metadata=(None, 0, 1))]
        assert scored[target] == (example.prompt, example.join + example.answer)


@pytest.mark.parametrize("task", list(ROWS))
def test_what_is_trained_on_is_exactly_what_the_harness_scores(task: str, tmp_path: Path) -> None:
    assert_same_as_the_harness(task, ROWS[task], tmp_path)


@pytest.mark.parametrize(("task", "folder"), [("piqa", "piqa"), ("medmcqa", "medmcqa"), ("multiple_choice", "qasc")])
def test_real_rows_are_read_as_the_harness_reads_them(
    task: str, folder: str, shared_data: Path, tmp_path: Path
) -> None:
    lines = (shared_data / folder / "test.jsonl").read_text(encoding="utf-8").split("\n")
    assert_same_as_the_harness(task, [json.loads(line) for line in lines[:50]], tmp_path)


@pytest.mark.parametrize("task", ["sciq", "piqa", "medmcqa"])
def test_the_harness_uses_its_own_definition_of_a_task_it_knows(task: str, tmp_path: Path) -> None:
    write_harness_task(task, ROWS[task], tmp_path)
    included = Path(json.loads((tmp_path / "task.yaml").read_text(encoding="utf-8"))["include"])
    assert included.is_file() and included.parent.parent.name == "tasks" and "lm_eval" in included.parts


def test_a_label_written_as_text_is_the_number_to_the_harness(tmp_path: Path) -> None:
    row = {"goal": "To cut paper", "sol1": "use soup", "sol2": "use scissors", "label": "1"}
    loaded, (doc,) = harness_task("piqa", [row], tmp_path)
    assert loaded.doc_to_target(doc) == 1
    assert read_example("piqa", row).answer == "use scissors"


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("multiple_choice", {"question": "First on the moon?", "choices": ["1969-07-20", "1972-12-11"], "label": 0}),
        ("multiple_choice", {"question": "2 + 2", "choices": [3, "4", 5.0], "label": 1}),
        ("piqa", {"goal": "2001-01-01", "sol1": "2001-01-01T10:00:00Z", "sol2": "1e3", "label": 0}),
    ],
)
def test_dates_and_numbers_reach_the_harness_as_the_text_they_are(
    task: str, row: dict[str, Any], tmp_path: Path
) -> None:
    assert_same_as_the_harness(task, [row], tmp_path)


def test_other_columns_of_any_kind_do_not_disturb_the_harness(tmp_path: Path) -> None:
    row = {**ROWS["multiple_choice"][0], "date": Path("x"), "image": b"\x00"}
    _, docs = harness_task("multiple_choice", [row], tmp_path)
    assert docs[0]["question"] == row["question"]


def test_rows_without_choices_cannot_be_scored_by_the_harness(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="task 'rows' has no choices to score"):
        write_harness_task("rows", [{"prompt": "a", "completion": "b"}], tmp_path)


def test_prompt_and_completion_are_taken_as_they_are_unless_a_join_is_given() -> None:
    row = {"prompt": "def f(x):\n", "completion": "    return x\n"}
    assert read_example("rows", row) == Example("def f(x):\n", "    return x\n", join="")
    assert read_example("rows", row, join=" ").join == " "
    assert read_example("piqa", ROWS["piqa"][0]).join == " "  # as in lm-evaluation-harness


def test_a_join_of_its_own_reaches_the_harness(tmp_path: Path) -> None:
    name = write_harness_task("piqa", ROWS["piqa"], tmp_path, join="\n")
    loaded = TaskManager(include_path=str(tmp_path), include_defaults=False).load(name)["tasks"][name]
    doc = next(iter(loaded.test_docs()))
    (_, scored), *_ = [r.args for r in loaded.construct_requests(doc, "prompt", metadata=(None, 0, 1))]
    assert scored == "\nuse scissors"


def test_messages_are_split_before_the_last_answer() -> None:
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Capital of France?"},
        {"role": "assistant", "content": "Paris"},
    ]
    example = read_example("rows", {"messages": turns})
    assert example == Example(turns[:-1], "Paris")
    assert example.messages() == turns


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}])
def test_a_last_message_marked_as_not_to_be_trained_is_not_trained(mark: dict[str, Any]) -> None:
    sharegpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", **mark}]
    for row in ({"messages": [CHAT[0], CHAT[1] | mark]}, {"conversations": sharegpt}):
        with pytest.raises(DataError, match=rf"^not to be trained: the last message has {next(iter(mark))} (0|False)"):
            read_example("rows", row)
    kept = dict.fromkeys(mark, 1)
    earlier = [CHAT[0], CHAT[1] | mark, CHAT[0], CHAT[1] | kept]
    assert read_example("rows", {"messages": earlier}).answer == "Hello"


def test_a_content_of_one_text_part_is_that_text() -> None:
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in CHAT]
    assert read_example("rows", {"messages": parts}) == read_example("rows", {"messages": CHAT})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT, "prompt": None, "completion": None},
        {"messages": [{**turn, "tool_calls": None} for turn in CHAT], "tools": None},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"prompt": CHAT},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"messages": json.dumps(CHAT)},
        {"prompt": json.dumps(CHAT[:1]), "completion": json.dumps(CHAT[1:])},
        {"messages": [*CHAT[:1], {"role": "assistant", "content": [{"text": "Hel"}, {"type": "text", "text": "lo"}]}]},
    ],
)
def test_a_conversation_is_read_from_each_format_that_it_comes_in(row: dict[str, Any]) -> None:
    assert read_example("rows", row) == Example(CHAT[:1], "Hello")


@pytest.mark.parametrize("absent", [None, "", float("nan")])
def test_a_column_of_nulls_does_not_hide_a_good_one(absent: Any) -> None:
    row = {"messages": absent, "conversations": absent, "system": absent, "prompt": "a", "completion": "b"}
    assert read_example("rows", row) == Example("a", "b")


@pytest.mark.parametrize("absent", [None, "", " ", float("nan")])
def test_an_alpaca_row_may_lack_an_input(absent: Any) -> None:
    row = {"instruction": "Add.", "input": absent, "output": "5", "history": None if absent == " " else absent}
    assert read_example("rows", row) == read_example("rows", {"instruction": "Add.", "output": "5"})


def test_an_alpaca_row_may_hold_its_whole_text_as_prompt_too() -> None:
    row = {"instruction": "Add.", "input": "", "output": "5"}
    assert read_example("rows", {**row, "prompt": "### Instruction: Add. ### Output: 5"}) == read_example("rows", row)
    assert read_example("rows", {**row, "prompt": "a", "completion": "b"}) == Example("a", "b")


@pytest.mark.parametrize("mark", ["label", "kto_tag"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b"},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"messages": CHAT},
        {"instruction": "Add.", "output": "5"},
    ],
)
def test_an_answer_that_kto_marks_as_unwanted_is_not_trained(row: dict[str, Any], mark: str) -> None:
    with pytest.raises(DataError, match=rf"^not to be trained: {mark} is false"):
        read_example("rows", {**row, mark: False})
    for other in (True, 0, "False", None):
        assert read_example("rows", {**row, mark: other}) == read_example("rows", row)


def test_a_text_prompt_begins_with_its_system_prompt_and_has_no_place_for_tools() -> None:
    row = {"prompt": "What?", "completion": "Seven."}
    assert read_example("rows", {**row, "system": "Be short."}) == Example("Be short.\n\nWhat?", "Seven.")
    for text in (row, {"instruction": "What?", "output": "Seven."}):
        for column in ("tools", "functions"):
            with pytest.raises(DataError, match=f"wrong {column}: a text prompt has no place for them. Write messages"):
                read_example("rows", {**text, column: '[{"name": "x"}]'})
            assert read_example("rows", {**text, column: "hammer, saw"}) == read_example("rows", text)


def test_options_for_the_chat_template_are_kept_with_the_row() -> None:
    options = {"enable_thinking": False}
    for cell in (options, json.dumps(options)):
        example = read_example("rows", {"messages": CHAT, "chat_template_kwargs": cell})
        assert example.template_options == options
    assert example.as_json() != read_example("rows", {"messages": CHAT}).as_json()
    assert read_example("rows", {"messages": CHAT, "documents": []}) == read_example("rows", {"messages": CHAT})


def test_alpaca_rows_are_laid_out_as_its_own_prompt() -> None:
    row = {"instruction": "Add one.", "input": "4", "output": "5"}
    expected = Example("### Instruction:\nAdd one.\n\n### Input:\n4\n\n### Response:\n", "5")
    assert read_example("rows", row) == expected
    short = read_example("rows", {**row, "input": ""})
    assert short.prompt == "### Instruction:\nAdd one.\n\n### Response:\n"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"messages": [{"role": "system", "content": "Be short."}, *CHAT]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
    ],
)
def test_a_system_prompt_in_a_column_of_its_own_is_the_first_turn(row: dict[str, Any]) -> None:
    example = read_example("rows", {**row, "system": "Be short."})
    assert example == Example([{"role": "system", "content": "Be short."}, *CHAT[:1]], "Hello")
    assert read_example("rows", {"messages": CHAT, "system": ""}) == Example(CHAT[:1], "Hello")


def test_an_alpaca_row_begins_with_its_system_prompt() -> None:
    row = {"system": "Be short.", "instruction": "Add.", "input": "", "output": "5", "history": []}
    assert read_example("rows", row).prompt == "Be short.\n\n### Instruction:\nAdd.\n\n### Response:\n"


def test_an_answer_of_tool_calls_and_the_tools_are_kept_as_they_are() -> None:
    calls = [{"function": {"name": "weather", "arguments": {"city": "Rome", "unit": None}}}]
    row = {"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": calls}], "tools": [{"name": "x"}]}
    example = read_example("rows", row)
    assert (example.answer, dict(example.turn), example.tools) == ("", {"tool_calls": calls}, [{"name": "x"}])


@pytest.mark.parametrize(("label", "answer"), [("B", "b"), (" A ", "a"), ("1", "b"), ("1.0", "b"), (0.0, "a")])
def test_a_label_may_be_a_letter_or_a_number_as_text(label: Any, answer: str, tmp_path: Path) -> None:
    row = {"question": "x", "choices": '["a", "b"]', "label": label}
    assert read_example("multiple_choice", row).answer == answer
    loaded, (doc,) = harness_task("multiple_choice", [row], tmp_path)
    assert loaded.doc_to_choice(doc)[loaded.doc_to_target(doc)] == answer


def test_choices_named_by_the_row_itself_are_found_by_name(tmp_path: Path) -> None:
    """ARC has questions whose choices are named 1 to 4: the answer "1" is then the first, not the second."""
    row = {"question": "x", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "label": "1"}
    assert_same_as_the_harness("multiple_choice", [row, {**row, "label": "2"}], tmp_path)
    assert read_example("multiple_choice", row).answer == "a"


@pytest.mark.parametrize("choices", [{"A": "a", "B": "b", "C": None}, '{"A": "a", "B": "b"}'])
def test_choices_may_be_an_object_with_their_names(choices: Any, tmp_path: Path) -> None:
    row = {"question": "x", "choices": choices, "label": "B"}
    assert read_example("multiple_choice", row).choices == ("a", "b")
    assert_same_as_the_harness("multiple_choice", [row], tmp_path)


def test_numbers_among_the_choices_are_read_as_text() -> None:
    example = read_example("multiple_choice", {"question": "2 + 2", "choices": [3, 4], "label": 1})
    assert (example.choices, example.answer) == (("3", "4"), "4")


USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be short."}


@pytest.mark.parametrize(
    ("task", "row", "problem"),
    [
        ("piqa", {**ROWS["piqa"][0], "label": 2}, "wrong label: 2, expected 0 to 1, or a letter from A on"),
        ("piqa", {**ROWS["piqa"][0], "label": -1}, "wrong label: -1, expected 0 to 1"),
        ("medmcqa", {**ROWS["medmcqa"][0], "cop": 4}, "wrong label: 4, expected 0 to 3"),
        ("medmcqa", {**ROWS["medmcqa"][0], "cop": "b"}, "wrong label: 'b'"),
        ("piqa", {**ROWS["piqa"][0], "label": None}, "wrong label: None"),
        ("piqa", {"goal": "x", "sol1": "a", "label": 0}, "missing column: 'sol2', it has goal, sol1, label"),
        ("piqa", {**ROWS["piqa"][0], "sol2": None}, "wrong cell: sol2 is None, expected text"),
        ("sciq", {k: v for k, v in ROWS["sciq"][0].items() if k != "support"}, "missing column: 'support'"),
        ("multiple_choice", {"question": "x", "choices": "a, b", "label": 0}, "wrong choices: 'a, b', expected a list"),
        (
            "multiple_choice",
            {"question": "x", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "label": 0},
            "wrong label: 0, expected one of the choices' names, ['A', 'B'], each once",
        ),
        (
            "multiple_choice",
            {"question": "x", "choices": {"text": ["a"], "label": ["A", "B"]}, "label": "B"},
            "wrong label: 'B', expected one of the choices' names",
        ),
        ("multiple_choice", {"question": "x", "choices": {"text": ["a"]}, "label": "A"}, "wrong choices.label: None"),
        ("multiple_choice", {"question": "x", "choices": [], "label": 0}, "wrong label: 0"),
        ("rows", {"messages": CHAT, "system": ["Be"]}, "wrong cell: system is ['Be'], expected text"),
        ("rows", {"messages": [SYSTEM, *CHAT], "system": "Other"}, "wrong system: 'Other', but the messages begin"),
        (
            "rows",
            {"instruction": "x", "output": "y", "history": [["a", "b"]]},
            "wrong history: [['a', 'b']], expected none. Write earlier turns as messages",
        ),
        ("rows", {"prompt": "x", "completion": "  "}, "empty cell: completion is '  '"),
        ("rows", {"prompt": "x", "completion": 4}, "wrong cell: completion is 4"),
        ("rows", {"prompt": None, "completion": "x"}, "wrong cell: prompt is None"),
        ("rows", {"prompt": CHAT, "completion": [1]}, "wrong messages: [{"),
        ("rows", {"prompt": CHAT[:1], "completion": "Hello"}, "wrong completion: 'Hello', expected a list of messages"),
        ("rows", {"prompt": CHAT[:1], "chosen": CHAT}, "missing column: 'completion', it has prompt, chosen"),
        ("rows", {"prompt": []}, "missing column: 'completion', it has prompt"),
        ("rows", {"conversations": [{"from": ["human"], "value": "x"}]}, "wrong messages: [{'from': ['human']"),
        ("rows", {"instruction": "x", "output": "y", "input": ["a"]}, "wrong cell: input is ['a'], expected text"),
        ("rows", {"instruction": "x", "output": "y", "input": {"a": 1}}, "wrong cell: input is {'a': 1}"),
        ("rows", {"messages": CHAT, "chat_template_kwargs": "x"}, "wrong chat_template_kwargs: 'x', expected an obj"),
        ("rows", {"messages": CHAT, "documents": [{"text": "x"}]}, "not rendered: documents; hlora passes none"),
        ("rows", {"prompt": "x"}, "missing column: 'completion'"),
        (
            "rows",
            {"messages": [USER, {"role": "assistant", "tool_calls": "x"}]},
            "wrong tool_calls: 'x', expected a list",
        ),
        ("rows", {"messages": [USER, {"role": "assistant", "tool_calls": ["x"]}]}, "wrong tool_calls: ['x'], expected"),
        (
            "rows",
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": "x"}]}]},
            "wrong tool_calls: [{",
        ),
        ("rows", {"messages": [USER]}, "they must end with an answer of the assistant"),
        ("rows", {"messages": [{"role": "assistant", "content": "Hi"}]}, "they must end with an answer"),
        ("rows", {"messages": [USER, {"role": "assistant", "content": ""}]}, "empty cell: answer is ''"),
        ("rows", {"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}, "wrong messages: [{"),
        ("rows", {"messages": ["Hi", {"role": "assistant", "content": "x"}]}, "wrong messages: ['Hi'"),
        ("rows", {"prompt": "", "completion": "x"}, "empty cell: prompt is ''"),
        ("multiple_choice", {"question": None, "choices": ["a"], "label": 0}, "wrong cell: question is None"),
        ("multiple_choice", {"question": float("nan"), "choices": ["a"], "label": 0}, "wrong cell: question is nan"),
        ("multiple_choice", {"question": "x", "choices": ["a", " "], "label": 0}, "empty cell: choices is ' '"),
        ("multiple_choice", {"question": "x", "choices": ["a", True], "label": 0}, "wrong cell: choices is True"),
        ("piqa", {**ROWS["piqa"][0], "label": float("nan")}, "wrong label: nan"),
        ("piqa", {**ROWS["piqa"][0], "label": float("inf")}, "wrong label: inf"),
        ("piqa", {**ROWS["piqa"][0], "label": [1]}, "wrong label: [1]"),
        ("rows", {"messages": []}, "they must end"),
        ("rows", {"messages": None}, "missing column: 'prompt', it has messages"),
        ("rows", {}, "missing column: 'prompt', it has nothing"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_with_the_kind_and_the_particulars(
    task: str, row: dict[str, Any], problem: str
) -> None:
    with pytest.raises(DataError) as caught:
        read_example(task, row)
    assert problem in str(caught.value) and ": " in str(caught.value)
