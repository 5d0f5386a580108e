"""What a layer reads and the gradient at what it writes, while a model trains: all that squared gradients are made of.

With inputs x_t and output gradients g_t, t over tokens, ∂L/∂θ of the adapted matrix is Σ_t g_t ⊗ x_t. LoRA's own
backward pass never forms it, only g^B = s G Aᵀ and g^A = s Bᵀ G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hlora.model.adapters import AdaptedMatrix

Use = Callable[[AdaptedMatrix, Tensor, Tensor], None]


@contextmanager
def layer_gradients(matrices: Sequence[AdaptedMatrix], use: Use, adapter: bool = True) -> Iterator[None]:
    """Calls use(matrix, x, gradient) at each layer that a backward pass reaches.

    x: the layer's input (…, d_in), before LoRA's dropout: the gradient is that of θ as W₀ sees it. gradient: at the
    layer's output, (…, d_out), in the unit of the loss that backward was called on. Both in the model's precision.
    adapter: of forward passes with the adapter, or of those without it.

    Every backward pass counts, once: with gradient accumulation, with gradient checkpointing of either kind, which may
    still drop the inputs, and in compiled models. A model that was compiled and ran before needs
    torch.compiler.reset() to see the hooks.
    """
    watch = torch.compiler.disable(_watch)  # what it does in the backward pass is not for a compiled graph
    handles = [m.module.register_forward_hook(partial(watch, m, use, adapter)) for m in matrices]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(
    matrix: AdaptedMatrix, use: Use, adapter: bool, module: Any, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor | None:
    active = matrix.adapter_name in module.active_adapters and not module.disable_adapters
    if active != adapter or not output.requires_grad:  # evaluation; the first run of a reentrant checkpoint
        return None
    return _Watch.apply(output, inputs[0].detach(), partial(use, matrix))


class _Watch(torch.autograd.Function):
    """The identity, whose backward pass hands the saved `x` and the gradient at `output` to `use`.

    Not a tensor hook that keeps x: what autograd saves, a checkpoint can drop and recompute, and only the graph
    that backward runs through counts, once. In place, so that no copy is made and the model may go on in place.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, use: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.mark_dirty(output)
        ctx.save_for_backward(x)
        ctx.use = use
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        with torch.no_grad(), torch.autocast(gradients[0].device.type, enabled=False):
            ctx.use(*ctx.saved_tensors, gradients[0])
        return gradients[0], None, None
