"""The section `training`: arguments of TRL's SFTConfig for both phases, checked before anything trains."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError, field_validator

from hlora.config.sections import Section, values_in
from hlora.config.spelling import nearest
from hlora.system.redaction import MARK, is_secret_name


class TrainingConfig(Section):
    general_rate: float = Field(default=0.25, gt=0)
    """Learning rate of the general phase as a share of `common`'s, where `record` names none. A gentle general phase
    spares text unlike its own (docs/results.md); 1 is the paper's."""
    common: dict[str, Any] = {}
    """Arguments of TRL's SFTConfig for both phases (learning_rate, max_length, ...)."""
    record: dict[str, Any] = {}
    """SFTConfig arguments for the general phase only."""
    tune: dict[str, Any] = {}
    """SFTConfig arguments for the domain phase only."""

    @field_validator("common", "record", "tune")
    @classmethod
    def _are_sft_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        types = _sft_types()
        for name, value in arguments.items():
            if name not in types:
                raise ValueError(f"{name!r} is not an argument of trl.SFTConfig{nearest(name, set(types))}")
            try:
                read = TypeAdapter(types[name]).validate_python(value)
            except ValidationError:
                expected = getattr(types[name], "__name__", str(types[name]))
                got = MARK if is_secret_name(name) else repr(value)
                raise ValueError(f"{name}: expected {expected} (trl.SFTConfig), got {got}") from None
            if isinstance(value, bool) and isinstance(read, int | float) and not isinstance(read, bool):
                raise ValueError(f"{name}: expected a number, got {value!r}")
            if isinstance(read, float) and not math.isfinite(read):
                raise ValueError(f"{name}: expected a finite number, got {value!r}")
            if name == "max_steps" and read == 0:
                raise ValueError("max_steps: expected at least 1, or -1 for num_train_epochs to count; got 0")
            if name == "report_to":
                _are_trackers(value)
            if name == "learning_rate" and not 0 < read < math.inf:
                raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
            if isinstance(value, str) and isinstance(read, float):
                arguments[name] = read  # a number in quotes
            if name in _AT_LEAST_ONE and value is not None and float(value) < 1:
                raise ValueError(f"{name}: expected at least 1, got {value!r}")
        return arguments

    def of_record(self) -> dict[str, Any]:
        """Arguments of the general phase."""
        gentle = {k: self.general_rate * v for k, v in self.common.items() if k == "learning_rate"}
        return {"packing": True, **self.common, **gentle, **self.record}

    def of_tune(self) -> dict[str, Any]:
        """Arguments of the domain phase."""
        return {**self.common, **self.tune}


@cache
def _sft_types() -> dict[str, Any]:
    from trl import SFTConfig

    types = get_type_hints(SFTConfig)
    return {name: types[name] for name in types if name not in ("output_dir", "seed")}  # those are the run's own


def _are_trackers(value: Any) -> None:
    from transformers.integrations import INTEGRATION_TO_CALLBACK

    for name in values_in([] if value is None else value):
        if name not in (known := sorted({*INTEGRATION_TO_CALLBACK, "all", "none"})):
            raise ValueError(f"report_to: {name!r} is no tracker{nearest(name, set(known))}")


_AT_LEAST_ONE = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length")  # TRL finds out too late
