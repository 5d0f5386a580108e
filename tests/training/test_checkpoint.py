"""Training that goes on from a checkpoint ends as if it had not been interrupted; a damaged checkpoint is not used."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import GENERAL_TEXT
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hlora.importance.recorder import ImportanceRecorder
from hlora.numerics import encodings
from hlora.system.errors import ArtifactError
from hlora.training import checkpoint
from hlora.training.checkpoint import random_state, set_random_state
from hlora.training.checkpoint_files import load_state, remove_checkpoints, save_state
from hlora.training.train import train


class Interrupted(Exception):
    """Stands in for whatever ends a run."""


class Interruption(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self.step:
            raise Interrupted


def model_of(model_dir: str) -> PeftModel:
    """With dropout, so that every step draws random numbers."""
    torch.manual_seed(1)
    base = LlamaForCausalLM.from_pretrained(model_dir)
    settings = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, target_modules=["q_proj", "v_proj"])
    return get_peft_model(base, settings)


ARGUMENTS = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "max_length": 32}
ROWS = 19  # five steps an epoch, the last one of three rows


Trained = tuple[PeftModel, ImportanceRecorder, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def train_once(model_dir: str) -> Callable[..., Trained]:
    """Trains the tiny Llama for 15 steps, up to `until`."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    words = GENERAL_TEXT.split()
    rows = Dataset.from_list([{"text": " ".join(words[n : n + 5 + n % 7])} for n in range(ROWS)])

    def run(output: Path, until: int | None = None, encoding: str = "factored", **arguments: Any) -> Trained:
        model = model_of(model_dir)
        recorder = ImportanceRecorder(model, encoding, method="path_integral")
        callbacks = [recorder.callback(), *([] if until is None else [Interruption(until)])]
        history: list[dict[str, Any]] = []
        try:
            settings = {**ARGUMENTS, **arguments}
            history = train(
                model, tokenizer, rows, output=output, arguments=settings, seed=7, callbacks=callbacks, resumable=True
            )
        except Interrupted:
            assert until is not None
        return model, recorder, history

    return run


@pytest.fixture
def trained(train_once: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trained]:
    """The same, with a checkpoint after each step."""
    monkeypatch.setattr(checkpoint, "_EVERY", 0.0)
    return train_once


@pytest.fixture(scope="module")
def whole(train_once: Callable[..., Trained], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The run that nothing interrupts."""
    return train_once(tmp_path_factory.mktemp("whole"))


def assert_same(mine: Any, theirs: Any) -> None:
    """Adapter, ω, counts and losses, bit by bit."""
    for (name, one), other in zip(mine[0].state_dict().items(), theirs[0].state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    for name, omega in mine[1].omega.items():
        for part, tensor in encodings.parts(omega).items():
            assert torch.equal(tensor, encodings.parts(theirs[1].omega[name])[part]), f"{name}.{part}"
            assert tensor.any()
    assert (mine[1].steps, mine[1].skipped_steps) == (theirs[1].steps, theirs[1].skipped_steps)
    losses = [[(entry["step"], entry["loss"]) for entry in history] for history in (mine[2], theirs[2])]
    assert losses[0] == losses[1] and losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("until", [1, 4, 5, 6, 13])  # 5 and 10 are the ends of epochs
def test_resumed_recording_equals_uninterrupted(trained: Any, whole: Trained, tmp_path: Path, until: int) -> None:
    trained(tmp_path / "cut", until)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)  # whatever the new process has
    assert_same(trained(tmp_path / "cut"), whole)
    assert whole[1].steps == 15


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["float32", "factored"])
def test_every_encoding_resumes(trained: Any, tmp_path: Path, encoding: str) -> None:
    whole = trained(tmp_path / "whole", encoding=encoding)
    trained(tmp_path / "cut", 7, encoding=encoding)
    assert_same(trained(tmp_path / "cut", encoding=encoding), whole)


@pytest.mark.slow
def test_batches_by_length_which_the_global_numbers_order_resume_in_their_order(trained: Any, tmp_path: Path) -> None:
    options = {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2}
    whole = trained(tmp_path / "whole", **options)
    trained(tmp_path / "cut", 4, **options)
    assert_same(trained(tmp_path / "cut", **options), whole)


def test_a_run_interrupted_twice_still_equals_the_uninterrupted(trained: Any, whole: Trained, tmp_path: Path) -> None:
    for until in (3, 9):
        trained(tmp_path / "cut", until)
    assert_same(trained(tmp_path / "cut"), whole)


def test_a_phase_that_saved_its_last_step_does_not_train_one_more(trained: Any, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    short = trained(tmp_path / "whole", **options)
    assert (tmp_path / "whole" / "checkpoint-4" / "complete.json").exists()
    assert_same(trained(tmp_path / "whole", **options), short)


def test_a_checkpoint_holds_no_pickle(trained: Any, tmp_path: Path) -> None:
    trained(tmp_path / "cut", 3)
    names = {file.name for file in (tmp_path / "cut" / "checkpoint-3").iterdir()}
    assert {"adapter_model.safetensors", "trainer_state.json", "resume.safetensors", "complete.json"} <= names
    assert "recording-factored.safetensors" in names
    assert not {name for name in names if not name.endswith((".json", ".safetensors", ".md", ".jinja"))}


def cut_short(checkpoint_directory: Path) -> None:
    (checkpoint_directory / "complete.json").unlink()


def truncated(checkpoint_directory: Path) -> None:
    file = checkpoint_directory / "resume.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flipped(checkpoint_directory: Path) -> None:
    file = checkpoint_directory / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def without_recording(checkpoint_directory: Path) -> None:
    (checkpoint_directory / "recording-factored.safetensors").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [cut_short, truncated, flipped, without_recording])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    trained: Any, whole: Trained, tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path / "cut", 6)
    damage(tmp_path / "cut" / "checkpoint-6")
    with caplog.at_level("INFO", logger="hlora"):
        assert_same(trained(tmp_path / "cut"), whole)
    assert "checkpoint-6: " in caplog.text and "resuming from an older one" in caplog.text
    assert f"resuming from {tmp_path / 'cut' / 'checkpoint-5'}" in caplog.text


def test_recording_does_not_go_on_from_a_checkpoint_without_its_state(trained: Any, tmp_path: Path) -> None:
    trained(tmp_path / "cut", 3, encoding="float32")
    with pytest.raises(ArtifactError, match=r"checkpoint-3: recording-factored\.json .* Resume from another"):
        trained(tmp_path / "cut", encoding="factored")


def test_two_checkpoints_are_kept_and_removed_when_asked(trained: Any, tmp_path: Path) -> None:
    trained(tmp_path / "cut", 6)
    assert {path.name for path in (tmp_path / "cut").glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-6"}
    remove_checkpoints(tmp_path / "cut")
    assert not list((tmp_path / "cut").glob("checkpoint-*"))


def test_a_checkpoint_does_not_ask_the_hub_for_the_base_models_vocabulary(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT would, where the base model is no directory: `Unable to fetch remote file`, in the log of every run."""
    asked, usual = [], peft.peft_model.get_peft_model_state_dict

    def watched(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["save_embedding_layers"])
        return usual(*args, **kwargs)

    monkeypatch.setattr(peft.peft_model, "get_peft_model_state_dict", watched)
    trained(tmp_path / "run")
    assert asked and not any(asked)


def test_state_keeps_tensors_numbers_and_kinds_of_keys(tmp_path: Path) -> None:
    state = {
        "state": {0: {"step": torch.tensor(3.0), "mean": torch.arange(6).view(2, 3).bfloat16()}},
        "groups": [{"lr": 0.1, "betas": (0.9, 0.999), "foreach": None, "name": "Ω"}],
        "empty": torch.zeros(0, 3),
    }
    save_state(tmp_path, "some", state)
    found = load_state(tmp_path, "some")
    assert found["groups"] == [{"lr": 0.1, "betas": [0.9, 0.999], "foreach": None, "name": "Ω"}]
    assert torch.equal(found["state"][0]["mean"], state["state"][0]["mean"])  # type: ignore[index]
    assert found["empty"].shape == (0, 3) and found["state"][0]["step"].dtype == torch.float32


def test_what_json_cannot_hold_is_refused_by_its_place(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"optimizer\.state\.0 is a function"):
        save_state(tmp_path, "some", {"optimizer": {"state": [print and (lambda: None)]}})


def test_random_numbers_go_on_where_they_were() -> None:
    state = random_state()

    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = drawn()
    set_random_state(state)
    assert drawn() == first


def test_random_numbers_of_other_gpus_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """To read them would start each GPU of the machine, in every process."""
    mine, put = torch.arange(16, dtype=torch.uint8), []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: mine)
    monkeypatch.setattr(torch.cuda, "set_rng_state", put.append)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: pytest.fail("asks every GPU"))
    set_random_state(random_state())
    assert put == [mine]
