"""What a model writes: from its own distribution or greedily, by settings of ours and none of the model's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase


@torch.no_grad()
def written(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Tensor,
    *,
    new_tokens: int,
    mask: Tensor | None = None,
    temperature: float | None = None,
    stops: list[int] | None = None,
) -> Tensor:  # (n, at most new_tokens)
    """Token ids that the model writes after `prompts`.

    Of the model's generation_config.json only the end tokens are taken. A repetition penalty, a top_p or suppressed
    tokens, which instruct models often have there, would make it another model's text.

    Args:
        prompts: (n, length) token ids, padded on the left.
        mask: (n, length), 0 where padded; None: nothing is.
        temperature: of the samples; None: the likeliest token after token.
        stops: further tokens that end a text.
    """
    ends = as_list(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    settings = GenerationConfig(
        do_sample=temperature is not None,
        max_new_tokens=new_tokens,
        eos_token_id=sorted({*ends, *as_list(tokenizer.eos_token_id), *(stops or [])}) or None,
        pad_token_id=tokenizer.pad_token_id,
        **({} if temperature is None else {"temperature": temperature, "top_k": 0, "top_p": 1.0}),
    )
    with nothing_of_its_own(model):
        found = model.generate(
            input_ids=prompts.to(model.device),
            attention_mask=(torch.ones_like(prompts) if mask is None else mask).to(model.device),
            generation_config=settings,
        )
    return found[:, prompts.shape[1] :]


@contextmanager
def nothing_of_its_own(model: Any) -> Iterator[None]:
    """The model without a generation configuration, from which Transformers fills what ours leaves at its default."""
    models = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    own = [getattr(each, "generation_config", None) for each in models]
    for each in models:
        each.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for each, config in zip(models, own, strict=True):
            each.generation_config = config


def as_list(ids: int | list[int] | None) -> list[int]:
    """The end tokens of a configuration, which holds one, several or none."""
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
