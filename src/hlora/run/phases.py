"""The phases of a run: the general phase, which records importance, and the domain phase, with or without penalty."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback

from hlora.budget.budget import ForgettingBudget
from hlora.budget.probes import SampleProbe, TextProbe
from hlora.budget.watch import ForgettingWatch
from hlora.config.paths import located
from hlora.config.sections import GeneralSource, ImportanceConfig
from hlora.config.units import parse_budget
from hlora.data.general import probe_texts
from hlora.data.packing import pack
from hlora.data.samples import model_samples
from hlora.importance.artefact import Importance
from hlora.importance.penalty import ImportancePenalty, PenaltyOptions
from hlora.importance.recorder import ImportanceRecorder
from hlora.importance.squared_gradients import fisher_information
from hlora.model.lora import attach_lora
from hlora.parallel.dtensor import full_tensor
from hlora.parallel.fsdp import is_sharded
from hlora.parallel.group import is_main, main_first, raise_on_all
from hlora.report.card import adapter_card
from hlora.run.job import Job
from hlora.run.reuse import recording_settings
from hlora.system.choices import LayerWeights
from hlora.system.files import atomic_directory
from hlora.training.train import train
from hlora.training.validation import StopWithoutGain

if TYPE_CHECKING:
    from trl import SFTTrainer

logger = logging.getLogger("hlora")

_PROBE_SAMPLES = 64  # samples of the base model for a budget without probe texts

History = list[dict[str, Any]]


def record_phase(job: Job) -> tuple[PeftModel, Importance, History]:
    """Record importance on general text. Trains nothing if importance is one pass of squared gradients at the base.

    Returns:
        The model after the general phase, its importance, and the losses.
    """
    config, options = job.config, job.config.importance
    model = attach_lora(job.base, config.lora, config.seed)
    if config.in_one_pass:
        return model, squared_gradients(job, model), []
    recorder = recorder_for(model, options, config.seed)
    arguments = config.training.record_arguments()
    logs = job.output / "logs" / "record"
    callbacks = [recorder.callback(options.stop_at_move)]
    dataset = job.general.dataset(job.tokenizer, arguments)
    history = train(
        model,
        job.tokenizer,
        dataset,
        output=logs,
        arguments=arguments,
        seed=config.seed,
        callbacks=callbacks,
        resumable=job.resumable,
    )
    return model, _of_this_job(job, recorder.consolidate(options.xi, job.general.facts)), history


def at_general_adapter(job: Job, importance: Importance) -> PeftModel:
    """The model with the general adapter θ^ν."""
    model = attach_lora(job.base, job.config.lora, job.config.seed)
    importance.load_adapter_into(model)
    return model


def recorder_for(model: PeftModel, options: ImportanceConfig, seed: int) -> ImportanceRecorder:
    """The configured recorder of a general phase."""
    return ImportanceRecorder(
        model, options.encoding, unprotected=options.unprotected, method=options.method, seed=seed
    )


def squared_gradients(job: Job, model: PeftModel) -> Importance:
    """Importance without a general phase: squared gradients of the general text at the base model."""
    options = job.config.importance
    importance = fisher_information(
        model,
        job.tokenizer,
        job.general.train,
        examples=options.sequences,
        max_length=options.sequence_length,
        seed=job.config.seed,
        at_most=True,
        encoding=options.encoding,
        labels="text",
        gradient=options.gradient or "exact",
    )
    importance.provenance["data"] = job.general.facts
    return _of_this_job(job, importance)


def _of_this_job(job: Job, importance: Importance) -> Importance:
    """The importance with the settings that made it, and its base model named as in the configuration or by its place.

    Transformers may have recorded a path of its cache.
    """
    base = located(job.config.model.name)
    importance.provenance |= {"base_model": base, "recorded_with": recording_settings(job.config)}
    if importance.lora_config:
        importance.lora_config["base_model_name_or_path"] = base
    return importance


def tune_phase(job: Job, importance: Importance) -> tuple[PeftModel, History, Importance | None]:
    """LoRA on the domain under the penalty (Eqs. 14–16).

    Returns:
        The tuned model; the losses; and the importance for a next domain, which is the sum of `importance` and this
        domain's (Eq. 13), recorded during tuning and anchored at the tuned adapter. None if there is no such
        importance, as with the anchor "base".
    """
    options = job.config.penalty
    model, penalty = protected(job, importance, options.phi, options.layer_weights)
    recorder = domain_recorder(job, model, importance)
    history = train_on_domain(job, model, "tune", penalty, recorder=recorder)
    return model, history, None if recorder is None else _with_domain(job, importance, recorder)


def domain_recorder(job: Job, model: PeftModel, importance: Importance) -> ImportanceRecorder | None:
    """Records the domain as `importance` was recorded, to be added to it; None with the anchor "base"."""
    if job.config.penalty.anchor == "base":
        return None
    unprotected, seed = job.config.importance.unprotected, job.config.seed
    return ImportanceRecorder(model, importance.encoding, unprotected=unprotected, method=importance.method, seed=seed)


def _with_domain(job: Job, importance: Importance, recorder: ImportanceRecorder) -> Importance | None:
    if recorder.steps == 0:  # a scaler may have skipped them all; the tuned adapter is kept
        logger.warning("no step of the domain phase could be recorded, so no run can come after this one")
        return None
    domain = recorder.consolidate(importance.provenance.get("xi", job.config.importance.xi), job.domain.facts)
    return _of_this_job(job, importance + domain)


def protected(
    job: Job, importance: Importance, phi: float, layer_weights: LayerWeights | None
) -> tuple[PeftModel, ImportancePenalty]:
    """The model where its domain phase starts, at θ^ν or the base model (`penalty.anchor`), and the penalty."""
    options = job.config.penalty
    if options.anchor == "general":
        model = at_general_adapter(job, importance)
    else:
        model = attach_lora(job.base, job.config.lora, job.config.seed)
    chosen: PenaltyOptions = {
        "layer_weights": layer_weights,
        "phi_scale": options.phi_scale,
        "group": options.group,
        "anchor": options.anchor,
    }
    return model, ImportancePenalty(model, importance, phi, **chosen)


def check_fits(job: Job, importance: Importance) -> None:
    """Raises ArtifactError or AdapterError if `importance` cannot protect the domain phase."""
    model, _ = protected(job, importance, job.config.penalty.phi, job.config.penalty.layer_weights)
    model.unload()


def lora(job: Job) -> tuple[PeftModel, History]:
    """LoRA(μ): a fresh adapter on the domain, without a penalty."""
    model = attach_lora(job.base, job.config.lora, job.config.seed)
    return model, train_on_domain(job, model, "lora")


def lora_after_general(job: Job, *, importance: Importance) -> tuple[PeftModel, History]:
    """LoRA(ν+μ): from θ^ν on the domain, without a penalty."""
    model = at_general_adapter(job, importance)
    return model, train_on_domain(job, model, "lora_after_general")


def train_on_domain(
    job: Job,
    model: PeftModel,
    phase: str,
    penalty: ImportancePenalty | None = None,
    *,
    recorder: ImportanceRecorder | None = None,
    dataset: Dataset | None = None,
    trainer_class: type[SFTTrainer] | None = None,
    **changes: Any,
) -> History:
    """The domain phase of any method, with the same arguments, seed and data order.

    Args:
        job: The job.
        model: The model to train.
        phase: Name of the logs.
        penalty: The penalty, if the method has one. A configured forgetting budget steers it.
        recorder: Records the importance of the domain during training.
        dataset: Rows to train on, if not the domain's.
        trainer_class: A subclass of trl.SFTTrainer, for another loss.
        changes: Arguments of trl.SFTConfig that differ from the domain phase's.
    """
    arguments = {**job.config.training.tune_arguments(), **changes}
    logs = job.output / "logs" / phase
    callbacks: list[TrainerCallback] = [] if recorder is None else [recorder.callback()]
    if penalty is not None:
        callbacks.append(penalty.callback())
        if job.config.penalty.budget is not None:
            callbacks.append(forgetting_budget(job, model, penalty).callback())
    rows = job.domain.dataset(job.tokenizer) if dataset is None else dataset
    options: Any = {"callbacks": callbacks, "trainer_class": trainer_class, "resumable": job.resumable}
    if job.domain.validation:
        options["evaluation"] = job.domain.validation_dataset(job.tokenizer)
        callbacks += while_training(job, model)
    return train(model, job.tokenizer, rows, output=logs, arguments=arguments, seed=job.config.seed, **options)


def while_training(job: Job, model: PeftModel) -> list[TrainerCallback]:
    """What goes along with evaluations on validation rows: early stopping, and forgetting over the same steps.

    Forgetting is measured on `penalty.probe_texts`, or else on the start of the evaluation texts. A budget has a probe
    of its own.
    """
    config = job.config
    found: list[TrainerCallback] = []
    if config.domain.patience is not None:
        found.append(StopWithoutGain(config.domain.patience))
    if config.penalty.budget is None:
        texts = probe_texts(config.penalty.probe_texts, job.general, config.general.column) or job.general.evaluation
        found.append(ForgettingWatch(TextProbe(model, job.tokenizer, texts, window=config.evaluation.window)))
    return found


def forgetting_budget(job: Job, model: PeftModel, penalty: ImportancePenalty) -> ForgettingBudget:
    """The configured budget with its probe: the worst of the probe texts, or the base model's own samples."""
    options, seed = job.config.penalty, job.config.seed
    assert options.budget is not None
    if options.probe_texts:
        texts = probe_texts(options.probe_texts, job.general, job.config.general.column)
        probe: TextProbe | SampleProbe = TextProbe(model, job.tokenizer, texts, window=job.config.evaluation.window)
    else:
        source = GeneralSource(source="model", samples=_PROBE_SAMPLES)
        with model.disable_adapter():
            samples = main_first(partial(model_samples, source, model, job.tokenizer, seed, job.output))
        probe = SampleProbe(model, pack(job.tokenizer, samples, _PROBE_SAMPLES, source.sample_tokens, at_most=True))
    return ForgettingBudget(penalty, probe, parse_budget(options.budget), every=options.probe_every)


def save_adapter(job: Job, model: PeftModel, directory: Path) -> Path:
    """Save the adapter atomically in PEFT's format, with its tokenizer and card.

    adapter_config.json names the base model as in the configuration; a local one by its absolute path.

    In several processes the main one writes.
    """
    gathered = None
    if is_sharded(model):
        gathered = {name: full_tensor(p.detach()) for name, p in model.named_parameters() if p.requires_grad}
    facts = {"general": job.general.facts, "domain": job.domain.facts}
    card = adapter_card({"config": job.config.for_a_file(), "provenance": {"data": facts}})
    model.active_peft_config.base_model_name_or_path = located(job.config.model.name)
    with raise_on_all():
        if is_main():
            with atomic_directory(directory) as fresh:
                # False, since no embedding is adapted: PEFT would ask the hub whether the vocabulary changed.
                model.save_pretrained(str(fresh), state_dict=gathered, save_embedding_layers=False)
                job.tokenizer.save_pretrained(str(fresh))
                (fresh / "README.md").write_text(card, encoding="utf-8")
    return directory
