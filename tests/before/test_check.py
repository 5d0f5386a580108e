"""`hlora check`: the data as they are trained, counts, an estimate, and nothing written."""

from __future__ import annotations

import gzip
import json
import math
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
from conftest import Invoke
from transformers import AutoTokenizer

from hlora.before.check import checked
from hlora.before.rows import trained_row
from hlora.config.reading import parse_config
from hlora.data.example import Example
from hlora.data.rendering import render


@pytest.fixture
def config(tmp_path: Path, job_fields: dict[str, Any]) -> Path:
    job_fields["evaluation"] = {"max_tokens": 100, "window": 64, "generate": 2, "max_new_tokens": 2}
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(job_fields), encoding="utf-8")
    return path


@pytest.fixture
def one_cut_one_leak(tmp_path: Path) -> None:
    """A training row whose answer max_length cuts (row 25), and one whose prompt is a test prompt (row 26)."""
    leak = json.loads((tmp_path / "test.jsonl").read_text(encoding="utf-8").splitlines()[0])
    cut = {"question": "Say it.", "choices": ["much " * 60, "2"], "label": 0}
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(cut) + "\n" + json.dumps(leak) + "\n")


def files_under(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", [["check"], ["run", "--dry-run"]])
def test_counts_rows_tokens_cut_answers_and_leaks_and_writes_nothing(
    hlora: Invoke,
    config: Path,
    one_cut_one_leak: None,
    tmp_path: Path,
    model_dir: str,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    before = files_under(tmp_path)
    status, out, err = hlora(*command, config, "--set", "domain.max_unusable=1")
    assert status == 0, err
    assert files_under(tmp_path) == before and not (tmp_path / "out").exists()
    assert not list(Path.cwd().iterdir())
    assert not [path for path in scratch.iterdir() if "wandb" not in path.name]  # W&B's own, removed as Python ends

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()[:24]]
    rendered = [render(tokenizer, _example(row)).training_row() for row in rows]
    tokens = sum(len(row["input_ids"]) for row in rendered)
    trained = sum(sum(row["completion_mask"]) for row in rendered)
    assert f"domain: 24 rows to train on, {tokens:,} tokens, {trained:,} of them trained; 8 rows to evaluate on" in out
    assert "left out as test prompts: 1 row\n" in out
    assert re.search(r"unusable: 1 of 26 rows of \S*train.jsonl \(answer cut: 1\)\n  row 25: answer cut: it needs", out)
    assert "template: plain text" in out
    assert "Question: What is 0 plus one?\nAnswer:⟦ 1<eos>⟧" in out
    assert re.search(r"record +│ 4 .* s .*\n.*tune +│ 4 .* s ", out) and "the whole run: about" in out


def _example(row: dict[str, Any]) -> Example:
    return Example(f"Question: {row['question']}\nAnswer:", row["choices"][row["label"]], join=" ")


def test_packed_files_are_read_as_in_a_run_and_validation_rows_are_counted(
    hlora: Invoke, config: Path, tmp_path: Path, model_dir: str
) -> None:
    train = (tmp_path / "train.jsonl").read_bytes()
    rows = train.splitlines(keepends=True)
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(train))
    with pyarrow.output_stream(tmp_path / "test.jsonl.zst", compression="zstd") as stream:
        stream.write((tmp_path / "test.jsonl").read_bytes())
    (tmp_path / "held-out.jsonl.gz").write_bytes(gzip.compress(b"".join(rows[:5])))
    named = {"train": "train.jsonl.gz", "validation": "held-out.jsonl.gz", "test": "test.jsonl.zst"}
    fields = [part for name, file in named.items() for part in ("--set", f"domain.{name}={tmp_path / file}")]
    status, out, err = hlora("check", config, *fields)
    assert status == 0, err
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokens = sum(len(render(tokenizer, _example(json.loads(row))).training_row()["input_ids"]) for row in rows[:5])
    assert re.search(
        rf"domain: 19 rows to train on, .*; 5 validation rows, {tokens} tokens; 8 rows to evaluate on", out
    )
    assert "note: evaluations on the validation rows, while the domain phase trains, are not timed." in out

    status, _, err = hlora("check", config, *fields[:2], "--set", "domain.validation=absent.jsonl.gz")
    assert status == 2 and "domain.validation: absent.jsonl.gz: no such file" in err


def test_an_output_that_a_run_could_not_write_is_refused(hlora: Invoke, config: Path, tmp_path: Path) -> None:
    for output in ("train.jsonl", "train.jsonl/below"):
        status, _, err = hlora("check", config, "--set", f"output={tmp_path / output}")
        assert status == 2 and f"output: {tmp_path / output} cannot be used" in err
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "logs").symlink_to(tmp_path)
    status, _, err = hlora("check", config, "--set", f"output={tmp_path / 'linked'}")
    assert status == 2 and "logs is a link to" in err


def test_the_marked_part_is_what_is_trained(config: Path, model_dir: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    with checked(parse_config(yaml.safe_load(config.read_text(encoding="utf-8")))) as found:
        dataset = found.job.domain.dataset(tokenizer)
        for row, trained in zip(found.shown, dataset, strict=False):
            assert (row.ids, row.mask) == (trained["input_ids"], trained["completion_mask"])
            marked = "".join(part for part, is_trained in row.parts(tokenizer) if is_trained)
            assert marked == tokenizer.decode(row.trained)
        assert found.disk > 0 and found.free > 0
        assert [cost.name for cost in found.costs] == ["record", "tune", "evaluate"]
        assert all(cost.each > 0 and math.isfinite(cost.seconds) and cost.memory for cost in found.costs)
        assert [cost.count for cost in found.costs] == [4, 4, 3]


def test_a_row_is_cut_and_masked_as_the_arguments_say(model_dir: str) -> None:
    tokenizer, example = AutoTokenizer.from_pretrained(model_dir), Example("What is it?", " seven")
    whole = render(tokenizer, example).training_row()
    row = trained_row(tokenizer, example, {"max_length": 6, "truncation_mode": "keep_end"})
    assert (row.ids, row.mask) == (whole["input_ids"][-6:], whole["completion_mask"][-6:])
    for strategy, kept in (
        {"wrapped": len(whole["input_ids"]), "bfd": 6, "bfd_split": len(whole["input_ids"])}
    ).items():
        packed = {"max_length": 6, "truncation_mode": "keep_end", "packing": True, "packing_strategy": strategy}
        assert trained_row(tokenizer, example, packed).ids == whole["input_ids"][:kept]
    row = trained_row(tokenizer, example, {"completion_only_loss": False})
    assert row.trained == whole["input_ids"]


def test_steps_of_an_epoch_and_squared_gradients_are_estimated(job_fields: dict[str, Any], tmp_path: Path) -> None:
    job_fields["training"]["tune"] = {
        "num_train_epochs": 2,
        "max_length": 64,
        "gradient_accumulation_steps": 2,
        "bf16": True,
    }
    job_fields["importance"] = {"method": "squared_gradients", "sequences": 6, "sequence_length": 16}
    job_fields["penalty"] = {"anchor": "base"}
    job_fields["evaluation"] = {"max_tokens": 60, "window": 32, "generate": 0, "accuracy": False}
    with checked(parse_config(job_fields)) as found:
        record, tune, evaluate = found.costs
    assert (record.count, tune.count, evaluate.count) == (6, 6, 2)  # 24 rows: 2 epochs of 3 steps of 2 x 4 rows
    assert not (tmp_path / "out").exists()


def test_an_error_names_its_field_with_status_2_and_writes_nothing(
    hlora: Invoke, config: Path, one_cut_one_leak: None, tmp_path: Path
) -> None:
    status, _, err = hlora("check", config, "--set", "domain.max_unusable=0")
    assert status == 2 and "domain.max_unusable" in err and "answer cut" in err and "Traceback" not in err
    fields = ("training.tune.dataloader_drop_last=true", "training.tune.per_device_train_batch_size=100")
    status, _, err = hlora("check", config, "--set", fields[0], "--set", fields[1], "--set", "domain.max_unusable=1")
    assert status == 2 and "training.tune.dataloader_drop_last: 24 training rows make no batch" in err
    assert not (tmp_path / "out").exists()


def test_the_chat_template_is_named_and_its_end_of_turn_is_trained(
    hlora: Invoke, config: Path, tmp_path: Path, model_dir: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chatty = shutil.copytree(model_dir, tmp_path / "chatty")
    tokenizer.save_pretrained(chatty)
    for name, start in (("train", 0), ("test", 100)):
        rows = [
            [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]
            for n in range(start, start + 5)
        ]
        text = "".join(json.dumps({"messages": row}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    status, out, err = hlora("check", config, "--set", f"model.name={chatty}", "--set", "domain.task=rows")
    assert status == 0, err
    assert f"template: the chat template of {chatty}" in out
    assert "<user>0?</user><assistant>⟦yes</assistant>⟧" in out
