"""Text that the base model generates."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hlora.config.sections import GeneralSource
from hlora.data.generation import written
from hlora.system.errors import culprit
from hlora.system.files import write_json
from hlora.system.progress import counted


@torch.no_grad()
def model_samples(
    config: GeneralSource,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    directory: Path,
    keep: bool = True,
) -> list[str]:
    """Sample text from the base model, from the first token on.

    Args:
        config: How many samples, of what length and temperature.
        model: The base model.
        tokenizer: The model's.
        seed: Seed of the sampling.
        directory: Where samples are read from, if they are there.
        keep: Whether to keep new samples there.

    Raises:
        DataError: The file of samples is damaged.
    """
    shape = f"{config.samples}x{config.sample_tokens}"
    cache = directory / f"samples-{shape}-temperature-{config.temperature:g}-seed-{seed}.json"
    asked = [config.samples, config.sample_tokens, config.temperature, seed, str(model.config._name_or_path)]
    if cache.is_file():
        with culprit(cache, "Remove it; the same samples are drawn again."):
            kept = json.loads(cache.read_text(encoding="utf-8"))
            if kept["asked"] == asked:
                return list(map(str, kept["samples"]))
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    samples: list[str] = []
    devices = [] if model.device.type == "cpu" else [model.device]  # by default every GPU of the machine
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        batches = [min(32, config.samples - done) for done in range(0, config.samples, 32)]
        for size in counted(batches, "sampling general text, sample", int):
            first = torch.full((size, 1), start)
            texts = written(model, tokenizer, first, new_tokens=config.sample_tokens, temperature=config.temperature)
            samples += tokenizer.batch_decode(texts, skip_special_tokens=True)
    if keep:
        directory.mkdir(parents=True, exist_ok=True)
        return write_json(cache, {"asked": asked, "samples": samples})["samples"]  # as a resumed run reads them
    return samples
