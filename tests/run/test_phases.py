"""What a run writes names its base model so that it is found from anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from hlora.model.lora import attach_lora
from hlora.run.job import Job
from hlora.run.phases import save_adapter, squared_gradients
from hlora.run.results import starting_results


def test_a_local_model_with_a_relative_name_is_written_by_its_absolute_path(
    open_job: Callable[..., Job], model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(model_dir).parent)
    job = open_job(model__name=Path(model_dir).name)
    model = attach_lora(job.base, job.config.lora, 0)
    importance = squared_gradients(job, model)
    assert importance.provenance["base_model"] == importance.lora_config["base_model_name_or_path"] == model_dir
    settings = save_adapter(job, model, tmp_path / "adapter") / "adapter_config.json"
    assert json.loads(settings.read_text(encoding="utf-8"))["base_model_name_or_path"] == model_dir
    job.keep_config()
    kept = yaml.safe_load((job.output / "config.yaml").read_text(encoding="utf-8"))
    assert kept["model"]["name"] == starting_results(job, job.base, "hlora run")["config"]["model"]["name"] == model_dir
