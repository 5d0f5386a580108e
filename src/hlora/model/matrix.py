"""One matrix that LoRA adapts: its factors, their gradients, and the base weight under them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import ParamWrapper
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hlora.model.experts import Expert, part_of_A, part_of_B
from hlora.numerics.precision import wide_dtype
from hlora.parallel.dtensor import full_tensor
from hlora.system.errors import AdapterError

_BASE_SAMPLE = 16  # values kept of each base matrix, by which the base model is recognised
# Relative distance of a quantised base's values from the true ones, 16 values of each matrix of SmolLM2-135M: at most
# 0.02 in 8 bits, 0.17 in nf4, 0.26 in fp4, 0.33 between nf4 and fp4. Values of another layer: at least 0.71.
_ROUGHLY = 0.5


@dataclass(frozen=True, eq=False)
class AdaptedMatrix:
    """θ = W₀ + scale·B·A of one linear layer, or of one expert of a mixture.

    A and B are read from the module each time: PEFT may replace them.
    """

    name: str
    """Module name in the base model, such as model.layers.3.self_attn.q_proj; model.layers.3.mlp.experts.up_proj[5]."""
    module: Any
    """PEFT's LoRA layer."""
    adapter_name: str
    initialisation: str = ""
    """PEFT's `init_lora_weights` if it is not one of the usual ones (see initialisation.py)."""
    layer: str = ""
    """Name of PEFT's layer if it adapts a parameter, such as all experts of a mixture, and not a linear layer."""
    expert: Expert | None = None

    @property
    def parameters(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The parameters that hold A and B; of an expert, those of all experts of its layer."""
        return self.module.lora_A[self.adapter_name].weight, self.module.lora_B[self.adapter_name].weight

    @property
    def A(self) -> Tensor:  # (r, d_in)
        return part_of_A(self.parameters[0], self.expert)

    @property
    def B(self) -> Tensor:  # (d_out, r)
        return part_of_B(self.parameters[1], self.expert)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """`.grad` of A and B, or views into those of all experts; None where there is none."""
        of_A, of_B = (parameter.grad for parameter in self.parameters)
        return (
            None if of_A is None else part_of_A(of_A, self.expert),
            None if of_B is None else part_of_B(of_B, self.expert),
        )

    @property
    def scale(self) -> float:
        """PEFT's scaling: alpha/r, or alpha/√r for rsLoRA."""
        return float(self.module.scaling[self.adapter_name])

    def base_sample(self) -> Tensor:
        """Up to 16 evenly spaced values of W₀, on the CPU; empty if W₀ cannot be read.

        float32, or bfloat16 to mark that a quantised base has them only roughly.
        """
        weight, quantised = self._base_weight()
        if weight is None:
            return torch.empty(0)
        flat = weight.detach().reshape(-1)
        # float64: in float32 the last index of a matrix above 2²⁴ elements rounds to one past the end.
        index = torch.linspace(0, flat.numel() - 1, min(_BASE_SAMPLE, flat.numel()), dtype=torch.float64).long()
        return flat[index.to(flat.device)].to(torch.bfloat16 if quantised else torch.float32).cpu()

    def is_on_base_of(self, kept: Tensor) -> bool:
        """Whether W₀ is the matrix that a `base_sample` was taken from; True if either is unknown.

        The same base may be loaded in another precision, or quantised.

        Args:
            kept: The `base_sample`.
        """
        sample = self.base_sample()
        if len(sample) != len(kept) or len(sample) == 0:
            return True
        if sample.dtype == kept.dtype == torch.float32:
            return torch.allclose(sample, kept, rtol=0.01, atol=1e-5)  # one rounding to bfloat16
        sample, kept = sample.float(), kept.float()
        distance, length = (sample - kept).norm(), torch.maximum(sample.norm(), kept.norm())
        return bool(distance <= _ROUGHLY * length)

    def base_square(self) -> float:
        """‖W₀‖², the sum of all squared values. Dequantises a quantised base.

        Raises:
            AdapterError: W₀ cannot be read.
        """
        weight, _ = self._base_weight()
        if weight is None:
            layer = type(self.module.get_base_layer()).__name__
            raise AdapterError(
                f"{self.name}: the weight of a {layer} cannot be read, so there is no norm to take a share of. "
                "Record without stop_at_move."
            )
        return float(torch.linalg.vector_norm(weight.detach(), dtype=wide_dtype(weight))) ** 2

    def _base_weight(self) -> tuple[Tensor | None, bool]:
        """W₀, or None if it is not in memory or cannot be dequantised; and whether it is quantised."""
        layer = self.module.get_base_layer()
        if isinstance(self.module, ParamWrapper):
            weight = self.module.get_param()
            if weight.is_meta or not weight.is_floating_point() or isinstance(weight, DTensor):
                return None, False
            return (weight[self.expert[0]] if self.expert else weight), False
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.is_meta:
            return None, False
        if isinstance(weight, DTensor):
            return full_tensor(weight), False
        if isinstance(weight, nn.Parameter) and get_bnb_param_type(weight):
            # Not dequantize_module_weight: on a CPU it loses the scales of an 8-bit layer that has run forward.
            state = getattr(layer, "state", None)
            return (None if is_packed(layer) else dequantize_bnb_weight(weight, state=state)), True
        if isinstance(weight, Tensor) and weight.is_floating_point():
            whole = dequantize_module_weight(layer)  # torchao's; returns the weight itself for a plain layer
            return whole, whole is not weight
        return (dequantize_module_weight(layer) if hasattr(layer, "W_q") else None), True  # HQQ; GPTQ, AWQ and others


def is_packed(layer: nn.Module) -> bool:
    """Whether bitsandbytes has packed a 4-bit weight for this CPU, through which no gradient passes."""
    return bool(getattr(getattr(getattr(layer, "weight", None), "quant_state", None), "packing_format_for_cpu", False))
