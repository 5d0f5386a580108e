"""The section `training`: arguments of TRL's SFTConfig for both phases, checked before anything is imported."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args, get_origin

from pydantic import Field, TypeAdapter, ValidationError, field_validator

from hlora.config.sections import Section, values_in
from hlora.config.spelling import did_you_mean, nearest
from hlora.config.trl_arguments import sft_types, trackers
from hlora.system.redaction import MARK, is_secret_name

_TOKENIZER = "training and scoring take special tokens and chat template from the model's tokenizer. Set it there"
_LAUNCH = (
    "ask for it in the launch, as evaluation needs to know too: `accelerate launch --use_fsdp --fsdp_version 2` "
    "(docs/guides/distributed.md)"
)
_NOT_HERE = {
    "output_dir": "hlora sets it from `output`",
    "seed": "hlora sets it from `seed`",
    "resume_from_checkpoint": "the same command, given again, resumes an interrupted run",
    "push_to_hub": "hlora uploads nothing while it trains. Afterwards: hlora push <output>/adapter REPO",
    "assistant_only_loss": "hlora trains on the answer alone, which is each row's last assistant turn",
    "dataset_text_field": "name the column in general.column",
    "chat_template_path": _TOKENIZER,
    "eos_token": _TOKENIZER,
    "pad_token": _TOKENIZER,
    "model_init_kwargs": "the section `model` says how the model is loaded",
    "fsdp": _LAUNCH,
    "deepspeed": "DeepSpeed takes the adapter's factors apart. For a model too large for one device, shard by FSDP2: "
    f"{_LAUNCH}",
}
"""Arguments that hlora sets itself or could only ignore, and what to do instead."""

_EVALUATING = ("eval_strategy", "eval_on_start", "do_eval", "load_best_model_at_end", "metric_for_best_model")

_AT_LEAST_ONE = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length")  # TRL finds out too late


class TrainingConfig(Section):
    general_rate: float = Field(default=0.25, gt=0)
    """Learning rate of the general phase as a share of the one in `common`, unless `record` sets its own. A low rate
    spares text unlike the general text (docs/results.md). The paper uses 1."""
    common: dict[str, Any] = {}
    """Arguments of TRL's SFTConfig for both phases (learning_rate, max_length, ...)."""
    record: dict[str, Any] = {}
    """SFTConfig arguments for the general phase only; they override `common`."""
    tune: dict[str, Any] = {}
    """SFTConfig arguments for the domain phase only; they override `common`."""

    @field_validator("common", "record", "tune")
    @classmethod
    def _are_sft_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        return {name: _checked(name, value) for name, value in arguments.items()}

    @field_validator("common", "record")
    @classmethod
    def _evaluate_no_general_text(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in filter(arguments.get, _EVALUATING):
            if arguments[name] != "no":
                raise ValueError(f"{name} cannot be set here: only the domain phase evaluates. Set it in training.tune")
        return arguments

    def record_arguments(self) -> dict[str, Any]:
        """Arguments of the general phase."""
        gentle = {k: self.general_rate * v for k, v in self.common.items() if k == "learning_rate"}
        return {"packing": True, **self.common, **gentle, **self.record}

    def tune_arguments(self) -> dict[str, Any]:
        """Arguments of the domain phase."""
        return {**self.common, **self.tune}


def with_evaluation(tune: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the domain phase, evaluated ten times if they do not say when.

    Trainer keeps the best of the checkpoints that it writes, so it writes one at each evaluation.
    """
    found = {"eval_strategy": "steps", **tune}
    if found["eval_strategy"] == "steps":
        found = {"eval_steps": 0.1, **found}
    if found.get("load_best_model_at_end"):
        found = {"save_strategy": found["eval_strategy"], **found}
        if "eval_steps" in found:
            found = {"save_steps": found["eval_steps"], **found}
    return found


def check_without_evaluation(training: TrainingConfig, instead: str) -> None:
    """Raises ValueError that names the first argument which needs validation rows."""
    for name in _EVALUATING:
        if training.tune.get(name) not in (None, False, "no"):
            raise ValueError(f"training.tune: {name} cannot be set here: {instead}")


def _checked(name: str, value: Any) -> Any:
    """The value of one argument. Raises ValueError that says what was expected."""
    types = sft_types()
    off = value is None or value is False or value == "no"
    if name in _NOT_HERE and (not off or name in ("output_dir", "seed")):
        raise ValueError(f"{name} cannot be set here: {_NOT_HERE[name]}")
    if name not in types:
        raise ValueError(f"{name!r} is not an argument of trl.SFTConfig{nearest(name, set(types))}")
    choices = [str(choice) for choice in get_args(types[name])] if get_origin(types[name]) is Literal else []
    if value is False and "no" in choices:
        return "no"  # YAML 1.1 reads a plain no as false
    got = MARK if is_secret_name(name) else repr(value)
    try:
        read = TypeAdapter(types[name]).validate_python(value)
    except ValidationError:
        if choices:
            raise ValueError(
                f"{name}: expected one of {', '.join(choices)}; got {got}{did_you_mean(value, choices)}"
            ) from None
        expected = getattr(types[name], "__name__", str(types[name]))
        raise ValueError(f"{name}: expected {expected} (trl.SFTConfig), got {got}") from None
    if isinstance(value, bool) and isinstance(read, int | float) and not isinstance(read, bool):
        raise ValueError(f"{name}: expected a number, got {got}")
    if isinstance(read, float) and not math.isfinite(read):
        raise ValueError(f"{name}: expected a finite number, got {got}")
    if name == "max_steps" and read == 0:
        raise ValueError("max_steps: expected at least 1, or -1 for num_train_epochs to count; got 0")
    if name == "num_train_epochs" and read <= 0:
        raise ValueError(f"num_train_epochs: expected more than 0, got {got}")
    if name == "learning_rate" and not 0 < read < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {got}")
    if name in _AT_LEAST_ONE and value is not None and float(value) < 1:
        raise ValueError(f"{name}: expected at least 1, got {got}")
    if name == "report_to":
        for tracker in values_in([] if value is None else value):
            if tracker not in trackers():
                raise ValueError(f"report_to: {tracker!r} is not a tracker{nearest(tracker, set(trackers()))}")
    return read if isinstance(value, str) else value  # a number, true or false in quotes
