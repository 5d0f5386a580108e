"""A few rows of the tables that tables.py prints in full: right, or refused in a true sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tables import cell, loss, of_architecture, of_run, token_ids, trained
from variants import of_optimizer, of_variant

pytestmark = pytest.mark.slow


def assert_right(cells: list[str]) -> None:
    assert [each for each in cells if not each.startswith("right")] == []


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "opt", "qwen3_5_moe_text"])
def test_architectures_are_recorded_and_held_as_a_dense_computation_says(name: str) -> None:
    assert_right(of_architecture(name))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_encoder_decoder_is_recorded_and_held_as_a_dense_computation_says() -> None:
    assert_right(of_architecture("t5")[:2])


def test_a_run_of_a_model_that_trl_or_peft_does_not_fit_ends_in_what_helps(tmp_path: Path) -> None:
    fit, whole = of_run("llama4_text", tmp_path)
    assert re.match(r"refused: .* trl .* trl/trainer/utils\.py.* hlora\.protect with transformers\.Trainer", fit)
    assert re.match(r"refused: .* peft .* Name other lora\.target_modules", whole)


def test_a_run_of_granitemoehybrid_works_as_its_refusal_says(tmp_path: Path) -> None:
    (tmp_path / "as it is").mkdir()
    for each in of_run("granitemoehybrid", tmp_path / "as it is"):
        assert re.match(r"refused: .* trl .* Set training\.common\.router_aux_loss_coef: 0\.0", each)
    assert of_run("granitemoehybrid", tmp_path, router_aux_loss_coef=0.0) == ["ok", "ok"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["PiSSA"])
def test_variants_are_recorded_and_start_at_the_general_adapter(name: str) -> None:
    assert_right(of_variant(name, token_ids(), loss, cell))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("CorDA", "refused: .*CorDA has changed its base weight"),
        ("DoRA", "refused: .*DoRA's magnitude"),
        ("MiSS", r"refused: this model is adapted by MISS; .* Use peft\.LoraConfig"),
    ],
)
def test_other_variants_are_refused_in_a_sentence(name: str, sentence: str) -> None:
    for each in of_variant(name, token_ids(), loss, cell):
        assert re.match(sentence, each)


@pytest.mark.parametrize("name", ["LoRA+", "Muon"])
def test_omega_under_an_optimizer_is_the_dense_one(name: str) -> None:
    assert_right([of_optimizer(name, token_ids(), loss)])


def test_a_trainer_of_preferences_adds_the_gradient_of_the_penalty_once_a_step(tmp_path: Path) -> None:
    assert_right([trained("KTO", tmp_path)])
