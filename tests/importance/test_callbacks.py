"""Recording and penalty inside the real Trainer and SFTTrainer, against a plain loop."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ReferenceOmega, move_adapter, record
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import hlora
from hlora.importance.artefact import Importance
from hlora.importance.penalty import ImportancePenalty
from hlora.importance.recorder import ImportanceRecorder
from hlora.numerics.encodings import Factored
from hlora.system.errors import AdapterError, ArtifactError, TrainingError
from hlora.training.train import train

LR, STEPS, TIGHT = 0.01, 4, 1e-3


def adapter_parameters(model: PeftModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def factors(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_factors(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 0.0) -> None:
    for name, mine in first.items():
        torch.testing.assert_close(mine, second[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def arguments(output: Path, kind: type[TrainingArguments] = TrainingArguments, **changes: Any) -> Any:
    settings = {
        "output_dir": str(output),
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": LR,
        "lr_scheduler_type": "linear",
        "optim": "adamw_torch",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        **changes,
    }
    return kind(**settings)


def rows(token_ids: Tensor, labels: bool = True) -> Dataset:
    """Nothing predicts a first token; Trainer of Transformers 5.5 counts its label all the same."""
    ids = token_ids.tolist()
    return Dataset.from_dict({"input_ids": ids} | ({"labels": [[-100, *row[1:]] for row in ids]} if labels else {}))


def make_trainer(
    model: PeftModel, token_ids: Tensor, output: Path, callbacks: Sequence[Any] = (), **changes: Any
) -> Trainer:
    return Trainer(
        model=model,
        args=arguments(output, **changes),
        train_dataset=rows(token_ids),
        callbacks=list(callbacks),
    )


def make_sft_trainer(
    model: PeftModel, model_dir: str, token_ids: Tensor, output: Path, callbacks: Sequence[Any] = (), **changes: Any
) -> SFTTrainer:
    return SFTTrainer(
        model=model,
        args=arguments(output, SFTConfig, gradient_checkpointing=False, **changes),
        train_dataset=rows(token_ids, labels=False),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        callbacks=list(callbacks),
    )


def plain_loop(
    model: PeftModel,
    token_ids: Tensor,
    recorder: ImportanceRecorder | None = None,
    penalty: ImportancePenalty | None = None,
    reference: ReferenceOmega | None = None,
    max_norm: float = 1.0,
) -> list[float]:
    """What the Trainer above does, written out; returns φ·L_reg before each step."""
    parameters, weighted = adapter_parameters(model), []
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    model.train()
    for step in range(STEPS):
        lr = LR * (1 - step / STEPS)
        optimizer.param_groups[0]["lr"] = lr
        batch = token_ids[4 * step :][:4]
        model(input_ids=batch, labels=batch, attention_mask=torch.ones_like(batch)).loss.backward()
        if reference is not None:
            reference.before(lr)
        if recorder is not None:
            recorder.capture(lr)
        if penalty is not None:
            value = penalty()
            weighted.append(value.item())
            value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        if recorder is not None:
            recorder.integrate()
        if reference is not None:
            reference.after()
        optimizer.zero_grad()
    return weighted


@pytest.fixture
def importance(peft_model: PeftModel, token_ids: Tensor) -> Importance:
    """Recorded on the reversed rows; the model goes back to where it was before."""
    start = copy.deepcopy(peft_model.state_dict())
    move_adapter(peft_model, seed=3)
    recorder = ImportanceRecorder(peft_model, "float32", method="path_integral")
    plain_loop(peft_model, token_ids.flip(0), recorder)
    result = recorder.consolidate(1e-3, {"source": "test"})
    peft_model.load_state_dict(start)
    return result


# Recording


@pytest.mark.parametrize("max_norm", [1.0, TIGHT, 0.0])
@pytest.mark.parametrize("which", ["Trainer", "SFTTrainer"])
def test_callback_records_what_a_plain_loop_records_from_unclipped_gradients(
    peft_model: PeftModel, token_ids: Tensor, model_dir: str, tmp_path: Path, which: str, max_norm: float
) -> None:
    move_adapter(peft_model)
    other = copy.deepcopy(peft_model)
    recorder, reference = ImportanceRecorder(peft_model, "float32", method="path_integral"), ReferenceOmega(other)
    callbacks = [recorder.callback()]
    if which == "Trainer":
        trainer = make_trainer(peft_model, token_ids, tmp_path, callbacks, max_grad_norm=max_norm)
    else:
        trainer = make_sft_trainer(peft_model, model_dir, token_ids, tmp_path, callbacks, max_grad_norm=max_norm)
    trainer.train()
    plain_loop(other, token_ids, reference=reference, max_norm=max_norm or float("inf"))
    assert (recorder.steps, recorder.skipped_steps) == (STEPS, 0)
    reference.assert_matches(recorder.omega)
    assert_same_factors(factors(peft_model), factors(other), 1e-5)


@pytest.mark.parametrize("encoding", ["float32", "factored"])
def test_the_three_ways_in_agree(peft_model: PeftModel, token_ids: Tensor, tmp_path: Path, encoding: str) -> None:
    """step, attach and callback on the same run of Trainer itself give the same numbers, bit for bit."""
    recorders = [ImportanceRecorder(peft_model, encoding, method="path_integral") for _ in range(3)]

    class Stepping(TrainerCallback):
        """`with recorder.step(lr)` around the trainer's own optimizer.step()."""

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.context = recorders[0].step(kwargs["optimizer"].param_groups[0]["lr"])
            self.context.__enter__()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.context.__exit__(None, None, None)

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            recorders[1].attach(kwargs["optimizer"])

    callbacks = [Stepping(), recorders[2].callback()]
    make_trainer(peft_model, token_ids, tmp_path, callbacks).train()
    states = [recorder.state_dict() for recorder in recorders]
    assert [state["steps"] for state in states] == [STEPS] * 3
    for name, tensor in states[2]["tensors"].items():
        assert tensor.any() or "start_B" in name
        assert torch.equal(states[0]["tensors"][name], tensor)
        assert torch.equal(states[1]["tensors"][name], tensor)


@pytest.mark.parametrize("max_norm", [1.0, TIGHT])
def test_recording_changes_neither_training_nor_its_log_nor_the_arguments(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path, max_norm: float
) -> None:
    other = copy.deepcopy(peft_model)
    callbacks = [ImportanceRecorder(peft_model, method="path_integral").callback()]
    recorded = make_trainer(peft_model, token_ids, tmp_path, callbacks, max_grad_norm=max_norm)
    plain = make_trainer(other, token_ids, tmp_path, max_grad_norm=max_norm)
    recorded.train()
    plain.train()
    assert recorded.args.max_grad_norm == max_norm
    assert_same_factors(factors(peft_model), factors(other))
    for mine, theirs in zip(recorded.state.log_history[:STEPS], plain.state.log_history[:STEPS], strict=True):
        assert mine["grad_norm"] > 10 * TIGHT  # the norm before clipping, as Trainer logs it
        assert mine == theirs


def test_training_twice_records_both_runs_and_leaves_no_hook_behind(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path
) -> None:
    recorder = ImportanceRecorder(peft_model, method="path_integral")
    trainer = make_trainer(peft_model, token_ids, tmp_path, [recorder.callback()])
    trainer.train()
    trainer.train()
    assert recorder.steps == 2 * STEPS
    optimizer = trainer.optimizer.optimizer
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert trainer.args.max_grad_norm == 1.0


def test_whoever_reads_the_arguments_between_steps_sees_the_clip_that_the_user_wrote(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path
) -> None:
    class Reader(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen.append(args.max_grad_norm)
            if state.global_step == STEPS:
                raise KeyboardInterrupt

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen.append(args.max_grad_norm)

    penalty = ImportancePenalty(peft_model, record(peft_model, token_ids), 1.0)
    recorder, reader = ImportanceRecorder(peft_model), Reader()
    callbacks = [recorder.callback(), penalty.callback(), reader]
    trainer = make_trainer(peft_model, token_ids, tmp_path, callbacks, max_grad_norm=TIGHT)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert reader.seen == [TIGHT] * (1 + STEPS) and trainer.args.max_grad_norm == TIGHT


@pytest.mark.parametrize("again", ["same trainer", "new trainer on the same arguments"])
def test_training_goes_on_with_its_clip_after_an_error(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path, again: str
) -> None:
    class Interrupt(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                raise KeyboardInterrupt

    recorder, interrupt = ImportanceRecorder(peft_model, method="path_integral"), Interrupt()
    callbacks = [recorder.callback(), interrupt]
    trainer = make_trainer(peft_model, token_ids, tmp_path, callbacks, max_grad_norm=TIGHT, optim="sgd")
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    if again == "same trainer":
        trainer.remove_callback(interrupt)
    else:
        data = rows(token_ids)
        trainer = Trainer(model=peft_model, args=trainer.args, train_dataset=data, callbacks=[recorder.callback()])
    before = factors(peft_model)
    trainer.train()
    moved = torch.cat([(after - before[name]).flatten() for name, after in factors(peft_model).items()]).norm()
    assert 0 < moved <= STEPS * LR * TIGHT * 1.01  # SGD moves by at most lr · clip in a step
    assert recorder.steps == 1 + STEPS
    assert trainer.args.max_grad_norm == TIGHT


@pytest.mark.parametrize("which", ["Trainer", "SFTTrainer"])
def test_accumulation_of_4_by_2_records_what_1_by_8_records(
    peft_model: PeftModel, token_ids: Tensor, model_dir: str, tmp_path: Path, which: str
) -> None:
    results = []
    for model, batch, accumulation in ((peft_model, 8, 1), (copy.deepcopy(peft_model), 2, 4)):
        recorder = ImportanceRecorder(model, "float32", method="path_integral")
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        if which == "Trainer":
            trainer = make_trainer(model, token_ids, tmp_path, [recorder.callback()], **sizes)
        else:
            trainer = make_sft_trainer(model, model_dir, token_ids, tmp_path, [recorder.callback()], **sizes)
        trainer.train()
        assert recorder.steps == STEPS
        results.append(recorder.omega)
    for name, omega in results[0].items():
        assert isinstance(omega, Tensor)
        torch.testing.assert_close(results[1][name], omega, rtol=0, atol=1e-3 * float(omega.abs().max()))


def test_a_recorder_of_another_model_is_refused_at_the_start_of_training(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path
) -> None:
    recorder = ImportanceRecorder(copy.deepcopy(peft_model), method="path_integral")
    with pytest.raises(AdapterError, match="this optimizer does not train"):
        make_trainer(peft_model, token_ids, tmp_path, [recorder.callback()]).train()


def test_copies_of_the_model_on_several_gpus_are_refused_at_the_start_where_rows_have_to_be_told_apart(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer does so without a launcher. A path integral reads the model's own factors, so it goes on."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    several = {"use_cpu": False, "per_device_train_batch_size": 2}
    recorder = ImportanceRecorder(peft_model)
    with pytest.raises(AdapterError, match=r"2 GPUs .* Launch with torchrun"):
        make_trainer(peft_model, token_ids, tmp_path, [recorder.callback()], **several).train()
    recorder = ImportanceRecorder(peft_model, method="path_integral")
    trainer = make_trainer(peft_model, token_ids, tmp_path, [recorder.callback()], **several)
    trainer.train()
    assert isinstance(trainer.model_wrapped, torch.nn.DataParallel)
    assert recorder.steps == STEPS


# Penalty


@pytest.mark.parametrize("max_norm", [1.0, TIGHT, 0.0])
@pytest.mark.parametrize("which", ["Trainer", "SFTTrainer"])
def test_penalty_callback_equals_a_plain_loop_and_is_part_of_what_is_clipped(
    peft_model: PeftModel,
    token_ids: Tensor,
    importance: Importance,
    model_dir: str,
    tmp_path: Path,
    which: str,
    max_norm: float,
) -> None:
    other = copy.deepcopy(peft_model)
    penalty = ImportancePenalty(peft_model, importance, phi=50.0)
    callbacks = [penalty.callback()]
    if which == "Trainer":
        trainer = make_trainer(peft_model, token_ids, tmp_path, callbacks, max_grad_norm=max_norm)
    else:
        trainer = make_sft_trainer(peft_model, model_dir, token_ids, tmp_path, callbacks, max_grad_norm=max_norm)
    trainer.train()
    weighted = plain_loop(
        other,
        token_ids,
        penalty=ImportancePenalty(other, importance, phi=50.0),
        max_norm=max_norm or float("inf"),
    )
    assert_same_factors(factors(peft_model), factors(other), 1e-5)
    assert trainer.args.max_grad_norm == max_norm
    logged = [entry["weighted_regularisation_loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(weighted, rel=1e-4)


def test_sgd_under_a_tight_clip_moves_by_the_clip_with_the_penalty_inside(
    peft_model: PeftModel, token_ids: Tensor, importance: Importance, tmp_path: Path
) -> None:
    """A penalty added after clipping would move the weights by its own, a thousand times larger, gradient."""
    penalty = ImportancePenalty(peft_model, importance, phi=50.0)
    before = factors(peft_model)
    options = {"max_grad_norm": TIGHT, "max_steps": 1, "optim": "sgd"}
    make_trainer(peft_model, token_ids, tmp_path, [penalty.callback()], **options).train()
    moved = torch.cat([(after - before[name]).flatten() for name, after in factors(peft_model).items()]).norm()
    assert float(moved) == pytest.approx(LR * TIGHT, rel=1e-2)
    penalty.add_gradients_()
    assert torch.stack([p.grad.norm() for p in adapter_parameters(peft_model)]).norm() > 1000 * TIGHT  # type: ignore[union-attr]


@pytest.mark.parametrize("which", ["Trainer", "SFTTrainer"])
def test_accumulation_of_4_by_2_ends_where_1_by_8_ends_under_the_penalty(
    peft_model: PeftModel, token_ids: Tensor, importance: Importance, model_dir: str, tmp_path: Path, which: str
) -> None:
    """SGD, so that a penalty counted four times, or a quarter, would show in full."""
    ends, penalties = [], []
    for model, batch, accumulation in ((peft_model, 8, 1), (copy.deepcopy(peft_model), 2, 4)):
        penalty = ImportancePenalty(model, importance, phi=1.0)
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
        if which == "Trainer":
            trainer = make_trainer(model, token_ids, tmp_path, [penalty.callback()], **sizes)
        else:
            trainer = make_sft_trainer(model, model_dir, token_ids, tmp_path, [penalty.callback()], **sizes)
        trainer.train()
        ends.append(factors(model))
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        penalties.append([entry["regularisation_loss"] for entry in logs])
    assert_same_factors(ends[0], ends[1], 1e-6)
    assert penalties[0] == pytest.approx(penalties[1], rel=1e-4)


def test_log_has_task_raw_weighted_and_total_loss_as_means_over_the_same_steps(
    peft_model: PeftModel, token_ids: Tensor, importance: Importance, tmp_path: Path
) -> None:
    other = copy.deepcopy(peft_model)
    penalty = ImportancePenalty(peft_model, importance, phi=20.0)
    trainer = make_trainer(peft_model, token_ids, tmp_path, [penalty.callback()], logging_steps=2)
    trainer.train()
    weighted = plain_loop(other, token_ids, penalty=ImportancePenalty(other, importance, phi=20.0))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry, pair in zip(logs, (weighted[:2], weighted[2:]), strict=True):
        assert entry["weighted_regularisation_loss"] == pytest.approx(sum(pair) / 2, rel=1e-4)
        assert entry["regularisation_loss"] == pytest.approx(sum(pair) / 2 / 20.0, rel=1e-4)
        assert entry["total_loss"] == pytest.approx(entry["loss"] + entry["weighted_regularisation_loss"])
    json.dumps(logs)


def test_a_second_run_does_not_log_what_the_first_left_over(
    peft_model: PeftModel, token_ids: Tensor, importance: Importance, tmp_path: Path
) -> None:
    penalty = ImportancePenalty(peft_model, importance, phi=20.0)
    trainer = make_trainer(peft_model, token_ids, tmp_path, [penalty.callback()], logging_steps=3)
    trainer.train()  # the fourth step is not logged
    trainer.args.learning_rate = 0.0
    trainer.optimizer = trainer.lr_scheduler = None
    expected = float(penalty.regularisation_loss())
    trainer.train()
    logged = [entry["regularisation_loss"] for entry in trainer.state.log_history if "regularisation_loss" in entry]
    assert logged[-1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("order", ["recorder first", "penalty first"])
@pytest.mark.parametrize("max_norm", [1.0, TIGHT])
def test_recording_under_a_penalty_sees_the_task_gradient_alone(
    peft_model: PeftModel, token_ids: Tensor, importance: Importance, tmp_path: Path, order: str, max_norm: float
) -> None:
    other = copy.deepcopy(peft_model)
    recorder = ImportanceRecorder(peft_model, "float32", method="path_integral")
    penalty = ImportancePenalty(peft_model, importance, phi=50.0)
    callbacks = [recorder.callback(), penalty.callback()]
    if order == "penalty first":
        callbacks.reverse()
    trainer = make_trainer(peft_model, token_ids, tmp_path, callbacks, max_grad_norm=max_norm)
    trainer.train()
    reference = ReferenceOmega(other)
    plain_loop(
        other,
        token_ids,
        reference=reference,
        penalty=ImportancePenalty(other, importance, phi=50.0),
        max_norm=max_norm,
    )
    reference.assert_matches(recorder.omega, 1e-3)
    assert_same_factors(factors(peft_model), factors(other), 1e-5)
    assert trainer.args.max_grad_norm == max_norm


def test_a_penalty_of_another_model_is_refused_at_the_start_of_training(
    peft_model: PeftModel, token_ids: Tensor, importance: Importance, tmp_path: Path
) -> None:
    penalty = ImportancePenalty(copy.deepcopy(peft_model), importance, phi=1.0)
    with pytest.raises(AdapterError, match="this optimizer does not train"):
        make_trainer(peft_model, token_ids, tmp_path, [penalty.callback()]).train()


# protect


@pytest.mark.parametrize("kind", ["object", "directory", "string"])
def test_protect_in_two_lines_starts_an_untouched_adapter_from_the_general_one(
    peft_model: PeftModel, token_ids: Tensor, importance: Importance, model_dir: str, tmp_path: Path, kind: str
) -> None:
    directory = importance.save(tmp_path / "importance")
    source = {"object": importance, "directory": directory, "string": str(directory)}[kind]
    other = copy.deepcopy(peft_model)
    trainer = make_sft_trainer(peft_model, model_dir, token_ids, tmp_path)
    hlora.protect(trainer, source, phi=9.0)
    for name, matrix in importance.matrices.items():
        assert torch.equal(peft_model.get_submodule(f"base_model.model.{name}").lora_B["default"].weight, matrix.B)
    trainer.train()
    importance.load_adapter_into(other)
    plain_loop(other, token_ids, penalty=ImportancePenalty(other, importance, phi=9.0))
    assert_same_factors(factors(peft_model), factors(other), 1e-5)
    assert all("total_loss" in entry for entry in trainer.state.log_history if "loss" in entry)


def test_protect_leaves_an_adapter_that_was_trained_as_it_is(
    peft_model: PeftModel, token_ids: Tensor, importance: Importance, tmp_path: Path
) -> None:
    move_adapter(peft_model)
    before = factors(peft_model)
    penalty = hlora.protect(make_trainer(peft_model, token_ids, tmp_path), importance, phi=9.0)
    assert_same_factors(factors(peft_model), before)
    assert penalty().item() > 0


def test_protect_passes_its_options_on(
    peft_model: PeftModel, token_ids: Tensor, importance: Importance, tmp_path: Path
) -> None:
    trainer = make_trainer(peft_model, token_ids, tmp_path)
    penalty = hlora.protect(trainer, importance, phi=3.0, layer_weights="uniform", phi_scale="paper", group="block")
    assert set(penalty.coefficients.values()) == {0.5}
    assert penalty.unit == 1.0


def test_protect_at_the_base_leaves_an_untouched_adapter_where_it_is(
    peft_model: PeftModel, token_ids: Tensor, importance: Importance, tmp_path: Path
) -> None:
    before = factors(peft_model)
    penalty = hlora.protect(make_trainer(peft_model, token_ids, tmp_path), importance, phi=9.0, anchor="base")
    assert_same_factors(factors(peft_model), before)
    assert penalty().item() == 0.0


def test_recording_ends_the_training_once_it_has_moved_far_enough(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path
) -> None:
    recorder = ImportanceRecorder(peft_model, method="path_integral")
    trainer = make_trainer(peft_model, token_ids, tmp_path, [recorder.callback(stop_at_move=1e-9)])
    trainer.train()
    assert trainer.state.global_step == recorder.steps == 1
    assert recorder.move() >= 1e-9


def test_protect_on_a_trainer_without_lora_or_with_another_adapter_is_refused(
    token_ids: Tensor, importance: Importance, model_dir: str, tmp_path: Path
) -> None:
    base = LlamaForCausalLM.from_pretrained(model_dir)
    trainer = make_trainer(base, token_ids, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="has no LoRA layers"):
        hlora.protect(trainer, importance, phi=9.0)
    other = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ArtifactError, match=r"q_proj: importance was recorded with A \(4, 32\)"):
        hlora.protect(make_trainer(other, token_ids, tmp_path), importance, phi=9.0)


class Reporter(TrainerCallback):
    """Sees logs as TensorBoard's callback does, which Trainer puts before the user's."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def test_reporters_that_came_before_protect_see_the_losses_too(
    peft_model: PeftModel, token_ids: Tensor, importance: Importance, tmp_path: Path
) -> None:
    reporter = Reporter()
    trainer = make_trainer(peft_model, token_ids, tmp_path, [reporter])
    hlora.protect(trainer, importance, phi=9.0)
    trainer.train()
    assert all("weighted_regularisation_loss" in logs for logs in reporter.seen[:STEPS])


# train


TRAIN = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 32, "report_to": [], "use_cpu": True}


def test_train_returns_one_entry_a_step_with_the_penalty_logged(
    peft_model: PeftModel, importance: Importance, model_dir: str, tmp_path: Path
) -> None:
    data = Dataset.from_dict({"prompt": ["2 + 2 ="] * 4, "completion": [" 4"] * 4})
    penalty = ImportancePenalty(peft_model, importance, phi=9.0)
    history = train(
        peft_model,
        AutoTokenizer.from_pretrained(model_dir),
        data,
        output=tmp_path,
        arguments=TRAIN,
        seed=0,
        callbacks=[penalty.callback()],
    )
    assert [entry["step"] for entry in history] == [1, 2]
    assert all(entry["total_loss"] > entry["loss"] > 0 for entry in history)


def test_train_is_repeated_exactly_by_its_seed(peft_model: PeftModel, model_dir: str, tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": [f"{n} plus one is {n + 1}." for n in range(8)]})
    ends = []
    for model in (peft_model, copy.deepcopy(peft_model)):
        train(model, AutoTokenizer.from_pretrained(model_dir), data, output=tmp_path, arguments=TRAIN, seed=7)
        ends.append(factors(model))
    assert_same_factors(*ends)


class Batches(TrainerCallback):
    """The batches that the model is given."""

    def __init__(self, model: PeftModel) -> None:
        self.seen: list[dict[str, Any]] = []
        model.register_forward_pre_hook(lambda _, args, kwargs: self.seen.append(kwargs), with_kwargs=True)


def test_packing_keeps_every_token_of_documents_longer_than_a_row(
    peft_model: PeftModel, model_dir: str, general_file: str, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    text = Path(general_file).read_text(encoding="utf-8")[:1500]
    count = len(tokenizer(text)["input_ids"])
    assert count > 8 * 32
    batches = Batches(peft_model)
    options = {**TRAIN, "packing": True, "max_steps": -1, "num_train_epochs": 1}
    train(peft_model, tokenizer, Dataset.from_dict({"text": [text]}), output=tmp_path, arguments=options, seed=0)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches.seen)
    assert tokens in (count, count + 1)  # with the end of the text
    assert {batch["input_ids"].shape[1] for batch in batches.seen} == {32}


def test_arguments_of_the_caller_come_before_the_defaults(
    peft_model: PeftModel, model_dir: str, tmp_path: Path
) -> None:
    batches = Batches(peft_model)
    data = Dataset.from_dict({"text": ["one two three"] * 8})
    options = {**TRAIN, "packing": True, "packing_strategy": "bfd", "logging_steps": 2}
    history = train(
        peft_model, AutoTokenizer.from_pretrained(model_dir), data, output=tmp_path, arguments=options, seed=0
    )
    assert len(history) == 1
    assert all("position_ids" in batch for batch in batches.seen)  # as bfd lays a batch out: one row


def test_factored_recording_through_train_can_protect_the_next(
    peft_model: PeftModel, model_dir: str, tmp_path: Path
) -> None:
    """The whole way: record on text, consolidate, tune under the penalty."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    recorder = ImportanceRecorder(peft_model, "factored", method="path_integral")
    text = Dataset.from_dict({"text": ["The assert statement is a debugging aid. " * 4] * 8})
    train(
        peft_model,
        tokenizer,
        text,
        output=tmp_path / "record",
        arguments={**TRAIN, "packing": True},
        seed=0,
        callbacks=[recorder.callback()],
    )
    importance = recorder.consolidate()
    assert all(isinstance(m.omega, Factored) and m.undo_cost > 0 for m in importance.matrices.values())
    rows = Dataset.from_dict({"prompt": ["2 + 2 ="] * 4, "completion": [" 4"] * 4})
    penalty = ImportancePenalty(peft_model, importance, phi=9.0)
    history = train(
        peft_model, tokenizer, rows, output=tmp_path / "tune", arguments=TRAIN, seed=0, callbacks=[penalty.callback()]
    )
    assert history[0]["regularisation_loss"] == 0.0
    assert history[1]["regularisation_loss"] > 0.0


TEXT = Dataset.from_list([{"text": "Call me Ishmael. Some years ago, never mind how long precisely."}] * 64)


def test_a_phi_too_large_for_the_learning_rate_stops_with_what_to_change(
    peft_model: PeftModel, token_ids: Tensor, model_dir: str, tmp_path: Path
) -> None:
    importance = record(peft_model, token_ids)
    penalty = ImportancePenalty(peft_model, importance, phi=1e30)
    settings = {"max_steps": 8, "learning_rate": 1e9, "max_grad_norm": 0, "optim": "sgd", "max_length": 16}
    with pytest.raises(TrainingError, match=r"step \d: the penalty is (inf|nan) at phi 1e\+30.*lower penalty\.phi"):
        train(
            peft_model,
            AutoTokenizer.from_pretrained(model_dir),
            TEXT,
            output=tmp_path,
            arguments=settings,
            seed=0,
            callbacks=[penalty.callback()],
        )


class Poison(TrainerCallback):
    """A weight that is not finite after step 3, as a step too large makes it."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            next(p for p in kwargs["model"].parameters() if p.requires_grad).data[0] = float("nan")


def test_a_loss_that_is_not_finite_stops_once_the_adapter_is_lost(
    peft_model: PeftModel, model_dir: str, tmp_path: Path
) -> None:
    tokenizer, settings = AutoTokenizer.from_pretrained(model_dir), {"max_steps": 8, "max_length": 16}
    with pytest.raises(TrainingError, match=r"step 4: the loss is nan and \S+lora_A\S+ is not finite.*learning_rate"):
        train(peft_model, tokenizer, TEXT, output=tmp_path, arguments=settings, seed=0, callbacks=[Poison()])


class OneBadLoss(TrainerCallback):
    """A step whose gradient is not finite, as one overflow makes it, and which the optimizer does not take."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2:
            for parameter in kwargs["model"].parameters():
                parameter.grad = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.global_step == 3 and logs and "loss" in logs:
            logs["loss"] = float("nan")


def test_one_loss_that_is_not_finite_does_not_end_a_training_that_survives_it(
    peft_model: PeftModel, model_dir: str, tmp_path: Path
) -> None:
    settings = {"max_steps": 6, "learning_rate": 1e-3, "max_length": 16}
    history = train(
        peft_model,
        AutoTokenizer.from_pretrained(model_dir),
        TEXT,
        output=tmp_path,
        arguments=settings,
        seed=0,
        callbacks=[OneBadLoss()],
    )
    assert len(history) == 6


def test_a_users_trainer_keeps_the_recording_in_its_checkpoints(
    model_dir: str, token_ids: Tensor, tmp_path: Path
) -> None:
    def run(output: Path, steps: int, resume: bool | str = False) -> ImportanceRecorder:
        torch.manual_seed(1)
        settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(LlamaForCausalLM.from_pretrained(model_dir), settings)
        recorder = ImportanceRecorder(model, "float32", method="path_integral")
        schedule = {"max_steps": 4, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": steps}
        callbacks = [recorder.callback(), *([] if steps == 4 or resume else [StopAfter(steps)])]
        make_trainer(model, token_ids, output, callbacks, **schedule).train(resume_from_checkpoint=resume or None)
        return recorder

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "cut", 2)
    resumed = run(tmp_path / "cut", 2, resume=True)
    assert resumed.steps == whole.steps == 4
    for name, omega in whole.omega.items():
        assert torch.equal(resumed.omega[name], omega) and omega.any(), name
    for output in ("whole", "elsewhere"):  # with a recording of its own, or with none
        with pytest.raises(ArtifactError, match=r"checkpoint-2: training resumes from step 2 .* not this one\. Copy"):
            run(tmp_path / output, 2, resume=str(tmp_path / "cut" / "checkpoint-2"))


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step
