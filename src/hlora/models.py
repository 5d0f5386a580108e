"""Base model and tokenizer: from a directory, the hub, a GGUF file or the embedded default; and LoRA on top."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hlora import embedded
from hlora.config import LoraSettings, ModelConfig
from hlora.errors import ConfigError, first_line

logger = logging.getLogger("hlora")


def load_base(config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model, frozen in evaluation mode on its device, and its tokenizer with a pad token.

    Raises ConfigError that names the field when the model cannot be found or loaded.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    name = str(embedded.model_directory()) if config.name == embedded.MODEL_NAME else config.name
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if config.gguf_file:
        options["gguf_file"] = config.gguf_file
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
        model, found = loaded
        if found["missing_keys"]:  # Transformers makes them up at random and says so in a report
            raise ValueError(f"its weights lack {', '.join(sorted(found['missing_keys'])[:3])}")
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigError(_why_not_loaded(config, name, error)) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.to(device)
    model.requires_grad_(False).eval()
    logger.info("%s: %s parameters, %s on %s", config.name, f"{model.num_parameters():,}", model.dtype, model.device)
    return model, tokenizer


def attach_lora(base: PreTrainedModel, settings: LoraSettings, seed: int) -> PeftModel:
    """A fresh LoRA adapter (B = 0) on `base`, the same for the same seed. Raises ConfigError for unknown modules."""
    if isinstance(settings.target_modules, list):
        for target in settings.target_modules:  # PEFT refuses a list of which nothing matches, but not a part of it
            if not any(f".{name}".endswith(f".{target}") for name, _ in base.named_modules()):
                raise ConfigError(_no_such_module(base, f"no module {target!r}"))
    set_seed(seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT divides it by r, any number will do
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        use_rslora=settings.rslora,
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        raise ConfigError(_no_such_module(base, first_line(error))) from None
    assert isinstance(model, PeftModel)
    return model


def pick_device(name: str) -> torch.device:
    """The torch device of that name, or the best here for "auto". Raises ConfigError when it is not here."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"model.device: {name!r} cannot be used here ({first_line(error)}). Try auto.") from None
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of that name; for "auto" bfloat16 on an accelerator that has it, float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    # CPU, SmolLM2-135M, LoRA step of 8×128 tokens: float32 4.8 s, bfloat16 4.7 s. Nothing to gain.
    return torch.float32


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Transformers' own progress bars and load reports off the terminal."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def _no_such_module(base: PreTrainedModel, problem: str) -> str:
    names = sorted({name.rsplit(".", 1)[-1] for name, module in base.named_modules() if hasattr(module, "weight")})
    return f"lora.target_modules: {problem}. Modules of this model: {', '.join(names)}"


def _why_not_loaded(config: ModelConfig, name: str, error: Exception) -> str:
    if Path(name).is_dir():
        remedy = "The directory needs config.json, safetensors weights and a tokenizer"
        if not config.gguf_file and list(Path(name).glob("*.gguf")):
            remedy = f"Set model.gguf_file to {sorted(Path(name).glob('*.gguf'))[0].name}"
    else:
        remedy = "It is no directory here; as a hub name it needs the network, and a login if the model is gated"
    return f"model.name: {config.name} could not be loaded ({first_line(error)}). {remedy}."
