"""The whole job, read first: record importance on general text, tune on the domain under it, evaluate, report."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DistributedType
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from hlora import checkpoint, data, report
from hlora.adapters import adapted_matrices
from hlora.budget import ForgettingBudget, SampleProbe, TextProbe
from hlora.config import CompareConfig, GeneralSource, ImportanceConfig, RunConfig
from hlora.distributed import (
    device_for,
    first_does,
    first_goes_first,
    is_first,
    is_sharded,
    lock_directory,
    shard,
    sharding,
    start,
    together,
    world,
)
from hlora.dtensor import whole
from hlora.errors import ArtifactError, ConfigError, DataError, first_line
from hlora.evaluation import add_forgetting, evaluate
from hlora.files import building, make_directory, write_text
from hlora.fisher import fisher_information, pack
from hlora.importance import Importance
from hlora.layer_weights import layer_coefficients
from hlora.models import attach_lora, check_lengths, load_base, pick_device
from hlora.penalty import ImportancePenalty
from hlora.recorder import ImportanceRecorder
from hlora.redaction import redacted, without_secret_fields
from hlora.saved_adapter import load_adapter
from hlora.trainer import sft_arguments, train
from hlora.units import parse_budget

logger = logging.getLogger("hlora")

UNFINISHED = "unfinished.json"  # what a run has finished so far; absent once it is done
_PARTS = ("common", "record", "tune")
_PROBE_SAMPLES = 64  # of the base model, for a budget without probe texts

History = list[dict[str, Any]]


def run(config: RunConfig, command: str = "hlora run") -> dict[str, Any]:
    """Record, tune, evaluate and report; returns what results.json holds.

    The output directory gets config.yaml, importance/, adapter/ (PEFT), results.json, report.html and the
    TensorBoard logs of each phase. A run that was interrupted goes on: from what it had finished, and within a phase
    from its last complete checkpoint.

    Every process of a torchrun or accelerate launch calls it: the phases are divided among them (DDP, FSDP2), the first
    evaluates and writes, and all return the same. They need the output directory in common.

    Raises ConfigError when another process works on the output directory.
    """
    with _opened(config) as job:
        results = _unfinished(job, command)
        _measure(job, results, "base", lambda: job.base)

        importance = _recorded(job, results)
        if not importance.without_move:
            _measure(job, results, "after_general", lambda: at_general_adapter(job, importance))

        adapter = _tuned(job, results, importance)
        _measure(job, results, "hlora", lambda: load_adapter(job.base, adapter))

        for arm in config.baselines:
            start = importance if arm == "lora_nu_mu" else None
            _measure(job, results, arm, partial(_baseline, job, results, arm, start))
        return first_does(lambda: finish(job, results))


@contextmanager
def _opened(config: RunConfig, resumable: bool = True, importance: Importance | None = None) -> Iterator[Job]:
    """The job, its output directory locked by this process, or by the launch that it is one of."""
    start(config.model.device)
    with lock_directory(Path(config.output)):
        yield Job.open(config, resumable, importance)


def _recorded(job: Job, results: dict[str, Any]) -> Importance:
    """The general phase's importance; from the disk, where this run had finished the phase before."""
    directory = job.output / "importance"
    if "record" in results["seconds"]:
        return Importance.load(directory)
    with _timed(job, results, "record"):
        model, importance, results["history"]["record"] = record_phase(job)
        with together():
            importance.save(directory)
        results["importance"] = describe(importance, job.config)
    job.release(model)
    return importance


def _tuned(job: Job, results: dict[str, Any], importance: Importance) -> Path:
    """Directory of the domain phase's adapter."""
    directory = job.output / "adapter"
    if "tune" not in results["seconds"]:
        with _timed(job, results, "tune"):
            model, results["history"]["tune"] = tune_phase(job, importance)
            save_adapter(model, directory)
        job.release(model)
    return directory


def _baseline(job: Job, results: dict[str, Any], arm: str, start: Importance | None) -> PeftModel:
    with _timed(job, results, arm):
        model, results["history"][arm] = baseline_phase(job, start)
    return model


@dataclass
class Job:
    """A configuration, its base model and its output directory. Data are read when first asked for."""

    config: RunConfig
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    output: Path
    recorded: tuple[ImportanceConfig, ...] = ()
    """A comparison's: every kind of importance that its general phases record at once."""
    resumable: bool = False
    """Whether its phases keep checkpoints, and go on from those that are there."""

    @classmethod
    def open(cls, config: RunConfig, resumable: bool = False, importance: Importance | None = None) -> Job:
        """Load the model, make the output directory, and check what can be checked before hours of training.

        importance: what a domain phase will be held by. Nothing that is there is changed until all of it fits.
        """
        output = Path(config.output)
        with together():
            _check_sharding(config)
            make_directory(output)
            on_cpu = {"use_cpu": pick_device(config.model.device).type == "cpu"}
            for arguments in (config.training.of_record(), config.training.of_tune()):
                sft_arguments(output, {**on_cpu, **arguments}, config.seed)
        base, tokenizer = first_goes_first(lambda: load_base(config.model))
        check_lengths(base, lengths(config))
        job = cls(config, base, tokenizer, output, resumable=resumable)
        with together():
            job.domain  # noqa: B018  # a wrong row is reported now, not after the general phase
        job.general  # noqa: B018  # read by every process
        with together():
            data.probe_texts(config.penalty.probe_texts, job.general)
            if importance is None:
                model = attach_lora(base, config.lora, config.seed)
                adapted_matrices(model)
            else:
                model, _ = protected(job, importance, config.penalty.phi, config.penalty.layer_weights)
            model.unload()
        return job

    def release(self, model: Any) -> None:
        """Take the adapter off the base model. One that was sharded stays so, and is loaded anew instead."""
        if is_sharded(model):
            self.base, _ = first_goes_first(lambda: load_base(self.config.model))
        elif isinstance(model, PeftModel):
            model.unload()

    def keep_config(self) -> None:
        """Write the resolved configuration beside what it makes."""
        write_text(self.output / "config.yaml", yaml.safe_dump(redacted(self.config.model_dump()), sort_keys=False))

    @cached_property
    def general(self) -> data.GeneralText:
        general, evaluation, seed = self.config.general, self.config.evaluation, self.config.seed
        read = partial(data.general_text, general, evaluation, self.base, self.tokenizer, seed, self.output)
        return first_goes_first(read)  # the model's own samples are kept in the output directory

    @cached_property
    def domain(self) -> data.DomainRows:
        space = data.Space.of(self.base, self.tokenizer, self.config.training.of_tune())
        return data.domain_rows(self.config.domain, self.config.evaluation.max_rows, self.config.seed, space)


def _check_sharding(config: RunConfig) -> None:
    """Raises ConfigError for what a launch that shards (FSDP2) cannot do, by field."""
    if not sharding():
        return
    unsupported = {
        "model.quantization": config.model.quantization is not None,
        "general.source: model": config.general.source == "model",
        "importance.method: squared_gradients": config.importance.method == "squared_gradients",
        "penalty.budget without penalty.probe_texts": config.penalty.budget is not None
        and not config.penalty.probe_texts,
    }
    for field, is_set in unsupported.items():
        if is_set:
            raise ConfigError(
                f"{field} cannot be used where the model is sharded (FSDP2). Launch with torchrun (DDP), or leave it "
                "out (docs/guides/distributed.md)."
            )
    on_cpu = pick_device(config.model.device).type == "cpu"
    if Accelerator(cpu=on_cpu).distributed_type is not DistributedType.FSDP:
        raise ConfigError(
            "this launch asks for FSDP2, and Accelerate shards on accelerators alone. Launch with torchrun (DDP) here."
        )


def lengths(config: RunConfig | CompareConfig) -> dict[str, int | None]:
    """Tokens of a row by field, for those that the user has set; TRL's own default of max_length is for any model."""
    training, importance, evaluation = config.training, config.importance, config.evaluation
    found = {f"training.{part}.max_length": getattr(training, part).get("max_length") for part in _PARTS}
    if "window" in evaluation.model_fields_set:
        found["evaluation.window"] = min(evaluation.window, evaluation.max_tokens)
    if importance.method == "squared_gradients":
        found["importance.sequence_length"] = importance.sequence_length
    if config.general.source == "model":
        found["general.sample_tokens"] = config.general.sample_tokens
    return found


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
    dataset = job.general.dataset()
    history = train(model, job.tokenizer, dataset, logs, arguments, config.seed, callbacks, resumable=job.resumable)
    return model, recorder.consolidate(options.xi, job.general.facts), history


def at_general_adapter(job: Job, importance: Importance) -> PeftModel:
    """The model at θ^ν."""
    model = attach_lora(job.base, job.config.lora, job.config.seed)
    importance.load_adapter_into(model)
    return model


def recorder_for(model: PeftModel, options: ImportanceConfig) -> ImportanceRecorder:
    """The recorder of a path integral, as configured."""
    return ImportanceRecorder(model, options.encoding)


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
        gradient=options.gradient or "exact",
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
    if options.anchor == "general":
        model = at_general_adapter(job, importance)
    else:
        model = attach_lora(job.base, job.config.lora, job.config.seed)
    scale, group, anchor = options.phi_scale, options.group, options.anchor
    return model, ImportancePenalty(model, importance, phi, layer_weights, scale, group, anchor=anchor)


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
    dataset, seed = job.domain.dataset(), job.config.seed
    return train(model, job.tokenizer, dataset, logs, arguments, seed, callbacks, resumable=job.resumable)


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
            samples = first_goes_first(partial(data.model_samples, source, model, job.tokenizer, seed, job.output))
        probe = SampleProbe(model, pack(job.tokenizer, samples, _PROBE_SAMPLES, source.sample_tokens, at_most=True))
    return ForgettingBudget(penalty, probe, parse_budget(options.budget), options.probe_every)


def record(config: RunConfig) -> Path:
    """The general phase alone; returns the importance directory."""
    with _opened(config) as job:
        results = _unfinished(job, "hlora record")
        _recorded(job, results)
        _forget(job)
        return job.output / "importance"


def tune(config: RunConfig) -> Path:
    """The domain phase alone, from <output>/importance; returns the directory of the PEFT adapter."""
    importance = Importance.load(Path(config.output) / "importance")
    with _opened(config, importance=importance) as job:
        _tuned(job, _unfinished(job, "hlora tune"), importance)
        _forget(job)
        return job.output / "adapter"


def evaluate_output(config: RunConfig, command: str = "hlora evaluate") -> dict[str, Any]:
    """Evaluate the base model and <output>/adapter, and write results.json and the report.

    Curves and times of the phases stay as an earlier results.json has them.
    """
    adapter = Path(config.output) / "adapter"
    with _opened(config, resumable=False) as job:
        _check_adapter(job, adapter)
        first_does(job.keep_config)
        results = first_does(lambda: _start(job, command))
        with suppress(DataError, KeyError):  # there may be none, or a damaged one, that this one replaces
            earlier = read_results(job.output)
            seconds = {k: v for k, v in earlier["seconds"].items() if not k.startswith("evaluate")}
            results |= {"history": earlier["history"], "seconds": seconds}
        _measure(job, results, "base", lambda: job.base)
        _measure(job, results, "hlora", lambda: load_adapter(job.base, adapter))
        if (job.output / "importance").is_dir():
            results["importance"] = describe(Importance.load(job.output / "importance"), config)
        return first_does(lambda: finish(job, results))


def _check_adapter(job: Job, directory: Path) -> None:
    """Raises ArtifactError when the adapter is not of the job's rank and base model, now and not after measuring that.

    The importance beside it, if there is one, knows the base model by its weights.
    """
    model = load_adapter(job.base, directory, job.config.lora.rank)
    recorded = job.output / "importance"
    if recorded.is_dir():
        importance = Importance.load(recorded)
        matrices = adapted_matrices(model, unprotected="warn")
        try:
            importance.covering([matrix for matrix in matrices if matrix.name in importance.matrices])
        except ArtifactError as error:
            raise ArtifactError(f"{recorded}: {error}") from None
    model.unload()


def save_adapter(model: PeftModel, directory: Path) -> Path:
    """Save the adapter as PEFT does, whole or not at all; in a group of processes the first does."""
    gathered = None
    if is_sharded(model):
        gathered = {name: whole(p.detach()) for name, p in model.named_parameters() if p.requires_grad}
    with together():
        if is_first():
            with building(directory) as fresh:
                model.save_pretrained(str(fresh), state_dict=gathered)
    return directory


def describe(importance: Importance, config: RunConfig) -> dict[str, Any]:
    """The `importance` part of results.json: what the artefact says of itself and the coefficients c_l used."""
    options = config.penalty
    weights = layer_coefficients(importance, options.layer_weights, options.group)
    return {**importance.describe(), "layer_weights": weights}


def finish(job: Job, results: dict[str, Any]) -> dict[str, Any]:
    """Write results.json and report.html."""
    results["provenance"]["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    results = redacted(results)
    write_text(job.output / "results.json", json.dumps(results, indent=1))
    report.write_report(results, job.output / "report.html")
    if job.resumable:  # an evaluation in between leaves what an interrupted run goes on from
        _forget(job)
    return results


def read_results(output: Path) -> dict[str, Any]:
    """results.json of a run. Raises DataError when it is absent or damaged."""
    try:
        return redacted(json.loads((output / "results.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{output}: no readable results.json ({error}). Make it with `hlora run` or `hlora evaluate`."
        ) from None


def measure(job: Job, model: Any) -> dict[str, Any]:
    """Every measure of one model on the job's evaluation texts and test rows (see evaluation.evaluate)."""
    return evaluate(model, job.tokenizer, job.general.evaluation, job.domain, job.config.evaluation)


def _measure(job: Job, results: dict[str, Any], arm: str, make: Callable[[], Any]) -> None:
    """Measure the model that `make` gives, unless this run has done so before."""
    if arm in results["arms"]:
        return
    model = make()
    logger.info("evaluating: %s", arm)
    with _timed(job, results, f"evaluate {arm}"):
        if sharding():
            shard(model)
        results["arms"][arm] = first_does(lambda: measure(job, model), in_step=sharding())
        add_forgetting(results["arms"][arm], results["arms"]["base"])
    job.release(model)


@contextmanager
def _timed(job: Job, results: dict[str, Any], phase: str) -> Iterator[None]:
    """Seconds of a phase; when it ends, what is finished so far goes to the disk."""
    started = time.perf_counter()
    yield
    before = results["seconds"].get(phase, 0.0)  # trained, but not measured, when the run was interrupted
    results["seconds"][phase] = before + time.perf_counter() - started
    if job.resumable:
        with together():
            if is_first():
                document = {**_made_from(job), "results": redacted(results)}
                write_text(job.output / UNFINISHED, json.dumps(document))


def _unfinished(job: Job, command: str) -> dict[str, Any]:
    """What an interrupted run of the same configuration and data had finished, or the start of a new one."""
    return first_does(lambda: _unfinished_here(job, command))


def _unfinished_here(job: Job, command: str) -> dict[str, Any]:
    try:
        kept = json.loads((job.output / UNFINISHED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        kept = {}
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s: %s; starting anew", job.output / UNFINISHED, first_line(error))
        kept = {}
    kept = kept if isinstance(kept, dict) else {}  # changed by hand
    mine = _made_from(job)
    another_number = kept.get("processes", mine["processes"]) != mine["processes"]
    if kept.get("made_from") == mine["made_from"] or (another_number and kept.get("by_rows") == mine["by_rows"]):
        logger.info("going on with the run of %s", kept["results"]["provenance"]["started"])
        return dict(kept["results"])
    if kept:
        logger.warning("output: the unfinished run in %s had other settings or data; starting anew", job.output)
    _forget(job)
    job.keep_config()
    results = _start(job, command)
    write_text(job.output / UNFINISHED, json.dumps({**mine, "results": redacted(results)}))
    return results


def _made_from(job: Job) -> dict[str, Any]:
    """Digests of what determines a run's results: as it is written, and with the rows of a step in place of the batch.

    By the second, a run goes on in another number of processes with batches that keep the rows of a step. Another
    token is no other run.
    """
    config = without_secret_fields(job.config.model_dump(exclude={"output"}))
    facts: dict[str, Any] = {"config": config, "hlora": version("hlora")}
    facts |= {"general": job.general.facts, "domain": job.domain.facts}
    written = _digest(facts)
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}  # Trainer's defaults
    phases = []
    for arguments in (job.config.training.of_record(), job.config.training.of_tune()):
        rows = world() * math.prod(arguments.get(name, default) for name, default in sizes.items())
        phases.append({k: v for k, v in arguments.items() if k not in sizes} | {"rows": rows})
    facts["config"]["training"] = phases
    return {"made_from": written, "by_rows": _digest(facts), "processes": world()}


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _forget(job: Job) -> None:
    """Remove what an interrupted run would go on from."""
    if not is_first():
        return
    (job.output / UNFINISHED).unlink(missing_ok=True)
    for phase in (job.output / "logs").glob("*"):
        checkpoint.remove(phase)


def provenance(base: PreTrainedModel, data_facts: dict[str, Any]) -> dict[str, Any]:
    """Versions, hardware, model size and data, for a results file."""
    device = device_for(base)
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
