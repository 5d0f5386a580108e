"""Finds every matrix that LoRA adapts in a model, or refuses it by name.

With matrix.py and experts.py the only module that reads PEFT's internals.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

from accelerate.utils import extract_model_from_parallel
from peft.tuners.lora import LoraLayer, LoraModel, ParamWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from hlora.model.initialisation import CHANGES_BASE, initialisation
from hlora.model.matrix import AdaptedMatrix, is_packed
from hlora.system.choices import Unprotected
from hlora.system.errors import AdapterError

_BASE_LAYERS = re.compile(r"(\.base_layer)+$")
_WRAPPER = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module)\.")  # from torch.compile and checkpoint_wrapper


def adapted_matrices(
    model: nn.Module, adapter_name: str | None = None, unprotected: Unprotected = "refuse"
) -> list[AdaptedMatrix]:
    """Every matrix that LoRA adapts in `model`, in module order.

    Args:
        model: A PEFT model, or one with an adapter from Transformers' `add_adapter`; also compiled or wrapped in DDP.
        adapter_name: The adapter to read; by default the active one.
        unprotected: What to do about trained parts that importance cannot cover: DoRA's magnitudes, lora_bias, LoRA on
            embeddings or convolutions, biases, modules_to_save, a second trained adapter. "refuse"
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

    begun, prefix = initialisation(model, adapter), _prefix(model)
    found, refused, covered = [], [], set()
    for name, module in layers.items():
        if adapter not in _adapters_of(module):
            continue
        reason = _why_not(module, adapter) or _why_no_base(begun)
        beside = None if reason else _beside_the_factors(module, adapter)
        if reason or beside:
            refused.append(f"{_base_name(name, prefix)} ({reason or beside})")
            covered |= {id(parameter) for parameter in module.parameters()}
        if not reason:
            found += _matrices_of(_base_name(name, prefix), module, adapter, begun)
            _check_gradients_pass(found[-1])
            covered |= set(map(id, found[-1].parameters))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in covered:
            refused.append(f"{_base_name(name, prefix)} (trained, but not a LoRA matrix of adapter {adapter!r})")
    if refused:
        shown = ", ".join(refused[:4]) + (f" and {len(refused) - 4} more" if len(refused) > 4 else "")
        which = f"importance covers one adapter, LoRA on linear layers and experts; it cannot protect {shown}."
        if not found:
            raise AdapterError(f"{which} Nothing else is adapted. Use plain LoRA, on linear layers.")
        if unprotected == "refuse":
            raise AdapterError(
                f"{which} Leave them out of target_modules or freeze them. Or train them unprotected: "
                "unprotected='warn', in the YAML of a run importance.unprotected: warn."
            )
        warnings.warn(f"{which} They are trained unprotected, and an importance does not keep them.", stacklevel=2)
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
    if is_packed(layer) or (getattr(layer, "support_avx512bf16_for_cpu", False) and matrix.A.device.type == "cpu"):
        raise AdapterError(
            f"{matrix.name}: on this CPU bitsandbytes packs a 4-bit weight at its first evaluation and then passes no "
            "gradient through it. Load the model again and call hlora.keep_trainable(model) before all else."
        )


def _prefix(model: nn.Module) -> str:
    """What PEFT, and a module that holds a PEFT model, put before the names of the base model's modules."""
    tuners = [name for name, module in model.named_modules() if isinstance(module, LoraModel)]
    return f"{_WRAPPER.sub('', tuners[0])}.model." if len(tuners) == 1 else "base_model.model."


def _base_name(name: str, prefix: str) -> str:
    return _WRAPPER.sub("", name).removeprefix(prefix)
