"""Experts of a mixture, which PEFT adapts as one parameter (`target_parameters`): each is a matrix of its own here.

PEFT keeps A and B of all E experts of a parameter in one tensor each: A (E·r, d_in), expert after expert, and
B (d_out, r·E), where the expert changes fastest. So expert e moves by scale · B[:, e::E] · A[e·r : (e+1)·r].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hlora.system.errors import AdapterError

Expert = tuple[int, int]
"""Number of an expert, and how many its layer has."""


def part_of_A(whole: Tensor, expert: Expert | None) -> Tensor:  # (E·r, d_in) → (r, d_in)
    """The rows of A that belong to an expert, as a view; all of A where there are no experts."""
    if expert is None:
        return whole
    number, count = _whole(whole, expert)
    return whole.unflatten(0, (count, -1))[number]


def part_of_B(whole: Tensor, expert: Expert | None) -> Tensor:  # (d_out, r·E) → (d_out, r)
    """The columns of B that belong to an expert, as a view; all of B where there are no experts."""
    if expert is None:
        return whole
    number, count = _whole(whole, expert)
    return whole[:, number::count]


def to_peft(matrices: Iterable[tuple[str, Tensor, Tensor]]) -> dict[str, Tensor]:
    """Factors by PEFT's names, those of experts put together.

    Args:
        matrices: PEFT's layer, A and B of each matrix; the experts of a layer in order.
    """
    layers: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for layer, A, B in matrices:
        layers.setdefault(layer, []).append((A, B))
    factors = {}
    for layer, pairs in layers.items():
        As, Bs = zip(*pairs, strict=True)
        factors[_peft_name(layer, "A")] = torch.cat(As)
        factors[_peft_name(layer, "B")] = torch.stack(Bs, -1).flatten(1)
    return factors


def from_peft(factors: Mapping[str, Tensor], layers: Mapping[str, str]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each matrix by its name: the inverse of `to_peft`.

    Args:
        factors: Tensors by PEFT's names.
        layers: PEFT's layer of each matrix by its name; the experts of a layer in order.

    Raises:
        KeyError: A factor is missing.
        ValueError: A factor cannot be divided among the experts.
    """
    counts, seen, found = Counter(layers.values()), Counter[str](), {}
    for name, layer in layers.items():
        expert = (seen[layer], counts[layer]) if counts[layer] > 1 else None
        seen[layer] += 1
        A, B = (factors[_peft_name(layer, factor)] for factor in "AB")
        if expert and (A.dim() != 2 or B.dim() != 2 or A.shape[0] % counts[layer] or A.shape[0] != B.shape[1]):
            raise ValueError(f"{layer}: factors of {tuple(A.shape)} and {tuple(B.shape)} for {counts[layer]} experts")
        found[name] = part_of_A(A, expert).contiguous(), part_of_B(B, expert).contiguous()
    return found


def _peft_name(layer: str, factor: str) -> str:
    return f"base_model.model.{layer}.lora_{factor}.weight"


def _whole(tensor: Tensor, expert: Expert) -> Expert:
    if isinstance(tensor, DTensor):
        raise AdapterError(
            "the factors of experts are sharded here (FSDP2), across the experts. Train them under DDP, or leave the "
            "experts out of target_modules and target_parameters."
        )
    return expert
