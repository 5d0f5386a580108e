"""The input of a layer and the gradient at its output while a model trains, which squared gradients are made of.

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
from hlora.system.errors import AdapterError

Use = Callable[[Tensor, Tensor], None]


@contextmanager
def layer_gradients(
    matrices: Sequence[AdaptedMatrix], use_of: Callable[[AdaptedMatrix], Use | None], adapter: bool = True
) -> Iterator[None]:
    """Call use(x, gradient) at each layer that a backward pass reaches, with `use_of` asked in the forward pass.

    Every backward pass counts once: with gradient accumulation, with either kind of gradient checkpointing, and in
    compiled models. A model that was compiled and has run needs torch.compiler.reset() to see the hooks.

    Args:
        matrices: The adapted matrices to watch.
        use_of: Called with a matrix as its layer runs forward. Returns what to call in the backward pass of that run,
            or None. It is called with the layer's input x (…, d_in), before LoRA's dropout, as W₀ reads it; and with
            the gradient at the layer's output (…, d_out), in the unit of the loss, both in the model's precision.
        adapter: Watch forward passes with the adapter, or those without it.

    Raises:
        AdapterError: A matrix is not that of a linear layer, such as an expert of a mixture.
    """
    for matrix in matrices:
        if matrix.layer:
            raise AdapterError(
                f"{matrix.name}: squared gradients come from the input and output of a linear layer, and PEFT adapts "
                "this parameter without one. Record by method path_integral, or name target_modules without it, such "
                "as q_proj and v_proj."
            )
    watch = torch.compiler.disable(_watch)  # a compiled graph would take in what it does in the backward pass
    handles = [m.module.register_forward_hook(partial(watch, m, use_of, adapter)) for m in matrices]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_row(tensor: Tensor, rows: int, tokens: int) -> Tensor:  # (…, d) → (rows, tokens, d)
    """A layer's tensor with a row of the batch in each row, also where the layer is given all tokens in one row.

    OPT's linear layers are, and the shared experts of Qwen's mixtures. A tensor of other sizes is returned as it is.
    """
    sizes = [size for size in tensor.shape[:-1] if size > 1]
    return tensor.reshape(rows, tokens, -1) if sizes in ([rows, tokens], [rows * tokens]) else tensor


def _watch(
    matrix: AdaptedMatrix,
    use_of: Callable[[AdaptedMatrix], Use | None],
    adapter: bool,
    module: Any,
    inputs: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor | None:
    active = matrix.adapter_name in module.active_adapters and not module.disable_adapters
    if active != adapter or not output.requires_grad:  # evaluation; the first run of a reentrant checkpoint
        return None
    use = use_of(matrix)
    return None if use is None else _Watch.apply(output, inputs[0].detach(), use)


class _Watch(torch.autograd.Function):
    """The identity. Its backward pass gives the saved `x` and the gradient at `output` to `use`.

    A tensor hook would keep x in memory. What autograd saves can be dropped and recomputed by a checkpoint, and each
    graph that backward runs through counts once. In place, so that nothing is copied.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, use: Use) -> Tensor:
        ctx.mark_dirty(output)
        ctx.save_for_backward(x)
        ctx.use = use
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        with torch.no_grad(), torch.autocast(gradients[0].device.type, enabled=False):
            ctx.use(*ctx.saved_tensors, gradients[0])
        return gradients[0], None, None
