"""Keeps 4-bit weights trainable on a CPU that would pack them for inference."""

from __future__ import annotations

from torch import nn


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference on a CPU; call before the first forward pass.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 packs the weights at the first evaluation. The packed product has no
    backward pass: lower layers get no gradient, or zeros, after one PyTorch warning. Does nothing to any other model.

    Args:
        model: The model whose 4-bit layers are kept trainable.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
