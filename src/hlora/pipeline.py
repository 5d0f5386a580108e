"""The whole job, read first: record importance on general text, tune on the domain under it, evaluate, report."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hlora import data, report
from hlora.config import RunConfig
from hlora.errors import DataError
from hlora.evaluation import evaluate
from hlora.importance import Importance
from hlora.models import attach_lora, load_base
from hlora.penalty import ImportancePenalty, layer_coefficients
from hlora.recorder import ImportanceRecorder
from hlora.trainer import train

logger = logging.getLogger("hlora")


@dataclass
class Job:
    """A configuration with its model loaded and its output directory made."""

    config: RunConfig
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    output: Path

    @classmethod
    def open(cls, config: RunConfig) -> Job:
        data.check_texts_are_held_out(config)
        output = Path(config.output)
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False))
        base, tokenizer = load_base(config.model)
        return cls(config, base, tokenizer, output)

    def general(self) -> Dataset:
        return data.general_text(self.config.general, self.base, self.tokenizer, self.config.seed)

    def domain(self) -> Dataset:
        return data.domain_rows(self.config.domain, self.config.seed)


def run(config: RunConfig, command: str = "hlora run") -> dict[str, Any]:
    """Record, tune, evaluate and report; returns what results.json holds.

    The output directory gets config.yaml, importance/, adapter/ (PEFT), results.json, report.html and the
    TensorBoard logs of each phase.
    """
    job = Job.open(config)
    results = _start(job, command)
    arms, history, seconds = results["arms"], results["history"], results["seconds"]
    arms["base"] = evaluate(job.base, job.tokenizer, config)
    general, domain = job.general(), job.domain()
    results["provenance"]["data"] = {"general": data.fingerprint(general), "domain": data.fingerprint(domain)}

    with _timed(seconds, "record"):
        importance, history["record"] = record_phase(job, general)
    importance.save(job.output / "importance")
    results["importance"] = describe(importance, config)

    with _timed(seconds, "tune"):
        model, history["tune"] = tune_phase(job, domain, importance)
    model.save_pretrained(job.output / "adapter")
    arms["hlora"] = evaluate(model, job.tokenizer, config)
    model = model.unload()

    for arm in config.baselines:
        with _timed(seconds, arm):
            model, history[arm] = baseline_phase(job, domain, importance if arm == "lora_nu_mu" else None)
        arms[arm] = evaluate(model, job.tokenizer, config)
        model.unload()
    return finish(job, results)


def record_phase(job: Job, general: Dataset) -> tuple[Importance, list[dict[str, Any]]]:
    """LoRA on general text with a recorder watching (Eqs. 7–13). The model is left as it was."""
    config = job.config
    model = attach_lora(job.base, config.lora, config.seed)
    recorder = ImportanceRecorder(model, encoding=config.importance.encoding)
    arguments = {"packing": True, **config.training.common, **config.training.record}
    history = train(
        model, job.tokenizer, general, job.output / "logs" / "record", arguments, config.seed, [recorder.callback()]
    )
    described = {"source": config.general.source, "sha256": data.fingerprint(general)}
    importance = recorder.consolidate(config.importance.xi, described)
    model.unload()
    return importance, history


def tune_phase(job: Job, domain: Dataset, importance: Importance) -> tuple[Any, list[dict[str, Any]]]:
    """LoRA on the domain from θ^ν under the penalty (Eqs. 14–16); returns the adapted model."""
    config, options = job.config, job.config.penalty
    model = attach_lora(job.base, config.lora, config.seed)
    importance.load_adapter_into(model)
    penalty = ImportancePenalty(
        model, importance, options.phi, options.layer_weights, options.phi_scale, options.group
    )
    arguments = {**config.training.common, **config.training.tune}
    history = train(
        model, job.tokenizer, domain, job.output / "logs" / "tune", arguments, config.seed, [penalty.callback()]
    )
    return model, history


def baseline_phase(
    job: Job, domain: Dataset, start: Importance | None
) -> tuple[Any, list[dict[str, Any]]]:
    """The same domain phase without a penalty: from a fresh adapter, LoRA(μ), or from θ^ν, LoRA(ν+μ)."""
    config = job.config
    model = attach_lora(job.base, config.lora, config.seed)
    if start is not None:
        start.load_adapter_into(model)
    logs = job.output / "logs" / ("lora_nu_mu" if start else "lora_mu")
    arguments = {**config.training.common, **config.training.tune}
    return model, train(model, job.tokenizer, domain, logs, arguments, config.seed)


def record(config: RunConfig) -> Path:
    """The general phase alone; returns the importance directory."""
    job = Job.open(config)
    importance, _ = record_phase(job, job.general())
    return importance.save(job.output / "importance")


def tune(config: RunConfig) -> Path:
    """The domain phase alone, from <output>/importance; returns the directory of the PEFT adapter."""
    importance = Importance.load(Path(config.output) / "importance")
    job = Job.open(config)
    model, _ = tune_phase(job, job.domain(), importance)
    model.save_pretrained(job.output / "adapter")
    return job.output / "adapter"


def evaluate_output(config: RunConfig, command: str = "hlora evaluate") -> dict[str, Any]:
    """Evaluate the base model and <output>/adapter, and write results.json and the report."""
    from peft import PeftModel

    adapter = Path(config.output) / "adapter"
    if not (adapter / "adapter_model.safetensors").is_file():
        raise DataError(f"{adapter}: no adapter_model.safetensors. Make it with `hlora tune` or `hlora run` first.")
    job = Job.open(config)
    results = _start(job, command)
    results["arms"]["base"] = evaluate(job.base, job.tokenizer, config)
    model = PeftModel.from_pretrained(job.base, str(adapter))
    results["arms"]["hlora"] = evaluate(model, job.tokenizer, config)
    if (job.output / "importance").is_dir():
        results["importance"] = describe(Importance.load(job.output / "importance"), config)
    return finish(job, results)


def demo_config(output: Path) -> RunConfig:
    """The embedded default: SmolLM2-135M, Python's own documentation, questions on the chemical elements."""
    from hlora import embedded

    directory = output / "data"
    directory.mkdir(parents=True, exist_ok=True)
    embedded.demo_data(directory)
    return embedded.demo_settings(output)


def describe(importance: Importance, config: RunConfig) -> dict[str, Any]:
    """The `importance` part of results.json: what the artefact says of itself and the coefficients c_l used."""
    options = config.penalty
    weights = layer_coefficients(importance, options.layer_weights, options.group)
    return {**importance.describe(), "layer_weights": weights}


def finish(job: Job, results: dict[str, Any]) -> dict[str, Any]:
    """Write results.json and report.html."""
    results["provenance"]["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    write_text(job.output / "results.json", json.dumps(results, indent=1))
    report.write_report(results, job.output / "report.html")
    return results


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    building = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with building.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    building.replace(path)


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - started


def _start(job: Job, command: str) -> dict[str, Any]:
    device = job.base.device
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    packages = ("hlora", "torch", "transformers", "peft", "trl", "datasets", "lm_eval")
    return {
        "arms": {},
        "seconds": {},
        "history": {},
        "importance": {},
        "provenance": {
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "seed": job.config.seed,
            "hardware": f"{hardware}, {os.cpu_count()} cores, {device.type}, {str(job.base.dtype).removeprefix('torch.')}",
            "parameters": job.base.num_parameters(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "data": {},
        },
        "config": job.config.model_dump(),
        "command": command,
    }
