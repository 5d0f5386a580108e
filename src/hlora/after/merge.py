"""A run's adapter merged into its base model: an ordinary model directory, checked before it is called done."""

from __future__ import annotations

import copy
import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from hlora.after.tuned import load_tuned, model_config
from hlora.data.generation import as_list
from hlora.data.rendering import end_tokens_of_template
from hlora.report.card import merged_card
from hlora.system.errors import ArtifactError, ConfigError, first_line
from hlora.system.files import atomic_directory, check_directory
from hlora.system.quiet import quiet

logger = logging.getLogger("hlora")

BOUNDS = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
"""Largest allowed distance of the merged model's logits, by the precision of its weights: RMS of the difference over
the RMS of the logits."""

_TEXT = (
    "Question: Which metal is liquid at room temperature?\nAnswer: mercury. The committee met again in March and asked "
    "for a shorter report. def area(width, height):\n    return width * height\n12 + 30 = 42. Sehr geehrte Damen und "
    "Herren, la réunion est reportée à jeudi. She turned the key twice, listened, and went back to her book."
)


class Merged(NamedTuple):
    """Where the merged model is, and how far its logits are from those of the adapter."""

    directory: Path
    precision: str
    error: float
    """RMS of the difference between merged and adapter logits, over the RMS of the logits."""
    bound: float
    effect: float
    """The same distance between the adapter and the base model: what the tuning changed."""


def merge(run: Path, directory: Path, overrides: list[str] | None = None) -> Merged:
    """Merge the adapter of a run into its base model, and write model, tokenizer and card to `directory`.

    The model is loaded again from what was written. Its logits on a fixed text have to equal the adapter's within
    `BOUNDS`, and to lie at most half as far from them as the base model's do. Otherwise nothing is left of it.

    Args:
        run: output directory of a run.
        directory: a new or an empty directory.
        overrides: of the run's model section, such as model.dtype=float32. A base in 4 or 8 bits is loaded in full.

    Raises:
        ConfigError: `run` is not a run's output, `directory` is in use, or the base model is only there quantised.
        ArtifactError: the adapter does not fit, or the merged model is not equal to it.
    """
    _check_free(directory)
    config = model_config(run, overrides)
    if config.quantization:
        logger.info("tuned on a base in %s; merged into the base in full precision", config.quantization)
        config = config.model_copy(update={"quantization": None})
    tuned = load_tuned(run, config)
    model: Any = tuned.model
    if getattr(model.get_base_model(), "is_quantized", False):
        raise ConfigError(
            f"model.name: {config.name} is kept quantised, and a merge would be rounded to its few bits. Name the "
            "model in full precision: --set model.name=…"
        )
    tokens = _tokens(tuned.tokenizer, model)
    with model.disable_adapter():
        base_logits = _logits(model, tokens)
    expected = _logits(model, tokens)
    dtype = model.dtype
    precision = str(dtype).removeprefix("torch.")
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as problem:  # the sum is not finite
        raise ArtifactError(f"{run / 'adapter'}: cannot be merged ({first_line(problem)}). Tune again.") from None
    merged.generation_config = _savable(merged.generation_config)
    _add_ends(merged, tuned.tokenizer)
    with atomic_directory(directory) as fresh, quiet():
        merged.save_pretrained(fresh)
        tuned.tokenizer.save_pretrained(fresh)
        (fresh / "README.md").write_text(merged_card(_results_of(run, config.model_dump()), precision), "utf-8")
        device = merged.device
        del model, merged, tuned
        again: Any = AutoModelForCausalLM.from_pretrained(
            fresh, dtype=dtype, use_safetensors=True, trust_remote_code=config.trust_remote_code
        )
        found = _logits(again.to(device).eval(), tokens)
        scale = _rms(expected)
        error, effect = _rms(found - expected) / scale, _rms(expected - base_logits) / scale
        result = Merged(directory, precision, error, BOUNDS.get(precision, BOUNDS["float32"]), effect)
        _check(result)
    return result


def _savable(config: GenerationConfig) -> GenerationConfig:
    """The author's generation settings, in a form that Transformers writes.

    Llama 2 and Vicuna have a temperature without do_sample. Transformers reads that and refuses to write it; with
    do_sample their values count. Of settings that contradict each other otherwise, only the special tokens are kept.
    """
    sampled = copy.deepcopy(config)
    sampled.do_sample = True
    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if (tokens["pad_token_id"] or 0) < 0:  # LLaMA's first configurations have -1 for none
        del tokens["pad_token_id"]
    for found in (config, sampled):
        with suppress(ValueError):
            found.validate(strict=True)
            return found
    logger.warning("generation_config: its settings contradict each other; only the special tokens are kept")
    return GenerationConfig(**tokens)


def _add_ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add what ends an answer in the chat template to the end tokens of the model's generation_config.json.

    Servers stop there. A base model's has its own EOS alone, and the tuned one would write on after <|im_end|>.
    """
    ends = as_list(model.generation_config.eos_token_id)
    if more := sorted(end_tokens_of_template(tokenizer) - {*ends}):
        model.generation_config.eos_token_id = [*ends, *more]


def _check(result: Merged) -> None:
    if not result.error <= result.bound:  # NaN, too
        raise ArtifactError(
            f"merge: the logits of the merged model differ from the adapter's by {result.error:.2g} of their size, "
            f"above the bound of {result.bound:.2g} for {result.precision}. Nothing was written. Merge in float32 "
            "(--set model.dtype=float32); if that fails too, report it with the name of the base model."
        )
    if result.error > result.effect / 2:
        raise ArtifactError(
            f"merge: the tuning changes the logits by {result.effect:.2g} of their size, and rounding the merged "
            f"weights to {result.precision} by {result.error:.2g}, so too little of it would be left. Nothing was "
            "written. Merge in float32 (--set model.dtype=float32), or serve the adapter as it is."
        )


def _check_free(directory: Path) -> None:
    check_directory(directory)
    if directory.is_dir() and any(directory.iterdir()):
        raise ConfigError(f"{directory}: not empty. Name a new directory for the merged model.")


def _tokens(tokenizer: PreTrainedTokenizerBase, model: Any) -> Tensor:
    """The fixed text as the model reads it, (1, n)."""
    ids: Tensor = tokenizer(_TEXT, return_tensors="pt")["input_ids"]
    return ids[:, : getattr(model.config.get_text_config(), "max_position_embeddings", None)].to(model.device)


@torch.inference_mode()
def _logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits of every position less their mean, which no probability depends on, in float32."""
    logits = model(input_ids=tokens, use_cache=False).logits.float()
    return (logits - logits.mean(-1, keepdim=True)).cpu()


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _results_of(run: Path, model: dict[str, Any]) -> dict[str, Any]:
    """results.json, for the card; without one, what config.yaml says of the model."""
    try:
        results: dict[str, Any] = json.loads((run / "results.json").read_text(encoding="utf-8"))
        return results if isinstance(results, dict) else {"config": {"model": model}}
    except (OSError, ValueError, RecursionError):
        return {"config": {"model": model}}
