"""φ Σ_l c_l Σ_i Ω_i (θ_i − θ_i*)² (Eqs. 14–16): a value to add to the loss, or its gradient once a step.

The anchor θ* is the paper's θ^ν, or the base model (`anchor="base"`): W₀, where the penalised square is that of sBA.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from hlora.importance.artefact import Importance
from hlora.importance.layer_weights import diverged, layer_coefficients, relative_unit
from hlora.importance.shares import Pending, Shares
from hlora.model.adapters import AdaptedMatrix, adapted_matrices
from hlora.model.initialisation import HOLDS_BASE, is_at_base
from hlora.numerics import encodings, ops, types
from hlora.numerics.encodings import Encoded
from hlora.parallel.dtensor import distribute_like, full_tensor, local_tensor
from hlora.parallel.group import world_size
from hlora.system.choices import Anchor, Group, LayerWeights, PhiScale
from hlora.system.errors import AdapterError, TrainingError

if TYPE_CHECKING:
    from transformers import TrainerCallback


class PenaltyOptions(TypedDict, total=False):
    """What `ImportancePenalty` takes beside model, importance and phi. `protect` takes the same."""

    layer_weights: LayerWeights
    phi_scale: PhiScale
    group: Group
    adapter_name: str | None
    anchor: Anchor


class ImportancePenalty:
    """Holds the adapted weights of `model` to an anchor, each element by its importance.

    Args:
        model: a model with LoRA.
        importance: an Importance, a directory or a hub repository.
        phi: weight φ of the penalty, in the unit that `phi_scale` says.
        layer_weights: c_l from the norms ‖Ω_l‖₂: softmax (Eq. 15), norm_share, uniform, or sum (all ones).
        phi_scale: "paper" takes Eq. 16 as written. "relative" first divides Ω by Σ_l c_l Σ_i Ω_i Δ_i². Then φ is the
            loss, in nats, of undoing the general phase once, whatever ξ, model and run length. For an importance
            without a move (squared gradients), φ is the loss, in nats, of one nat a token of expected forgetting,
            ½ Σ F δ²; layer weights then keep the cost of a move that is alike everywhere.
        group: one c_l for each adapted "matrix", or for each transformer "block".
        adapter_name: the adapter to hold; by default the one active adapter.
        anchor: "general", θ^ν, where the adapter should start too and whose LoRA settings it needs (the paper's).
            Or "base", the base model, for a fresh adapter of any rank on any matrices that the importance covers.

    Attributes:
        coefficients: c_l by matrix name.
        unit: what L_reg is divided by, 1 in Eq. 16 as written.

    In several processes (DDP, FSDP2) each holds Ω of its share of the matrices alone (shares.py). Every process calls
    every method, and the results are the same everywhere. A trainer may move the model, join a group or shard after the
    penalty was made.

    Warns when one coefficient exceeds 0.9, since all other layers are then free to drift.

    Raises:
        ArtifactError: when the importance does not fit the model, is not finite, or is zero everywhere.
        AdapterError: without LoRA; with the anchor "base" on a trained adapter of PiSSA or OLoRA, which hold a part of
            the base weights.
    """

    def __init__(
        self,
        model: nn.Module,
        importance: Importance | str | Path,
        phi: float,
        *,
        layer_weights: LayerWeights = "softmax",
        phi_scale: PhiScale = "relative",
        group: Group = "matrix",
        adapter_name: str | None = None,
        anchor: Anchor = "general",
    ) -> None:
        check_phi(phi)
        if phi_scale not in ("relative", "paper"):
            raise ValueError(f"phi_scale: expected relative or paper, got {phi_scale!r}")
        if anchor not in ("general", "base"):
            raise ValueError(f"anchor: expected general or base, got {anchor!r}")
        importance = Importance.of(importance)
        self.phi = phi
        self.anchor = anchor
        self.matrices = adapted_matrices(model, adapter_name, unprotected="warn")
        if anchor == "base":
            importance = importance.covering(self.matrices)
        else:
            importance.check(self.matrices)
        self.coefficients = layer_coefficients(importance, layer_weights, group)
        self.unit = relative_unit(importance, self.coefficients) if phi_scale == "relative" else 1.0
        self._shares = Shares(self.matrices)
        self._begun: Pending | None = None
        self._device = self.matrices[0].A.device
        self._omega: dict[str, Encoded] = {}
        self._anchor: dict[str, types.Factors | None] = {}
        for matrix in self.matrices:
            mine, device = importance.matrices[matrix.name], matrix.A.device
            at_general = mine.A.to(device), mine.B.to(device)
            self._anchor[matrix.name] = at_general if anchor == "general" else _base_factors(matrix)
        for matrix in self._shares.mine:
            omega = importance.matrices[matrix.name].omega
            self._omega[matrix.name] = encodings.to_device(omega, matrix.A.device)

    def __repr__(self) -> str:
        return f"ImportancePenalty(phi={self.phi:g}, {len(self.matrices)} matrices, anchor={self.anchor!r})"

    def __call__(self) -> Tensor:
        """φ·L_reg, a scalar to add to the task loss, with closed-form gradients to A and B.

        Computed in float32 or wider, inside torch.autocast too.

        Raises:
            TrainingError: where it is not finite. An accelerator is not waited for; the result there is inf or NaN.

        Source: Eqs. 15–16.
        """
        factors = [factor for matrix in self.matrices for factor in (matrix.A, matrix.B)]
        value = self.phi * _Regularisation.apply(self, *factors)
        self._check(value)
        return value

    @torch.no_grad()
    def begin(self) -> None:
        """Call at the start of a step, so that results of other processes arrive beside the passes of the model.

        The next evaluation takes them, unless a factor was changed in place meanwhile. Does nothing in one process.
        """
        self._follow()
        if self._shares.divided:
            self._begun = self._current() or self._divided()

    @torch.no_grad()
    def regularisation_loss(self) -> Tensor:
        """L_reg without φ and without gradients, a scalar. Source: Eq. 15."""
        return self._evaluate()[0]

    def is_at_anchor(self) -> bool:
        """Whether the adapter's factors are those of the anchor, to the bit."""
        for matrix in self.matrices:
            anchor = self._anchor[matrix.name]
            if anchor is None or not all(
                torch.equal(full_tensor(factor.detach()), kept.to(factor.dtype))
                for factor, kept in zip((matrix.A, matrix.B), anchor, strict=True)
            ):
                return False
        return True

    @torch.no_grad()
    def add_gradients_(self) -> Tensor:
        """Add ∂(φ·L_reg)/∂A and ∂B to `.grad`; call once before each optimizer step. Returns L_reg, a scalar.

        Raises:
            TrainingError: where the penalty or a gradient, in its factor's precision, is not finite; nothing is added
                then. An accelerator is not waited for; the result there is inf or NaN.
        """
        value, gradients = self._evaluate()
        factors = [factor for matrix in self.matrices for factor in (matrix.A, matrix.B)]
        scaled = torch._foreach_mul(gradients, self.phi)
        rounded = [gradient.to(factor.dtype) for factor, gradient in zip(factors, scaled, strict=True)]
        self._check(self.phi * value, *map(local_tensor, rounded))
        here, added = [], []
        for factor, gradient in zip(factors, rounded, strict=True):
            if factor.requires_grad and factor.grad is not None:
                here.append(local_tensor(factor.grad))
                added.append(local_tensor(gradient))
            elif factor.requires_grad:
                factor.grad = gradient
        if here:
            torch._foreach_add_(here, added)
        return value

    def callback(self) -> TrainerCallback:
        """For Trainer and its children: the gradient of Eq. 16 once per optimizer step, before clipping."""
        from hlora.importance.callbacks import PenaltyCallback

        return PenaltyCallback(self)

    def _check(self, weighted: Tensor, *gradients: Tensor) -> None:
        """Raises TrainingError that says what to change, where it is known without waiting for the device."""
        if weighted.is_cpu and not all(bool(each.isfinite().all()) for each in (weighted, *gradients)):
            raise TrainingError(diverged(float(weighted.detach()), self.phi))

    def _evaluate(self) -> tuple[Tensor, list[Tensor]]:
        """L_reg and its gradients in the order A₁, B₁, A₂, B₂, …"""
        self._follow()
        if not self._shares.divided:
            values, pairs = self._weighted([m.A for m in self.matrices], [m.B for m in self.matrices])
            return values.sum(), [gradient for pair in pairs for gradient in pair]
        begun, self._begun = self._current() or self._divided(), None
        values, gradients = begun.wait()
        factors = [factor for matrix in self.matrices for factor in (matrix.A, matrix.B)]
        return values.sum(), [distribute_like(f, gradient) for f, gradient in zip(factors, gradients, strict=True)]

    def _follow(self) -> None:
        """To where the model is now: Trainer moves or shards it, and may join a group, after the penalty was made."""
        if self._shares.processes == 1 != world_size():
            self._shares = Shares(self.matrices)
            self._omega = {matrix.name: self._omega[matrix.name] for matrix in self._shares.mine}
        if self._device == self.matrices[0].A.device:
            return
        self._device = self.matrices[0].A.device
        for matrix in self.matrices:
            device, anchor = matrix.A.device, self._anchor[matrix.name]
            self._anchor[matrix.name] = None if anchor is None else (anchor[0].to(device), anchor[1].to(device))
            if matrix.name in self._omega:
                self._omega[matrix.name] = encodings.to_device(self._omega[matrix.name], device)

    def _weighted(self, As: list[Tensor], Bs: list[Tensor]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """c_l Σ Ω D² of this process's matrices, (L,), with the gradients of A and B."""
        mine = self._shares.mine
        values, *gradients = ops.penalties_with_gradients(
            [self._omega[m.name] for m in mine],
            As,
            Bs,
            [self._anchor[m.name] for m in mine],
            [m.scale for m in mine],
        )
        weights = [self.coefficients[m.name] / self.unit for m in mine]
        for each in (list(values), *gradients):
            torch._foreach_mul_(each, weights)  # in place, by one launch where there would be one a matrix
        return values, list(zip(*gradients, strict=True))

    def _divided(self) -> Pending:
        """This process's share of the work done, and its results sent to the others."""
        shares = self._shares
        if shares.sharded:
            As, Bs = (
                [f.detach() for f in factors] for factors in zip(*((m.A, m.B) for m in self.matrices), strict=True)
            )
            pieces = list(zip(shares.pieces(As), shares.pieces(Bs), strict=True))
            factors, _ = shares.to_owners(pieces, torch.ones((), dtype=torch.bool, device=pieces[0][0].device))
        else:
            factors = [[m.A, m.B] for m in shares.mine]
        if not factors:  # more processes than matrices
            return shares.to_all([], [])
        values, gradients = self._weighted(*map(list, zip(*factors, strict=True)))
        return shares.to_all(list(values), gradients)

    def _current(self) -> Pending | None:
        """What `begin` has under way, if it is of the factors as they are."""
        if self._begun is not None and self._begun.versions != self._shares.versions():
            self._begun.work.wait()
            self._begun = None
        return self._begun


def check_phi(phi: float) -> None:
    """Raises ValueError for a weight of the penalty that is negative, not finite or no number."""
    if not isinstance(phi, int | float) or not 0 <= phi < math.inf:
        raise ValueError(f"phi: expected a finite weight of at least 0, got {phi!r}")


def _base_factors(matrix: AdaptedMatrix) -> types.Factors | None:
    """What the adapter has to be for the model to be the base: None for sBA = 0, or the fresh factors of PiSSA."""
    if matrix.initialisation not in HOLDS_BASE:
        return None
    if not is_at_base(matrix):
        raise AdapterError(
            f"{matrix.name}: this adapter was initialised by {matrix.initialisation}, which moved a part of the base "
            "weight into it, and has been trained since, so the base weight is not known any more. Make the penalty "
            "before training, on the fresh adapter, or use the anchor general."
        )
    A, B = (full_tensor(factor.detach()).clone() for factor in (matrix.A, matrix.B))
    return A, B


class _Regularisation(torch.autograd.Function):
    """L_reg with its closed-form gradients; no graph and no d×d tensor is kept."""

    @staticmethod
    def forward(ctx: Any, penalty: ImportancePenalty, *factors: Tensor) -> Tensor:
        value, gradients = penalty._evaluate()
        ctx.dtypes = [factor.dtype for factor in factors]
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Rounded once, as in add_gradients_. Of a model split over devices, factors are on several.
        scaled = (upstream.to(gradient.device) * gradient for gradient in ctx.saved_tensors)
        return None, *(gradient.to(dtype) for gradient, dtype in zip(scaled, ctx.dtypes, strict=True))
