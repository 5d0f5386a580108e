"""Watches optimizer steps on the general task and integrates the path integral ω, element by element (Eqs. 7–12)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from hlora.importance.artefact import Importance, ImportanceMatrix
from hlora.importance.capture import Snapshot, copies_of, factor_copies, gradient_copies, on_device, widened
from hlora.importance.shares import Shares
from hlora.model.adapters import AdaptedMatrix, adapted_matrices, check_trained_by, unwrapped
from hlora.numerics import encodings, ops
from hlora.numerics.encodings import Encoded
from hlora.numerics.types import Consolidated, Step
from hlora.parallel.dtensor import whole
from hlora.parallel.group import exchange, together, world
from hlora.system.errors import AdapterError, ArtifactError

if TYPE_CHECKING:
    from transformers import TrainerCallback


class ImportanceRecorder:
    """Accumulates ω for every LoRA-adapted matrix of `model` while it is trained on general text.

    Three equal ways in: `with recorder.step(lr): optimizer.step()`, `recorder.attach(optimizer)`, and
    `Trainer(callbacks=[recorder.callback()])`. The gradient must be that of the task loss alone, averaged
    over accumulation and before clipping; the callback sees to that by itself.

    encoding: float32 or factored (never dense). Starts from any adapter
    state, not only B = 0.
    steps, skipped_steps: integrated, and left out because a gradient was not finite. Reading them waits for the device;
    recording itself never does.

    In a group of processes (DDP, FSDP2) each integrates ω of its share of the matrices alone (shares.py), and
    every process calls every method. A trainer may move the model, join a group or shard after the recorder was made.

    Raises AdapterError when the model has no LoRA or trains what cannot be protected (see adapted_matrices),
    ValueError for an unknown encoding.
    """

    def __init__(
        self,
        model: nn.Module,
        encoding: str = "factored",
        adapter_name: str | None = None,
        unprotected: Literal["refuse", "warn"] = "refuse",
    ) -> None:
        encodings.zeros(encoding, 1, 1, torch.device("cpu"))  # an unknown encoding is refused now
        self.model = unwrapped(model)
        self.encoding = encoding
        self.matrices = adapted_matrices(model, adapter_name, unprotected)
        if not any(factor.requires_grad for matrix in self.matrices for factor in (matrix.A, matrix.B)):
            adapter = self.matrices[0].adapter_name
            raise AdapterError(
                f"adapter {adapter!r} is frozen, so there is nothing to record. Load it with is_trainable=True, "
                f"or make it the trained one: model.set_adapter({adapter!r})"
            )
        self._shares = Shares(self.matrices)
        self._captured: Snapshot | None = None
        self._elsewhere: list[Tensor] = []  # at capture, the norm of gradients that other processes integrate
        self._base_squares: dict[str, float] = {}  # ‖W₀‖² by name, once asked for
        self.reset()

    def reset(self) -> None:
        """Forget everything recorded and start from the adapter as it is now."""
        self._omega: dict[str, Encoded] = {}  # made when first needed: next to a consolidated one it would be a second
        self._start = {matrix.name: factor_copies(matrix) for matrix in self.matrices}
        self._integrated = 0  # with those that were skipped
        self._skipped = torch.zeros((), dtype=torch.int64, device=self.matrices[0].A.device)
        self._warned = False
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
        """Record each step of `optimizer` through its own hooks; returns a function that detaches.

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

        handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

        def detach() -> None:
            for handle in handles:
                handle.remove()

        return detach

    def callback(self, stop_at_move: float | None = None) -> TrainerCallback:
        """For Trainer and SFTTrainer: records every optimizer step of `train()` from unclipped gradients.

        stop_at_move: ends the training once `move()` reaches it.
        """
        from hlora.importance.callbacks import RecordingCallback

        return RecordingCallback(self, stop_at_move)

    def _follow(self) -> None:
        """To where the model is now: Trainer moves or shards it, and may join a group, after the recorder was made."""
        if self._integrated == 0 and self._shares.processes == 1 != world():
            self._shares, self._omega = Shares(self.matrices), {}
        if self._skipped.device == self.matrices[0].A.device:
            return
        for matrix in self.matrices:
            name, device = matrix.name, matrix.A.device
            A, B = self._start[name]
            self._start[name] = A.to(device), B.to(device)
            if name in self._omega:
                self._omega[name] = encodings.to_device(self._omega[name], device)
        self._skipped = self._skipped.to(self.matrices[0].A.device)

    @torch.no_grad()
    def move(self) -> float:
        """How far the adapter has moved the recorded matrices, as a share of their base weights' norm."""
        self._follow()
        moved = torch.zeros((), device=self.matrices[0].A.device)
        for matrix in self.matrices:
            left, right = ops.difference(whole(matrix.A), whole(matrix.B), self._start[matrix.name], matrix.scale)
            moved += ((left.T @ left) * (right @ right.T)).sum().to(moved.device)
            if matrix.name not in self._base_squares:
                self._base_squares[matrix.name] = matrix.base_square()
        return (max(float(moved), 0.0) / sum(self._base_squares.values())) ** 0.5

    def capture_from(self, optimizer: Any) -> None:
        """Keep factors and gradients as they are now, with the learning rates of the optimizer's groups."""
        scale = getattr(optimizer, "grad_scale", None)  # set while a fused optimizer unscales by itself
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        self.capture(rates, 1.0 if scale is None else 1.0 / scale)

    @torch.no_grad()
    def capture(self, lr: float | Mapping[int, float], gradient_scale: float | Tensor = 1.0) -> None:
        """Keep factors and gradients as they are now, for the `integrate` after the optimizer's step.

        lr: one learning rate, or one by parameter id. Where A and B differ (LoRA+), η of the second-order
        term is √(η_A η_B), which makes that term exact. gradient_scale: multiplies the gradients.
        """
        self._follow()
        pieces, here = self._shares.pieces, self._here()
        As, Bs = [m.A for m in here], [m.B for m in here]
        gradients = gradient_copies(As, pieces), gradient_copies(Bs, pieces)
        self._elsewhere = self._gradient_norm_elsewhere()
        if isinstance(gradient_scale, Tensor) or gradient_scale != 1:
            for gradient in (*gradients[0], *gradients[1], *self._elsewhere):
                gradient.mul_(on_device(gradient.device, gradient_scale))
        if isinstance(lr, Mapping):
            rates = [(lr.get(id(A), 0.0) * lr.get(id(B), 0.0)) ** 0.5 for A, B in zip(As, Bs, strict=True)]
        else:
            rates = [lr] * len(As)
        self._captured = (copies_of(pieces(As)), copies_of(pieces(Bs)), *gradients, rates)

    def _here(self) -> list[AdaptedMatrix]:
        """Matrices whose factors this process keeps at capture: its share, or of sharded ones a piece of each."""
        return self.matrices if self._shares.sharded else self._shares.mine

    def _gradient_norm_elsewhere(self) -> list[Tensor]:
        """One step counts everywhere or nowhere, so each process looks at all gradients before the optimizer does."""
        held = set(map(id, self._here()))
        factors = [factor for m in self.matrices if id(m) not in held for factor in (m.A, m.B)]
        gradients = [factor.grad for factor in factors if factor.grad is not None]
        return [torch.nn.utils.get_total_norm(widened(gradients))] if gradients else []

    def discard(self) -> None:
        """Forget what `capture` kept; the optimizer did not step."""
        self._captured = None

    @torch.no_grad()
    def integrate(self) -> None:
        """ω −= g̃ ⊙ Δθ (Eq. 12) over the step since `capture`.

        Skipped, counted and warned of once if not finite. On an accelerator that is decided there, and the warning
        comes when the count is next read.
        """
        if self._captured is None:
            return
        captured = self._captured
        self.discard()
        here = self._here()
        As, Bs = (self._shares.pieces([getattr(m, which).detach() for m in here]) for which in "AB")
        elsewhere = [f.detach() for m in self.matrices if len(here) < len(self.matrices) for f in (m.A, m.B)]
        factors = widened([*As, *Bs, *elsewhere])  # the norm of a float16 one overflows
        seen = [*factors, *captured[2], *captured[3], *self._elsewhere]
        finite = torch.isfinite(torch.nn.utils.get_total_norm(seen))
        steps = [Step(*step) for step in zip(*captured, As, Bs, strict=True)]
        if self._shares.sharded:
            steps, finite = self._at_owners(steps, finite)
        self._integrated += 1
        self._skipped += ~finite
        if finite.is_cpu:
            self._warn()
        scales = [matrix.scale for matrix in self._shares.mine]
        ops.accumulate_all_(list(self.omega.values()), steps, scales, finite)

    def _at_owners(self, pieces: list[Step], finite: Tensor) -> tuple[list[Step], Tensor]:
        """The step of this process's matrices, from the pieces that all processes have of them."""
        tensors = [(p.A, p.B, p.grad_A, p.grad_B, p.A_next, p.B_next) for p in pieces]
        found, finite = self._shares.to_owners(tensors, finite)
        rates = [pieces[i].lr for i in self._shares.indices]
        steps = [Step(A, B, g, h, lr, a, b) for (A, B, g, h, a, b), lr in zip(found, rates, strict=True)]
        return steps, finite

    @property
    def steps(self) -> int:
        """Optimizer steps integrated, without the skipped ones."""
        return self._integrated - self.skipped_steps

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps left out because a gradient or weight was not finite."""
        self._warn()
        return int(self._skipped)

    def _warn(self) -> None:
        if not self._warned and int(self._skipped) > 0:
            self._warned = True
            warnings.warn(
                "a gradient or weight is not finite; this step adds nothing to the importance. "
                "The count is in recorder.skipped_steps.",
                stacklevel=3,
            )

    @property
    def omega(self) -> dict[str, Encoded]:
        """The path integral so far, by matrix name, in the encoding.

        In a group of processes, that of this one's share.
        """
        for matrix in self._shares.mine if not self._omega else ():
            sizes, device = (matrix.B.shape[0], matrix.A.shape[1]), matrix.A.device
            self._omega[matrix.name] = encodings.zeros(self.encoding, *sizes, device)
        return self._omega

    @torch.no_grad()
    def consolidate(self, xi: float = 1e-3, data: Mapping[str, Any] | None = None) -> Importance:
        """Importance Ω = max(ω, 0)/(Δ² + ξ) (Eq. 13) with the adapter as it is now as θ^ν; resets ω to zero.

        xi: ξ, unit weight². data: a description of the general data, kept as provenance. The recorder goes on
        from here: the next call covers the movement since this one. In a group of processes every one gets the whole,
        in host memory.

        Raises ArtifactError when no step was recorded, AdapterError when the processes hold different adapters.
        """
        if self.steps == 0:
            raise ArtifactError(
                f"nothing recorded: 0 steps integrated, {self.skipped_steps} skipped as not finite. "
                "Train with recorder.step, recorder.attach or recorder.callback before consolidating."
            )
        self._follow()
        As, Bs = copies_of([whole(m.A) for m in self.matrices]), copies_of([whole(m.B) for m in self.matrices])
        _check_same_everywhere(As, Bs)
        found = self._consolidated(As, Bs, xi)
        matrices, negative, elements = {}, 0.0, 0
        for matrix, A, B in zip(self.matrices, As, Bs, strict=True):
            mine, count = found[matrix.name], B.shape[0] * A.shape[1]
            negative, elements = negative + mine.negative * count, elements + count
            matrices[matrix.name] = ImportanceMatrix(
                omega=mine.importance,
                A=A,
                B=B,
                scale=matrix.scale,
                undo_cost=mine.undo_cost,
                base_sample=matrix.base_sample(),
            )
        importance = Importance(
            matrices=matrices,
            encoding=self.encoding,
            lora_config=_lora_config(self.model, self.matrices[0].adapter_name),
            provenance={
                "xi": xi,
                "steps": self.steps,
                "skipped_steps": self.skipped_steps,
                "clamped_share": negative / elements,
                "base_model": str(getattr(getattr(self.model, "config", None), "_name_or_path", "")),
                "data": dict(data or {}),
            },
        )
        self.reset()
        return importance

    def _consolidated(self, As: list[Tensor], Bs: list[Tensor], xi: float) -> dict[str, Consolidated]:
        """Ω of each matrix by name: this process's share, and what the others make of theirs."""
        mine, indices = self._shares.mine, self._shares.indices
        factors = [As[i] for i in indices], [Bs[i] for i in indices]
        starts, scales = [self._start[m.name] for m in mine], [m.scale for m in mine]
        omegas = list(self.omega.values())
        found = ops.consolidate_all(omegas, *factors, starts, scales, xi)
        of = {matrix.name: each for matrix, each in zip(mine, found, strict=True)}
        if self._shares.processes == 1:
            return of
        importance = self._shares.gathered({n: c.importance for n, c in of.items()}, self.encoding, everywhere=True)
        numbers = {name: [each.negative, each.undo_cost, each.norm] for name, each in of.items()}
        known = {name: each for text in exchange(json.dumps(numbers)) for name, each in json.loads(text).items()}
        return {name: Consolidated(omega, *known[name]) for name, omega in importance.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: ω in its encoding, starting factors, counts. Tensors and plain values only.

        In a group of processes the first has all of it, for a group of any number to go on from; another has its share.

        Raises ArtifactError when a sum has overflowed: a state that is not finite is neither given nor taken.
        """
        tensors: dict[str, Tensor] = {}
        for name, omega in self._shares.gathered(self.omega, self.encoding, everywhere=False).items():
            tensors |= {f"{name}.omega.{part}": tensor for part, tensor in encodings.parts(omega).items()}
            tensors[f"{name}.start_A"], tensors[f"{name}.start_B"] = self._start[name]
        with together():
            _check_finite(tensors)
        return {
            "tensors": {name: tensor.clone() for name, tensor in tensors.items()},
            "encoding": self.encoding,
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. Nothing is changed when it is refused.

        Raises ArtifactError when it is not finite, or of another model or encoding.
        """
        if state["encoding"] != self.encoding:
            raise ArtifactError(f"recording state is {state['encoding']}, this recorder is {self.encoding}")
        self._follow()
        tensors, found = state["tensors"], []
        mine = self.omega
        for name, start in self._start.items():
            omega = encodings.parts(mine[name]) if name in mine else {}
            pairs = [(part, f"{name}.omega.{suffix}") for suffix, part in omega.items()]
            pairs += [(factor, f"{name}.start_{which}") for factor, which in zip(start, "AB", strict=True)]
            for target, key in pairs:
                if key not in tensors or tensors[key].shape != target.shape:
                    got = tuple(tensors[key].shape) if key in tensors else "nothing"
                    raise ArtifactError(f"recording state: expected {key} of shape {tuple(target.shape)}, got {got}")
                found.append((target, key))
        _check_finite({key: tensors[key] for _, key in found})
        for target, key in found:
            target.copy_(tensors[key])
        self._integrated = int(state["steps"]) + int(state["skipped_steps"])
        self._skipped.fill_(int(state["skipped_steps"]))


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ArtifactError(
                f"recording state: {key} holds numbers that are not finite. The general phase has diverged; go on from "
                "an older checkpoint, or record again with a smaller learning rate."
            )


def _check_same_everywhere(As: list[Tensor], Bs: list[Tensor]) -> None:
    """Raises AdapterError where the processes of a group have trained each its own adapter."""
    norms = torch.stack([torch.linalg.vector_norm(factor, dtype=torch.float64) for factor in (*As, *Bs)]).cpu()
    for number, text in enumerate(exchange(json.dumps(norms.tolist()))):
        if not torch.allclose(norms, torch.tensor(json.loads(text), dtype=torch.float64), rtol=1e-3, equal_nan=True):
            raise AdapterError(
                f"process {number} has another adapter than this one, so their gradients were not averaged. Train the "
                "model in DistributedDataParallel or with fully_shard, from the same adapter everywhere."
            )


def _lora_config(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    if not isinstance(model, PeftModel) and not hasattr(model, "peft_config"):
        return {}
    return model.peft_config[adapter_name].to_dict()  # type: ignore[union-attr, index]
