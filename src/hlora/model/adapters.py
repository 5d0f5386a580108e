"""The only module that reads PEFT's internals: finds every LoRA-adapted matrix of a model, or refuses it by name."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate.utils import extract_model_from_parallel
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from hlora.model.experts import Expert, part_of_A, part_of_B
from hlora.model.initialisation import CHANGES_BASE, initialisation
from hlora.numerics.precision import wide_dtype
from hlora.parallel.dtensor import full_tensor
from hlora.system.errors import AdapterError

_BASE_SAMPLE = 16  # values kept of each base matrix, by which the base model is recognised
# Relative distance of a quantised base's values from the true ones, 16 values of each matrix of SmolLM2-135M: at most
# 0.02 in 8 bits, 0.17 in nf4, 0.26 in fp4, 0.33 between nf4 and fp4. Values of another layer: at least 0.71.
_ROUGHLY = 0.5
_BASE_LAYERS = re.compile(r"(\.base_layer)+$")
_WRAPPER = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module)\.")  # from torch.compile and checkpoint_wrapper


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
    """Name of PEFT's layer if it holds the factors of several experts."""
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
            return (None if _is_packed(layer) else dequantize_bnb_weight(weight, state=state)), True
        if isinstance(weight, Tensor) and weight.is_floating_point():
            whole = dequantize_module_weight(layer)  # torchao's; returns the weight itself for a plain layer
            return whole, whole is not weight
        return (dequantize_module_weight(layer) if hasattr(layer, "W_q") else None), True  # HQQ; GPTQ, AWQ and others


def adapted_matrices(
    model: nn.Module,
    adapter_name: str | None = None,
    unprotected: Literal["refuse", "warn"] = "refuse",
) -> list[AdaptedMatrix]:
    """Every matrix that LoRA adapts in `model`, in module order.

    Args:
        model: A PEFT model, or one with an adapter from Transformers' `add_adapter`; also compiled or wrapped in DDP.
        adapter_name: The adapter to read; by default the active one.
        unprotected: What to do about trained parts that importance cannot cover: DoRA's magnitudes, lora_bias, LoRA on
            embeddings, convolutions or bare parameters, biases, modules_to_save, a second trained adapter. "refuse"
            raises an error with their names, "warn" warns with their names.

    Raises:
        AdapterError: The model has no LoRA, the adapter name is unknown or ambiguous, or a trained part is refused. Or
            gradients would be lost (see four_bits.keep_trainable). Or FSDP1 or DeepSpeed takes the factors apart.
    """
    check_whole(model)
    model = unwrapped(model)
    check_is_lora(model, adapter_name)
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    adapter = adapter_name or _active_adapter(layers)
    known = sorted({name for module in layers.values() for name in _adapters_of(module)})
    if adapter not in known:
        raise AdapterError(f"no adapter {adapter!r} in this model; it has {', '.join(map(repr, known))}")

    begun = initialisation(model, adapter)
    found, refused, covered = [], [], set()
    for name, module in layers.items():
        if adapter not in _adapters_of(module):
            continue
        reason = _why_not(module, adapter) or _why_no_base(begun)
        beside = None if reason else _beside_the_factors(module, adapter)
        if reason or beside:
            refused.append(f"{_base_name(name)} ({reason or beside})")
            covered |= {id(parameter) for parameter in module.parameters()}
        if not reason:
            found += _matrices_of(_base_name(name), module, adapter, begun)
            _check_gradients_pass(found[-1])
            covered |= set(map(id, found[-1].parameters))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in covered:
            refused.append(f"{_base_name(name)} (trained, but not a LoRA matrix of adapter {adapter!r})")
    if refused:
        shown = ", ".join(refused[:4]) + (f" and {len(refused) - 4} more" if len(refused) > 4 else "")
        message = (
            f"importance covers one adapter, LoRA on linear layers; it cannot protect {shown}. "
            "Leave them out of the LoraConfig or freeze them, or pass unprotected='warn' to train them unprotected."
        )
        if unprotected == "refuse" or not found:
            raise AdapterError(message)
        warnings.warn(message, stacklevel=2)
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DistributedDataParallel and the like, which rename its modules."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def check_is_lora(model: nn.Module, adapter_name: str | None = None) -> None:
    """Raises AdapterError if `model` has no adapter, or one of another PEFT method than LoRA."""
    configs = next((c for m in model.modules() if isinstance(c := getattr(m, "peft_config", None), dict)), {})
    asked = [configs[adapter_name]] if adapter_name in configs else configs.values()
    methods = {str(getattr(config.peft_type, "value", config.peft_type)) for config in asked}
    if methods and "LORA" not in methods:
        raise AdapterError(
            f"this model is adapted by {', '.join(sorted(methods))}; importance covers LoRA alone, θ = W₀ + sBA. "
            "Use peft.LoraConfig with the same target_modules."
        )
    if not any(isinstance(module, LoraLayer) for module in model.modules()):
        raise AdapterError(
            f"{type(model).__name__} has no LoRA layers. Wrap it first: "
            "model = peft.get_peft_model(model, peft.LoraConfig(target_modules=[...]))"
        )


def check_whole(*models: nn.Module) -> None:
    """Raises AdapterError if FSDP1 or DeepSpeed has taken parameters apart."""
    for model in models:
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise AdapterError(instead_of("FSDP1 (FullyShardedDataParallel)"))
        engine = type(model).__name__ == "DeepSpeedEngine"
        if engine or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise AdapterError(instead_of("DeepSpeed"))


def instead_of(name: str) -> str:
    """The error text for a wrapper that takes the factors apart: what to train under instead."""
    return (
        f"{name} takes the factors of the adapter apart, so that neither they nor their gradients can be read here. "
        "Train under DDP, or under FSDP2 (accelerate launch --use_fsdp --fsdp_version 2, or fully_shard); see "
        "docs/guides/distributed.md."
    )


def _matrices_of(name: str, module: Any, adapter: str, begun: str) -> list[AdaptedMatrix]:
    """The matrix of a linear layer, or one matrix for each expert of a parameter."""
    if not isinstance(module, ParamWrapper):
        return [AdaptedMatrix(name, module, adapter, begun)]
    inside = f"{_BASE_LAYERS.sub('', name)}.{module.parameter_name}"  # PEFT nests the wrappers of one module
    if module.num_experts == 1:
        return [AdaptedMatrix(inside, module, adapter, begun, name)]
    count = module.num_experts
    return [AdaptedMatrix(f"{inside}[{e}]", module, adapter, begun, name, (e, count)) for e in range(count)]


def _adapters_of(module: Any) -> set[str]:
    return set(module.lora_A) | set(module.lora_embedding_A)


def _active_adapter(layers: dict[str, Any]) -> str:
    active = sorted({name for module in layers.values() for name in module.active_adapters})
    if len(active) != 1:
        raise AdapterError(
            f"expected one active adapter, found {active or 'none'}. Name the one to use: adapter_name='...'"
        )
    return active[0]


def _why_not(module: Any, adapter: str) -> str | None:
    if adapter not in module.lora_A:
        return "LoRA on an embedding"
    A = module.lora_A[adapter]
    if not isinstance(A, nn.Linear):
        return f"LoRA on a {type(A).__name__}"
    variant = module.lora_variant.get(adapter)
    if variant is not None and adapter not in module.lora_magnitude_vector:
        return f"LoRA variant {type(variant).__name__}"
    if isinstance(module, ParamWrapper):
        return None
    base = module.get_base_layer()
    weight = getattr(base, "weight", None)  # quantised layers may have none
    other_shape = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() != 2
    if other_shape or isinstance(base, nn.MultiheadAttention):
        return f"LoRA on a {type(base).__name__}"
    return None


def _why_no_base(begun: str) -> str | None:
    if begun not in CHANGES_BASE:
        return None
    return f"{CHANGES_BASE[begun]} has changed its base weight, and no adapter file carries the change"


def _beside_the_factors(module: Any, adapter: str) -> str | None:
    """What a layer trains in addition to A and B, so that their product is not all that moves."""
    if adapter in module.lora_magnitude_vector:
        return "DoRA's magnitude; A and B are covered"
    if module.lora_bias.get(adapter):
        return "the bias of lora_bias; A and B are covered"
    return None


def _check_gradients_pass(matrix: AdaptedMatrix) -> None:
    """Raises AdapterError for a 4-bit layer that evaluation packs, or has packed (see four_bits.keep_trainable)."""
    layer = matrix.module.get_base_layer()
    if _is_packed(layer) or (getattr(layer, "support_avx512bf16_for_cpu", False) and matrix.A.device.type == "cpu"):
        raise AdapterError(
            f"{matrix.name}: on this CPU bitsandbytes packs a 4-bit weight at its first evaluation and then passes no "
            "gradient through it. Load the model again and call hlora.keep_trainable(model) before all else."
        )


def _is_packed(layer: nn.Module) -> bool:
    return bool(getattr(getattr(getattr(layer, "weight", None), "quant_state", None), "packing_format_for_cpu", False))


def _base_name(name: str) -> str:
    return _WRAPPER.sub("", name).removeprefix("base_model.model.")
