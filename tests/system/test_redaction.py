"""Secrets, planted wherever a user can put one, are in no file, on no terminal and in no message afterwards."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hlora import pipeline
from hlora.cli import main
from hlora.config.reading import load_config, parse_config
from hlora.importance.artefact import Importance
from hlora.report.run.page import write_report
from hlora.run import resume, steps
from hlora.system.errors import ConfigError
from hlora.system.redaction import MARK, RedactingFormatter, is_secret_name, redact_argument, redact_text, redacted
from hlora.training.train import sft_arguments

ENVIRONMENT = {
    "HF_TOKEN": "planted-one-hf",
    "HUGGING_FACE_HUB_TOKEN": "planted-two-hub",
    "WANDB_API_KEY": "planted-three-5f2c",
    "MLFLOW_TRACKING_PASSWORD": "planted-four-mlflow",
    "ACME_SECRET": "planted-five-acme",
}
FIELD = "planted-six-by-its-field"
SHAPES = ["hf_" + "plantedseven" * 2, "sk-planted-eight-0123456789", "ghp_" + "plantednine0" * 3]
ADDRESS = "planted:ten"
SECRETS = [*ENVIRONMENT.values(), FIELD, *SHAPES, ADDRESS]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job_fields: dict[str, Any]) -> dict[str, Any]:
    """A job with secrets in the environment, its settings, its paths, its data and the names of its texts."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    place = tmp_path / ENVIRONMENT["WANDB_API_KEY"] / SHAPES[0]
    place.mkdir(parents=True)
    general, train = place / "general.txt", place / "train.jsonl"
    shutil.copy(job_fields["general"]["paths"][0], general)
    shutil.copy(job_fields["domain"]["train"], train)
    row = {"question": f"Who has {SHAPES[1]}?", "choices": [ENVIRONMENT["HF_TOKEN"], "b"], "label": 0}
    test = Path(job_fields["domain"]["test"])
    test.write_text(json.dumps(row) + "\n" + test.read_text(encoding="utf-8"), encoding="utf-8")
    job_fields["general"]["paths"] = [str(general)]
    job_fields["domain"] |= {"train": str(train), "subset": SHAPES[2]}
    evaluation = {"texts": {f"text of {SHAPES[2]}": str(general)}, "max_tokens": 100, "window": 64, "stride": 48}
    job_fields["evaluation"] = evaluation | {"generate": 2, "max_new_tokens": 2}
    job_fields["training"]["common"] |= {"hub_token": FIELD, "run_name": "mine"}
    job_fields["general"]["dataset"] = f"https://{ADDRESS}@example.org/x"
    return job_fields


def found_in(place: Path) -> list[str]:
    """Which secrets are in which files below a directory, in their bytes or their names."""
    return [
        f"{file.relative_to(place)}: {secret}"
        for file in place.rglob("*")
        if file.is_file()
        for secret in SECRETS
        if secret.encode() in file.read_bytes() or secret in str(file.relative_to(place))
    ]


def none_in(text: str) -> None:
    assert [secret for secret in SECRETS if secret in text] == []


def command_line(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["hlora", *map(str, arguments)])
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])  # pytest's own, that basicConfig would leave in place
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_a_run_leaves_no_secret_in_its_files_or_on_the_terminal(
    planted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(planted), encoding="utf-8")
    status = command_line(monkeypatch, "run", config, "--set", f"training.record.hub_token={FIELD}")
    shown = capfd.readouterr()
    assert status == 0, shown.err
    output = tmp_path / "out"
    files = {file.name for file in output.rglob("*")}
    assert {"results.json", "config.yaml", "report.html", "importance.json", "adapter_config.json"} <= files
    assert found_in(output) == []
    none_in(shown.out + shown.err)
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert results["command"].endswith(f"'training.record.hub_token={MARK}'")
    assert results["config"]["training"]["common"]["hub_token"] == MARK
    assert MARK in str(results["provenance"]["data"]) and MARK in str(results["arms"]["hlora"]["samples"])
    Importance.load(output / "importance")  # its checksums are of what was written
    # What an older hlora wrote: the report that is made from it again has none either.
    results["command"] += f" {SHAPES[0]}"
    (output / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert command_line(monkeypatch, "report", output) == 0
    none_in((output / "report.html").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_an_interrupted_run_keeps_no_secret_and_goes_on_with_another_token(
    planted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hlora")  # as the command sets it
    planted["training"]["record"]["save_steps"], planted["training"]["record"]["save_strategy"] = 2, "steps"
    with monkeypatch.context() as cut:
        cut.setattr(resume, "measure", lambda *_: 1 / 0)  # before anything is finished
        with pytest.raises(ZeroDivisionError):
            pipeline.run(parse_config(planted), f"hlora run {SHAPES[0]}")
        assert (tmp_path / "out" / "unfinished.json").exists() and found_in(tmp_path / "out") == []
    with monkeypatch.context() as cut:
        cut.setattr(steps, "tune_phase", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipeline.run(parse_config(planted), f"hlora run {SHAPES[0]}")
    assert (tmp_path / "out" / "unfinished.json").exists() and list(tmp_path.rglob("complete.json"))
    assert found_in(tmp_path / "out") == []
    planted["training"]["common"]["hub_token"] = "a newer one"
    monkeypatch.setattr(steps, "record_phase", lambda *_: 1 / 0)  # finished before
    assert pipeline.run(parse_config(planted))["arms"]["hlora"]
    assert "resuming the run of" in caplog.text


@pytest.mark.slow
def test_a_comparison_leaves_no_secret_in_its_files(
    planted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError(f"the server refuses {SHAPES[0]} of https://{ADDRESS}@example.org/?token={FIELD}")

    monkeypatch.setattr("hlora.comparison.paper.rslora", fails)
    task = planted.pop("domain")
    arms = {
        "Base": {"method": "base"},
        "LoRA(μ)": {"method": "lora"},
        "LoRA(ν+μ)": {"method": "lora_after_general"},
        SHAPES[1]: {"method": "rslora"},
    }
    planted |= {"seeds": [0], "tasks": {"sums": task}, "arms": arms, "selection": {"rows": 6}}
    planted["evaluation"] |= {"generate": 0, "accuracy": False}
    planted["training"]["tune"]["save_strategy"] = "epoch"  # Trainer's pickles stay there
    config = tmp_path / "compare.yaml"
    config.write_text(yaml.safe_dump(planted, allow_unicode=True), encoding="utf-8")
    status = command_line(monkeypatch, "compare", config, "--set", f"training.tune.hub_token={FIELD}")
    shown = capfd.readouterr()
    assert status == 0, shown.err
    assert list(tmp_path.rglob("training_args.bin")) and list(tmp_path.rglob("recording.json"))
    assert "failed" in shown.err and "comparison.json" in {file.name for file in (tmp_path / "out").iterdir()}
    assert found_in(tmp_path / "out") == []
    none_in(shown.out + shown.err)


@pytest.mark.parametrize(
    "change",
    [
        "training.tune.lr_scheduler_type=nope",
        f"training.common.hub_token=[{FIELD}]",
        f"training.common.hub_token=[{FIELD}",
        f"training.common.hub_token.x={FIELD}",
        f"model.name=https://{ADDRESS}@example.org/model",
        f"model.name={SHAPES[0]}",
        f"model.device={ENVIRONMENT['ACME_SECRET']}",
        f"general.paths=[missing/{SHAPES[1]}.txt]",
        f"penalty.api_key={FIELD}",
        f"penalty={SHAPES[0]}",
        f"{SHAPES[1]}=1",
    ],
)
def test_a_message_of_what_is_wrong_has_no_secret(
    planted: dict[str, Any], change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # 45 s of trying again without a network
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(planted), encoding="utf-8")
    assert command_line(monkeypatch, "run", config, "--set", change) == 2
    shown = capfd.readouterr()
    assert "hlora: " in shown.err
    none_in(shown.out + shown.err)


def test_a_damaged_yaml_file_is_named_without_the_line_that_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"output: x\ntraining:\n  common:\n    hub_token: {FIELD}: x\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.yaml: not readable as YAML: .*line 4") as caught:
        load_config(path)
    none_in(str(caught.value))


def test_what_sft_config_refuses_is_shown_without_its_token(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'learning_rate': 0\.1, 'hub_token': '<redacted>'") as caught:
        sft_arguments(tmp_path, {"learning_rate": 0.1, "hub_token": FIELD, "lr_scheduler_type": "nope"}, 0)
    none_in(str(caught.value))


def test_a_traceback_in_the_log_has_no_secret() -> None:
    try:
        raise RuntimeError(f"Bearer {SHAPES[1]}")
    except RuntimeError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "%s", (SHAPES[0],), sys.exc_info())
    text = RedactingFormatter("%(message)s").format(record)
    none_in(text)
    assert "RuntimeError" in text


@pytest.mark.parametrize(
    "name",
    [
        "hub_token", "HF_TOKEN", "token", "WANDB_API_KEY", "apiKey", "PGPASSWORD", "client_secret", "passwd",
        "hubToken", "AWS_SECRET_ACCESS_KEY", "AZURE_CREDENTIALS", "training.common.hub_token",
    ],
)  # fmt: skip
def test_a_secrets_name_is_known(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "eos_token", "pad_token", "tokens", "max_tokens", "sample_tokens", "TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH",
        "key", "average_tokens_across_devices", "include_num_input_tokens_seen", "training.common.pad_token",
    ],
)  # fmt: skip
def test_a_name_that_only_looks_like_a_secrets_is_left(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    "text",
    [
        "task-specific risk-averse sk-learn", "hf_model", "models/hf_llama-2", "https://example.org/a@b", "a: b@c.d",
        "penalty.phi=9", "eos_token=<|im_end|>", "hf://datasets/x/y@main/z.parquet", "'token': 5",
        "Bearer of news", "pad_token: 'x'", "2 + 2 = 4",
    ],
)  # fmt: skip
def test_other_text_is_left_as_it_is(text: str) -> None:
    assert redact_text(text) == redact_argument(text) == text


def test_numbers_types_and_nesting_are_left_as_they_are() -> None:
    value = {"a": [1, 2.5, None, True, {"tokens": 3, "token": 4}], "b": float("inf"), 3: "x"}
    assert redacted(value) == value


def test_a_short_value_of_the_environment_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_TOKEN", "yes")
    assert redact_text("yes") == "yes"


def test_a_report_made_by_a_program_has_no_secret(tmp_path: Path) -> None:
    results = {"arms": {}, "config": {"hub_token": FIELD}, "command": f"x {SHAPES[0]}", "provenance": {"a": SHAPES[1]}}
    write_report(results, tmp_path / "report.html")
    none_in((tmp_path / "report.html").read_text(encoding="utf-8"))
