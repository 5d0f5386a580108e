"""Squared gradients recorded in training steps, against one dense backward pass for each example."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import move_adapter
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from hlora.importance.artefact import Importance
from hlora.importance.examples import batch_of
from hlora.importance.layer_weights import layer_coefficients
from hlora.importance.penalty import ImportancePenalty
from hlora.importance.recorded_squares import affordable_share
from hlora.importance.recorder import ImportanceRecorder
from hlora.model.adapters import adapted_matrices
from hlora.numerics import encodings
from hlora.numerics.encodings import Factored
from hlora.system.errors import AdapterError, ArtifactError
from hlora.training.train import train

LR = 0.05
SHORT = 8  # tokens of a row whose sums are exact
Rows = list[tuple[Tensor, Tensor]]  # token ids and labels of each example, one dimension


@pytest.fixture
def model(peft_model: PeftModel) -> PeftModel:
    """The tiny Llama in float64, its adapter moved."""
    peft_model.double()
    move_adapter(peft_model)
    return peft_model.train()


def recorder_of(model: Any, **options: Any) -> ImportanceRecorder:
    """Of all rows."""
    return ImportanceRecorder(model, method="squared_gradients", **{"share": 1.0, **options})


def sgd(model: PeftModel) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)


class Dense:
    """Σ G_b² of each matrix by autograd on the merged weights, one example at a time, and the tokens predicted."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.tokens = 0

    def add(self, model: PeftModel, rows: Rows) -> None:
        names = [matrix.name for matrix in adapted_matrices(model)]
        merged = copy.deepcopy(model).double().eval().merge_and_unload().requires_grad_(False)
        weights = [merged.get_submodule(name).weight.requires_grad_() for name in names]
        for ids, labels in rows:
            likelihood = merged(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            counted = labels[1:] != -100
            loss = -likelihood[counted].gather(1, labels[1:][counted][:, None]).sum()
            self.tokens += int(counted.sum())
            for name, gradient in zip(names, torch.autograd.grad(loss, weights), strict=True):
                self.sums[name] = self.sums.get(name, 0) + gradient**2

    def assert_matches(self, recorder: ImportanceRecorder, tolerance: float = 1e-5) -> None:
        """Within `tolerance` of the largest sum; Transformers computes its loss in float32."""
        assert list(recorder.omega) == list(self.sums)
        for name, dense in self.sums.items():
            sums = recorder.omega[name]
            assert isinstance(sums, Factored)
            for mine, other in ((sums.row, dense.sum(1)), (sums.column, dense.sum(0))):
                assert other.max() > 0
                bound = tolerance * float(other.max())
                torch.testing.assert_close(mine.double(), other, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def whole_rows(ids: Tensor) -> Rows:
    return [(row, row) for row in ids]


def stepped(model: PeftModel, recorder: ImportanceRecorder, loss: Callable[[], None]) -> None:
    loss()
    with recorder.step(LR):
        pass
    model.zero_grad()


@pytest.mark.parametrize("way", ["step", "attach"])
def test_recorded_sums_are_those_of_each_rows_dense_gradient(model: PeftModel, token_ids: Tensor, way: str) -> None:
    dense, recorder, optimizer = Dense(), recorder_of(model), sgd(model)
    if way == "attach":
        recorder.attach(optimizer)
    for step in range(3):
        rows = token_ids[4 * step :][:4, :SHORT]
        dense.add(model, whole_rows(rows))
        model(input_ids=rows, labels=rows).loss.backward()
        if way == "attach":
            optimizer.step()
        else:
            with recorder.step(LR):
                optimizer.step()
        optimizer.zero_grad()
    dense.assert_matches(recorder)
    importance = recorder.consolidate()
    facts = importance.provenance
    assert (facts["tokens"], facts["examples"], facts["unit"]) == (12 * (SHORT - 1), 12, "token") and dense.tokens == 84
    for name, sums in dense.sums.items():
        omega = importance.matrices[name].omega
        assert isinstance(omega, Factored)
        torch.testing.assert_close(omega.row, sums.sum(1) / 84, rtol=1e-4, atol=0)


def padded(ids: Tensor, lengths: list[int], side: str, answers: bool) -> tuple[dict[str, Tensor], Rows]:
    """A padded batch of rows cut to `lengths`, and the rows by themselves; with answers, only the end is labelled."""
    batch = {name: torch.full((len(lengths), SHORT), value) for name, value in (("input_ids", 2), ("labels", -100))}
    batch["attention_mask"] = torch.zeros(len(lengths), SHORT, dtype=torch.long)
    rows = []
    for number, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(SHORT - length, SHORT)
        row = ids[number, :length]
        labels = row.clone()
        labels[: length // 2 if answers else 1] = -100  # padding would predict the first token of a row
        batch["input_ids"][number, where], batch["labels"][number, where] = row, labels
        batch["attention_mask"][number, where] = 1
        rows.append((row, labels))
    return batch, rows


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("answers", [False, True])
def test_padded_positions_count_nothing(model: PeftModel, token_ids: Tensor, side: str, answers: bool) -> None:
    batch, rows = padded(token_ids, [8, 3, 6, 4], side, answers)
    if side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    dense, recorder = Dense(), recorder_of(model)
    dense.add(model, rows)
    stepped(model, recorder, lambda: model(**batch).loss.backward())
    dense.assert_matches(recorder)
    assert recorder.consolidate().provenance["tokens"] == dense.tokens


def test_rows_of_unequal_length_count_alike_however_a_step_is_divided(model: PeftModel, token_ids: Tensor) -> None:
    """One batch; micro-batches whose mean is over their own tokens; and over the step's, as Trainer has it."""
    batch, rows = padded(token_ids, [8, 3, 6, 4], "right", False)
    parts = [{name: tensor[at : at + 2] for name, tensor in batch.items()} for at in (0, 2)]
    total = int((batch["labels"][:, 1:] != -100).sum())
    dense = Dense()
    dense.add(model, rows)
    ways: list[Callable[[], None]] = [
        lambda: model(**batch).loss.backward(),
        lambda: [(model(**part).loss / 2).backward() for part in parts],  # type: ignore[func-returns-value]
        lambda: [model(**part, num_items_in_batch=torch.tensor(total)).loss.backward() for part in parts],  # type: ignore[func-returns-value]
        lambda: (model(**batch).loss * 3.0**9).backward(),  # a gradient scaler's factor, or a number of processes
    ]
    for way in ways:
        recorder = recorder_of(model)
        stepped(model, recorder, way)
        dense.assert_matches(recorder)


def test_each_sequence_of_a_packed_row_is_an_example(model: PeftModel, token_ids: Tensor) -> None:
    """As TRL packs without padding: one row, positions that begin anew, and no label across a border."""
    lengths = [5, 8, 3, 7]
    rows = [token_ids[number, :length] for number, length in enumerate(lengths)]
    ids, labels = torch.cat(rows)[None], torch.cat(rows)[None].clone()
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels[positions == 0] = -100
    dense, recorder = Dense(), recorder_of(model)
    dense.add(model, [(row, row) for row in rows])
    stepped(
        model,
        recorder,
        lambda: model(input_ids=ids, position_ids=positions, labels=labels, use_cache=False).loss.backward(),
    )
    dense.assert_matches(recorder)
    facts = recorder.consolidate().provenance
    assert (facts["examples"], facts["tokens"]) == (4, sum(lengths) - 4)


def checkpointed(model: PeftModel, reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_each_row_once(model: PeftModel, token_ids: Tensor, reentrant: bool) -> None:
    rows = token_ids[:4, :SHORT]
    dense, recorder = Dense(), recorder_of(model)
    dense.add(model, whole_rows(rows))
    checkpointed(model, reentrant)
    stepped(model, recorder, lambda: model(input_ids=rows, labels=rows, use_cache=False).loss.backward())
    dense.assert_matches(recorder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_a_compiled_model_is_recorded_as_the_plain_one(model: PeftModel, token_ids: Tensor) -> None:
    torch.compiler.reset()
    rows = token_ids[:4, :SHORT]
    dense = Dense()
    dense.add(model, whole_rows(rows))
    running: Any = torch.compile(model, backend="eager")
    recorder = recorder_of(running)
    stepped(model, recorder, lambda: running(input_ids=rows, labels=rows).loss.backward())
    dense.assert_matches(recorder)
    torch.compiler.reset()


def test_autocast_is_recorded_within_its_rounding(model: PeftModel, token_ids: Tensor) -> None:
    model.float()
    rows = token_ids[:4, :SHORT]
    dense, recorder = Dense(), recorder_of(model)
    dense.add(model, whole_rows(rows))

    def loss() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            found = model(input_ids=rows, labels=rows).loss
        found.backward()

    stepped(model, recorder, loss)
    dense.assert_matches(recorder, 0.05)
    assert all(part.dtype == torch.float32 for o in recorder.omega.values() for part in encodings.parts(o).values())


def test_longer_rows_are_sketched_without_bias(model: PeftModel, token_ids: Tensor) -> None:
    """The mean of 100 seeds is within 5 standard errors of the dense sums, each matrix' rows and columns."""
    rows = token_ids[:4, :12]
    dense = Dense()
    dense.add(model, whole_rows(rows))
    found: dict[str, list[Tensor]] = {name: [] for name in dense.sums}
    for seed in range(100):
        recorder = recorder_of(model, seed=seed)
        stepped(model, recorder, lambda: model(input_ids=rows, labels=rows).loss.backward())
        for name, omega in recorder.omega.items():
            found[name].append(torch.cat(list(encodings.parts(omega).values())).clone())
    for name, sums in dense.sums.items():
        estimates = torch.stack(found[name])
        assert estimates.std(0).max() > 0
        error = (estimates.mean(0) - torch.cat([sums.sum(1), sums.sum(0)])) / (estimates.std(0) / 10)
        assert error.abs().max() < 5


def test_a_share_of_the_rows_is_recorded_without_bias(model: PeftModel, token_ids: Tensor) -> None:
    """Two and a half of four rows on average: the mean of 200 seeds is within 5 standard errors of all rows' sums."""
    rows = token_ids[:4, :SHORT]
    dense, examples = Dense(), []
    dense.add(model, whole_rows(rows))
    found: dict[str, list[Tensor]] = {name: [] for name in dense.sums}
    recorder = recorder_of(model, share=0.625)
    squares: Any = recorder._recording
    for seed in range(200):
        squares.seed = seed
        stepped(model, recorder, lambda: model(input_ids=rows, labels=rows).loss.backward())
        examples.append(recorder._recording.facts()["examples"])
        for name, omega in recorder.omega.items():
            found[name].append(torch.cat(list(encodings.parts(omega).values())) / examples[-1])
        recorder.reset()
    assert set(examples) == {2, 3} and sum(examples) / len(examples) == pytest.approx(2.5, abs=0.2)
    for name, sums in dense.sums.items():
        each = torch.stack(found[name])
        error = (each.mean(0) - torch.cat([sums.sum(1), sums.sum(0)]) / 4) / (each.std(0) / 200**0.5)
        assert error.abs().max() < 5


def test_beside_a_large_model_all_rows_are_affordable_and_beside_a_small_one_a_part() -> None:
    def share(parameters: int, layers: int, *sizes: tuple[int, int]) -> float:
        whole: Any = SimpleNamespace(parameters=lambda: [torch.empty(parameters, device="meta")])
        matrices: Any = [
            SimpleNamespace(B=torch.empty(d_out, 8, device="meta"), A=torch.empty(8, d_in, device="meta"))
            for d_out, d_in in sizes
        ] * layers
        return affordable_share(whole, matrices)

    assert share(3_200_000_000, 28, (3072, 3072), (1024, 3072)) == 1
    assert share(135_000_000, 30, (576, 576), (192, 576)) == pytest.approx(1 / 3, abs=0.02)


def assert_equal(first: ImportanceRecorder, second: ImportanceRecorder) -> None:
    for name, omega in first.omega.items():
        for part, tensor in encodings.parts(omega).items():
            assert tensor.any() and torch.equal(tensor, encodings.parts(second.omega[name])[part])


def recorded(model: PeftModel, rows: Tensor, recorder: ImportanceRecorder, steps: range) -> ImportanceRecorder:
    optimizer = sgd(model)
    detach = recorder.attach(optimizer)
    for step in steps:
        part = rows[4 * step :][:4]
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    detach()
    return recorder


def test_going_on_from_a_saved_state_equals_not_stopping(model: PeftModel, token_ids: Tensor) -> None:
    recorder = recorded(model, token_ids, recorder_of(model, seed=3), range(2))
    state, resumed_model = copy.deepcopy(recorder.state_dict()), copy.deepcopy(model)
    resumed = recorder_of(resumed_model, seed=3)
    resumed.load_state_dict(state)
    recorded(resumed_model, token_ids, resumed, range(2, 4))
    recorded(model, token_ids, recorder, range(2, 4))
    assert resumed.steps == recorder.steps == 4
    assert_equal(recorder, resumed)
    first, second = recorder.consolidate(), resumed.consolidate()
    assert first.provenance == second.provenance and first.provenance["examples"] == 16
    for name, matrix in first.matrices.items():
        assert matrix.undo_cost == second.matrices[name].undo_cost > 0


def test_each_step_has_signs_of_its_own(model: PeftModel, token_ids: Tensor) -> None:
    rows = token_ids[:4, :12]
    recorder, seen = recorder_of(model), []
    for _ in range(2):
        before = copy.deepcopy(recorder.omega)
        stepped(model, recorder, lambda: model(input_ids=rows, labels=rows).loss.backward())
        seen.append(
            {n: encodings.parts(o)["row"] - encodings.parts(before[n])["row"] for n, o in recorder.omega.items()}
        )
    for name, first in seen[0].items():
        assert not torch.allclose(first, seen[1][name], rtol=1e-3)


def test_a_step_that_is_not_finite_adds_nothing_and_is_counted(model: PeftModel, token_ids: Tensor) -> None:
    rows = token_ids[:4, :SHORT]
    dense, recorder = Dense(), recorder_of(model)
    dense.add(model, whole_rows(rows))
    stepped(model, recorder, lambda: model(input_ids=rows, labels=rows).loss.backward())
    with pytest.warns(UserWarning, match="not finite"):
        stepped(model, recorder, lambda: (model(input_ids=rows, labels=rows).loss * torch.nan).backward())
    dense.assert_matches(recorder)
    assert (recorder.steps, recorder.skipped_steps) == (1, 1)
    assert recorder.consolidate().provenance["tokens"] == 4 * (SHORT - 1)


def test_a_step_that_is_discarded_adds_nothing_to_the_next(model: PeftModel, token_ids: Tensor) -> None:
    rows = token_ids[:8, :SHORT]
    dense, recorder = Dense(), recorder_of(model)
    dense.add(model, whole_rows(rows[4:]))
    model(input_ids=rows[:4], labels=rows[:4]).loss.backward()
    with pytest.raises(RuntimeError, match="out of memory"), recorder.step(LR):
        raise RuntimeError("out of memory")
    stepped(model, recorder, lambda: model(input_ids=rows[4:], labels=rows[4:]).loss.backward())
    dense.assert_matches(recorder)


def test_evaluation_between_steps_counts_nothing(model: PeftModel, token_ids: Tensor) -> None:
    rows = token_ids[:4, :SHORT]
    dense, recorder = Dense(), recorder_of(model)
    dense.add(model, whole_rows(rows))

    def loss() -> None:
        found = model(input_ids=rows, labels=rows).loss
        with torch.no_grad():
            model(input_ids=token_ids[8:], labels=token_ids[8:])
        found.backward()

    stepped(model, recorder, loss)
    dense.assert_matches(recorder)


def test_a_loss_of_ones_own_is_counted_as_it_is_called(model: PeftModel, token_ids: Tensor) -> None:
    rows = token_ids[:4, :SHORT]
    dense, recorder = Dense(), recorder_of(model)
    dense.add(model, whole_rows(rows))

    def loss() -> None:
        logits = model(input_ids=rows).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum").backward()

    stepped(model, recorder, loss)
    dense.assert_matches(recorder)
    assert recorder.consolidate().provenance["unit"] == "loss as called"


def test_a_copy_of_the_model_is_not_recorded(model: PeftModel, token_ids: Tensor) -> None:
    rows = token_ids[:4, :SHORT]
    dense, recorder = Dense(), recorder_of(model)
    dense.add(model, whole_rows(rows))
    other = copy.deepcopy(model)
    other(input_ids=rows[:2], labels=rows[:2]).loss.backward()
    stepped(model, recorder, lambda: model(input_ids=rows, labels=rows).loss.backward())
    other(input_ids=rows[:2], labels=rows[:2]).loss.backward()
    dense.assert_matches(recorder)


# By Trainer and TRL


def test_trainers_record_what_a_plain_loop_records(
    model: PeftModel, model_dir: str, token_ids: Tensor, tmp_path: Path
) -> None:
    """Trainer's own mean over an accumulated step, and SFTTrainer's from log-probabilities."""
    rows = token_ids[:16, :SHORT]
    plain, by_trainer, by_trl = (copy.deepcopy(model).float() for _ in range(3))
    dense, optimizer = Dense(), sgd(plain)
    for step in range(2):
        part = rows[8 * step :][:8]
        dense.add(plain, whole_rows(part))
        plain(input_ids=part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    settings: dict[str, Any] = {"max_steps": 2, "learning_rate": LR, "optim": "sgd", "lr_scheduler_type": "constant"}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    settings |= {"report_to": [], "train_sampling_strategy": "sequential"}
    data = [{"input_ids": row, "labels": row} for row in rows]
    recorder = recorder_of(by_trainer)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, save_strategy="no", **settings)
    trainer = Trainer(by_trainer, arguments, train_dataset=data, callbacks=[recorder.callback()])
    trainer.train()
    dense.assert_matches(recorder, 1e-3)
    recorder, tokenizer = recorder_of(by_trl), AutoTokenizer.from_pretrained(model_dir)
    dataset = Dataset.from_dict({"input_ids": rows.tolist()})
    train(
        by_trl,
        tokenizer,
        dataset,
        output=tmp_path / "logs" / "record",
        arguments=settings,
        seed=0,
        callbacks=[recorder.callback()],
    )
    dense.assert_matches(recorder, 1e-3)


def test_recording_ends_with_detach_and_with_the_recorder(model: PeftModel, token_ids: Tensor) -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks()
    recorder = recorder_of(model)
    assert hooks() > before
    recorded(model, token_ids, recorder, range(1))
    assert hooks() == before
    recorder = recorder_of(model)
    assert hooks() > before
    del recorder
    gc.collect()
    assert hooks() == before


def test_recording_does_not_change_what_training_does(peft_model: PeftModel, token_ids: Tensor) -> None:
    other = copy.deepcopy(peft_model)
    recorded(peft_model, token_ids, recorder_of(peft_model), range(3))
    recorded(other, token_ids, ImportanceRecorder(other, method="path_integral"), range(3))
    for mine, plain in zip(peft_model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, plain)


# The artefact


def test_the_importance_is_anchored_at_the_general_adapter_and_says_what_it_is(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path
) -> None:
    recorder = recorded(peft_model, token_ids, recorder_of(peft_model), range(3))
    recorder.consolidate(data={"files": ["a.txt"]}).save(tmp_path / "importance")
    importance = Importance.load(tmp_path / "importance")
    told = importance.describe()
    assert (told["method"], told["recorded"]) == ("squared_gradients", "along the general phase")
    assert told["anchors"] == ["general", "base"] and not importance.without_move and told["undo_cost"] > 0
    assert told["data"] == {"files": ["a.txt"]} and told["examples"] == 12
    assert importance.nbytes() == sum(4 * (m.B.shape[0] + m.A.shape[1]) for m in recorder.matrices)
    penalty = ImportancePenalty(peft_model, importance, phi=2.0)
    assert penalty.coefficients == layer_coefficients(importance, "root")
    assert penalty().item() == 0
    with torch.no_grad():
        for matrix in recorder.matrices:  # undoing the general phase costs φ
            matrix.B.zero_()
    assert penalty().item() == pytest.approx(2.0, rel=1e-5)


def test_a_relative_phi_does_not_depend_on_the_number_of_steps_in_a_recording(
    peft_model: PeftModel, token_ids: Tensor
) -> None:
    """The mean over tokens: the same rows twice give the same importance as once."""
    rows, found = token_ids[:4, :SHORT], []
    for repeats in (1, 3):
        recorder = recorder_of(peft_model)
        for _ in range(repeats):
            stepped(peft_model, recorder, lambda: peft_model(input_ids=rows, labels=rows).loss.backward())
        found.append(recorder.consolidate())
    for name, matrix in found[0].matrices.items():
        torch.testing.assert_close(matrix.omega, found[1].matrices[name].omega)


def test_what_does_not_go_together_is_refused(model_dir: str, peft_model: PeftModel, token_ids: Tensor) -> None:
    with pytest.raises(ValueError, match="expected path_integral or squared_gradients, got 'fisher'"):
        ImportanceRecorder(peft_model, method="fisher")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="squared gradients are recorded factored, got 'float32'"):
        ImportanceRecorder(peft_model, "float32", method="squared_gradients")
    state = ImportanceRecorder(peft_model, method="path_integral").state_dict()
    with pytest.raises(ArtifactError, match="state is of path_integral, this recorder's method is squared_gradients"):
        recorder_of(peft_model).load_state_dict(state)
    recorder = recorder_of(peft_model)
    with pytest.raises(AdapterError, match="Call the model that the recorder was made with"):
        peft_model.base_model.model(input_ids=token_ids[:2], labels=token_ids[:2]).loss.backward()
    del recorder


class Reshaping(torch.nn.Module):
    """A linear layer that is given its input in another shape."""

    def __init__(self, linear: torch.nn.Module) -> None:
        super().__init__()
        self.linear = linear


class Flattening(Reshaping):
    """As OPT does, and the shared experts of Qwen's mixtures."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(0, 1)).view(*x.shape[:2], -1)


class Nesting(Reshaping):
    """As DeepSeek's attention does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[:, None])[:, 0]


class Choosing(Reshaping):
    """As an expert of a mixture does, which gets some of the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.linear(x.flatten(0, 1)[1:])
        return torch.cat([torch.zeros_like(chosen[:1]), chosen]).view(*x.shape[:2], -1)


class Tiling(Reshaping):
    """As a vision tower does, whose rows are images or their tiles."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.repeat_interleave(2, 0))[::2]


def with_reshaping(model_dir: str, kind: type[Reshaping]) -> PeftModel:
    base = LlamaForCausalLM.from_pretrained(model_dir)
    base.model.layers[1].mlp.up_proj = kind(base.model.layers[1].mlp.up_proj)
    return get_peft_model(base, LoraConfig(r=4, target_modules=["linear", "gate_proj"]))


@pytest.mark.parametrize("kind", [Flattening, Nesting])
@pytest.mark.parametrize("tokens", [1 + SHORT // 2, SHORT])
def test_a_layer_that_is_given_all_tokens_in_another_shape_is_recorded_by_example(
    model_dir: str, token_ids: Tensor, kind: type[Reshaping], tokens: int
) -> None:
    model = with_reshaping(model_dir, kind).double()
    move_adapter(model)
    dense, recorder = Dense(), recorder_of(model)
    rows = token_ids[:3, :tokens]
    dense.add(model, whole_rows(rows))
    stepped(model, recorder, lambda: model(input_ids=rows, labels=rows).loss.backward())
    dense.assert_matches(recorder)


@pytest.mark.parametrize(("kind", "got"), [(Choosing, r"\(47, 32\)"), (Tiling, r"\(8, 12, 32\)")])
def test_a_layer_whose_rows_are_not_the_examples_is_refused_by_name(
    model_dir: str, token_ids: Tensor, kind: type[Reshaping], got: str
) -> None:
    model = with_reshaping(model_dir, kind)
    recorder = recorder_of(model)
    expected = rf"up_proj\.linear: expected .* \(4, tokens, d_in\) .* got {got}.*path_integral"
    with pytest.raises(AdapterError, match=expected):
        model(input_ids=token_ids[:4], labels=token_ids[:4]).loss.backward()
    del recorder


@pytest.mark.parametrize("between", ["a reference with gradients", "a second forward pass"])
def test_each_backward_pass_counts_for_its_own_forward_pass(model: PeftModel, token_ids: Tensor, between: str) -> None:
    dense, recorder = Dense(), recorder_of(model)
    first, second = token_ids[:2, :SHORT], token_ids[2:6, :SHORT]
    dense.add(model, whole_rows(first))

    def loss() -> None:
        mine = model(input_ids=first, labels=first).loss
        if between == "a reference with gradients":
            with model.disable_adapter():
                model(input_ids=second, labels=second)
            mine.backward()
        else:
            dense.add(model, whole_rows(second))
            (mine + model(input_ids=second, labels=second).loss).backward()

    stepped(model, recorder, loss)
    dense.assert_matches(recorder)
    assert recorder.consolidate().provenance["unit"] == "token"


@pytest.mark.parametrize("dropped", ["gradients that are not finite", "a batch that is left out"])
def test_gradients_that_are_dropped_without_a_step_cost_no_other_step(
    model: PeftModel, token_ids: Tensor, dropped: str
) -> None:
    dense, recorder, optimizer = Dense(), recorder_of(model), sgd(model)
    recorder.attach(optimizer)
    for number, rows in enumerate(token_ids[:8, :SHORT].split(2)):
        loss = model(input_ids=rows, labels=rows).loss
        if number % 2 == 0:
            (loss * (math.inf if "finite" in dropped else 1)).backward()
        else:
            dense.add(model, whole_rows(rows))
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
    assert (recorder.steps, recorder.skipped_steps) == (2, 0)
    dense.assert_matches(recorder)


def test_a_batch_whose_loss_is_multiplied_by_zero_counts_nothing(model: PeftModel, token_ids: Tensor) -> None:
    dense, recorder = Dense(), recorder_of(model)
    rows = token_ids[:2, :SHORT]
    dense.add(model, whole_rows(rows))

    def loss() -> None:
        (0 * model(input_ids=token_ids[2:6], labels=token_ids[2:6]).loss).backward()
        model(input_ids=rows, labels=rows).loss.backward()

    stepped(model, recorder, loss)
    dense.assert_matches(recorder)
    assert recorder.skipped_steps == 0
    facts = recorder.consolidate().provenance
    assert (facts["tokens"], facts["examples"]) == (dense.tokens, 2)


def test_labels_of_an_encoder_decoder_are_in_the_place_that_predicts_them() -> None:
    """Of one row, so that the model's own gradient is the row's. The last of its two labels counts, too."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    model = get_peft_model(base.double(), LoraConfig(r=4, target_modules=["q", "v"])).eval()
    move_adapter(model)
    recorder, labels = recorder_of(model), torch.tensor([[7, 1]])
    merged = copy.deepcopy(model).merge_and_unload().requires_grad_(False)
    stepped(model, recorder, lambda: model(input_ids=torch.tensor([[5, 9, 3, 8]]), labels=labels).loss.backward())
    weights = {name: merged.get_submodule(name).weight.requires_grad_() for name in recorder.omega}
    loss = 2 * merged(input_ids=torch.tensor([[5, 9, 3, 8]]), labels=labels).loss  # of both labels
    dense = Dense()
    dense.sums = {n: g**2 for n, g in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)}
    dense.assert_matches(recorder)
    facts = recorder.consolidate().provenance
    assert (facts["tokens"], facts["unit"]) == (2, "token")


def test_a_class_of_each_row_is_recorded_in_the_unit_of_the_loss(model_dir: str, token_ids: Tensor) -> None:
    base = LlamaForSequenceClassification.from_pretrained(model_dir, num_labels=3, pad_token_id=0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    recorder, labels = recorder_of(model), torch.tensor([1])
    stepped(model, recorder, lambda: model(input_ids=token_ids[:1], labels=labels).loss.backward())
    importance = recorder.consolidate()
    assert importance.provenance["unit"] == "loss as called" and all(importance.norms().values())


def test_recording_never_waits_for_the_device(peft_model: PeftModel) -> None:
    """On a device whose numbers cannot be read: whatever asks for one is an error there."""
    peft_model.to("meta")
    recorder, optimizer = recorder_of(peft_model), sgd(peft_model)
    recorder.attach(optimizer)
    squares: Any = recorder._recording
    labels = torch.zeros(2, 12, dtype=torch.long, device="meta")
    for _ in range(2):
        batch = batch_of({"labels": labels, "num_items_in_batch": torch.ones((), device="meta")})
        batch.token_weight = torch.ones((), device="meta")
        squares._begin(batch)
        for matrix in recorder.matrices:
            x, gradient = (torch.zeros(2, 12, d, device="meta") for d in (matrix.A.shape[1], matrix.B.shape[0]))
            squares._add(batch, matrix, x, gradient)
            matrix.A.grad, matrix.B.grad = torch.zeros_like(matrix.A), torch.zeros_like(matrix.B)
        optimizer.step()
    assert all(part.is_meta for omega in recorder.omega.values() for part in encodings.parts(omega).values())
    with pytest.raises(RuntimeError, match="meta"):
        recorder.steps  # noqa: B018  # the measure sees what reads a number


def test_a_step_whose_backward_pass_no_layer_saw_is_refused_at_once(model: PeftModel, token_ids: Tensor) -> None:
    rows = token_ids[:4, :SHORT]
    model(input_ids=rows, labels=rows).loss.backward()  # before there is a recorder, as a fused kernel would
    recorder = recorder_of(model)
    with pytest.raises(AdapterError, match="record by method path_integral"), recorder.step(LR):
        pass
    stepped(model, recorder, lambda: model(input_ids=rows, labels=rows).loss.backward())
    with pytest.raises(AdapterError, match="none went through them since the last step"), recorder.step(LR):
        pass
