"""Lengths in tokens: defaults are capped at the model's context, and a longer length set by the user is refused."""

from __future__ import annotations

from typing import TypeVar

from transformers import PreTrainedModel

from hlora.config.comparison import CompareConfig
from hlora.config.run import RunConfig
from hlora.model.base import check_lengths

_PARTS = ("common", "record", "tune")

Config = TypeVar("Config", RunConfig, CompareConfig)


def fit_lengths(config: Config, base: PreTrainedModel) -> Config:
    """A copy of the configuration with every default length capped at the model's context.

    Raises:
        ConfigError: A length that the user has set is above the context, with its field.
    """
    from trl import SFTConfig

    check_lengths(base, lengths(config))
    fitted = config.model_copy(deep=True)
    context = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if not context:
        return fitted
    training, evaluation = fitted.training, fitted.evaluation
    default = SFTConfig.max_length
    unset = any("max_length" not in arguments for arguments in (training.record_arguments(), training.tune_arguments()))
    if unset and default is not None and default > context:
        training.common["max_length"] = context
    evaluation.window = min(evaluation.window, context)
    fitted.importance.sequence_length = min(fitted.importance.sequence_length, context)
    fitted.general.sample_tokens = min(fitted.general.sample_tokens, context)
    if isinstance(fitted, CompareConfig):
        fitted.fisher.max_length = min(fitted.fisher.max_length, context)
    return fitted


def lengths(config: RunConfig | CompareConfig) -> dict[str, int | None]:
    """Tokens by field, of the lengths that the user has set and that a phase or a measure uses."""
    training, importance, evaluation = config.training, config.importance, config.evaluation
    found = {f"training.{part}.max_length": getattr(training, part).get("max_length") for part in _PARTS}
    if "window" in evaluation.model_fields_set:
        found["evaluation.window"] = min(evaluation.window, evaluation.max_tokens)
    in_one_pass = importance.method == "squared_gradients" and config.penalty.anchor == "base"
    if in_one_pass and "sequence_length" in importance.model_fields_set:
        found["importance.sequence_length"] = importance.sequence_length
    if config.general.source == "model" and "sample_tokens" in config.general.model_fields_set:
        found["general.sample_tokens"] = config.general.sample_tokens
    return found
