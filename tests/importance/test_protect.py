"""`protect`, ProtectCallback and RecordCallback in the real Trainer: where training starts, and what holds it."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import move_adapter, record
from peft import LoraConfig, PeftModel, get_peft_model
from test_callbacks import STEPS, arguments, assert_same_factors, factors, make_trainer, plain_loop, rows
from torch import Tensor
from transformers import LlamaForCausalLM, Trainer

import hlora
from hlora.importance.artefact import Importance
from hlora.importance.penalty import ImportancePenalty
from hlora.importance.recorder import ImportanceRecorder
from hlora.model.adapters import adapted_matrices
from hlora.system.errors import AdapterError, ArtifactError
from hlora.training.trackers import LayerCoefficients


def pissa(model_dir: str) -> PeftModel:
    base = LlamaForCausalLM.from_pretrained(model_dir)
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa"))


@pytest.fixture
def importance(peft_model: PeftModel, token_ids: Tensor) -> Importance:
    return record(copy.deepcopy(peft_model), token_ids.flip(0), "factored")


# Where training starts


def test_a_fresh_pissa_adapter_starts_at_the_general_adapter(model_dir: str, token_ids: Tensor, tmp_path: Path) -> None:
    importance = record(pissa(model_dir), token_ids)
    model = pissa(model_dir)
    penalty = hlora.protect(make_trainer(model, token_ids, tmp_path), importance, phi=9.0)
    assert penalty.is_at_anchor() and penalty().item() == 0.0


def test_an_adapter_that_was_trained_stays_with_a_word(
    peft_model: PeftModel, token_ids: Tensor, importance: Importance, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    move_adapter(peft_model)
    before = factors(peft_model)
    with caplog.at_level(logging.WARNING, "hlora"):
        hlora.protect(make_trainer(peft_model, token_ids, tmp_path), importance, phi=9.0)
    assert "it starts as it is, not from the general adapter" in caplog.text
    assert_same_factors(factors(peft_model), before)


def test_an_adapter_that_was_loaded_frozen_is_refused_with_what_to_do(
    peft_model: PeftModel, model_dir: str, token_ids: Tensor, importance: Importance, tmp_path: Path
) -> None:
    peft_model.save_pretrained(str(tmp_path / "adapter"))
    frozen = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model_dir), tmp_path / "adapter")
    trainer = make_trainer(frozen, token_ids, tmp_path)
    hlora.protect(trainer, importance, phi=9.0)
    with pytest.raises(AdapterError, match=r"adapter 'default' is frozen.*is_trainable=True"):
        trainer.train()


def test_an_adapter_at_the_general_one_stays_without_a_word(
    peft_model: PeftModel, token_ids: Tensor, importance: Importance, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    importance.load_adapter_into(peft_model)
    with caplog.at_level(logging.WARNING, "hlora"):
        hlora.protect(make_trainer(peft_model, token_ids, tmp_path), importance, phi=9.0)
    assert caplog.text == ""


def test_protect_twice_replaces_the_first_penalty_and_its_start(
    peft_model: PeftModel, token_ids: Tensor, importance: Importance, tmp_path: Path
) -> None:
    other = copy.deepcopy(peft_model)
    elsewhere = record(copy.deepcopy(peft_model), token_ids, "factored", steps=2)
    trainer = make_trainer(peft_model, token_ids, tmp_path)
    hlora.protect(trainer, elsewhere, phi=900.0)
    penalty = hlora.protect(trainer, importance, phi=50.0)
    assert penalty.is_at_anchor()
    callbacks = trainer.callback_handler.callbacks
    assert sum(isinstance(each, hlora.ProtectCallback) for each in callbacks) == 1
    assert sum(isinstance(each, LayerCoefficients) for each in callbacks) == 1
    trainer.train()
    importance.load_adapter_into(other)
    plain_loop(other, token_ids, penalty=ImportancePenalty(other, importance, phi=50.0))
    assert_same_factors(factors(peft_model), factors(other), 1e-5)


# An optimizer that steps inside backward


class InBackward(torch.optim.SGD):
    """As LOMO under Accelerate: each parameter moves as soon as its gradient is there, and `step` is never called."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float) -> None:
        super().__init__(parameters, lr=lr)
        self.step = lambda closure=None: None  # type: ignore[method-assign, assignment]  # past the hooks
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._move)

    def _move(self, parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.sub_(self.param_groups[0]["lr"] * parameter.grad)
        parameter.grad = None


@pytest.mark.parametrize("what", ["record", "protect"])
def test_a_step_that_no_hook_saw_is_an_error_at_the_first_one(
    peft_model: PeftModel, token_ids: Tensor, importance: Importance, tmp_path: Path, what: str
) -> None:
    optimizer = InBackward([p for p in peft_model.parameters() if p.requires_grad], 0.01)
    trainer = Trainer(
        model=peft_model, args=arguments(tmp_path), train_dataset=rows(token_ids), optimizers=(optimizer, None)
    )
    if what == "record":
        trainer.add_callback(ImportanceRecorder(peft_model, method="path_integral").callback())
    else:
        hlora.protect(trainer, importance, phi=9.0)
    with pytest.raises(AdapterError, match=r"InBackward steps inside the backward pass.*adamw_torch"):
        trainer.train()
    assert trainer.state.global_step == 0


# Callbacks for trainers that take them before there is a model


def test_the_protect_callback_trains_as_protect_does(
    peft_model: PeftModel, token_ids: Tensor, importance: Importance, tmp_path: Path
) -> None:
    other = copy.deepcopy(peft_model)
    directory = importance.save(tmp_path / "importance")
    callback = hlora.ProtectCallback(directory, 50.0, layer_weights="uniform")
    trainer = make_trainer(peft_model, token_ids, tmp_path, [callback])
    trainer.train()
    protected = make_trainer(other, token_ids, tmp_path)
    hlora.protect(protected, importance, 50.0, layer_weights="uniform")
    protected.train()
    assert_same_factors(factors(peft_model), factors(other))
    assert set(callback.penalty.coefficients.values()) == {0.25}
    assert all("total_loss" in entry for entry in trainer.state.log_history if "loss" in entry)


def test_training_on_keeps_the_penalty_and_where_the_adapter_is(
    peft_model: PeftModel, token_ids: Tensor, importance: Importance, tmp_path: Path
) -> None:
    callback = hlora.ProtectCallback(importance, 50.0)
    trainer = make_trainer(peft_model, token_ids, tmp_path, [callback])
    trainer.train()
    penalty, distance = callback.penalty, float(callback.penalty.regularisation_loss())
    trainer.args.learning_rate = 0.0
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    assert callback.penalty is penalty
    assert float(penalty.regularisation_loss()) == pytest.approx(distance) and distance > 0


def test_a_resumed_training_keeps_the_checkpoints_adapter(
    peft_model: PeftModel, token_ids: Tensor, importance: Importance, tmp_path: Path
) -> None:
    whole, fresh = copy.deepcopy(peft_model), copy.deepcopy(peft_model)
    saved = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(whole, token_ids, tmp_path / "whole", [hlora.ProtectCallback(importance, 50.0)], **saved).train()
    resumed = make_trainer(fresh, token_ids, tmp_path / "whole", [hlora.ProtectCallback(importance, 50.0)], **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_factors(factors(fresh), factors(whole), 1e-6)


def test_a_protect_callback_refuses_a_wrong_importance_or_phi_when_it_is_made(
    importance: Importance, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="no such directory"):
        hlora.ProtectCallback(tmp_path / "nothing", 1.0)
    with pytest.raises(ValueError, match="phi: expected a finite weight"):
        hlora.ProtectCallback(importance, -1.0)


def test_the_record_callback_saves_what_a_recorder_records(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path
) -> None:
    other = copy.deepcopy(peft_model)
    callback = hlora.RecordCallback(
        tmp_path / "importance", 1e-2, encoding="float32", data={"source": "test"}, method="path_integral"
    )
    make_trainer(peft_model, token_ids, tmp_path / "logs", [callback]).train()
    recorder = ImportanceRecorder(other, "float32", method="path_integral")
    make_trainer(other, token_ids, tmp_path / "logs", [recorder.callback()]).train()
    expected = recorder.consolidate(1e-2)
    found = Importance.load(tmp_path / "importance")
    assert callback.importance is not None and found.provenance["data"] == {"source": "test"}
    assert found.provenance["steps"] == STEPS
    for name, matrix in expected.matrices.items():
        assert torch.equal(found.matrices[name].omega, matrix.omega) and matrix.omega.any()  # type: ignore[arg-type]


def test_the_record_callback_refuses_a_directory_of_other_files_before_training(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    trainer = make_trainer(
        peft_model, token_ids, tmp_path / "logs", [hlora.RecordCallback(tmp_path / "mine", method="path_integral")]
    )
    with pytest.raises(ArtifactError, match=r"holds thesis\.txt"):
        trainer.train()
    assert trainer.state.global_step == 0 and not any(m.B.any() for m in adapted_matrices(peft_model))


@pytest.mark.parametrize("output", [".", "logs"])
def test_the_record_callback_refuses_the_trainers_own_directory_before_training(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path, output: str
) -> None:
    record = hlora.RecordCallback(tmp_path)
    trainer = make_trainer(peft_model, token_ids, tmp_path / output, [record])
    with pytest.raises(ArtifactError, match=r"the trainer writes its checkpoints there.*/importance\."):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(("wrong", "field"), [({"xi": 0.0}, "xi"), ({"data": "wikitext-2"}, "data")])
def test_the_record_callback_refuses_wrong_arguments_as_it_is_made(
    tmp_path: Path, wrong: dict[str, Any], field: str
) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected a"):
        hlora.RecordCallback(tmp_path, **wrong)


def test_callbacks_work_where_the_trainer_makes_the_adapter(model_dir: str, token_ids: Tensor, tmp_path: Path) -> None:
    """SFTTrainer with a peft_config: the callbacks are made before there is an adapter."""
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    def train(*callbacks: Any) -> SFTTrainer:
        torch.manual_seed(0)
        trainer = SFTTrainer(
            model=LlamaForCausalLM.from_pretrained(model_dir),
            args=arguments(tmp_path / "logs", SFTConfig, gradient_checkpointing=False),
            train_dataset=rows(token_ids, labels=False),
            processing_class=AutoTokenizer.from_pretrained(model_dir),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
            callbacks=[*callbacks],
        )
        trainer.train()
        return trainer

    train(hlora.RecordCallback(tmp_path / "importance", method="path_integral"))
    distances = {}
    for phi in (0.0, 500.0):
        callback = hlora.ProtectCallback(tmp_path / "importance", phi)
        train(callback)
        distances[phi] = float(callback.penalty.regularisation_loss())
    assert 0 < distances[500.0] < 0.5 * distances[0.0]
