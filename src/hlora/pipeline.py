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
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from hlora import data, report
from hlora.budget import ForgettingBudget, SampleProbe, TextProbe, parse_budget
from hlora.config import GeneralSource, ImportanceConfig, RunConfig
from hlora.errors import ConfigError, DataError
from hlora.evaluation import add_forgetting, evaluate
from hlora.files import building, write_text
from hlora.fisher import fisher_information, pack
from hlora.importance import Importance
from hlora.models import attach_lora, load_base
from hlora.penalty import ImportancePenalty, layer_coefficients
from hlora.recorder import ImportanceRecorder
from hlora.trainer import sft_arguments, train

logger = logging.getLogger("hlora")

_PROBE_SAMPLES = 64  # of the base model, for a budget without probe texts

History = list[dict[str, Any]]


def run(config: RunConfig, command: str = "hlora run") -> dict[str, Any]:
    """Record, tune, evaluate and report; returns what results.json holds.

    The output directory gets config.yaml, importance/, adapter/ (PEFT), results.json, report.html and the
    TensorBoard logs of each phase.
    """
    job = Job.open(config)
    results = _start(job, command)
    _measure(job, results, "base", job.base)

    with _timed(results, "record"):
        model, importance, results["history"]["record"] = record_phase(job)
    importance.save(job.output / "importance")
    results["importance"] = describe(importance, config)
    if not importance.without_move:
        _measure(job, results, "after_general", model)
    model.unload()

    with _timed(results, "tune"):
        model, results["history"]["tune"] = tune_phase(job, importance)
    save_adapter(model, job.output / "adapter")
    _measure(job, results, "hlora", model)
    model.unload()

    for arm in config.baselines:
        with _timed(results, arm):
            model, results["history"][arm] = baseline_phase(job, importance if arm == "lora_nu_mu" else None)
        _measure(job, results, arm, model)
        model.unload()
    return finish(job, results)


@dataclass
class Job:
    """A configuration, its base model and its output directory. Data are read when first asked for."""

    config: RunConfig
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    output: Path
    recorded: tuple[ImportanceConfig, ...] = ()
    """A comparison's: every kind of importance that its general phases record at once."""

    @classmethod
    def open(cls, config: RunConfig) -> Job:
        """Check what can be checked before hours of training, load the model, make the output directory."""
        output = Path(config.output)
        try:
            output.mkdir(parents=True, exist_ok=True)
            write_text(output / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False))
        except OSError as error:
            raise ConfigError(
                f"output: {output} cannot be written ({error.strerror}). Name another directory."
            ) from None
        for arguments in (config.training.of_record(), config.training.of_tune()):
            sft_arguments(output, arguments, config.seed)
        base, tokenizer = load_base(config.model)
        job = cls(config, base, tokenizer, output)
        job.domain  # noqa: B018  # a wrong row is reported now, not after the general phase
        return job

    @cached_property
    def general(self) -> data.GeneralText:
        general, evaluation, seed = self.config.general, self.config.evaluation, self.config.seed
        return data.general_text(general, evaluation, self.base, self.tokenizer, seed, self.output)

    @cached_property
    def domain(self) -> data.DomainRows:
        return data.domain_rows(self.config.domain, self.config.evaluation.max_rows, self.config.seed)


def record_phase(job: Job) -> tuple[PeftModel, Importance, History]:
    """Record importance on general text; returns the model at θ^ν, Ω and the losses.

    The path integral of LoRA training (Eqs. 7–13), or the squared gradients at the base model, where θ^ν is θ₀.
    """
    config, options = job.config, job.config.importance
    model = attach_lora(job.base, config.lora, config.seed)
    if options.method == "squared_gradients":
        return model, squared_gradients(job, model), []
    recorder = recorder_for(model, options)
    arguments = config.training.of_record()
    logs = job.output / "logs" / "record"
    callbacks = [recorder.callback(options.stop_at_move)]
    history = train(model, job.tokenizer, job.general.dataset(), logs, arguments, config.seed, callbacks)
    return model, recorder.consolidate(options.xi, job.general.facts), history


def recorder_for(model: PeftModel, options: ImportanceConfig) -> ImportanceRecorder:
    """The recorder of a path integral, as configured."""
    chosen = options.model_dump(include={"encoding", "gradient", "flush_every", "offload"})
    return ImportanceRecorder(model, **chosen)


def squared_gradients(job: Job, model: PeftModel) -> Importance:
    """Ω of the job's general text without a general phase: its squared gradients at the base model."""
    options = job.config.importance
    importance = fisher_information(
        model,
        job.tokenizer,
        job.general.train,
        options.sequences,
        options.sequence_length,
        job.config.seed,
        at_most=True,
        encoding=options.encoding,
        labels="text",
        gradient=options.gradient,
    )
    importance.provenance["data"] = job.general.facts
    return importance


def tune_phase(job: Job, importance: Importance) -> tuple[PeftModel, History]:
    """LoRA on the domain under the penalty (Eqs. 14–16); returns the tuned model and the losses."""
    options = job.config.penalty
    model, penalty = protected(job, importance, options.phi, options.layer_weights)
    return model, train_on_domain(job, model, "tune", penalty)


def protected(job: Job, importance: Importance, phi: float, layer_weights: str) -> tuple[PeftModel, ImportancePenalty]:
    """The model where its domain phase starts, θ^ν or the base model by `penalty.anchor`, and the penalty."""
    options = job.config.penalty
    model = attach_lora(job.base, job.config.lora, job.config.seed)
    if options.anchor == "general":
        importance.load_adapter_into(model)
    scale, group, anchor, offload = options.phi_scale, options.group, options.anchor, job.config.importance.offload
    return model, ImportancePenalty(model, importance, phi, layer_weights, scale, group, anchor=anchor, offload=offload)


def baseline_phase(job: Job, start: Importance | None) -> tuple[PeftModel, History]:
    """The same domain phase without a penalty: from a fresh adapter, LoRA(μ), or from θ^ν, LoRA(ν+μ)."""
    model = attach_lora(job.base, job.config.lora, job.config.seed)
    if start is not None:
        start.load_adapter_into(model)
    return model, train_on_domain(job, model, "lora_nu_mu" if start else "lora_mu", None)


def train_on_domain(job: Job, model: PeftModel, phase: str, penalty: ImportancePenalty | None = None) -> History:
    """The domain phase of any method: the same arguments, seed and data order, with or without a penalty.

    A forgetting budget, where the configuration has one, steers the penalty.
    """
    arguments = job.config.training.of_tune()
    logs = job.output / "logs" / phase
    callbacks: list[TrainerCallback] = []
    if penalty is not None:
        callbacks.append(penalty.callback())
        if job.config.penalty.budget is not None:
            callbacks.append(forgetting_budget(job, model, penalty).callback())
    return train(model, job.tokenizer, job.domain.dataset(), logs, arguments, job.config.seed, callbacks)


def forgetting_budget(job: Job, model: PeftModel, penalty: ImportancePenalty) -> ForgettingBudget:
    """The configured budget on its probe: the worst of the probe texts, or the base model's own samples."""
    options, seed = job.config.penalty, job.config.seed
    assert options.budget is not None
    if options.probe_texts:
        texts = data.probe_texts(options.probe_texts, job.general)
        probe: TextProbe | SampleProbe = TextProbe(model, job.tokenizer, texts, window=job.config.evaluation.window)
    else:
        source = GeneralSource(source="model", samples=_PROBE_SAMPLES)
        with model.disable_adapter():
            samples = data.model_samples(source, model, job.tokenizer, seed, job.output)
        probe = SampleProbe(model, pack(job.tokenizer, samples, _PROBE_SAMPLES, source.sample_tokens, at_most=True))
    return ForgettingBudget(penalty, probe, parse_budget(options.budget), options.probe_every)


def record(config: RunConfig) -> Path:
    """The general phase alone; returns the importance directory."""
    job = Job.open(config)
    _, importance, _ = record_phase(job)
    return importance.save(job.output / "importance")


def tune(config: RunConfig) -> Path:
    """The domain phase alone, from <output>/importance; returns the directory of the PEFT adapter."""
    importance = Importance.load(Path(config.output) / "importance")
    job = Job.open(config)
    model, _ = tune_phase(job, importance)
    return save_adapter(model, job.output / "adapter")


def evaluate_output(config: RunConfig, command: str = "hlora evaluate") -> dict[str, Any]:
    """Evaluate the base model and <output>/adapter, and write results.json and the report."""
    adapter = Path(config.output) / "adapter"
    if not (adapter / "adapter_model.safetensors").is_file():
        raise DataError(f"{adapter}: no adapter_model.safetensors. Make it with `hlora tune` or `hlora run` first.")
    job = Job.open(config)
    results = _start(job, command)
    _measure(job, results, "base", job.base)
    model = PeftModel.from_pretrained(job.base, str(adapter))
    _measure(job, results, "hlora", model)
    if (job.output / "importance").is_dir():
        results["importance"] = describe(Importance.load(job.output / "importance"), config)
    return finish(job, results)


def save_adapter(model: PeftModel, directory: Path) -> Path:
    """Save the adapter as PEFT does, whole or not at all."""
    with building(directory) as fresh:
        model.save_pretrained(str(fresh))
    return directory


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


def read_results(output: Path) -> dict[str, Any]:
    """results.json of a run. Raises DataError when it is absent or damaged."""
    try:
        return json.loads((output / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{output}: no readable results.json ({error}). Make it with `hlora run` or `hlora evaluate`."
        ) from None


def measure(job: Job, model: Any) -> dict[str, Any]:
    """Every measure of one model on the job's evaluation texts and test rows (see evaluation.evaluate)."""
    return evaluate(model, job.tokenizer, job.general.evaluation, job.domain, job.config.evaluation)


def _measure(job: Job, results: dict[str, Any], arm: str, model: Any) -> None:
    logger.info("evaluating: %s", arm)
    with _timed(results, f"evaluate {arm}"):
        results["arms"][arm] = measure(job, model)
    add_forgetting(results["arms"][arm], results["arms"]["base"])


@contextmanager
def _timed(results: dict[str, Any], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    results["seconds"][phase] = time.perf_counter() - started


def provenance(base: PreTrainedModel, data_facts: dict[str, Any]) -> dict[str, Any]:
    """Versions, hardware, model size and data, for a results file."""
    device = base.device
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    packages = ("hlora", "torch", "transformers", "peft", "trl", "datasets", "lm_eval")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "hardware": f"{hardware}, {os.cpu_count()} cores, {device.type}, {str(base.dtype).removeprefix('torch.')}",
        "parameters": base.num_parameters(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "data": data_facts,
    }


def _start(job: Job, command: str) -> dict[str, Any]:
    facts = {"general": job.general.facts, "domain": job.domain.facts}
    return {
        "arms": {},
        "seconds": {},
        "history": {},
        "importance": {},
        "provenance": {"seed": job.config.seed, **provenance(job.base, facts)},
        "config": job.config.model_dump(),
        "command": command,
    }


def _processor() -> str:
    """Name of the CPU; Linux keeps it in a file that `platform` does not read."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
