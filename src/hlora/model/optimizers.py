"""What hlora needs of an optimizer: that it trains the adapter, by steps after the backward pass, at a known rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hlora.model.adapters import AdaptedMatrix, check_whole, instead_of
from hlora.system.errors import AdapterError


def check_trained_by(optimizer: Any, matrices: list[AdaptedMatrix]) -> None:
    """Raises AdapterError when `optimizer` trains none of `matrices`: it belongs to another model or adapter."""
    if "deepspeed" in f"{type(optimizer).__module__}.{type(optimizer).__name__}".lower():
        raise AdapterError(instead_of("DeepSpeed"))
    check_whole(*(matrix.module for matrix in matrices))
    if type(optimizer).__name__ == "LayerWiseDummyOptimizer":
        raise AdapterError(steps_in_backward("a layer-wise optimizer"))
    check_trainable(matrices)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(factor) in trained for matrix in matrices for factor in matrix.parameters):
        raise AdapterError(
            f"this optimizer does not train {matrices[0].name} or any other matrix of adapter "
            f"{matrices[0].adapter_name!r} of this model. Give hlora the model that the trainer or optimizer was "
            "built on (trainer.model, if the trainer made the adapter from a peft_config)."
        )


def check_trainable(matrices: list[AdaptedMatrix]) -> None:
    """Raises AdapterError when every factor is frozen, as PeftModel.from_pretrained leaves an adapter."""
    if not any(factor.requires_grad for matrix in matrices for factor in matrix.parameters):
        adapter = matrices[0].adapter_name
        raise AdapterError(
            f"adapter {adapter!r} is frozen, so no step would change it. Load it with is_trainable=True, or make it "
            f"the trained one: model.set_adapter({adapter!r})"
        )


def learning_rate(group: Mapping[str, Any]) -> float:
    """η of a parameter group. Raises AdapterError where the optimizer chooses its own, as Adafactor(lr=None) does."""
    if group["lr"] is None:
        raise AdapterError(
            "this optimizer has no learning rate (Adafactor with lr=None), and recording needs it. Give it one: "
            "Adafactor(lr=1e-3, relative_step=False, scale_parameter=False), or optim: adafactor in Trainer."
        )
    return float(group["lr"])


def steps_in_backward(optimizer: str) -> str:
    """What to change where an optimizer steps inside the backward pass, which no hook sees."""
    return (
        f"{optimizer} steps inside the backward pass, where the whole gradient of a step is never there: nothing can "
        "be recorded or protected. Set optim to one that steps after it, such as adamw_torch or galore_adamw."
    )
