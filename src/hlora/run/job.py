"""A configuration with its base model, data and output directory, checked before anything trains."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from accelerate import Accelerator, DistributedType
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hlora.config.run import RunConfig
from hlora.config.sections import ImportanceConfig
from hlora.data.domain import DomainRows, TokenLimits
from hlora.data.general import GeneralText, general_text, probe_texts
from hlora.data.validation import rows_of_run
from hlora.importance.artefact import Importance
from hlora.model.adapters import adapted_matrices
from hlora.model.base import load_base, pick_device
from hlora.model.lora import attach_lora
from hlora.model.saved_adapter import changes_base, load_adapter
from hlora.parallel.fsdp import is_sharded
from hlora.parallel.group import is_main, main_first, raise_on_all
from hlora.parallel.launch import sharding
from hlora.run.data_check import check_data
from hlora.run.inputs import KEPT, Inputs, inputs_of
from hlora.run.kept_predictions import KeptPredictions
from hlora.run.lengths import fit_lengths
from hlora.run.trial import check_arguments, try_phases
from hlora.system.errors import ConfigError
from hlora.system.files import make_directory, write_json, write_text
from hlora.system.redaction import redacted

if TYPE_CHECKING:
    from hlora.run.plan import Plan

logger = logging.getLogger("hlora")


@dataclass
class Job:
    """A configuration, its base model and its output directory. Data are read when first used."""

    config: RunConfig
    _base: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    output: Path
    recorded: tuple[ImportanceConfig, ...] = ()
    """In a comparison: every kind of importance that its general phases record at once."""
    resumable: bool = False
    """Whether the phases write checkpoints, and resume from those on the disk."""
    given: Importance | None = None
    """An importance recorded earlier, for the domain phase: the one that `importance.use` names, or the one on disk."""
    base_changed: bool = False
    """Whether an adapter on the base model has changed its weights."""
    plan: Plan | None = None
    """The phases of the run, for the progress line."""
    predictions: KeptPredictions = field(default_factory=KeptPredictions)
    """Of the models that tuned ones are compared with."""
    inputs: Inputs = field(default_factory=dict)
    """The files that the configuration names, as they were before they were read; in the main process."""

    @classmethod
    def open(cls, config: RunConfig, resumable: bool = False, given: Importance | None = None) -> Job:
        """Check everything that can be checked before hours of training: files, rows, model, lengths, both trainers.

        Changes nothing on disk until every check has passed, except that it makes the output directory.
        """
        output = Path(config.output)
        with raise_on_all():
            check_sharding(config)
            make_directory(output)
            check_arguments(config.training, output, pick_device(config.model.device))
            inputs = inputs_of(config) if is_main() else {}
            check_data(config)
        base, tokenizer = main_first(lambda: load_base(config.model))
        fitted = fit_lengths(config, base)
        job = cls(fitted, base, tokenizer, output, resumable=resumable, given=given, inputs=inputs)
        with raise_on_all():
            job.domain  # noqa: B018  # an unusable row is reported now, not after the general phase
        job.general  # noqa: B018  # read by every process
        with raise_on_all():
            probe_texts(config.penalty.probe_texts, job.general, config.general.column)
            model = attach_lora(base, config.lora, config.seed)
            adapted_matrices(model, unprotected=config.importance.unprotected)
            model.unload()
        logger.info("trying one step of each phase")
        try_phases(job)
        return job

    @property
    def base(self) -> PreTrainedModel:
        """The base model with the weights it was loaded with.

        In several processes: the first use after `release` may load the base again, so every process makes it.
        """
        if self._base is None:
            self._base, _ = main_first(lambda: load_base(self.config.model))
        return self._base

    @base.setter
    def base(self, base: PreTrainedModel) -> None:
        self._base = base

    def with_adapter(self, directory: Path, rank: int | None = None) -> PeftModel:
        """The base model with a saved adapter on it (see `load_adapter`). `release` takes the adapter off again."""
        self.base_changed = changes_base(directory)
        return load_adapter(self.base, directory, rank)

    def release(self, model: Any) -> None:
        """Take the adapter off the base model, or drop a base that is sharded or changed: `base` loads it again."""
        if is_sharded(model) or self.base_changed:
            self._base, self.base_changed = None, False
        elif isinstance(model, PeftModel):
            model.unload()

    def keep_config(self) -> None:
        """Write the resolved configuration to the output directory, and what its files were like."""
        write_json(self.output / KEPT, self.inputs)
        write_text(self.output / "config.yaml", yaml.safe_dump(redacted(self.config.for_a_file()), sort_keys=False))

    @cached_property
    def general(self) -> GeneralText:
        general, evaluation, seed = self.config.general, self.config.evaluation, self.config.seed
        read = partial(general_text, general, evaluation, self.base, self.tokenizer, seed, self.output)
        return main_first(read)  # the model's own samples are kept in the output directory

    @cached_property
    def domain(self) -> DomainRows:
        token_limits = TokenLimits.of(self.base, self.tokenizer, self.config.training.tune_arguments())
        return rows_of_run(self.config, token_limits)


def check_sharding(config: RunConfig) -> None:
    """Raises ConfigError that names the first field which a launch that shards (FSDP2) cannot serve."""
    if not sharding():
        return
    unsupported = {
        "model.quantization": config.model.quantization is not None,
        "general.source: model": config.general.source == "model",
        "importance.method: squared_gradients with penalty.anchor: base": config.in_one_pass,
        "penalty.budget without penalty.probe_texts": config.penalty.budget is not None
        and not config.penalty.probe_texts,
    }
    for name, is_set in unsupported.items():
        if is_set:
            raise ConfigError(
                f"{name} cannot be used with a sharded model (FSDP2). Launch with torchrun (DDP), or remove it "
                "(docs/guides/distributed.md)."
            )
    on_cpu = pick_device(config.model.device).type == "cpu"
    if Accelerator(cpu=on_cpu).distributed_type is not DistributedType.FSDP:
        raise ConfigError(
            "this launch asks for FSDP2, but Accelerate shards on accelerators only. Launch with torchrun (DDP) here."
        )
