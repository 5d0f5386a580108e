"""Four-bit weights that a CPU would pack for inference stay trainable."""

from __future__ import annotations

from torch import nn


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference on a CPU; call it before the first forward pass.

    On a CPU with AVX512-BF16 it packs them at the first evaluation, and the packed product has no backward pass: layers
    below it get no gradient, or zeros, after one warning of PyTorch's (bitsandbytes 0.50). Any other model stays as is.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
