"""Records importance while a model trains on general text, by either method, in a loop, an optimizer or a Trainer."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hlora.importance.artefact import Importance
from hlora.importance.capture import copies_of
from hlora.importance.consolidation import (
    check_consolidation,
    check_same_everywhere,
    importance_of,
    warn_of_unreached,
)
from hlora.importance.movement import Movement
from hlora.importance.path_integral import PathIntegral
from hlora.importance.recorded_squares import RecordedSquares
from hlora.model.adapters import adapted_matrices, unwrapped
from hlora.model.optimizers import check_trainable, check_trained_by, learning_rate
from hlora.numerics import encodings
from hlora.numerics.encodings import Encoded
from hlora.parallel.dtensor import full_tensor
from hlora.parallel.group import raise_on_all
from hlora.system.choices import EncodingName, Method, Unprotected
from hlora.system.errors import ArtifactError

if TYPE_CHECKING:
    from transformers import TrainerCallback


class ImportanceRecorder:
    """Records the importance of every LoRA-adapted matrix of `model` while it is trained on general text.

    There are three equal ways to use it: `with recorder.step(lr): optimizer.step()`, `recorder.attach(optimizer)`, and
    `Trainer(callbacks=[recorder.callback()])`. The loss must be the task loss alone. Gradients must be averaged over
    accumulation and not yet clipped, which the callback takes care of. Recording can start from any adapter state.

    Squared gradients are taken of each row of a batch, or of each sequence that packing put into a row, with the labels
    that the model is trained on. Hooks take them in the backward pass, from when the recorder is made until `attach`'s
    function detaches it, the callback's training ends, or the recorder is deleted. The whole model must be called, with
    `labels`. Squared gradients are always kept factored.

    Args:
        model: A model with LoRA from PEFT, compiled, wrapped or neither.
        encoding: "factored", d_out + d_in numbers for each matrix; or "float32", dense, for a path integral only.
        adapter_name: The adapter to record; by default the active one.
        unprotected: "refuse" or "warn" of trained parts that importance cannot cover, such as embeddings.
        method: "squared_gradients", of each sequence; or "path_integral", gradient times movement (Eqs. 7-12, the
            paper's).
        seed: Seed of the random signs by which squared gradients are summed, and of the choice of rows.
        share: Share of each batch's rows whose squared gradients are taken, at least one row. By default as many as
            take about 1 % of a training step: all rows for a model of 3 billion weights, a third for 135 million.

    Attributes:
        importance: What `consolidate` last returned, such as to save it elsewhere; None before.

    In several processes (DDP, FSDP2) every process must call every method. Each integrates the path integral of its
    share of the matrices, or the squared gradients of its own rows. A trainer may move or shard the model, or join a
    group, after the recorder is made.

    Raises:
        AdapterError: The model has no LoRA, or trains parts that cannot be protected.
        ValueError: The encoding or method is unknown, or the two cannot be combined.

    Source: Eqs. 7–13; for squared gradients, docs/equations.md.
    """

    def __init__(
        self,
        model: nn.Module,
        encoding: EncodingName = "factored",
        adapter_name: str | None = None,
        *,
        unprotected: Unprotected = "refuse",
        method: Method = "squared_gradients",
        seed: int = 0,
        share: float | None = None,
    ) -> None:
        encodings.zeros(encoding, 1, 1, device=torch.device("cpu"))  # refuses an unknown encoding
        if method not in ("path_integral", "squared_gradients"):
            raise ValueError(f"method: expected path_integral or squared_gradients, got {method!r}")
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"share: expected a number above 0 and at most 1, got {share!r}")
        if method == "squared_gradients" and encoding != "factored":
            raise ValueError(f"encoding: squared gradients are recorded factored, got {encoding!r}")
        self.model = unwrapped(model)
        self.importance: Importance | None = None
        self.encoding = encoding
        self.method = method
        self.matrices = adapted_matrices(model, adapter_name, unprotected)
        check_trainable(self.matrices)
        self._movement = Movement(self.matrices)
        self._recording: PathIntegral | RecordedSquares
        if method == "path_integral":
            self._recording = PathIntegral(self.matrices, encoding)
        else:
            self._recording = squares = RecordedSquares(self.model, self.matrices, seed, share=share)
            weakref.finalize(self, squares.listening.close)
            squares.listen()
        self.reset()

    @property
    def kind(self) -> str:
        """Name of the state's files: the encoding of a path integral, or "squares"."""
        return self.encoding if self.method == "path_integral" else "squares"

    def reset(self) -> None:
        """Forget everything recorded and start from the adapter as it is now."""
        self._recording.reset()
        self._movement.begin()
        self._integrated = 0  # with those that were skipped
        self._skipped = torch.zeros((), dtype=torch.int64, device=self.matrices[0].A.device)
        self._warned = False

    @contextmanager
    def step(self, lr: float) -> Iterator[None]:
        """A context manager for one `optimizer.step()`; clip inside it, so that gradients are read before clipping.

        Args:
            lr: The learning rate η of this step. Gradients that a scaler multiplied must be unscaled first.
        """
        self.capture(lr)
        try:
            yield
        except BaseException:
            self.discard()
            raise
        self.integrate()

    def attach(self, optimizer: Any) -> Callable[[], None]:
        """Record each step of `optimizer` through its own hooks.

        Learning rates come from the parameter groups. A step that a gradient scaler skips never reaches the hooks and
        is not counted. The hooks see gradients as they are when the optimizer steps. If you clip, use `recorder.step`
        instead, or call `recorder.capture_from(optimizer)` before clipping.

        Args:
            optimizer: The optimizer that trains the adapter; one that Accelerate wraps is unwrapped.

        Returns:
            A function that detaches the recorder.

        Raises:
            AdapterError: The optimizer has none of the recorded parameters.
            ValueError: Later, when the optimizer steps with a closure, whose gradients come too late.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps the real one
        check_trained_by(optimizer, self.matrices)

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if any(callable(argument) for argument in (*args[1:], *kwargs.values())):
                raise ValueError(
                    "recorder.attach: optimizer.step(closure) computes its gradients after they are captured. "
                    "Call backward before optimizer.step(), without a closure."
                )
            if not self._recording.captured:
                self.capture_from(optimizer)

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self.integrate()

        handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
        if isinstance(self._recording, RecordedSquares):
            self._recording.listen()

        def detach() -> None:
            for handle in handles:
                handle.remove()
            if isinstance(self._recording, RecordedSquares):
                self._recording.listening.close()

        return detach

    def callback(self, stop_at_move: float | None = None) -> TrainerCallback:
        """A callback for Trainer and SFTTrainer: records every optimizer step of `train()` from unclipped gradients.

        Args:
            stop_at_move: Ends the training once `move()` reaches this share.
        """
        from hlora.importance.callbacks import RecordingCallback

        return RecordingCallback(self, stop_at_move)

    def _follow(self) -> None:
        """Follow the model: Trainer moves or shards it, and may join a group, after the recorder was made."""
        self._recording.follow(self._integrated > 0)
        if self._skipped.device == self.matrices[0].A.device:
            return
        self._movement.follow()
        self._skipped = self._skipped.to(self.matrices[0].A.device)

    @torch.no_grad()
    def move(self) -> float:
        """How far the adapter has moved the recorded matrices, as a share of their base weights' norm."""
        self._follow()
        return self._movement.share()

    def capture_from(self, optimizer: Any) -> None:
        """`capture` with the learning rates of the optimizer's parameter groups."""
        scale = getattr(optimizer, "grad_scale", None)  # set while a fused optimizer unscales by itself
        rates = {id(p): learning_rate(group) for group in optimizer.param_groups for p in group["params"]}
        self.capture(rates, 1.0 if scale is None else 1.0 / scale)

    @torch.no_grad()
    def capture(self, lr: float | Mapping[int, float], gradient_scale: float | Tensor = 1.0) -> None:
        """Copy what `integrate` needs, before the optimizer steps.

        Args:
            lr: One learning rate, or one for each parameter by id. If A's and B's differ (LoRA+), η of the second-order
                term is √(η_A η_B), which makes that term exact.
            gradient_scale: Factor to multiply the gradients by first.

        Source: Eq. 11.
        """
        self._follow()
        self._recording.capture(lr, gradient_scale)

    def discard(self) -> None:
        """Drop what `capture` copied, since the optimizer did not step."""
        self._recording.discard()

    @torch.no_grad()
    def integrate(self) -> None:
        """Add the step since `capture` to what is recorded.

        A step that is not finite is skipped and counted, with one warning. An accelerator decides that by itself, so
        the warning comes when the count is next read.

        Source: Eq. 12.
        """
        if not self._recording.captured:
            return
        finite = self._recording.integrate()
        self._integrated += 1
        self._skipped += finite.logical_not()
        if finite.is_cpu:
            self._warn()

    @property
    def steps(self) -> int:
        """Optimizer steps recorded, without the skipped ones."""
        return self._integrated - self.skipped_steps

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps skipped because a gradient or weight was not finite."""
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
        """What is recorded so far, by matrix name: the path integral, or sums of squared gradients.

        In several processes, this process's part.
        """
        return self._recording.omega

    @torch.no_grad()
    def consolidate(self, xi: float = 1e-3, data: Mapping[str, Any] | None = None) -> Importance:
        """Compute the importance, anchored at the adapter as it is now. The recorder then restarts from here.

        From a path integral ω it is max(ω, 0)/(Δ² + ξ). From squared gradients it is their sum divided by the number of
        predicted tokens, so that half the penalty is in nats per token, however long the phase was.

        Args:
            xi: Damping ξ of a path integral, unit weight².
            data: A description of the general data, kept as provenance.

        Returns:
            The importance of all matrices, in host memory.

        In several processes every one gets all of it.

        Raises:
            ValueError: `xi` is not above 0, or `data` is no mapping.
            ArtifactError: No step was recorded.
            AdapterError: The processes hold different adapters.

        Source: Eq. 13; for squared gradients, docs/equations.md.
        """
        check_consolidation(xi, data)
        if self.steps == 0:
            kept = "" if self.importance is None else " recorder.importance has what was consolidated before."
            raise ArtifactError(
                f"nothing recorded: 0 steps integrated, {self.skipped_steps} skipped as not finite. "
                f"Train with recorder.step, recorder.attach or recorder.callback before consolidating.{kept}"
            )
        self._follow()
        As = copies_of([full_tensor(matrix.A) for matrix in self.matrices])
        Bs = copies_of([full_tensor(matrix.B) for matrix in self.matrices])
        check_same_everywhere(As, Bs)
        found = self._recording.consolidated(As, Bs, self._movement.start, xi=xi)
        provenance = {
            "method": self.method,
            **({"xi": xi} if self.method == "path_integral" else {"labels": "text", "gradient": "exact"}),
            **self._recording.facts(),
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
            "data": dict(data or {}),
        }
        self.importance = importance_of(
            self.model, self.matrices, found, As=As, Bs=Bs, encoding=self.encoding, provenance=provenance
        )
        self.reset()
        warn_of_unreached([name for name, each in found.items() if each.norm == 0])
        return self.importance

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume, as tensors and plain values: what is recorded, starting factors, counts.

        In several processes the main one returns all of it, from which any number of processes can resume. Each of the
        others returns its part.

        Raises:
            ArtifactError: A sum has overflowed, so the state is not finite.
        """
        tensors: dict[str, Tensor] = {}
        for name, omega in self._recording.gathered().items():
            tensors |= {f"{name}.omega.{part}": tensor for part, tensor in encodings.parts(omega).items()}
            tensors[f"{name}.start_A"], tensors[f"{name}.start_B"] = self._movement.start[name]
        with raise_on_all():
            _check_finite(tensors)
        return {
            "tensors": {name: tensor.clone() for name, tensor in tensors.items()},
            "encoding": self.encoding,
            "method": self.method,
            "facts": self._recording.facts(),
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state_dict`. Changes nothing if the state is refused.

        Args:
            state: What `state_dict` returned.

        Raises:
            ArtifactError: The state is not finite, or comes from another model, encoding or method.
        """
        if state.get("method", "path_integral") != self.method:
            raise ArtifactError(f"recording state is of {state.get('method')}, this recorder's method is {self.method}")
        if state["encoding"] != self.encoding:
            raise ArtifactError(f"recording state is {state['encoding']}, this recorder is {self.encoding}")
        self._follow()
        tensors, found = state["tensors"], []
        mine = self.omega
        for name, start in self._movement.start.items():
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
        self._recording.resume(self._integrated, state.get("facts", {}))


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ArtifactError(
                f"recording state: {key} holds numbers that are not finite. The general phase has diverged. Resume "
                "from an older checkpoint, or record again with a smaller learning rate."
            )
