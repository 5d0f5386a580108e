"""General text and domain rows: what is read, what is refused by name, and that nothing evaluated is trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GENERAL_TEXT
from tokenizers import Tokenizer, models, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hlora.config.sections import DomainConfig, EvaluationConfig, GeneralConfig
from hlora.data.domain import DomainRows, TokenLimits, domain_rows
from hlora.data.example import Example
from hlora.data.general import GeneralText, general_text, probe_texts
from hlora.system.errors import ConfigError, DataError

LINE = "Long lines of an evaluation text are sentences that nobody writes twice, word for word, by chance alone"


def write_jsonl(path: Path, rows: list[dict[str, Any]], **options: Any) -> str:
    path.write_text("".join(json.dumps(row, **options) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_general(general: GeneralConfig, texts: dict[str, str] | None = None) -> GeneralText:
    """From files or the hub, where neither model nor cache is touched."""
    return general_text(general, EvaluationConfig(texts=texts or {}), None, None, 0, Path("unused"))  # type: ignore[arg-type]


def read_domain(train: Any, test: Any, seed: int = 0, max_test_rows: int | None = None, **config: Any) -> DomainRows:
    settings = {"task": "rows", "train": str(train), "test": str(test), **config}
    return domain_rows(DomainConfig.model_validate(settings), max_test_rows, seed)


def pairs(start: int, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{n} plus one is", "completion": str(n + 1)} for n in range(start, start + count)]


# General text


def test_long_lines_of_an_evaluation_text_never_reach_training(tmp_path: Path) -> None:
    train = write_jsonl(
        tmp_path / "train.jsonl",
        [{"text": f"before\n  {LINE}\nafter"}, {"text": LINE}, {"text": "short\nlines"}],
    )
    heldout = tmp_path / "heldout.txt"
    heldout.write_text(f"Title\n{LINE}  \nshort\nThe end\n", encoding="utf-8")
    text = read_general(GeneralConfig(paths=[train]), {"held out": str(heldout)})
    assert text.train == ["before\nafter", "short\nlines"]
    assert text.facts["characters_left_out_as_evaluation_text"] == len(f"  {LINE}\n") + len(LINE)
    assert LINE in text.evaluation["held out"]


def test_no_long_line_is_shared_whatever_wikitext_files_are_named(shared_data: Path) -> None:
    both = [str(shared_data / "wikitext2" / name) for name in ("valid.txt", "test.txt")]
    text = read_general(GeneralConfig(paths=both), {"wikitext": both[1]})
    long = {line.strip() for line in text.evaluation["wikitext"].splitlines() if len(line.strip()) >= 80}
    assert len(long) > 1000
    assert not long & {line.strip() for document in text.train for line in document.splitlines()}
    assert len("".join(text.train)) > 900_000


def test_the_last_tenth_is_held_out_when_no_evaluation_text_is_named(tmp_path: Path) -> None:
    documents = [f"document {n}" for n in range(30)]
    text = read_general(GeneralConfig(paths=[write_jsonl(tmp_path / "a.jsonl", [{"text": d} for d in documents])]))
    assert text.train == documents[:27]
    assert text.evaluation == {"general (held out)": "\n\n".join(documents[27:])}


def test_one_document_leaves_none_to_hold_out(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "alone"}, {"text": " \n"}])
    with pytest.raises(DataError, match=r"1 document of one line, which leaves none to hold out .* evaluation.texts"):
        read_general(GeneralConfig(paths=[file]))


def test_of_one_document_the_last_tenth_of_its_lines_is_held_out(tmp_path: Path) -> None:
    lines = [f"Sentence {n}.\n" for n in range(20)]
    (tmp_path / "a.txt").write_text("".join(lines), encoding="utf-8")
    text = read_general(GeneralConfig(paths=[str(tmp_path / "a.txt")]))
    assert text.train == ["".join(lines[:18])]
    assert text.evaluation == {"general (held out)": "Sentence 18.\nSentence 19."}


def test_the_same_file_for_training_and_evaluation_is_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": LINE}, {"text": f"{LINE}!"}])
    with pytest.raises(DataError, match="nothing left to train on; all 2 documents stand in an evaluation text"):
        read_general(GeneralConfig(paths=[file]), {"same": file})


def test_empty_files_are_refused_as_holding_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n\n")
    with pytest.raises(DataError, match="no text in what source 'files' names"):
        read_general(GeneralConfig(paths=[str(tmp_path / "a.txt")]), {"same": str(tmp_path / "a.txt")})


def test_column_and_limit_apply_to_all_files_and_the_column_to_evaluation_texts_too(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [{"body": f"{n}{m}"} for m in "ab"]) for n in (1, 2)]
    test = write_jsonl(tmp_path / "test.jsonl", [{"body": "c"}])
    text = read_general(GeneralConfig(paths=files, column="body", max_documents=3), {"test": test})
    assert text.train == ["1a", "1b", "2a"]
    assert text.evaluation == {"test": "c"}


def test_general_facts_change_when_and_only_when_the_text_does(tmp_path: Path) -> None:
    evaluation = write_jsonl(tmp_path / "test.jsonl", [{"text": "x"}])

    def facts(*documents: str) -> dict[str, Any]:
        train = write_jsonl(tmp_path / "train.jsonl", [{"text": d} for d in documents])
        return read_general(GeneralConfig(paths=[train]), {"test": evaluation}).facts

    first = facts("ab", "c")
    assert first == facts("ab", "c")
    assert first["documents"] == 2 and first["characters"] == 3
    assert len({first["sha256"], facts("a", "bc")["sha256"], facts("c", "ab")["sha256"]}) == 3
    write_jsonl(tmp_path / "test.jsonl", [{"text": "y"}])
    assert facts("ab", "c")["evaluation_texts"] != first["evaluation_texts"]


def test_general_text_is_packed_into_rows_that_begin_with_bos_where_the_tokenizer_adds_one(model_dir: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    documents = GENERAL_TEXT.split("\n\n")[:9]
    joined = [i for d in documents for i in [*tokenizer(d)["input_ids"], tokenizer.eos_token_id]]
    plain = GeneralText(documents, {}).dataset(tokenizer, {"packing": True, "max_length": 32})
    assert plain.column_names == ["input_ids"]
    assert [i for row in plain["input_ids"] for i in row] == joined and {
        len(row) for row in plain["input_ids"][:-1]
    } == {32}
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    rows = GeneralText(documents, {}).dataset(tokenizer, {"packing": True, "max_length": 32})["input_ids"]
    assert all(row[0] == 0 and len(row) <= 32 for row in rows)
    assert [i for row in rows for i in row[1:]] == joined
    whole = GeneralText(documents, {}).dataset(tokenizer, {"max_length": 32})["input_ids"]
    assert whole[0] == [*tokenizer(documents[0])["input_ids"], tokenizer.eos_token_id] and len(whole) == len(documents)
    with pytest.raises(ConfigError, match=r"training.record.max_length: None cannot be used here"):
        GeneralText(documents, {}).dataset(tokenizer, {"packing": True, "max_length": None})


# Hub


@pytest.fixture
def hub_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set as a hub repository has it, here as a directory, which datasets loads in the same way."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    directory = tmp_path / "qa"
    directory.mkdir()
    write_jsonl(directory / "train.jsonl", pairs(0, 12))
    write_jsonl(directory / "test.jsonl", pairs(10, 4))
    return str(directory)


def test_domain_rows_are_read_from_the_splits_of_a_hub_data_set(hub_directory: str) -> None:
    rows = read_domain(hub_directory, "test")
    assert [example.answer for example in rows.test] == ["11", "12", "13", "14"]
    assert rows.facts["train_rows_left_out_as_test_prompts"] == 2
    assert [example.answer for example in rows.train] == [str(n) for n in range(1, 11)]


def test_the_training_split_of_a_hub_data_set_can_be_named(hub_directory: str, tmp_path: Path) -> None:
    test = write_jsonl(tmp_path / "mine.jsonl", pairs(0, 1))
    rows = read_domain(hub_directory, test, train_split="test")
    assert [example.answer for example in rows.train] == ["11", "12", "13", "14"]


@pytest.mark.parametrize("limit", [None, 5])
def test_general_text_is_read_from_a_hub_data_set_streamed_up_to_its_limit(
    limit: int | None, hub_directory: str
) -> None:
    config = GeneralConfig(source="hub", dataset=hub_directory, column="prompt", max_documents=limit)
    text = read_general(config)
    count = limit or 12
    assert len(text.train) == count - 1
    assert text.train[0] == "0 plus one is"
    assert text.evaluation == {"general (held out)": f"{count - 1} plus one is"}


def test_a_hub_data_set_without_the_column_says_which_it_has(hub_directory: str) -> None:
    with pytest.raises(DataError, match=r"qa: 12 of 12 rows cannot be used.*: 'text', it has prompt, completion"):
        read_general(GeneralConfig(source="hub", dataset=hub_directory))


def test_a_split_that_a_hub_data_set_lacks_is_an_error_that_names_it(hub_directory: str) -> None:
    with pytest.raises(DataError, match=r"validation.*Check the name, its subset and split"):
        read_domain(hub_directory, "validation")


def test_a_hub_that_cannot_be_reached_is_a_data_error_that_says_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"acme/absent: not a file here, nor a data set .* the network, or give a local"
    ):
        read_general(GeneralConfig(source="hub", dataset="acme/absent"))
    with pytest.raises(DataError, match="acme/absent: not a file here"):
        read_domain("acme/absent", "test")


# Samples of the model


@pytest.fixture
def sample(model_dir: str, tmp_path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def text(seed: int, directory: str = "samples", **settings: Any) -> list[str]:
        config = GeneralConfig.model_validate({"source": "model", "samples": 40, "sample_tokens": 8, **settings})
        got = general_text(config, EvaluationConfig(), model, tokenizer, seed, tmp_path / directory)
        return [*got.train, *got.evaluation.values()]

    return text


def test_samples_of_the_model_are_the_same_for_the_same_seed_only(sample: Any) -> None:
    first = sample(0, "a")
    assert len(set(first)) > 30
    assert sample(0, "b") == first
    assert sample(1, "c") != first


def test_sampling_leaves_the_random_state_as_it_was(sample: Any) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    sample(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_kept_samples_are_used_the_second_time(sample: Any, tmp_path: Path) -> None:
    sample(0)
    file = next((tmp_path / "samples").iterdir())
    kept = json.loads(file.read_text(encoding="utf-8"))
    kept["samples"] = ["kept one", "kept two"]
    file.write_text(json.dumps(kept), encoding="utf-8")
    assert sample(0) == ["kept one", "kept two"]


@pytest.mark.parametrize("content", ["{", "[]", '{"asked": 1}'])
def test_a_damaged_file_of_kept_samples_is_named_with_what_to_do(sample: Any, tmp_path: Path, content: str) -> None:
    sample(0)
    file = next((tmp_path / "samples").iterdir())
    if content.endswith("1}"):
        content = json.dumps({**json.loads(file.read_text(encoding="utf-8")), "samples": 1})
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=rf"{file.name}: not as hlora writes it .* Remove it"):
        sample(0)


@pytest.mark.parametrize("change", [{"seed": 1}, {"samples": 41}, {"sample_tokens": 9}, {"temperature": 0.5}])
def test_kept_samples_are_made_anew_when_a_setting_changes(sample: Any, change: dict[str, Any]) -> None:
    first = sample(0)
    changed = sample(**{"seed": 0, **change})
    assert changed != first
    assert sample(**{"seed": 0, "directory": "fresh", **change}) == changed


def test_a_low_temperature_makes_samples_alike(sample: Any) -> None:
    assert len(set(sample(0, temperature=1e-4))) == 2  # nearly greedy: one text, and the joined held-out ones
    assert len(set(sample(0, temperature=1.0))) > 30


# Domain rows


def test_train_rows_whose_prompt_is_in_the_test_are_left_out_and_counted(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [*pairs(0, 6), {"prompt": "4 plus one is", "completion": "five"}])
    test = write_jsonl(tmp_path / "test.jsonl", pairs(4, 4))
    rows = read_domain(train, test)
    assert [example.prompt for example in rows.train] == [f"{n} plus one is" for n in range(4)]
    assert rows.facts["train_rows_left_out_as_test_prompts"] == 3
    assert (rows.facts["train_rows"], rows.facts["test_rows"]) == (4, 4)


@pytest.mark.parametrize(
    "test",
    [
        {"messages": [{"content": "a", "role": "user"}, {"role": "assistant", "content": "other"}]},
        {
            "messages": [
                {"role": "user", "content": " a\n", "id": 7, "name": None},
                {"role": "assistant", "content": "x"},
            ]
        },
        {"messages": [{"role": "user", "content": "a", "tool_calls": None}, {"role": "assistant", "content": "1"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "1"}]},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "1"}]},
    ],
)
def test_a_leak_is_found_by_the_rendered_prompt_whatever_else_differs(test: Any, limits: Any, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "1"}]} for q in "ab"]
    found = limits()
    found.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    files = write_jsonl(tmp_path / "train.jsonl", rows), write_jsonl(tmp_path / "test.jsonl", [test])
    kept = domain_rows(DomainConfig(task="rows", train=files[0], test=files[1]), None, 0, found)
    assert [example.prompt[0]["content"] for example in kept.train] == ["b"]
    assert kept.facts["train_rows_left_out_as_test_prompts"] == 1


def test_a_leak_of_text_is_found_through_outer_white_space(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", pairs(0, 2))
    test = write_jsonl(tmp_path / "test.jsonl", [{"prompt": " 1 plus one is\n", "completion": "2"}])
    assert [example.answer for example in read_domain(train, test).train] == ["1"]


def test_messages_with_the_same_turns_before_the_answer_count_as_the_same_prompt(tmp_path: Path) -> None:
    def dialogue(question: str, answer: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    train = write_jsonl(tmp_path / "train.jsonl", [dialogue("a", "1"), dialogue("b", "2")])
    test = write_jsonl(tmp_path / "test.jsonl", [dialogue("a", "other")])
    assert [example.answer for example in read_domain(train, test).train] == ["2"]


@pytest.mark.parametrize(("task", "folder"), [("piqa", "piqa"), ("medmcqa", "medmcqa"), ("multiple_choice", "qasc")])
def test_real_tasks_have_no_prompt_in_both_sets(task: str, folder: str, shared_data: Path) -> None:
    rows = read_domain(shared_data / folder / "train.jsonl", shared_data / folder / "test.jsonl", task=task)
    assert not {str(example.prompt) for example in rows.train} & {str(example.prompt) for example in rows.test}
    assert len(rows.train) > 1200 and len(rows.test) == len(rows.test_rows) >= 600


def test_the_training_choice_is_seeded_and_the_test_choice_is_the_first_rows(tmp_path: Path) -> None:
    train, test = write_jsonl(tmp_path / "a.jsonl", pairs(0, 50)), write_jsonl(tmp_path / "b.jsonl", pairs(90, 9))
    chosen = [read_domain(train, test, seed, max_test_rows=4, max_train_rows=10) for seed in (0, 0, 1)]
    prompts = [[example.prompt for example in rows.train] for rows in chosen]
    assert prompts[0] == prompts[1] != prompts[2]
    assert all(len(set(map(str, some))) == 10 for some in prompts)
    assert [example.answer for example in chosen[0].test] == ["91", "92", "93", "94"]
    assert chosen[0].test_rows == pairs(90, 4)


def test_domain_facts_change_when_and_only_when_the_rows_do(tmp_path: Path) -> None:
    test = write_jsonl(tmp_path / "test.jsonl", pairs(90, 2))

    def facts(start: int) -> dict[str, Any]:
        return read_domain(write_jsonl(tmp_path / "train.jsonl", pairs(start, 5)), test).facts

    assert facts(0) == facts(0)
    assert facts(0)["train_sha256"] != facts(1)["train_sha256"]
    assert facts(0)["test_sha256"] == facts(1)["test_sha256"]


def test_the_domain_data_set_has_token_ids_and_a_mask_of_the_answer_and_its_end(
    questions: tuple[str, str], model_dir: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    data = read_domain(*questions, task="multiple_choice").dataset(tokenizer)
    prompt, answer = (tokenizer(t)["input_ids"] for t in ("Question: What is 0 plus one?\nAnswer:", " 1"))
    assert data[0] == {
        "input_ids": [*prompt, *answer, tokenizer.eos_token_id],
        "completion_mask": [0] * len(prompt) + [1] * (len(answer) + 1),
    }
    assert len(data) == 24


def test_columns_of_other_names_are_mapped_to_the_tasks(tmp_path: Path) -> None:
    rows = [{"question": f"{n}?", "reply": str(n), "prompt": "unused"} for n in range(4)]
    files = write_jsonl(tmp_path / "a.jsonl", rows[:2]), write_jsonl(tmp_path / "b.jsonl", rows[2:])
    found = read_domain(*files, columns={"prompt": "question", "completion": "reply"}, join=" ")
    assert found.train[0] == Example("0?", "0", join=" ")
    with pytest.raises(DataError, match=r"missing column: 'answer' \(domain.columns\), it has question, reply, prompt"):
        read_domain(*files, columns={"prompt": "question", "completion": "answer"})


def test_a_mapped_column_that_some_rows_lack_is_null_there(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"q": f"{n}?", "a": str(n), **({"c": "See."} if n % 2 else {})} for n in range(4)]
    files = write_jsonl(tmp_path / "a.jsonl", rows[:2]), write_jsonl(tmp_path / "b.jsonl", rows[2:])
    found = read_domain(*files, columns={"instruction": "q", "output": "a", "input": "c"})
    assert ["See." in str(example.prompt) for example in found.train] == [False, True]


def test_a_directory_of_test_rows_is_named_as_such(hub_directory: str, tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    write_jsonl(tmp_path / "test" / "rows.jsonl", pairs(20, 2))
    with pytest.raises(DataError, match=rf"^domain.test: '{tmp_path}/test' is a directory. Name a file in it, or"):
        read_domain(hub_directory, tmp_path / "test")


@pytest.mark.parametrize("unknown", ["answer", "prompt"])
def test_a_text_that_the_tokenizer_cannot_write_is_no_row(unknown: str, limits: Any) -> None:
    found = limits(max_length=64)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))  # of Latin letters, without bytes to fall back to
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<eos>"], show_progress=False)
    tokenizer.train_from_iterator([GENERAL_TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    lossy = replace(found, tokenizer=fast)
    assert lossy.train(Example("What", " seven"))
    if unknown == "answer":
        row, problem = Example("What", " 七是"), "no answer: the tokenizer has no tokens for ' 七是'"
    else:
        fast.unk_token = fast.backend_tokenizer.model.unk_token = None  # it is left out
        row, problem = Example("何", "seven"), "no prompt: the tokenizer has no token for it"
    for check in (lossy.train, lossy.test):
        with pytest.raises(DataError, match=problem):
            check(row)


def test_an_unused_column_called_label_is_ignored_in_a_csv(tmp_path: Path) -> None:
    for name, n in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.csv").write_text(f"prompt,completion,label\n{n}?,{n},arithmetic\n", encoding="utf-8")
    assert read_domain(tmp_path / "a.csv", tmp_path / "b.csv").train == [Example("1?", "1")]


def test_a_wrong_row_is_named_by_file_and_number(questions: tuple[str, str], tmp_path: Path) -> None:
    rows = [{"question": "x", "choices": ["a", "b"], "label": n} for n in (0, 1, 2)]
    wrong = write_jsonl(tmp_path / "wrong.jsonl", rows)
    for train, test in ((wrong, questions[1]), (questions[0], wrong)):
        with pytest.raises(DataError) as caught:
            read_domain(train, test, task="multiple_choice")
        assert str(caught.value) == (
            f"{wrong}: 1 of 3 rows cannot be used, and domain.max_unusable (1%) allows 0 to be skipped. "
            "Row 3: wrong label: 2, expected 0 to 1, or a letter from A on. Task 'multiple_choice' needs question, "
            "choices (a list), label (index of the right choice); domain.columns maps other names to these. Fix them, "
            "or raise domain.max_unusable."
        )


def test_unusable_rows_within_the_limit_are_left_out_counted_and_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = [*pairs(0, 10), {"prompt": "x", "completion": " "}, *pairs(10, 10), {"prompt": "y"}]
    test = [{"prompt": 1, "completion": 2}, *pairs(90, 4)]
    files = write_jsonl(tmp_path / "train.jsonl", train), write_jsonl(tmp_path / "test.jsonl", test)
    with caplog.at_level("WARNING", "hlora"):
        rows = read_domain(*files, max_unusable=2, max_test_rows=3)
    assert len(rows.train) == 20 and rows.test_rows == pairs(90, 3)
    assert [example.answer for example in rows.test] == ["91", "92", "93"]
    assert rows.facts["unusable"] == {
        files[0]: {
            "rows": 2,
            "of": 22,
            "reasons": {"empty cell": 1, "missing column": 1},
            "first": {
                "row 11": "empty cell: completion is ' '",
                "row 22": "missing column: 'completion', it has prompt",
            },
        },
        files[1]: {
            "rows": 1,
            "of": 5,
            "reasons": {"wrong cell": 1},
            "first": {"row 1": "wrong cell: completion is 2, expected text"},
        },
    }
    assert [record.message.split(". ")[0] for record in caplog.records] == [
        f"{files[0]}: skipped 2 of 22 rows that cannot be used",
        f"{files[1]}: skipped 1 of 5 rows that cannot be used",
    ]
    for limit in (1, 0, "5%"):
        with pytest.raises(DataError, match=r"train.jsonl: 2 of 22 rows"):
            read_domain(*files, max_unusable=limit)


def test_general_documents_without_text_are_left_out_within_the_limit(tmp_path: Path) -> None:
    rows = [{"text": f"document {n}"} for n in range(200)]
    rows[7], rows[8], rows[9] = {"text": None}, {"other": "x"}, {"text": " "}
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    text = read_general(GeneralConfig(paths=[file]))
    assert text.facts["documents"] + 20 == 197  # blank ones count as nothing
    assert text.facts["unusable"] == {
        file: {
            "rows": 2,
            "of": 200,
            "reasons": {"no text": 1, "missing column": 1},
            "first": {"row 8": "no text: 'text' holds NoneType", "row 9": "missing column: 'text', it has other"},
        }
    }
    with pytest.raises(
        DataError, match=r"a.jsonl: 2 of 200 rows .* general.max_unusable \(1\) allows 1 .* Row 8: no text"
    ):
        read_general(GeneralConfig(paths=[file], max_unusable=1))
    with pytest.raises(DataError, match=r"a.jsonl: Row 8: no text.*; Row 9: .* must not lose rows"):
        read_general(GeneralConfig(paths=[file]), {"same": file})


@pytest.fixture
def limits(model_dir: str) -> Any:
    """Of the tiny Llama, whose context is 256 tokens, for arguments of training."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    return lambda **arguments: TokenLimits.of(model, tokenizer, arguments)


def tokens(limits: TokenLimits, row: dict[str, str], answer: bool) -> int:
    text = f"{row['prompt']}{row['completion']}<eos>" if answer else row["prompt"]
    return len(limits.tokenizer(text)["input_ids"])


def test_a_row_whose_answer_training_would_cut_off_is_left_out_and_one_token_less_is_not(
    limits: Any, tmp_path: Path
) -> None:
    row = {"prompt": "Where is Orion?" * 5, "completion": " In the sky"}
    files = write_jsonl(tmp_path / "train.jsonl", [row]), write_jsonl(tmp_path / "test.jsonl", pairs(0, 1))
    config = DomainConfig(task="rows", train=files[0], test=files[1])
    length, whole = (tokens(limits(), row, answer=answer) for answer in (False, True))
    assert len(domain_rows(config, None, 0, limits(max_length=whole)).train) == 1
    with pytest.raises(DataError, match=rf"Row 1: answer cut: it needs {whole} tokens, .* keeps {whole - 1}"):
        domain_rows(config, None, 0, limits(max_length=whole - 1))
    with pytest.raises(DataError, match=rf"Row 1: no answer left: .* the {length} tokens of training's max_length"):
        domain_rows(config, None, 0, limits(max_length=length))
    for kept in (
        {"packing": True},
        {"packing": True, "packing_strategy": "wrapped"},
        {"packing": True, "packing_strategy": "bfd_split"},
        {"truncation_mode": "keep_end"},
    ):
        assert len(domain_rows(config, None, 0, limits(max_length=length, **kept)).train) == 1
    bfd = {"packing": True, "packing_strategy": "bfd", "truncation_mode": "keep_end"}  # keeps the start nonetheless
    with pytest.raises(DataError, match=rf"answer cut: it needs {whole} tokens"):
        domain_rows(config, None, 0, limits(max_length=whole - 1, **bfd))
    with pytest.raises(DataError, match=rf"answer cut: it needs {whole - length} tokens"):
        domain_rows(config, None, 0, limits(max_length=whole - length - 1, truncation_mode="keep_end"))


def test_a_row_of_a_hundred_megabytes_is_refused_without_reading_all_of_it(limits: Any) -> None:
    endless = "word " * 20_000_000
    for example, problem in ((Example(endless, "x"), "no answer left"), (Example("x", endless), "answer cut")):
        with pytest.raises(DataError, match=problem):
            limits(max_length=64).train(example)
        with pytest.raises(DataError, match="too long"):
            limits(max_length=None).test(example)


def test_a_row_longer_than_the_context_is_left_out_of_both_sets_unless_training_packs_it(
    limits: Any, tmp_path: Path
) -> None:
    row = {"prompt": "Where is it?", "completion": " word"}
    while tokens(limits(), row, answer=True) < 256:
        row["completion"] += "s" if tokens(limits(), row, answer=True) > 250 else " words and more words"
    assert tokens(limits(), row, answer=True) == 256
    longer = {**row, "completion": row["completion"] + " zz zz"}
    some = write_jsonl(tmp_path / "some.jsonl", pairs(0, 2))
    for file, ok in (
        (write_jsonl(tmp_path / "fits.jsonl", [row]), True),
        (write_jsonl(tmp_path / "long.jsonl", [longer]), False),
    ):
        for train, test in ((file, some), (some, file)):
            config = DomainConfig(task="rows", train=train, test=test)
            if ok:
                domain_rows(config, None, 0, limits(max_length=None))
            else:
                with pytest.raises(DataError, match=r"long.jsonl: 1 of 1 .* too long: more than the 256 tokens of"):
                    domain_rows(config, None, 0, limits(max_length=None))
    packed = DomainConfig(task="rows", train=str(tmp_path / "long.jsonl"), test=some)
    assert len(domain_rows(packed, None, 0, limits(max_length=256, packing=True)).train) == 1


def test_no_rows_to_train_or_test_on_is_an_error(tmp_path: Path) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    some = write_jsonl(tmp_path / "some.jsonl", pairs(0, 3))
    with pytest.raises(DataError, match=r"empty.jsonl: no rows to evaluate on"):
        read_domain(some, empty)
    with pytest.raises(DataError, match=r"empty.jsonl: no rows left \(0 read"):
        read_domain(empty, some)
    with pytest.raises(DataError, match=r"some.jsonl: no rows left \(3 read, 3 of them in the test set\)"):
        read_domain(some, some)


def test_a_test_split_beside_a_train_file_is_refused_and_not_read_from_it(questions: tuple[str, str]) -> None:
    with pytest.raises(DataError, match=r"domain.test: 'test' is no .jsonl, .json, .parquet or .csv file"):
        read_domain(questions[0], "test", task="multiple_choice")


def test_general_text_of_the_fixture_is_read_whole(general_file: str) -> None:
    text = read_general(GeneralConfig(paths=[general_file]))
    words = " ".join([*text.train, *text.evaluation.values()]).split()
    assert words == GENERAL_TEXT.split()


# Mixtures


def test_a_mixture_takes_characters_by_weight_and_repeats_none(tmp_path: Path) -> None:
    for name, letter, count in (("a", "a", 30), ("b", "b", 100)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{letter}{n:09d}"} for n in range(count)])
    sources = [{"paths": [str(tmp_path / f"{name}.jsonl")], "weight": w} for name, w in (("a", 3), ("b", 2))]
    test = tmp_path / "test.txt"
    test.write_text("evaluated", encoding="utf-8")
    found = read_general(GeneralConfig.model_validate({"mixture": sources}), {"test": str(test)})
    text = "".join(found.train)
    assert (text.count("a"), text.count("b")) == (30, 20)
    assert len(set(found.train)) == len(found.train) == 50
    assert found.facts["source"] == "mixture"
    assert found.facts["mixture"] == [{"source": "files", "characters": n} for n in (300, 200)]
    first = "".join(document[0] for document in found.train[:25])
    assert {"a", "b"} == set(first)  # shuffled, not one after the other


def test_a_mixture_of_a_source_without_text_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": " "}])
    with pytest.raises(DataError, match="no text in what source 'files' names"):
        read_general(GeneralConfig.model_validate({"mixture": [{"paths": [str(tmp_path / "a.jsonl")]}]}))


# Probe texts


def test_a_probe_text_has_no_line_that_is_trained_or_evaluated_on(tmp_path: Path) -> None:
    trained, evaluated, own = (f"{word} " * 20 for word in ("trained", "evaluated", "own"))
    general = GeneralText([f"a\n{trained}\nb"], {"test": evaluated}, {})
    (tmp_path / "probe.txt").write_text("\n".join([trained, own, evaluated]), encoding="utf-8")
    found = probe_texts({"prose": str(tmp_path / "probe.txt")}, general)
    assert found["prose"].strip() == own.strip()


def test_a_probe_text_that_is_trained_on_whole_is_refused(tmp_path: Path) -> None:
    line = "the same line " * 10
    (tmp_path / "probe.txt").write_text(line, encoding="utf-8")
    with pytest.raises(DataError, match="nothing is left of 'prose'"):
        probe_texts({"prose": str(tmp_path / "probe.txt")}, GeneralText([line], {}, {}))


def test_the_column_of_the_general_text_holds_for_probe_texts(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "probe.jsonl", [{"body": "own text"}])
    found = probe_texts({"prose": file}, GeneralText(["x"], {}, {}), "body")
    assert found["prose"].strip() == "own text"
