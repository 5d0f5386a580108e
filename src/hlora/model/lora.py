"""A fresh LoRA adapter on a base model."""

from __future__ import annotations

import re

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, set_seed

from hlora.config.sections import LoraSettings
from hlora.system.errors import ConfigError, first_line


def attach_lora(base: PreTrainedModel, settings: LoraSettings, seed: int) -> PeftModel:
    """Attach a fresh LoRA adapter (B = 0) to `base`.

    Args:
        base: The base model.
        settings: The `lora` section.
        seed: Determines A.

    Raises:
        ConfigError: `target_modules` or `exclude_modules` names a module that the model lacks.
    """
    for field in ("target_modules", "exclude_modules"):
        named = getattr(settings, field)
        for target in named if isinstance(named, list) else ():  # PEFT refuses a list only if none of it matches
            if not any(f".{name}".endswith(f".{target}") for name, _ in base.named_modules()):
                raise ConfigError(_no_such_module(base, f"lora.{field}: no module {target!r}"))
    set_seed(seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT divides it by r, so any number works
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        exclude_modules=settings.exclude_modules,
        use_rslora=settings.rslora,
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(base, config)
    except (ValueError, re.error) as error:  # PEFT reads a single name as a regular expression
        raise ConfigError(_no_such_module(base, f"lora.target_modules: {first_line(error)}")) from None
    assert isinstance(model, PeftModel)
    return model


def _no_such_module(base: PreTrainedModel, problem: str) -> str:
    names = sorted({name.rsplit(".", 1)[-1] for name, module in base.named_modules() if hasattr(module, "weight")})
    return f"{problem}. Modules of this model: {', '.join(names)}"
