"""Lengths that nobody has set fit the model's context."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from hlora.config.reading import parse_config
from hlora.run.lengths import fit_lengths


def model(context: int) -> LlamaForCausalLM:
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=context))


def test_defaults_are_capped_at_the_context_and_what_is_set_stays(job_fields: dict[str, Any]) -> None:
    del job_fields["training"]["tune"]["max_length"]
    config = parse_config(job_fields)
    fitted = fit_lengths(config, model(context=100))
    assert (
        fitted.training.tune_arguments()["max_length"] == 100 and fitted.training.record_arguments()["max_length"] == 32
    )
    assert (fitted.evaluation.window, fitted.importance.sequence_length, fitted.general.sample_tokens) == (100,) * 3
    assert config == parse_config(job_fields), "the configuration that was given is changed"


def test_a_context_that_has_room_changes_nothing(job_fields: dict[str, Any]) -> None:
    del job_fields["training"]["tune"]["max_length"]
    assert fit_lengths(parse_config(job_fields), model(context=2048)) == parse_config(job_fields)
