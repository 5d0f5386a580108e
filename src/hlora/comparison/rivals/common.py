"""Helpers of several rivals: attach PEFT's other adapters, check a strength or a model."""

from __future__ import annotations

import math

from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from hlora.system.errors import CannotRun, ConfigError, first_line


def adapted(base: PreTrainedModel, config: PeftConfig, method: str) -> PeftModel:
    """The model with one of PEFT's adapters. Raises CannotRun if PEFT refuses the model."""
    try:
        model = get_peft_model(base, config)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise CannotRun(f"PEFT's {method} does not take this model ({first_line(error)})") from None
    assert isinstance(model, PeftModel)
    return model


def check_not_quantised(base: PreTrainedModel, method: str) -> None:
    """Raises CannotRun for a quantised model."""
    if getattr(base, "is_quantized", False):
        raise CannotRun(f"{method} decomposes the weights themselves, and those of this model are quantised")


def between_0_and_1(strength: float | None, method: str, meaning: str) -> float:
    """Return the strength. Raises ConfigError unless it is above 0 and below 1."""
    if strength is None or not 0 < strength < 1:
        raise ConfigError(f"{method}: expected a strength between 0 and 1, {meaning}; got {strength}")
    return float(strength)


def at_least_0(strength: float | None, method: str, symbol: str) -> float:
    """Return the strength. Raises ConfigError unless it is a finite number of 0 or more."""
    if strength is None or not 0 <= strength < math.inf:
        raise ConfigError(f"{method}: expected a strength {symbol} of 0 or more, got {strength}")
    return float(strength)
