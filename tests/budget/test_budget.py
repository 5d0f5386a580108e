"""The forgetting budget: its probes, its steering on a made-up plant, and both inside SFTTrainer."""

from __future__ import annotations

import math
import os
import random
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GENERAL_TEXT, move_adapter, record
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hlora.budget.budget import ForgettingBudget
from hlora.budget.probes import Rise, SampleProbe, TextProbe
from hlora.budget.steering import Steering
from hlora.config.units import parse_budget
from hlora.evaluation.likelihood import losses_and_drift
from hlora.importance.artefact import Importance
from hlora.importance.penalty import ImportancePenalty
from hlora.model.adapters import adapted_matrices
from hlora.system import progress
from hlora.system.errors import ConfigError, DataError
from hlora.training.train import train


@pytest.fixture
def tokenizer(model_dir: str):
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture
def importance(peft_model, token_ids) -> Importance:
    found = record(peft_model, token_ids)
    with torch.no_grad():
        for matrix in adapted_matrices(peft_model):
            matrix.B.zero_()
    return found


def text_probe(model: Any, tokenizer: Any, **sizes: int) -> TextProbe:
    sizes = {"tokens": 512, "most_tokens": 1024, "window": 64, **sizes}
    return TextProbe(model, tokenizer, {"topics": GENERAL_TEXT}, **sizes)


def sample_probe(model: Any, tokens: int = 256) -> SampleProbe:
    """The tiny Llama is random: no text is its own. The divergence grows to 0.013 nats, whatever is done to it."""
    sequences = torch.randint(3, 384, (32, 32), generator=torch.Generator().manual_seed(5))
    return SampleProbe(model, sequences, tokens=tokens, most_tokens=1024)


def factors(model: Any) -> list[torch.Tensor]:
    return [factor.detach().clone() for matrix in adapted_matrices(model) for factor in (matrix.A, matrix.B)]


# what a budget is


@pytest.mark.parametrize(
    ("text", "nats"), [("1%", math.log(1.01)), (" 0.5 % ", math.log(1.005)), (0.01, 0.01), ("2e-2", 0.02)]
)
def test_a_percentage_is_a_rise_of_perplexity_and_a_number_is_nats(text, nats):
    assert parse_budget(text) == pytest.approx(nats)


@pytest.mark.parametrize("text", ["one", "", "%", "1%%", "-1%", "0", "nan", "inf%", True, None, [1]])
def test_what_is_no_budget_is_refused_with_what_was_expected(text):
    with pytest.raises(ValueError, match='such as "1%", or nats'):
        parse_budget(text)


# probes


def test_an_untouched_adapter_has_risen_by_exactly_nothing(peft_model, tokenizer, token_ids):
    for probe in (text_probe(peft_model, tokenizer), SampleProbe(peft_model, token_ids)):
        rise = probe.measure(512)
        assert rise.nats == pytest.approx(0.0, abs=1e-7)
        assert rise.stderr == pytest.approx(0.0, abs=1e-7)


def test_the_rise_on_a_text_is_that_of_its_sliding_window_loss_without_what_has_no_context(peft_model, tokenizer):
    move_adapter(peft_model, deviation=0.3)
    peft_model.eval()
    tokens = tokenizer(GENERAL_TEXT, return_tensors="pt")["input_ids"][0][:256]  # 64 + 4 · 48 tokens
    with torch.no_grad():
        after = losses_and_drift(peft_model, tokens, window=64, stride=48, batch_size=2)[0]
        with peft_model.disable_adapter():
            before = losses_and_drift(peft_model, tokens, window=64, stride=48, batch_size=2)[0]
    expected = (after - before)[15:]  # evaluation scores the whole of its first window
    assert abs(float(expected.mean())) > 1e-3
    rise = TextProbe(peft_model, tokenizer, {"": GENERAL_TEXT}, tokens=256, most_tokens=256, window=64).measure(10_000)
    assert rise.tokens == len(expected) == 240
    assert rise.nats == pytest.approx(float(expected.mean()), abs=1e-5)


def test_a_text_shorter_than_a_window_is_scored_whole(peft_model, tokenizer):
    count = len(tokenizer(GENERAL_TEXT[:60])["input_ids"])
    assert TextProbe(peft_model, tokenizer, {"": GENERAL_TEXT[:60]}).measure(512).tokens == count - 1


def test_the_divergence_is_that_of_the_full_distributions(peft_model, token_ids):
    move_adapter(peft_model, deviation=0.3)
    peft_model.eval()
    with torch.no_grad():
        peft_model.get_output_embeddings().weight.mul_(20)  # far enough apart to tell the direction
        q = peft_model(input_ids=token_ids).logits[:, :-1].double().log_softmax(-1)
        with peft_model.disable_adapter():
            p = peft_model(input_ids=token_ids).logits[:, :-1].double().log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    backwards = float((q.exp() * (q - p)).sum(-1).mean())
    assert abs(backwards / expected - 1) > 0.01
    assert SampleProbe(peft_model, token_ids).measure(10_000).nats == pytest.approx(expected, rel=1e-3)


def test_the_worst_text_counts(peft_model, tokenizer):
    move_adapter(peft_model, deviation=0.3)
    halves = {"first": GENERAL_TEXT[:2000], "second": GENERAL_TEXT[2000:4000]}
    alone = {
        name: TextProbe(peft_model, tokenizer, {name: text}, window=64).measure(512) for name, text in halves.items()
    }
    worst = max(alone.values(), key=lambda rise: rise.nats)
    assert alone["first"].nats != alone["second"].nats
    assert TextProbe(peft_model, tokenizer, halves, window=64).measure(512) == worst


def test_a_longer_probe_extends_the_base_losses_of_a_shorter_one(peft_model, tokenizer):
    move_adapter(peft_model)
    probe = text_probe(peft_model, tokenizer)
    probe.measure(128)
    assert probe.measure(512) == text_probe(peft_model, tokenizer).measure(512)


def test_a_probe_leaves_modes_random_numbers_and_what_is_trained_alone(peft_model, tokenizer, token_ids):
    peft_model.train()
    frozen = adapted_matrices(peft_model)[0].A
    frozen.requires_grad_(False)
    trained = [parameter.requires_grad for parameter in peft_model.parameters()]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    peft_model.register_forward_hook(lambda *_: torch.rand(1) and None)  # a model that draws, also in evaluation mode
    for probe in (text_probe(peft_model, tokenizer), SampleProbe(peft_model, token_ids)):
        probe.measure(128)
    assert torch.rand(1) == expected
    assert all(module.training for module in peft_model.modules())
    assert [parameter.requires_grad for parameter in peft_model.parameters()] == trained


def test_the_standard_error_covers_the_rise_of_another_part_of_the_text(peft_model, tokenizer):
    move_adapter(peft_model, deviation=0.3)
    half = len(GENERAL_TEXT) // 2
    parts = [
        TextProbe(peft_model, tokenizer, {"": text}, window=64).measure(2048)
        for text in (GENERAL_TEXT[:half], GENERAL_TEXT[half:])
    ]
    assert parts[0].stderr > 0
    assert abs(parts[0].nats - parts[1].nats) < 4 * math.hypot(parts[0].stderr, parts[1].stderr)


def test_a_probe_without_text_is_refused(peft_model, tokenizer):
    with pytest.raises(DataError, match="no probe text"):
        TextProbe(peft_model, tokenizer, {})
    with pytest.raises(DataError, match="'x' has 0 tokens"):
        TextProbe(peft_model, tokenizer, {"x": ""})
    with pytest.raises(DataError, match="shape"):
        SampleProbe(peft_model, torch.zeros(3, 1, dtype=torch.long))


# steering, on a made-up plant


def plant(
    budget: float, phi: float, steps: int = 60, seed: int = 0, noise: float = 1.0, every: int = 6
) -> tuple[list[float], list[float]]:
    """Rise after each step and φ after each probe: as SmolLM2's on QASC, by and large.

    At a constant φ the rise goes to 0.06/(1 + φ)^0.4 nats with a lag of 6 steps, and is up to 4 times that while
    the learning rate is high. A probe's noise is that of 4096 tokens: √(2 · rise / 4096) nats.
    """
    draw = random.Random(seed)
    steering = Steering(budget, math.log(phi))
    rise, rises, phis = 1e-4, [], [phi]
    for step in range(1, steps + 1):
        left = 1 - step / steps
        rise *= (0.06 / (1 + phi) ** 0.4 * (1 + 3 * left**2) / rise) ** (1 / 6)
        rises.append(rise)
        if step < steps and (step % every == 0 or step in (2, 4, 6, 8)):
            stderr = math.sqrt(2 * rise / 4096)
            phi = steering.next_phi(Rise(rise + noise * draw.gauss(0, stderr), stderr, "", 4096), step / steps)
            phis.append(phi)
    return rises, phis


@pytest.mark.parametrize("budget", [0.005, 0.01, 0.02, 0.04])
@pytest.mark.parametrize("off", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("every", [2, 6])
def test_the_rise_ends_near_the_budget_wherever_phi_starts(budget, off, every):
    right = (0.06 / budget) ** 2.5 - 1  # the φ that a constant one would need
    for seed in range(5):
        rises, _ = plant(budget, right * off, seed=seed, every=every)
        assert 0.6 < rises[-1] / budget < 1.6, (seed, rises[-1])


def test_phi_stays_within_its_bounds_and_comes_back_from_them_at_once():
    steering = Steering(0.01, 0.0)
    for probe in range(200):
        lowest = steering.next_phi(Rise(1e-6, 1e-9, "", 1), min(1.0, 0.1 * probe))
    assert lowest == pytest.approx(1e-4)
    assert steering.next_phi(Rise(1.0, 1e-9, "", 1), 1.0) > 2 * lowest


def test_one_probe_changes_phi_by_a_bounded_factor():
    moves = [abs(math.log(b / a)) for seed in range(3) for a, b in pairwise(plant(0.005, 0.003, seed=seed)[1])]
    assert 1.0 < max(moves) < 2.5001


def test_phi_does_not_fall_while_the_rise_has_hardly_begun():
    steering = Steering(0.01, 0.0)
    assert steering.next_phi(Rise(0.0001, 0.00001, "", 1), 0.05) == 1
    assert steering.next_phi(Rise(0.0001, 0.00001, "", 1), 0.5) < 0.5


def test_a_rise_above_the_budget_is_allowed_while_much_of_the_run_is_left():
    phis = [Steering(0.01, 0.0).next_phi(Rise(0.015, 1e-9, "", 1), progress) for progress in (0.3, 1.0)]
    assert phis[0] < 1 < phis[1]


def test_a_rise_below_its_noise_is_taken_for_the_noise():
    below, equal = (Steering(0.01, 0.0).next_phi(Rise(nats, 0.001, "", 1), 0.5) for nats in (-0.002, 0.001))
    assert below == equal < 1


def test_a_rise_that_is_not_finite_leaves_phi():
    assert Steering(0.01, math.log(7.0)).next_phi(Rise(math.nan, 0.1, "", 1), 0.5) == pytest.approx(7.0)


# in SFTTrainer


ROWS = [{"prompt": f"What is {n} plus one?", "completion": f" It is {n + 1}."} for n in range(32)]


def make_trainer(model: Any, tokenizer: Any, output: Path, steps: int = 20, **changes: Any) -> SFTTrainer:
    arguments = {
        "output_dir": str(output),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": 64,
        **changes,
    }
    return SFTTrainer(
        model=model, args=SFTConfig(**arguments), train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer
    )


def tune(
    model: Any,
    tokenizer: Any,
    importance: Importance,
    output: Path,
    budget: float | None,
    anchor: str = "base",
    **options: Any,
) -> tuple[ForgettingBudget | None, SFTTrainer]:
    if anchor == "general":
        importance.load_adapter_into(model)
    penalty = ImportancePenalty(model, importance, 0.01, layer_weights="uniform", anchor=anchor)
    trainer = make_trainer(model, tokenizer, output)
    trainer.add_callback(penalty.callback())
    steered = None
    if budget is not None:
        steered = ForgettingBudget(penalty, sample_probe(model), budget, **options)
        trainer.add_callback(steered.callback())
    trainer.train()
    return steered, trainer


@pytest.mark.parametrize("anchor", ["base", "general"])
def test_a_budget_that_binds_is_met_on_the_probe(peft_model, tokenizer, importance, tmp_path, anchor):
    budget = 0.002
    if anchor == "general":  # where the tuning starts counts too
        importance.load_adapter_into(peft_model)
        budget += sample_probe(peft_model).measure(1024).nats
    steered, _ = tune(peft_model, tokenizer, importance, tmp_path, budget, anchor)
    rise = sample_probe(peft_model).measure(1024).nats
    assert 0.7 * budget < rise <= budget
    assert steered.history[-1]["rise"] == pytest.approx(rise, abs=1e-7)
    assert 0 < steered.history[-1]["alpha"] <= 1.25


def test_without_the_budget_the_same_run_forgets_more(peft_model, tokenizer, importance, tmp_path):
    tune(peft_model, tokenizer, importance, tmp_path, None)
    assert sample_probe(peft_model).measure(1024).nats > 0.003


def test_log_and_history_say_what_was_measured_and_what_phi_became(peft_model, tokenizer, importance, tmp_path):
    steered, trainer = tune(peft_model, tokenizer, importance, tmp_path, 0.002, every=5)
    log = trainer.state.log_history
    assert [entry["step"] for entry in steered.history] == [5, 10, 15, 20]
    assert [entry["probe_step"] for entry in log if "probe_rise" in entry] == [5, 10, 15, 20]
    assert all("phi" in entry for entry in log if "loss" in entry)
    assert len({entry["phi"] for entry in log if "loss" in entry}) > 2
    assert log[-1]["probe_rise"] == steered.history[-1]["rise"]
    assert steered.seconds > 0


def test_without_landing_the_adapter_stays_where_training_left_it(peft_model, tokenizer, importance, tmp_path):
    steered, _ = tune(peft_model, tokenizer, importance, tmp_path, 1e-6, landing=False)
    assert steered.history[-1]["alpha"] == 1
    assert steered.history[-1]["rise"] > 1e-6


@pytest.mark.parametrize("anchor", ["base", "general"])
def test_landing_goes_back_on_the_line_to_the_anchor_and_no_further_than_needed(
    peft_model, tokenizer, importance, anchor
):
    penalty = ImportancePenalty(peft_model, importance, 1.0, layer_weights="uniform", anchor=anchor)
    move_adapter(peft_model, deviation=0.3)
    before = factors(peft_model)
    probe = sample_probe(peft_model, 1024)
    rise, alpha = ForgettingBudget(penalty, probe, 0.005).land()
    assert probe.measure(1024) == rise
    assert 0.0046 < rise.nats <= 0.005
    assert 0 < alpha < 1
    anchored = [t for m in importance.matrices.values() for t in (m.A, m.B)]
    for n, (start, end, now) in enumerate(zip(anchored, before, factors(peft_model), strict=True)):
        if anchor == "base":
            start, share = (torch.zeros_like(end), alpha) if n % 2 else (end, 1.0)
        else:
            share = alpha
        torch.testing.assert_close(now, start + share * (end - start))


def test_landing_uses_what_is_left_of_the_budget_only_where_the_penalty_held_the_adapter_back(
    peft_model, tokenizer, importance
):
    move_adapter(peft_model, deviation=0.05)
    before = factors(peft_model)
    now = sample_probe(peft_model, 1024).measure(1024).nats
    for phi, moved in ((1e-9, False), (1e9, True)):
        penalty = ImportancePenalty(peft_model, importance, phi, layer_weights="uniform", anchor="base")
        rise, alpha = ForgettingBudget(penalty, sample_probe(peft_model, 1024), 1.2 * now).land()
        assert (1.01 < alpha <= 1.25) is moved
        assert now <= rise.nats <= 1.2 * now
    torch.testing.assert_close(factors(peft_model)[1], alpha * before[1])


def test_a_landing_reads_as_much_text_as_its_budget_is_small(peft_model, tokenizer, importance):
    penalty = ImportancePenalty(peft_model, importance, 1.0, layer_weights="uniform", anchor="base")
    move_adapter(peft_model, deviation=0.3)
    probe = text_probe(peft_model, tokenizer)
    stderr = probe.measure(512).stderr
    read = [ForgettingBudget(penalty, probe, share * stderr)._precisely()[0].tokens for share in (11.0, 9.0, 0.1)]
    assert read[0] < read[1] <= read[2]
    assert read[2] == probe.measure(10_000).tokens


def test_where_the_general_phase_left_room_its_rise_is_read_less_precisely(peft_model, tokenizer, importance):
    penalty = ImportancePenalty(peft_model, importance, 1.0, layer_weights="uniform")
    ids = tokenizer(GENERAL_TEXT, return_tensors="pt")["input_ids"][:, :512]
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(10):
        peft_model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    probe = text_probe(peft_model, tokenizer)
    at_anchor = probe.measure(512)
    assert at_anchor.nats < -at_anchor.stderr < 0
    steered = ForgettingBudget(penalty, probe, 5 * at_anchor.stderr)  # a tenth of it needs more than 512 tokens
    assert steered._precisely()[1] > 512
    rise, tokens = steered._precisely(room=True)
    assert tokens < probe.most_tokens
    assert rise.stderr <= 0.1 * (steered.budget - rise.nats)
    steered.begin()
    assert steered.history[0]["stderr"] == rise.stderr


def test_a_probe_says_how_far_it_is(peft_model, tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(progress, "_FIRST", 0.0)
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    caplog.set_level("INFO", "hlora")
    for probe in (text_probe(peft_model, tokenizer), sample_probe(peft_model)):
        caplog.clear()
        with progress.line("step", 4):
            probe.measure(512)
        said = [record.getMessage() for record in caplog.records]
        done, total = said[-1].split(" token ")[1].split(", ")[0].split(" of ")
        assert said[0].startswith("the budget's probe, token ")
        assert done == total


def test_each_probe_reads_another_part_in_turn_and_the_landing_all(peft_model, tokenizer):
    move_adapter(peft_model, deviation=0.3)
    for probe, same in (
        (text_probe(peft_model, tokenizer), 7),
        (sample_probe(peft_model), 4),
    ):  # 7 · 6 = 2 · 21 windows
        parts = [probe.measure(256, turn).nats for turn in range(same)]
        assert len(set(parts[:4])) == 4
        assert probe.measure(1024).nats == pytest.approx(sum(parts) / same, abs=1e-6)
        assert probe.measure(256, same).nats == pytest.approx(parts[0], abs=1e-9)


def test_an_adapter_within_its_budget_is_not_moved(peft_model, tokenizer, importance):
    penalty = ImportancePenalty(peft_model, importance, 1e-9, layer_weights="uniform", anchor="base")
    move_adapter(peft_model, deviation=0.3)
    before = factors(peft_model)
    _, alpha = ForgettingBudget(penalty, sample_probe(peft_model), 10.0).land()
    assert alpha == 1
    assert all(torch.equal(a, b) for a, b in zip(before, factors(peft_model), strict=True))


def test_a_general_adapter_beyond_the_budget_is_said_and_nothing_moved(peft_model, tokenizer, importance, caplog):
    importance.load_adapter_into(peft_model)
    penalty = ImportancePenalty(peft_model, importance, 1.0, layer_weights="uniform")
    steered = ForgettingBudget(penalty, sample_probe(peft_model), 1e-9)
    steered.begin()
    assert "itself" in caplog.text
    move_adapter(peft_model, deviation=0.3)
    before = factors(peft_model)
    assert steered.land()[1] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, factors(peft_model), strict=True))


def test_a_resumed_run_steers_as_an_uninterrupted_one(peft_model, tokenizer, importance, tmp_path):
    start = factors(peft_model)

    def run(output: Path, resume: str | None = None) -> tuple[list[dict[str, Any]], list[float], list[torch.Tensor]]:
        with torch.no_grad():
            for factor, kept in zip((f for m in adapted_matrices(peft_model) for f in (m.A, m.B)), start, strict=True):
                factor.copy_(kept)
        penalty = ImportancePenalty(peft_model, importance, 0.01, layer_weights="uniform", anchor="base")
        trainer = make_trainer(peft_model, tokenizer, output, save_strategy="steps", save_steps=7)
        steered = ForgettingBudget(penalty, sample_probe(peft_model), 0.002)
        trainer.add_callback(penalty.callback())
        trainer.add_callback(steered.callback())
        trainer.train(resume_from_checkpoint=resume)
        phis = [entry["phi"] for entry in trainer.state.log_history if "loss" in entry]
        return steered.history, phis, factors(peft_model)

    whole = run(tmp_path / "a")
    resumed = run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-7"))
    assert len(whole[1]) == 20
    assert whole[0] == resumed[0]
    assert whole[1] == resumed[1]
    assert all(torch.equal(a, b) for a, b in zip(whole[2], resumed[2], strict=True))


def test_a_checkpoint_of_another_budget_is_refused(peft_model, tokenizer, importance):
    penalty = ImportancePenalty(peft_model, importance, 1.0, layer_weights="uniform", anchor="base")
    probe = sample_probe(peft_model)
    state = ForgettingBudget(penalty, probe, 0.01).state()
    with pytest.raises(ConfigError, match="same budget"):
        ForgettingBudget(penalty, probe, 0.02).load_state(state)


@pytest.mark.parametrize(("phi", "budget", "every"), [(0.0, 0.01, None), (1.0, 0.0, None), (1.0, 0.01, 0)])
def test_a_budget_that_cannot_be_steered_is_refused(peft_model, tokenizer, importance, phi, budget, every):
    penalty = ImportancePenalty(peft_model, importance, phi, layer_weights="uniform", anchor="base")
    with pytest.raises(ConfigError, match=r"more than 0|at least 1"):
        ForgettingBudget(penalty, sample_probe(peft_model), budget, every=every)


def test_ctrl_c_leaves_the_landing_to_the_resumed_training(peft_model, tokenizer, importance, tmp_path):
    class Press(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    penalty = ImportancePenalty(peft_model, importance, 0.01, anchor="base")
    budget = ForgettingBudget(penalty, sample_probe(peft_model), 0.01)
    callbacks = [Press(), penalty.callback(), budget.callback()]
    arguments = {"max_steps": 6, "per_device_train_batch_size": 2, "report_to": []}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    try:
        with pytest.raises(KeyboardInterrupt, match="after step 3 of 6"):
            rows, output = Dataset.from_list(ROWS), tmp_path / "logs" / "tune"
            options: Any = {"arguments": arguments, "callbacks": callbacks, "resumable": True}
            train(peft_model, tokenizer, rows, output=output, seed=0, **options)
    finally:
        signal.signal(signal.SIGINT, before)
    assert budget.history and not any("alpha" in entry for entry in budget.history)
