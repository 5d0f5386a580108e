"""The tuned model of a run: its base model with its adapter, from the output directory."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from hlora.config.reading import parse_config, read_yaml
from hlora.config.sections import ModelConfig, Section
from hlora.model.base import load_base
from hlora.model.saved_adapter import load_adapter
from hlora.system.errors import ConfigError


class Tuned(NamedTuple):
    """A base model with a tuned adapter on it, which `model.disable_adapter()` turns off."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    config: ModelConfig


class _ModelPart(Section):
    """Of a run's config.yaml what says which base model it is. The rest may be of another version of hlora."""

    model: ModelConfig


def model_config(run: Path, overrides: list[str] | None = None) -> ModelConfig:
    """The `model` section of a run's config.yaml, with overrides such as model.device=cpu.

    Raises ConfigError where `run` is not the output directory of a run with a tuned adapter.
    """
    config = run / "config.yaml"
    for needed in (config, run / "adapter" / "adapter_config.json"):
        if not needed.is_file():
            raise ConfigError(
                f"{run}: expected the output directory of a run, but {needed.relative_to(run)} is missing. "
                "Name the `output` of a finished `hlora run` or `hlora tune`."
            )
    fields = {"model": read_yaml(config).get("model")}
    return parse_config(fields, str(config), overrides, _ModelPart).model


def load_tuned(run: Path, config: ModelConfig) -> Tuned:
    """Load the base model and put the run's adapter on it. Raises ConfigError or ArtifactError."""
    base, tokenizer = load_base(config)
    return Tuned(load_adapter(base, run / "adapter"), tokenizer, config)
