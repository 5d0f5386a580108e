"""The exact gradient G = ∂L/∂θ of each adapted matrix, taken while the model trains (reading 7 in docs/equations.md).

LoRA's own backward pass never forms G, only g^B = s G Aᵀ and g^A = s Bᵀ G. A hook on each LoRA layer adds it up
from the layer's input x and the gradient at its output y: G = Σ_t ∂L/∂y_t ⊗ x_t over tokens and backward passes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hlora.adapters import AdaptedMatrix
from hlora.errors import AdapterError, ConfigError

Add = Callable[[Tensor, Tensor], None]


class ExactGradient:
    """Sums G of every matrix over the backward passes of one optimizer step (gradient accumulation).

    x is the layer's input, before LoRA's dropout: G is the gradient of θ as W₀ sees it. A sum starts anew
    when the matrix's factors have no gradient, so what `zero_grad()` threw away is not in it; after
    zero_grad(set_to_none=False) call `clear`. Every backward pass counts, torch.autograd.grad's too.

    Memory: 4·d_out·d_in bytes for each matrix (float32; 8 when its factors are float64), from the backward pass
    to `clear`: 1.31 GiB for q_proj and v_proj of LLaMA-3.2-3B. Time: one product of the size of the layer's own.

    sums: G by matrix name, (d_out, d_in), in the unit of the loss that backward was called on; see `unit`.

    Raises ConfigError in a process group of more than one, where a process sees the gradient of its rows alone.
    """

    def __init__(self, matrices: list[AdaptedMatrix]) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        processes = torch.distributed.get_world_size() if distributed else 1
        if processes > 1:
            raise ConfigError(
                f"gradient: exact works in one process, this is one of {processes}, and each sees the gradient of its "
                "own rows alone. Record in one process (with gradient accumulation), or with gradient: effective."
            )
        self.matrices = matrices
        self._handles: list[RemovableHandle] = []
        self.clear()

    def open(self) -> None:
        """Put the hooks on the model, if they are not there."""
        if self._handles:
            return
        watch = torch.compiler.disable(self._watch)  # what it does in the backward pass is not for a compiled graph
        for matrix in self.matrices:
            self._handles.append(matrix.module.register_forward_hook(partial(watch, matrix)))
            trained = [factor for factor in (matrix.A, matrix.B) if factor.requires_grad]
            self._handles += [factor.register_post_accumulate_grad_hook(self._measure) for factor in trained]

    def close(self) -> None:
        """Take the hooks off the model and forget the sums."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self._pass: dict[str, int] = {}  # of each sum, the backward pass that it was last added to by
        self._norms: dict[nn.Parameter, Tensor] = {}  # of each factor's gradient, when backward had accumulated it

    def unit(self) -> Tensor:
        """What the factors' gradients were multiplied by since the backward pass: 1, or by GradScaler.unscale_ 1/scale.

        G times this has their unit. Clipping that came before is in it too, as it is in the factors' gradients.
        Raises AdapterError when a matrix has a gradient that passed the hooks by.
        """
        for matrix in self.matrices:
            gradients = [factor.grad for factor in (matrix.A, matrix.B) if factor.grad is not None]
            if matrix.name not in self.sums and any(bool(gradient.any()) for gradient in gradients):
                raise AdapterError(
                    f"gradient 'exact': {matrix.name} has a gradient, but no backward pass was seen at its layer. "
                    "Make or attach the recorder before the forward pass, and do not close or detach it before the "
                    "step; a compiled model that ran before needs torch.compiler.reset(). Where a fused kernel takes "
                    "the LoRA layer's place, record with gradient='effective'."
                )
        pairs = [(norm, _norm(factor.grad)) for factor, norm in self._norms.items() if factor.grad is not None]
        if not pairs:
            return torch.ones(())
        before, now = (torch.linalg.vector_norm(torch.stack(norms)) for norms in zip(*pairs, strict=True))
        return torch.where(before == 0, 1.0, now / before)

    def _watch(self, matrix: AdaptedMatrix, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        active = matrix.adapter_name in module.active_adapters and not module.disable_adapters
        if not active or not output.requires_grad:  # evaluation; the first run of a reentrant checkpoint
            return None
        return _Watch.apply(output, inputs[0].detach(), partial(self._add, matrix))

    @torch.no_grad()
    def _add(self, matrix: AdaptedMatrix, gradient: Tensor, x: Tensor) -> None:
        """G += Σ_t gradient_t ⊗ x_t, in float32 or wider. gradient: (…, d_out), x: (…, d_in)."""
        current = torch._C._current_graph_task_id()
        if matrix.A.grad is None and matrix.B.grad is None and self._pass.get(matrix.name) != current:
            self.sums.pop(matrix.name, None)
        self._pass[matrix.name] = current
        wide = torch.promote_types(matrix.B.dtype, torch.float32)
        gradient, x = (tensor.reshape(-1, tensor.shape[-1]).to(wide) for tensor in (gradient, x))
        if matrix.name not in self.sums:
            self.sums[matrix.name] = torch.zeros(gradient.shape[1], x.shape[1], dtype=wide, device=x.device)
        self.sums[matrix.name].addmm_(gradient.T, x)

    def _measure(self, factor: nn.Parameter) -> None:
        if factor.grad is not None:
            self._norms[factor] = _norm(factor.grad)


class _Watch(torch.autograd.Function):
    """The identity, whose backward pass hands the gradient at `output` and the saved `x` to `add`.

    Not a tensor hook that keeps x: what autograd saves, a checkpoint can drop and recompute, and only the graph
    that backward runs through counts, once. In place, so that no copy is made and the model may go on in place.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, add: Add) -> Tensor:
        ctx.mark_dirty(output)
        ctx.save_for_backward(x)
        ctx.add = add
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.add(gradients[0], *ctx.saved_tensors)
        return gradients[0], None, None


def _norm(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient.detach(), dtype=torch.promote_types(gradient.dtype, torch.float32))
