"""A configuration with its base model, data and output directory, checked before anything trains."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator, DistributedType
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hlora.config.comparison import CompareConfig
from hlora.config.run import RunConfig
from hlora.config.sections import ImportanceConfig
from hlora.data.domain import DomainRows, Space, domain_rows
from hlora.data.general import GeneralText, general_text, probe_texts
from hlora.importance.artefact import Importance
from hlora.model.adapters import adapted_matrices
from hlora.model.base import check_lengths, load_base, pick_device
from hlora.model.lora import attach_lora
from hlora.parallel.fsdp import is_sharded
from hlora.parallel.group import first_goes_first, together
from hlora.parallel.launch import sharding
from hlora.system.errors import ConfigError
from hlora.system.files import make_directory, write_text
from hlora.system.redaction import redacted
from hlora.training.train import sft_arguments

_PARTS = ("common", "record", "tune")


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
    given: Importance | None = None
    """An importance recorded before, for its domain phase: the one that `importance.use` names, or that is there."""

    @classmethod
    def open(cls, config: RunConfig, resumable: bool = False, given: Importance | None = None) -> Job:
        """Load the model, make the output directory, and check what can be checked before hours of training.

        Nothing that is there is changed until all of it fits.
        """
        output = Path(config.output)
        with together():
            check_sharding(config)
            make_directory(output)
            on_cpu = {"use_cpu": pick_device(config.model.device).type == "cpu"}
            for arguments in (config.training.of_record(), config.training.of_tune()):
                sft_arguments(output, {**on_cpu, **arguments}, config.seed)
        base, tokenizer = first_goes_first(lambda: load_base(config.model))
        check_lengths(base, lengths(config))
        job = cls(config, base, tokenizer, output, resumable=resumable, given=given)
        with together():
            job.domain  # noqa: B018  # a wrong row is reported now, not after the general phase
        job.general  # noqa: B018  # read by every process
        with together():
            probe_texts(config.penalty.probe_texts, job.general)
            model = attach_lora(base, config.lora, config.seed)
            adapted_matrices(model)
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
    def general(self) -> GeneralText:
        general, evaluation, seed = self.config.general, self.config.evaluation, self.config.seed
        read = partial(general_text, general, evaluation, self.base, self.tokenizer, seed, self.output)
        return first_goes_first(read)  # the model's own samples are kept in the output directory

    @cached_property
    def domain(self) -> DomainRows:
        space = Space.of(self.base, self.tokenizer, self.config.training.of_tune())
        return domain_rows(self.config.domain, self.config.evaluation.max_rows, self.config.seed, space)


def check_sharding(config: RunConfig) -> None:
    """Raises ConfigError for what a launch that shards (FSDP2) cannot do, by field."""
    if not sharding():
        return
    unsupported = {
        "model.quantization": config.model.quantization is not None,
        "general.source: model": config.general.source == "model",
        "importance.method: squared_gradients with penalty.anchor: base": config.in_one_pass,
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
    if importance.method == "squared_gradients" and config.penalty.anchor == "base":
        found["importance.sequence_length"] = importance.sequence_length
    if config.general.source == "model":
        found["general.sample_tokens"] = config.general.sample_tokens
    return found
