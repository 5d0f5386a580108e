"""Where an adapter stands when its model is the base model: sBA = 0, or what PEFT's initialisation moved into it.

PiSSA and OLoRA take a part of each base weight out and put it into the adapter: W₀ = residual + sB₀A₀. There an adapter
of zeros is not the base model, and a fresh adapter has B ≠ 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hlora.parallel.dtensor import full_tensor
from hlora.system.errors import AdapterError

if TYPE_CHECKING:
    from hlora.model.adapters import AdaptedMatrix

HOLDS_BASE = ("pissa", "olora")
"""Initialisations that keep a part of the base weights in the adapter. PEFT repeats them when it loads the adapter."""

CHANGES_BASE = {"corda": "CorDA", "lora_ga": "LoRA-GA", "loftq": "LoftQ"}
"""Initialisations that change the base weights by data or rounding, which no adapter file carries."""

_TOLERANCE = 2e-5


def lora_settings(model: nn.Module, adapter: str) -> Any:
    """PEFT's configuration of an adapter, or None.

    Args:
        model: A PEFT model, or one that holds one, as TRL's value-head models do.
        adapter: The adapter's name.
    """
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and adapter in configs:
            return configs[adapter]
    return None


def initialisation(model: nn.Module, adapter: str) -> str:
    """`init_lora_weights` of an adapter, in lower case and without PiSSA's number of iterations; "" for PEFT's default.

    Args: as `lora_settings`.
    """
    given = getattr(lora_settings(model, adapter), "init_lora_weights", True)
    return given.lower().partition("_niter_")[0] if isinstance(given, str) else ""


def is_at_base(matrix: AdaptedMatrix) -> bool:
    """Whether W₀ + sBA is the weight of the base model, to the precision of the factors.

    PiSSA and OLoRA are recognised by what their fresh factors have in common and training destroys: PiSSA's A and B
    hold the same singular values (BᵀB = AAᵀ, diagonal), the columns of OLoRA's B are orthonormal (BᵀB = 1).
    """
    A, B = (full_tensor(factor.detach()).cpu().double() for factor in (matrix.A, matrix.B))
    of_A, of_B = A @ A.T, B.T @ B  # (r, r); BA itself may take 470 MB
    tolerance = max(_TOLERANCE, 2 * torch.finfo(matrix.B.dtype).eps)
    if matrix.initialisation == "olora":
        return bool((of_B - torch.eye(len(of_B))).norm() <= tolerance * of_B.norm())
    if matrix.initialisation == "pissa":
        return bool((of_B - torch.diag(of_A.diag())).norm() <= tolerance * of_B.norm())
    return bool((of_A * of_B).sum().clamp(min=0).sqrt() <= tolerance * A.norm() * B.norm())  # ‖BA‖


def check_base_without_adapter(matrices: Iterable[AdaptedMatrix]) -> None:
    """Raises AdapterError where the model with its adapter off is not the base model."""
    for matrix in matrices:
        if matrix.initialisation in HOLDS_BASE:
            raise AdapterError(
                f"{matrix.name}: the base model is wanted here, the model with its adapter off. This adapter was "
                f"initialised by {matrix.initialisation}, which moved a part of the base weight into it. "
                "Use init_lora_weights=True."
            )
