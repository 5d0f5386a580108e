"""What the source of TRL and Transformers says of SFTConfig is what an import says."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from hlora.config.trl_arguments import sft_types, trackers

VALUES: tuple[Any, ...] = (None, True, 3, 0.5, "text", "0.5", ["a"], [1], {"a": 1}, {"a": "b"})


def accepts(kind: Any, value: Any) -> bool:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return False
    return True


def test_every_argument_is_known_and_no_other() -> None:
    assert set(sft_types()) == {field.name for field in fields(SFTConfig) if field.init}


def test_a_value_fits_the_type_that_is_read_where_it_fits_the_type_that_is_imported() -> None:
    imported, compared = get_type_hints(SFTConfig), 0
    for name, kind in sft_types().items():
        if kind is Any or get_origin(kind) is Literal:
            continue
        for value in VALUES:
            if accepts(imported[name], value):
                assert accepts(kind, value), (name, value)
            elif "Any" not in str(kind):
                assert not accepts(kind, value), (name, value)
            compared += 1
    assert compared > 800


def test_enumerations_are_their_values_and_trackers_those_of_transformers() -> None:
    assert get_args(sft_types()["lr_scheduler_type"]) == tuple(each.value for each in SchedulerType)
    assert get_args(sft_types()["optim"]) == tuple(each.value for each in OptimizerNames)
    assert set(trackers()) == {*INTEGRATION_TO_CALLBACK, "all", "none"}
