"""Watches optimizer steps on the general task and integrates the path integral ω, element by element (Eqs. 7–12)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from hlora import encodings, ops
from hlora.adapters import AdaptedMatrix, adapted_matrices, check_trained_by
from hlora.encodings import Encoded
from hlora.errors import AdapterError, ArtifactError
from hlora.exact_gradient import ExactGradient
from hlora.importance import Importance, ImportanceMatrix

if TYPE_CHECKING:
    from transformers import TrainerCallback

Snapshot = tuple[Tensor, Tensor, Tensor, Tensor, float]  # A, B, their gradients, learning rate


class ImportanceRecorder:
    """Accumulates ω for every LoRA-adapted matrix of `model` while it is trained on general text.

    Three equal ways in: `with recorder.step(lr): optimizer.step()`, `recorder.attach(optimizer)`, and
    `Trainer(callbacks=[recorder.callback()])`. The gradient must be that of the task loss alone, averaged
    over accumulation and before clipping; the callback sees to that by itself.

    encoding: float32, bfloat16 or factored (never dense). Starts from any adapter state, not only B = 0.
    gradient: effective, g̃ of Eq. 11 from the factors' gradients (the paper's), or exact, G = ∂L/∂θ from hooks on
    the LoRA layers (reading 7; see ExactGradient for its memory, a dense G per matrix while recording). The hooks
    are there from the start, or `attach`, until detached or `close`; an optimizer step ends each sum of G.
    steps, skipped_steps: integrated, and left out because a gradient was not finite.

    Raises AdapterError when the model has no LoRA or trains what cannot be protected (see adapted_matrices),
    ValueError for an unknown encoding or gradient, ConfigError for exact in more than one process.
    """

    def __init__(
        self,
        model: nn.Module,
        encoding: str = "factored",
        adapter_name: str | None = None,
        unprotected: Literal["refuse", "warn"] = "refuse",
        gradient: Literal["effective", "exact"] = "effective",
    ) -> None:
        if gradient not in ("effective", "exact"):
            raise ValueError(f"gradient: expected effective or exact, got {gradient!r}")
        self.model = model
        self.encoding = encoding
        self.gradient = gradient
        self.matrices = adapted_matrices(model, adapter_name, unprotected)
        if not any(factor.requires_grad for matrix in self.matrices for factor in (matrix.A, matrix.B)):
            adapter = self.matrices[0].adapter_name
            raise AdapterError(
                f"adapter {adapter!r} is frozen, so there is nothing to record. Load it with is_trainable=True, "
                f"or make it the trained one: model.set_adapter({adapter!r})"
            )
        self._exact = ExactGradient(self.matrices) if gradient == "exact" else None
        self._captured: dict[str, Snapshot] | None = None
        self._unit: Tensor | float = 1.0  # of the exact gradient, at capture
        self._base_squares: dict[str, float] = {}  # ‖W₀‖² by name, once asked for
        self.reset()
        if self._exact is not None:
            self._exact.open()

    def reset(self) -> None:
        """Forget everything recorded and start from the adapter as it is now."""
        self.steps = 0
        self.skipped_steps = 0
        self._omega: dict[str, Encoded] = {
            matrix.name: encodings.zeros(self.encoding, matrix.B.shape[0], matrix.A.shape[1], matrix.A.device)
            for matrix in self.matrices
        }
        self._start = {matrix.name: _factors(matrix) for matrix in self.matrices}
        self.discard()

    @contextmanager
    def step(self, lr: float) -> Iterator[None]:
        """Wraps one `optimizer.step()`; put clipping inside too, so that ω sees the gradient before it.

        lr: the learning rate η of this step. Gradients that a scaler multiplied must be unscaled before.
        """
        self.capture(lr)
        try:
            yield
        except BaseException:
            self.discard()
            raise
        self.integrate()

    def attach(self, optimizer: Any) -> Callable[[], None]:
        """Record each step of `optimizer` through its own hooks; returns a function that detaches (and closes).

        Learning rates come from the parameter groups. A step that a gradient scaler skips never reaches the
        hooks and is not counted. Clip inside `recorder.step` instead, or call `recorder.capture_from(optimizer)`
        before clipping: the hooks see gradients as they are when the optimizer steps.

        Raises AdapterError when the optimizer has none of the recorded parameters.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps the real one
        check_trained_by(optimizer, self.matrices)

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if any(callable(argument) for argument in (*args[1:], *kwargs.values())):
                raise ValueError(
                    "recorder.attach: optimizer.step(closure) computes its gradients after they are captured. "
                    "Call backward before optimizer.step(), without a closure."
                )
            if self._captured is None:
                self.capture_from(optimizer)

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self.integrate()

        if self._exact is not None:
            self._exact.open()
        handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

        def detach() -> None:
            for handle in handles:
                handle.remove()
            self.close()

        return detach

    def close(self) -> None:
        """Take the hooks of the exact gradient off the model; the effective one has none. ω stays.

        For recording with `recorder.step`, or as `contextlib.closing(recorder)`; detaching and `train()`'s end do it.
        """
        if self._exact is not None:
            self._exact.close()

    def callback(self, stop_at_move: float | None = None) -> TrainerCallback:
        """For Trainer and SFTTrainer: records every optimizer step of `train()` from unclipped gradients.

        stop_at_move: ends the training once `move()` reaches it.
        """
        from hlora.trainer import RecordingCallback

        return RecordingCallback(self, stop_at_move)

    @torch.no_grad()
    def move(self) -> float:
        """How far the adapter has moved the recorded matrices, as a share of their base weights' norm."""
        moved, whole = 0.0, 0.0
        for matrix in self.matrices:
            left, right = ops.difference(matrix.A, matrix.B, self._start[matrix.name], matrix.scale)
            moved += float(((left.T @ left) * (right @ right.T)).sum())
            if matrix.name not in self._base_squares:
                self._base_squares[matrix.name] = matrix.base_square()
            whole += self._base_squares[matrix.name]
        return (max(moved, 0.0) / whole) ** 0.5

    def capture_from(self, optimizer: Any) -> None:
        """Keep factors and gradients as they are now, with the learning rates of the optimizer's groups."""
        scale = getattr(optimizer, "grad_scale", None)  # set while a fused optimizer unscales by itself
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        self.capture(rates, 1.0 if scale is None else 1.0 / float(scale))

    def capture(self, lr: float | Mapping[int, float], gradient_scale: float = 1.0) -> None:
        """Keep factors and gradients as they are now, for the `integrate` after the optimizer's step.

        lr: one learning rate, or one by parameter id. Where A and B differ (LoRA+), η of the second-order
        term is √(η_A η_B), which makes that term exact. gradient_scale: multiplies the gradients.

        Raises AdapterError when gradients passed the hooks of the exact gradient by.
        """
        if self._exact is not None:
            self._unit = self._exact.unit() * gradient_scale
        snapshots: dict[str, Snapshot] = {}
        for matrix in self.matrices:
            A, B = matrix.A, matrix.B
            rate = (lr.get(id(A), 0.0) * lr.get(id(B), 0.0)) ** 0.5 if isinstance(lr, Mapping) else lr
            gradients = (_gradient(A) * gradient_scale, _gradient(B) * gradient_scale)
            snapshots[matrix.name] = (*_factors(matrix), *gradients, rate)
        self._captured = snapshots

    def discard(self) -> None:
        """Forget what `capture` kept, and the sum of exact gradients; the optimizer did not step."""
        self._captured = None
        if self._exact is not None:
            self._exact.clear()

    @torch.no_grad()
    def integrate(self) -> None:
        """ω −= g̃ ⊙ Δθ (Eq. 12), or G ⊙ Δθ, over the step since `capture`.

        Skipped, counted and warned of once if not finite.
        """
        if self._captured is None:
            return
        captured, unit, exact = self._captured, self._unit, self._exact.sums if self._exact is not None else None
        self.discard()
        moved = torch.stack([(m.A.detach().sum() + m.B.detach().sum()).double() for m in self.matrices]).sum()
        slopes = torch.stack([(gA.sum() + gB.sum()).double() for _, _, gA, gB, _ in captured.values()]).sum()
        for G in (exact or {}).values():
            slopes = slopes + unit * G.sum()
        if not torch.isfinite(moved + slopes):
            if self.skipped_steps == 0:
                warnings.warn(
                    "a gradient or weight is not finite; this step adds nothing to the importance. "
                    "The count is in recorder.skipped_steps.",
                    stacklevel=2,
                )
            self.skipped_steps += 1
            return
        for matrix in self.matrices:
            A, B, grad_A, grad_B, lr = captured[matrix.name]
            delta = ops.difference(matrix.A, matrix.B, (A, B), matrix.scale)
            if exact is None:
                gradient = ops.effective_gradient(A, B, grad_A, grad_B, lr, matrix.scale)
                ops.accumulate_(self._omega[matrix.name], gradient, delta)
            elif matrix.name in exact:  # a layer that no token reached has no G
                left, right = delta
                ops.accumulate_(self._omega[matrix.name], exact[matrix.name], (unit * left, right))
        self.steps += 1

    @property
    def omega(self) -> dict[str, Encoded]:
        """The path integral so far, by matrix name, in the encoding."""
        return self._omega

    @torch.no_grad()
    def consolidate(self, xi: float = 1e-3, data: Mapping[str, Any] | None = None) -> Importance:
        """Importance Ω = max(ω, 0)/(Δ² + ξ) (Eq. 13) with the adapter as it is now as θ^ν; resets ω to zero.

        xi: ξ, unit weight². data: a description of the general data, kept as provenance. The recorder goes on
        from here: the next call covers the movement since this one.

        Raises ArtifactError when no step was recorded.
        """
        if self.steps == 0:
            raise ArtifactError(
                f"nothing recorded: 0 steps integrated, {self.skipped_steps} skipped as not finite. "
                "Train with recorder.step, recorder.attach or recorder.callback before consolidating."
            )
        matrices, negative, elements = {}, 0.0, 0
        for matrix in self.matrices:
            delta = ops.difference(matrix.A, matrix.B, self._start[matrix.name], matrix.scale)
            omega, share = ops.consolidate(self._omega[matrix.name], delta, xi)
            count = matrix.B.shape[0] * matrix.A.shape[1]
            negative, elements = negative + share * count, elements + count
            A, B = _factors(matrix)
            matrices[matrix.name] = ImportanceMatrix(
                omega=omega,
                A=A,
                B=B,
                scale=matrix.scale,
                undo_cost=float(ops.penalty(omega, delta)),
                base_sample=matrix.base_sample(),
            )
        importance = Importance(
            matrices=matrices,
            encoding=self.encoding,
            lora_config=_lora_config(self.model, self.matrices[0].adapter_name),
            provenance={
                "xi": xi,
                "gradient": self.gradient,
                "steps": self.steps,
                "skipped_steps": self.skipped_steps,
                "clamped_share": negative / elements,
                "base_model": str(getattr(getattr(self.model, "config", None), "_name_or_path", "")),
                "data": dict(data or {}),
            },
        )
        self.reset()
        return importance

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: ω in its encoding, starting factors, counts. Tensors and plain values only."""
        tensors: dict[str, Tensor] = {}
        for name, omega in self._omega.items():
            tensors |= {f"{name}.omega.{part}": tensor for part, tensor in encodings.parts(omega).items()}
            tensors[f"{name}.start_A"], tensors[f"{name}.start_B"] = self._start[name]
        return {
            "tensors": {name: tensor.clone() for name, tensor in tensors.items()},
            "encoding": self.encoding,
            "gradient": self.gradient,
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. Raises ArtifactError when it is of another model, encoding or gradient."""
        if state["encoding"] != self.encoding:
            raise ArtifactError(f"recording state is {state['encoding']}, this recorder is {self.encoding}")
        gradient = state.get("gradient", "effective")  # states from before there was a choice have none
        if gradient != self.gradient:
            raise ArtifactError(
                f"recording state is of the {gradient} gradient, this recorder is of the {self.gradient} one. "
                f"Make it with gradient={gradient!r}, or record from the start."
            )
        tensors = state["tensors"]
        for name, omega in self._omega.items():
            pairs = [(part, f"{name}.omega.{suffix}") for suffix, part in encodings.parts(omega).items()]
            pairs += [(factor, f"{name}.start_{which}") for factor, which in zip(self._start[name], "AB", strict=True)]
            for target, key in pairs:
                if key not in tensors or tensors[key].shape != target.shape:
                    got = tuple(tensors[key].shape) if key in tensors else "nothing"
                    raise ArtifactError(f"recording state: expected {key} of shape {tuple(target.shape)}, got {got}")
                target.copy_(tensors[key])
        self.steps, self.skipped_steps = int(state["steps"]), int(state["skipped_steps"])


def _factors(matrix: AdaptedMatrix) -> tuple[Tensor, Tensor]:
    return matrix.A.detach().clone(), matrix.B.detach().clone()


def _gradient(parameter: nn.Parameter) -> Tensor:
    """A copy in float32 or wider; zeros for a frozen or unused factor."""
    wide = torch.promote_types(parameter.dtype, torch.float32)
    if parameter.grad is None:
        return torch.zeros_like(parameter, dtype=wide)
    return parameter.grad.detach().to(wide, copy=True)


def _lora_config(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    if not isinstance(model, PeftModel) and not hasattr(model, "peft_config"):
        return {}
    return model.peft_config[adapter_name].to_dict()  # type: ignore[union-attr, index]
