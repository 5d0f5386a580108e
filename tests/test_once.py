"""Recorded once, used by many; and a finished output is not overwritten unasked."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from hlora.config.reading import load_comparison, load_config, parse_config
from hlora.importance.artefact import Importance
from hlora.system.errors import ConfigError


@pytest.fixture
def settings(tuned_run: Path, tmp_path: Path) -> Path:
    """The YAML of the finished run, with an output that is a copy of it."""
    shutil.copytree(tuned_run, tmp_path / "out")
    fields = yaml.safe_load((tuned_run / "config.yaml").read_text(encoding="utf-8"))
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump({**fields, "output": str(tmp_path / "out")}), encoding="utf-8")
    return path


def files_of(output: Path) -> dict[str, bytes]:
    kept = (path for path in sorted(output.rglob("*")) if path.is_file() and not path.name.startswith(".lock"))
    return {str(path.relative_to(output)): path.read_bytes() for path in kept}


def test_a_finished_run_is_shown_again_and_nothing_is_written(
    settings: Path, tmp_path: Path, hlora: Any, caplog: pytest.LogCaptureFixture
) -> None:
    before = files_of(tmp_path / "out")
    status, out, _ = hlora("run", settings)
    assert status == 0 and "is finished, with these settings" in caplog.text and "report.html" in out
    assert files_of(tmp_path / "out") == before


def test_a_check_of_a_finished_run_says_so_once_without_an_option_that_it_lacks(
    settings: Path, hlora: Any, caplog: pytest.LogCaptureFixture
) -> None:
    status, out, _ = hlora("check", settings)
    assert status == 0 and "is finished with these settings: a run would show its results" in out
    assert "--overwrite" not in caplog.text + out


def test_a_default_length_that_was_cut_to_the_context_is_no_other_setting(
    settings: Path, tmp_path: Path, hlora: Any
) -> None:
    fields = yaml.safe_load(settings.read_text(encoding="utf-8"))
    kept = {**fields, "evaluation": {**fields["evaluation"], "window": 256}}
    (tmp_path / "out" / "config.yaml").write_text(yaml.safe_dump(kept), encoding="utf-8")
    fields["evaluation"].pop("window")
    settings.write_text(yaml.safe_dump(fields), encoding="utf-8")
    assert hlora("run", settings)[0] == 0
    status, _, err = hlora("run", settings, "--set", "evaluation.window=32")
    assert status == 2 and "evaluation.window (there 256, here 32). Name another output" in " ".join(err.split())
    status, _, err = hlora("run", settings, "--set", "evaluation.batch_size=3")  # which changes no training
    assert status == 2 and "Measure it by these with `hlora evaluate`, name another output" in " ".join(err.split())


@pytest.mark.parametrize("verb", ["run", "tune"])
def test_other_settings_are_refused_by_name_before_the_model_is_loaded(
    settings: Path, tmp_path: Path, hlora: Any, verb: str
) -> None:
    before = files_of(tmp_path / "out")
    secret = "hf_" + "plantedonce0" * 2
    other = ("--set", "penalty.phi=30", "--set", "seed=7", "--set", f"training.common.hub_token={secret}")
    status, _, err = hlora(verb, settings, *other, "--set", "model.name=ann/nowhere")
    assert status == 2 and secret not in err
    assert re.search(r"other settings: .*penalty.phi \(there 1.0, here 30.0\)", err) and "--overwrite" in err
    assert "seed (there nothing, here 7)" in err or "seed (there 0, here 7)" in err
    assert files_of(tmp_path / "out") == before


def test_data_that_changed_since_are_refused_too_and_a_copy_is_not(settings: Path, tmp_path: Path, hlora: Any) -> None:
    train = Path(yaml.safe_load(settings.read_text(encoding="utf-8"))["domain"]["train"])
    mine = Path(shutil.copy(train, tmp_path / "train.jsonl"))
    chosen = ("--set", f"domain.train={mine}")
    for kept in (tmp_path / "out" / "config.yaml", tmp_path / "out" / "inputs.json"):
        kept.write_text(kept.read_text(encoding="utf-8").replace(str(train), str(mine)), encoding="utf-8")
    assert hlora("run", settings, *chosen)[0] == 0
    mine.write_text(mine.read_text(encoding="utf-8").replace("plus one", "plus two"), encoding="utf-8")
    os.utime(mine, (1e9, 1e9))
    status, _, err = hlora("run", settings, *chosen)
    assert status == 2 and "domain.train (changed since)" in err


@pytest.mark.parametrize("part", ["adapter", "importance"])
def test_a_run_without_its_adapter_or_importance_is_not_called_finished(
    settings: Path, tmp_path: Path, hlora: Any, part: str
) -> None:
    shutil.rmtree(tmp_path / "out" / part)
    before = files_of(tmp_path / "out")
    status, _, err = hlora("run", settings)
    assert status == 2 and f"without its {part}" in err and "--overwrite" in err
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"config": {}, "arms": []}', '{"config": 3, "arms": {}}', '{"config": {}, "arms": {"base": 3}}'],
)
def test_results_of_another_shape_are_one_message(settings: Path, tmp_path: Path, hlora: Any, content: str) -> None:
    (tmp_path / "out" / "results.json").write_text(content, encoding="utf-8")
    status, _, err = hlora("run", settings)
    assert status == 2 and "results.json" in err and "hlora evaluate" in err


def test_a_moved_run_says_where_its_report_is_now(settings: Path, tmp_path: Path, hlora: Any) -> None:
    (tmp_path / "out").rename(tmp_path / "moved")
    status, out, err = hlora("run", settings, "--set", f"output={tmp_path / 'moved'}")
    assert status == 0, err
    assert f"report: {tmp_path / 'moved' / 'report.html'}" in out


def test_a_local_model_under_another_path_is_the_same_by_what_is_in_it(
    settings: Path, model_dir: str, tmp_path: Path, hlora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model_dir, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    assert hlora("run", settings, "--set", "model.name=base")[0] == 0
    (tmp_path / "base" / "config.json").write_text("{}", encoding="utf-8")
    status, _, err = hlora("run", settings, "--set", "model.name=base")
    assert status == 2 and "model.name (changed since)" in err


def test_overwrite_replaces_a_run_and_keeps_an_importance_of_the_same_settings(
    settings: Path, tmp_path: Path, hlora: Any, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    before = files_of(out)
    status, _, err = hlora("run", settings, "--set", "penalty.phi=30", "--overwrite")
    assert status == 0, err
    assert "was recorded with these settings before; nothing is recorded" in caplog.text
    after = files_of(out)
    assert after["importance/importance.safetensors"] == before["importance/importance.safetensors"]
    assert after["adapter/adapter_model.safetensors"] != before["adapter/adapter_model.safetensors"]
    results = json.loads(after["results.json"])
    assert results["config"]["penalty"]["phi"] == 30 and "record" not in results["seconds"]


def test_an_importance_of_other_settings_is_not_recorded_over_unasked(
    settings: Path, tmp_path: Path, hlora: Any
) -> None:
    importance = tmp_path / "out" / "importance"
    for left in ("results.json", "adapter"):
        path = tmp_path / "out" / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = files_of(importance)
    for verb in ("run", "record"):
        status, _, err = hlora(verb, settings, "--set", "importance.method=path_integral")
        assert status == 2 and "importance.method (there 'squared_gradients', here 'path_integral')" in err
        assert "--importance" in err
    assert files_of(importance) == before
    assert hlora("record", settings)[0] == 0 and files_of(importance) == before
    assert hlora("record", settings, "--set", "importance.xi=1e-5")[0] == 0  # of a path integral: no effect here
    assert files_of(importance) == before
    path = ("--set", "importance.method=path_integral", "--set", "importance.xi=1e-5")
    assert hlora("record", settings, *path, "--overwrite")[0] == 0
    assert Importance.load(importance).provenance["xi"] == 1e-5


def test_a_run_uses_the_importance_that_it_is_given_and_records_nothing(
    settings: Path, tuned_run: Path, tmp_path: Path, hlora: Any, caplog: pytest.LogCaptureFixture
) -> None:
    new = tmp_path / "second"
    status, _, err = hlora("run", settings, "--set", f"output={new}", "--importance", tuned_run / "importance")
    assert status == 0, err
    assert f"using {tuned_run / 'importance'}; nothing is recorded" in caplog.text
    assert not (new / "importance").exists() and not (new / "logs" / "record").exists()
    results, first = (json.loads((out / "results.json").read_text()) for out in (new, tuned_run))
    assert results["arms"]["hlora"]["texts"] == first["arms"]["hlora"]["texts"]
    tuned = "adapter/adapter_model.safetensors"
    assert (new / tuned).read_bytes() == (tuned_run / tuned).read_bytes()
    assert load_config(new / "config.yaml").importance.use == str(tuned_run / "importance")


def test_tune_uses_it_too_and_one_that_does_not_fit_is_refused_before_anything(
    settings: Path, tuned_run: Path, tmp_path: Path, hlora: Any
) -> None:
    new = ("--set", f"output={tmp_path / 'second'}", "--importance", tuned_run / "importance")
    status, _, err = hlora("run", settings, *new, "--set", "lora.rank=2")
    assert status == 2 and "importance was recorded with A (4, 32)" in err
    status, _, err = hlora("tune", settings, *new)
    assert status == 0, err
    tuned = "adapter/adapter_model.safetensors"
    assert (tmp_path / "second" / tuned).read_bytes() == (tuned_run / tuned).read_bytes()
    status, _, err = hlora("tune", settings, "--importance", tmp_path / "nowhere")
    assert status == 2 and "no such directory" in err


def test_importance_may_be_a_name_alone_also_under_the_preset(job_fields: dict[str, Any]) -> None:
    short = parse_config({**job_fields, "importance": "ann/importance", "preset": "paper"})
    assert short.importance.use == "ann/importance" and short.penalty.phi == 9
    long = parse_config({**job_fields, "importance": {"use": "ann/importance"}, "preset": "paper"})
    assert short == long


def test_recording_what_is_recorded_is_refused(settings: Path, hlora: Any) -> None:
    status, _, err = hlora("record", settings, "--set", "importance.use=ann/importance")
    assert status == 2 and "importance.use: ann/importance is recorded already" in err


def test_a_comparison_takes_no_recorded_importance(comparison_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"importance\.use: a comparison records"):
        load_comparison(comparison_file, ["importance=ann/importance"])
