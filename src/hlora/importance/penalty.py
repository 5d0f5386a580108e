"""φ Σ_l c_l Σ_i Ω_i (θ_i − θ_i*)² (Eqs. 14–16): a value to add to the loss, or its gradient once a step.

The anchor θ* is the general adapter θ^ν (the paper's), or the base model W₀: the penalised square is then that of sBA.
"""

from __future__ import annotations

import math
from numbers import Real
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
    """Keyword arguments of `ImportancePenalty`, which `protect` takes too."""

    layer_weights: LayerWeights | None
    phi_scale: PhiScale
    group: Group
    adapter_name: str | None
    anchor: Anchor


class ImportancePenalty:
    """A penalty on moving adapted weights away from an anchor, weighted by the importance of each weight.

    Warns if one layer coefficient exceeds 0.9, since all other layers are then free to drift.

    Args:
        model: A model with LoRA.
        importance: An Importance, a directory or a hub repository.
        phi: Weight φ of the penalty, in the unit that `phi_scale` sets.
        layer_weights: How the coefficients c_l come from the norms ‖Ω_l‖₂: "softmax" (Eq. 15), "norm_share", "uniform",
            "sum" (all ones), or "root", √(mean ‖Ω_k‖ / ‖Ω_l‖). By default "root" for squared gradients and "softmax"
            for a path integral.
        phi_scale: "paper" takes Eq. 16 as written. "relative" first divides Ω by Σ_l c_l Σ_i Ω_i Δ_i². Then φ is the
            loss, in nats, of undoing the general phase once, whatever ξ, model and run length. For squared gradients
            recorded without training, φ is the loss, in nats, of one nat per token of expected forgetting, ½ Σ F δ².
            Layer weights then leave the cost of a uniform move unchanged.
        group: One coefficient for each adapted "matrix", or for each transformer "block".
        adapter_name: The adapter to hold; by default the active one.
        anchor: "general", the general adapter θ^ν (the paper's): the adapter should start there, and needs its LoRA
            settings. Or "base", the base model: for a fresh adapter of any rank, on matrices that the importance
            covers.

    Attributes:
        coefficients: c_l by matrix name.
        unit: What L_reg is divided by; 1 in Eq. 16 as written.

    In several processes (DDP, FSDP2) each process holds Ω of its share of the matrices only. Every process must call
    every method, and gets the same results. A trainer may move or shard the model, or join a group, afterwards.

    Raises:
        ArtifactError: The importance does not fit the model, is not finite, or is zero everywhere.
        AdapterError: The model has no LoRA. Or the anchor is "base", and a PiSSA or OLoRA adapter, which holds a part
            of the base weights, has been trained.

    Source: Eqs. 14–16.
    """

    def __init__(
        self,
        model: nn.Module,
        importance: Importance | str | Path,
        phi: float,
        *,
        layer_weights: LayerWeights | None = None,
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

        Computed in float32 or wider, also inside torch.autocast.

        Raises:
            TrainingError: The penalty is not finite. Checked on a CPU only, since an accelerator would have to be
                waited for; the result there is inf or NaN.

        Source: Eqs. 15–16.
        """
        factors = [factor for matrix in self.matrices for factor in (matrix.A, matrix.B)]
        value = self.phi * _Regularisation.apply(self, *factors)
        self._check(value)
        return value

    @torch.no_grad()
    def begin(self) -> None:
        """Start the exchange between processes; call at the start of a step, so that it overlaps with the model.

        The next evaluation uses the results, unless a factor was changed in place meanwhile.

        In several processes every one calls it. In one process it does nothing.
        """
        self._follow()
        if self._shares.divided:
            self._begun = self._current() or self._divided()

    @torch.no_grad()
    def regularisation_loss(self) -> Tensor:
        """L_reg, a scalar without φ and without gradients. Source: Eq. 15."""
        return self._evaluate()[0]

    def is_at_anchor(self) -> bool:
        """Whether the adapter's factors equal the anchor's, bit for bit."""
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
        """Add ∂(φ·L_reg)/∂A and ∂B to `.grad`; call once before each optimizer step.

        Returns:
            L_reg, a scalar.

        Raises:
            TrainingError: The penalty, or a gradient in its factor's precision, is not finite; nothing is added then.
                Checked on a CPU only, since an accelerator would have to be waited for; the result there is inf or NaN.

        Source: Eq. 16.
        """
        value, gradients = self._evaluate()
        factors = [factor for matrix in self.matrices for factor in (matrix.A, matrix.B)]
        scaled = torch._foreach_mul(gradients, self.phi)
        rounded = [gradient.to(factor.dtype) for factor, gradient in zip(factors, scaled, strict=True)]
        self._check(self.phi * value, *map(local_tensor, rounded))
        here, added = [], []
        for matrix, *pair in zip(self.matrices, rounded[::2], rounded[1::2], strict=True):
            for parameter in matrix.parameters if matrix.expert else ():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)  # of all experts, to which each adds its own
            for parameter, there, gradient in zip(matrix.parameters, matrix.gradients(), pair, strict=True):
                if parameter.requires_grad and there is not None:
                    here.append(local_tensor(there))
                    added.append(local_tensor(gradient))
                elif parameter.requires_grad:
                    parameter.grad = gradient
        if here:
            torch._foreach_add_(here, added)
        return value

    def callback(self) -> TrainerCallback:
        """A callback for Trainer and its subclasses: adds the gradient once per optimizer step, before clipping."""
        from hlora.importance.callbacks import PenaltyCallback

        return PenaltyCallback(self)

    def _check(self, weighted: Tensor, *gradients: Tensor) -> None:
        """Raises TrainingError if something is not finite and this is known without waiting for the device."""
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
        """Follow the model: Trainer moves or shards it, and may join a group, after the penalty was made."""
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
            anchors=[self._anchor[m.name] for m in mine],
            scales=[m.scale for m in mine],
        )
        weights = [self.coefficients[m.name] / self.unit for m in mine]
        for each in (list(values), *gradients):
            torch._foreach_mul_(each, weights)  # in place; one kernel launch for all matrices, not one each
        return values, list(zip(*gradients, strict=True))

    def _divided(self) -> Pending:
        """Compute this process's share, and start to send the results to the others."""
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
        """What `begin` started, if the factors are still the same."""
        if self._begun is not None and self._begun.versions != self._shares.versions():
            self._begun.work.wait()
            self._begun = None
        return self._begun


def check_phi(phi: float) -> None:
    """Raises ValueError if `phi` is negative, not finite or not a number."""
    if not isinstance(phi, Real) or not 0 <= phi < math.inf:
        raise ValueError(f"phi: expected a finite weight of at least 0, got {phi!r}")


def _base_factors(matrix: AdaptedMatrix) -> types.Factors | None:
    """The factors at which the model equals the base: None stands for sBA = 0; PiSSA's are its fresh ones."""
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
    """L_reg with its closed-form gradients; keeps no graph and no d×d tensor."""

    @staticmethod
    def forward(ctx: Any, penalty: ImportancePenalty, *factors: Tensor) -> Tensor:
        value, gradients = penalty._evaluate()
        ctx.dtypes = [factor.dtype for factor in factors]
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Rounded once, as in add_gradients_. The factors of a model that is split over devices are on several.
        scaled = (upstream.to(gradient.device) * gradient for gradient in ctx.saved_tensors)
        return None, *(gradient.to(dtype) for gradient, dtype in zip(scaled, ctx.dtypes, strict=True))
