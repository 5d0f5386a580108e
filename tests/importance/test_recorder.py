"""The path integral ω: three ways in, any optimizer, any starting point, and what must not enter it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ReferenceOmega, move_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from hlora.importance.artefact import Importance
from hlora.importance.recorder import ImportanceRecorder
from hlora.numerics import encodings
from hlora.numerics.encodings import ENCODINGS, Factored
from hlora.system.errors import AdapterError, ArtifactError

LR = 0.05
Optimizer = torch.optim.Optimizer


def backward(model: PeftModel, rows: Tensor) -> Tensor:
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    return loss.detach()


def adapter_parameters(model: PeftModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model: PeftModel) -> Optimizer:
    return torch.optim.AdamW(adapter_parameters(model), lr=0.01)


def sgd(model: PeftModel) -> Optimizer:
    return torch.optim.SGD(adapter_parameters(model), lr=LR)


def train(model: PeftModel, rows: Tensor, optimizer: Optimizer, around: Callable[[], Any], steps: int = 4) -> None:
    for step in range(steps):
        backward(model, rows[4 * (step % 4) :][:4])
        around()
        optimizer.zero_grad()


def recorded(
    model: PeftModel, rows: Tensor, optimizer: Optimizer, encoding: str = "float32", steps: int = 4, **options: Any
) -> tuple[ImportanceRecorder, ReferenceOmega]:
    recorder, reference = ImportanceRecorder(model, encoding, **options, method="path_integral"), ReferenceOmega(model)

    def step() -> None:
        lr = optimizer.param_groups[0]["lr"]
        reference.before(lr)
        with recorder.step(lr):
            optimizer.step()
        reference.after()

    train(model, rows, optimizer, step, steps)
    return recorder, reference


def test_omega_is_lr_times_the_squared_effective_gradient_under_sgd(peft_model: PeftModel, token_ids: Tensor) -> None:
    """Factors in float64, so that the update is exact; ω itself is kept in float32."""
    peft_model.double()
    move_adapter(peft_model)
    recorder, reference = recorded(peft_model, token_ids, sgd(peft_model))
    for name, omega in recorder.omega.items():
        expected = sum(LR * gradient**2 for gradient in reference.gradients[name])
        assert isinstance(omega, Tensor)
        torch.testing.assert_close(omega.double(), expected, rtol=1e-6, atol=0)
        assert (omega >= 0).all()


@pytest.mark.parametrize("encoding", ["float32", "factored"])
@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("start", ["zero B", "moved"])
def test_omega_follows_the_equations_from_any_start_under_any_optimizer(
    peft_model: PeftModel, token_ids: Tensor, encoding: str, make: Callable[[PeftModel], Optimizer], start: str
) -> None:
    if start == "moved":
        move_adapter(peft_model)
    recorder, reference = recorded(peft_model, token_ids, make(peft_model), encoding)
    reference.assert_matches(recorder.omega)
    assert (recorder.steps, recorder.skipped_steps) == (4, 0)


def test_omega_of_bfloat16_factors_is_integrated_in_float32(model_dir: str, token_ids: Tensor) -> None:
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    move_adapter(model)
    assert {parameter.dtype for parameter in adapter_parameters(model)} == {torch.bfloat16}
    recorder, reference = recorded(model, token_ids, adamw(model))
    reference.assert_matches(recorder.omega)


@pytest.mark.parametrize("encoding", ["float32", "factored"])
def test_step_and_attach_agree_exactly(peft_model: PeftModel, token_ids: Tensor, encoding: str) -> None:
    other = copy.deepcopy(peft_model)
    stepped, _ = recorded(peft_model, token_ids, adamw(peft_model), encoding)
    attached, optimizer = ImportanceRecorder(other, encoding, method="path_integral"), adamw(other)
    attached.attach(optimizer)
    train(other, token_ids, optimizer, optimizer.step)
    assert attached.steps == stepped.steps
    assert_same_omega(stepped, attached)


def assert_same_omega(first: ImportanceRecorder, second: ImportanceRecorder) -> None:
    for name, omega in first.omega.items():
        mine, other = encodings.parts(omega), encodings.parts(second.omega[name])
        assert all(part.any() for part in mine.values())
        assert all(torch.equal(mine[part], other[part]) for part in mine)


def test_detaching_ends_the_recording(peft_model: PeftModel, token_ids: Tensor) -> None:
    recorder, optimizer = ImportanceRecorder(peft_model, method="path_integral"), sgd(peft_model)
    detach = recorder.attach(optimizer)
    train(peft_model, token_ids, optimizer, optimizer.step, steps=2)
    detach()
    train(peft_model, token_ids, optimizer, optimizer.step, steps=2)
    assert recorder.steps == 2


def test_attach_with_recorder_step_around_it_counts_each_step_once(peft_model: PeftModel, token_ids: Tensor) -> None:
    recorder, optimizer = ImportanceRecorder(peft_model, method="path_integral"), sgd(peft_model)
    recorder.attach(optimizer)

    def step() -> None:
        with recorder.step(LR):
            optimizer.step()

    train(peft_model, token_ids, optimizer, step, steps=3)
    assert recorder.steps == 3


def test_clipping_inside_the_step_leaves_omega_the_unclipped_gradient(peft_model: PeftModel, token_ids: Tensor) -> None:
    optimizer = sgd(peft_model)
    recorder, reference = ImportanceRecorder(peft_model, "float32", method="path_integral"), ReferenceOmega(peft_model)

    def step() -> None:
        reference.before(LR)
        with recorder.step(LR):
            norm = torch.nn.utils.clip_grad_norm_(adapter_parameters(peft_model), 1e-3)
            assert norm > 1e-2
            optimizer.step()
        reference.after()

    train(peft_model, token_ids, optimizer, step)
    reference.assert_matches(recorder.omega)


def test_attach_takes_the_learning_rate_of_each_group(peft_model: PeftModel, token_ids: Tensor) -> None:
    """Each matrix in its own group, changed by a scheduler: under SGD ω = Σ η_l g̃², so a wrong rate shows at once."""
    peft_model.double()
    recorder, reference = ImportanceRecorder(peft_model, "float32", method="path_integral"), ReferenceOmega(peft_model)
    rates = {m.name: 0.02 * (number + 1) for number, m in enumerate(recorder.matrices)}
    groups = [{"params": [m.A, m.B], "lr": rates[m.name]} for m in recorder.matrices]
    optimizer = torch.optim.SGD(groups)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    move_adapter(peft_model)
    recorder.reset()
    recorder.attach(optimizer)
    expected = {name: torch.zeros_like(omega) for name, omega in reference.omega.items()}
    for step in range(3):
        backward(peft_model, token_ids[:4])
        for m in recorder.matrices:
            lr = rates[m.name] * 0.5**step
            reference.before(lr)
            expected[m.name] += lr * reference.gradients[m.name][-1] ** 2
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    reference.omega = expected
    reference.assert_matches(recorder.omega, 1e-6)


def test_two_learning_rates_of_one_matrix_make_the_second_order_term_exact(
    peft_model: PeftModel, token_ids: Tensor
) -> None:
    """LoRA+: with η = √(η_A η_B), η²g^B g^A is the true second-order part of the SGD movement."""
    recorder, reference = ImportanceRecorder(peft_model, "float32", method="path_integral"), ReferenceOmega(peft_model)
    move_adapter(peft_model)
    recorder.reset()
    rate_A, rate_B = 0.2, 3.2
    optimizer = torch.optim.SGD(
        [
            {"params": [m.A for m in recorder.matrices], "lr": rate_A},
            {"params": [m.B for m in recorder.matrices], "lr": rate_B},
        ]
    )
    recorder.attach(optimizer)

    def step() -> None:
        reference.before(0.8)  # √(0.2 · 3.2)
        optimizer.step()
        reference.after()

    train(peft_model, token_ids, optimizer, step, steps=2)
    reference.assert_matches(recorder.omega)


def test_a_closure_is_refused_since_its_gradients_come_too_late(peft_model: PeftModel, token_ids: Tensor) -> None:
    recorder, optimizer = ImportanceRecorder(peft_model, method="path_integral"), sgd(peft_model)
    recorder.attach(optimizer)
    with pytest.raises(ValueError, match=r"optimizer\.step\(closure\)"):
        optimizer.step(lambda: float(backward(peft_model, token_ids[:4])))


def test_an_optimizer_of_another_model_is_refused(model_dir: str, peft_model: PeftModel) -> None:
    other = copy.deepcopy(peft_model)
    with pytest.raises(AdapterError, match="this optimizer does not train"):
        ImportanceRecorder(peft_model, method="path_integral").attach(sgd(other))


def test_a_frozen_adapter_is_refused_with_what_to_do(peft_model: PeftModel) -> None:
    peft_model.requires_grad_(False)
    with pytest.raises(AdapterError, match=r"adapter 'default' is frozen.*is_trainable=True"):
        ImportanceRecorder(peft_model, method="path_integral")


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_skips_are_not_counted(
    peft_model: PeftModel, token_ids: Tensor, fused: bool
) -> None:
    recorder, reference = ImportanceRecorder(peft_model, "float32", method="path_integral"), ReferenceOmega(peft_model)
    optimizer = torch.optim.AdamW(adapter_parameters(peft_model), lr=0.01, fused=fused)
    recorder.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for step in range(4):
            rows = token_ids[4 * step :][:4]
            scale = scaler.get_scale()
            scaler.scale(peft_model(input_ids=rows, labels=rows).loss).backward()
            if step == 1:
                recorder.matrices[0].A.grad[0, 0] = float("inf")  # an overflow in half precision
            else:
                reference.before(0.01, gradient_scale=1 / scale)
            if not fused:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)  # a fused optimizer unscales by itself, and runs its hooks when it skips
            scaler.update()
            if step != 1:
                reference.after()
            optimizer.zero_grad()
    assert recorder.steps == 3
    reference.assert_matches(recorder.omega)


def test_a_gradient_that_is_not_finite_skips_the_step_counts_it_and_warns_once(
    peft_model: PeftModel, token_ids: Tensor
) -> None:
    recorder, reference = ImportanceRecorder(peft_model, "float32", method="path_integral"), ReferenceOmega(peft_model)
    optimizer = sgd(peft_model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(5):
            backward(peft_model, token_ids[:4])
            bad = {1: float("nan"), 3: float("-inf")}.get(step)
            if bad is None:
                reference.before(LR)
                with recorder.step(LR):
                    optimizer.step()
                reference.after()
            else:
                recorder.matrices[-1].B.grad[2, 1] = bad
                with recorder.step(LR):
                    pass  # as a gradient scaler does
            optimizer.zero_grad()
    assert [str(w.message) for w in caught if "not finite" in str(w.message)] == [
        "a gradient or weight is not finite; this step adds nothing to the importance. "
        "The count is in recorder.skipped_steps."
    ]
    assert (recorder.steps, recorder.skipped_steps) == (3, 2)
    reference.assert_matches(recorder.omega)


def test_weights_that_become_not_finite_leave_omega_finite(peft_model: PeftModel, token_ids: Tensor) -> None:
    recorder, optimizer = ImportanceRecorder(peft_model, "factored", method="path_integral"), sgd(peft_model)
    recorder.attach(optimizer)
    train(peft_model, token_ids, optimizer, optimizer.step, steps=2)
    backward(peft_model, token_ids[:4])
    recorder.matrices[0].B.grad[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    train(peft_model, token_ids, optimizer, optimizer.step, steps=2)
    assert (recorder.steps, recorder.skipped_steps) == (2, 3)
    for omega in recorder.omega.values():
        assert all(torch.isfinite(part).all() for part in encodings.parts(omega).values())


def test_an_error_in_the_step_records_nothing(peft_model: PeftModel, token_ids: Tensor) -> None:
    recorder = ImportanceRecorder(peft_model, method="path_integral")
    backward(peft_model, token_ids[:4])
    with pytest.raises(RuntimeError, match="out of memory"), recorder.step(LR):
        raise RuntimeError("out of memory")
    recorder.integrate()
    assert recorder.steps == 0


def test_accumulated_gradients_give_the_omega_of_one_batch(peft_model: PeftModel, token_ids: Tensor) -> None:
    other = copy.deepcopy(peft_model)
    recorders = []
    for model, parts in ((peft_model, 1), (other, 4)):
        recorder, optimizer = ImportanceRecorder(model, "float32", method="path_integral"), sgd(model)
        for _ in range(3):
            for rows in token_ids[:8].chunk(parts):
                (model(input_ids=rows, labels=rows).loss / parts).backward()
            with recorder.step(LR):
                optimizer.step()
            optimizer.zero_grad()
        recorders.append(recorder)
    for name, omega in recorders[0].omega.items():
        assert isinstance(omega, Tensor)
        torch.testing.assert_close(recorders[1].omega[name], omega, rtol=0, atol=1e-4 * float(omega.max()))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_going_on_from_a_saved_state_equals_not_stopping(
    peft_model: PeftModel, token_ids: Tensor, encoding: str, tmp_path: Path
) -> None:
    move_adapter(peft_model)
    recorder, optimizer = ImportanceRecorder(peft_model, encoding, method="path_integral"), sgd(peft_model)
    recorder.attach(optimizer)
    train(peft_model, token_ids, optimizer, optimizer.step, steps=2)
    torch.save(recorder.state_dict(), tmp_path / "recorder.pt")

    resumed_model = copy.deepcopy(peft_model)
    resumed_model.zero_grad()
    resumed, resumed_optimizer = ImportanceRecorder(resumed_model, encoding, method="path_integral"), sgd(resumed_model)
    resumed.load_state_dict(torch.load(tmp_path / "recorder.pt", weights_only=True))
    resumed.attach(resumed_optimizer)

    for model, which in ((peft_model, optimizer), (resumed_model, resumed_optimizer)):
        train(model, token_ids, which, which.step, steps=2)
    assert resumed.steps == recorder.steps == 4
    assert_same_omega(recorder, resumed)
    first, second = recorder.consolidate(), resumed.consolidate()
    for name, matrix in first.matrices.items():
        assert matrix.undo_cost == second.matrices[name].undo_cost > 0


def test_a_saved_state_does_not_change_with_the_recording(peft_model: PeftModel, token_ids: Tensor) -> None:
    recorder, optimizer = ImportanceRecorder(peft_model, method="path_integral"), sgd(peft_model)
    recorder.attach(optimizer)
    train(peft_model, token_ids, optimizer, optimizer.step, steps=1)
    state = recorder.state_dict()
    before = copy.deepcopy(state)
    train(peft_model, token_ids, optimizer, optimizer.step, steps=1)
    assert all(torch.equal(tensor, before["tensors"][name]) for name, tensor in state["tensors"].items())


# Where ω is, and in what


def test_a_consolidated_recorder_holds_no_second_omega(peft_model: PeftModel, token_ids: Tensor) -> None:
    recorder, _ = recorded(peft_model, token_ids, sgd(peft_model))
    recorder.consolidate()
    held = [*vars(recorder).values(), *vars(recorder._recording).values()]
    tensors = [each for value in held if isinstance(value, dict) for each in value.values()]
    assert not any(getattr(each, "shape", None) == (32, 32) for each in tensors)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_recording_never_waits_for_the_device(peft_model: PeftModel, token_ids: Tensor, encoding: str) -> None:
    """On a device whose numbers cannot be read: whatever asks for one, as a branch on it does, is an error there."""
    peft_model.to("meta")
    optimizer = torch.optim.SGD(adapter_parameters(peft_model), lr=LR)
    recorder = ImportanceRecorder(peft_model, encoding, method="path_integral")
    recorder.attach(optimizer)
    for _ in range(3):
        for parameter in adapter_parameters(peft_model):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.grad_scale = torch.ones((), device="meta")  # as a fused optimizer has it under a scaler
        recorder.capture_from(optimizer)
        del optimizer.grad_scale
        optimizer.step()
    assert all(part.is_meta for omega in recorder.omega.values() for part in encodings.parts(omega).values())
    with pytest.raises(RuntimeError, match="meta"):
        recorder.steps  # noqa: B018  # the measure sees what reads a number


def test_a_state_of_another_encoding_or_rank_is_refused(model_dir: str, peft_model: PeftModel) -> None:
    state = ImportanceRecorder(peft_model, "factored", method="path_integral").state_dict()
    with pytest.raises(ArtifactError, match="recording state is factored, this recorder is float32"):
        ImportanceRecorder(peft_model, "float32", method="path_integral").load_state_dict(state)
    base = LlamaForCausalLM.from_pretrained(model_dir)
    wider = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ArtifactError, match=r"q_proj\.start_A of shape \(8, 32\), got \(4, 32\)"):
        ImportanceRecorder(wider, "factored", method="path_integral").load_state_dict(state)


def test_an_unknown_encoding_is_refused(peft_model: PeftModel) -> None:
    with pytest.raises(ValueError, match="float32, factored, got 'int3'"):
        ImportanceRecorder(peft_model, "int3", method="path_integral")


def test_consolidating_without_a_step_says_that_nothing_was_recorded(peft_model: PeftModel) -> None:
    with pytest.raises(ArtifactError, match=r"nothing recorded: 0 steps integrated, 0 skipped.*recorder\.callback"):
        ImportanceRecorder(peft_model, method="path_integral").consolidate()


@pytest.mark.parametrize(
    ("method", "encoding"),
    [("path_integral", "float32"), ("path_integral", "factored"), ("squared_gradients", "factored")],
)
def test_a_wrong_argument_of_consolidate_costs_nothing(
    model_dir: str, token_ids: Tensor, method: Any, encoding: Any
) -> None:
    found = []
    for wrong in ({}, {"data": "wikitext-2"}, {"xi": -1.0}):
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules=["q_proj"])
        model = get_peft_model(LlamaForCausalLM.from_pretrained(model_dir), lora)
        recorder, optimizer = ImportanceRecorder(model, encoding, method=method), adamw(model)
        recorder.attach(optimizer)
        train(model, token_ids, optimizer, optimizer.step)
        if wrong:
            with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected a"):
                recorder.consolidate(**wrong)
        found.append(recorder.consolidate())
    assert found[0].norms() == found[1].norms() == found[2].norms() and all(found[0].norms().values())


def test_an_importance_that_could_not_be_saved_is_still_there(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path
) -> None:
    recorder, _ = recorded(peft_model, token_ids, adamw(peft_model))
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ArtifactError, match="holds checkpoint-2"):
        recorder.consolidate().save(tmp_path)
    with pytest.raises(ArtifactError, match=r"nothing recorded.*recorder\.importance has"):
        recorder.consolidate()
    kept = recorder.importance
    assert kept is not None and Importance.load(kept.save(tmp_path / "importance")).norms() == kept.norms()


def test_recording_does_not_change_what_training_does(peft_model: PeftModel, token_ids: Tensor) -> None:
    other = copy.deepcopy(peft_model)
    recorded(peft_model, token_ids, adamw(peft_model))
    optimizer = adamw(other)
    train(other, token_ids, optimizer, optimizer.step)
    for mine, plain in zip(adapter_parameters(peft_model), adapter_parameters(other), strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_recorder_goes_on_from_zero_after_consolidation(
    peft_model: PeftModel, token_ids: Tensor, encoding: str
) -> None:
    """The second importance is that of a recorder made at the end of the first phase; the first is left alone."""
    recorder, optimizer = ImportanceRecorder(peft_model, encoding, method="path_integral"), sgd(peft_model)
    recorder.attach(optimizer)
    train(peft_model, token_ids, optimizer, optimizer.step, steps=2)
    first = recorder.consolidate()
    kept = copy.deepcopy(first)
    assert (recorder.steps, recorder.skipped_steps) == (0, 0)
    assert all(float(encodings.norm(omega)) == 0 for omega in recorder.omega.values())

    other = copy.deepcopy(peft_model)
    fresh, fresh_optimizer = ImportanceRecorder(other, encoding, method="path_integral"), sgd(other)
    fresh.attach(fresh_optimizer)
    for model, which in ((peft_model, optimizer), (other, fresh_optimizer)):
        torch.manual_seed(0)
        train(model, token_ids, which, which.step, steps=2)
    second, expected = recorder.consolidate(), fresh.consolidate()
    for name, matrix in second.matrices.items():
        assert matrix.undo_cost == expected.matrices[name].undo_cost
        for part, tensor in encodings.parts(matrix.omega).items():
            assert torch.equal(tensor, encodings.parts(expected.matrices[name].omega)[part])
            assert torch.equal(
                encodings.parts(first.matrices[name].omega)[part], encodings.parts(kept.matrices[name].omega)[part]
            )


def test_unprotected_parts_are_warned_of_once_not_at_each_consolidation(model_dir: str, token_ids: Tensor) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(LlamaForCausalLM.from_pretrained(model_dir), config)
    with pytest.warns(UserWarning, match="lm_head"):
        recorder = ImportanceRecorder(model, unprotected="warn", method="path_integral")
    optimizer = sgd(model)
    recorder.attach(optimizer)
    train(model, token_ids, optimizer, optimizer.step, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorder.consolidate()


def test_factored_recording_is_the_row_and_column_sums_of_float32_recording(
    peft_model: PeftModel, token_ids: Tensor
) -> None:
    other = copy.deepcopy(peft_model)
    dense, _ = recorded(peft_model, token_ids, adamw(peft_model), "float32")
    factored, _ = recorded(other, token_ids, adamw(other), "factored")
    for name, omega in dense.omega.items():
        mine = factored.omega[name]
        assert isinstance(mine, Factored)
        for got, expected in ((mine.row, omega.sum(1)), (mine.column, omega.sum(0))):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_move_is_the_share_of_the_base_norm_that_the_adapter_has_moved_since_the_start(
    peft_model: PeftModel, token_ids: Tensor
) -> None:
    move_adapter(peft_model)
    recorder = ImportanceRecorder(peft_model, method="path_integral")
    assert recorder.move() == pytest.approx(0, abs=1e-6)
    start = {m.name: (m.scale * m.B @ m.A).detach().double() for m in recorder.matrices}
    optimizer = adamw(peft_model)
    recorder.attach(optimizer)
    train(peft_model, token_ids, optimizer, optimizer.step)
    ends = {m.name: (m.scale * m.B @ m.A).detach().double() for m in recorder.matrices}
    moved = sum(float((end - start[name]).square().sum()) for name, end in ends.items())
    base = sum(float(m.module.get_base_layer().weight.double().square().sum()) for m in recorder.matrices)
    assert recorder.move() == pytest.approx((moved / base) ** 0.5, rel=1e-4)
    assert moved > 1e-4 * base


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_recording_follows_a_model_that_is_moved_after_the_recorder_was_made(
    peft_model: PeftModel, token_ids: Tensor, encoding: str
) -> None:
    """As Trainer moves one to its GPU. The meta device stands in for it: it refuses a CPU tensor in a computation."""
    recorder = ImportanceRecorder(peft_model, encoding, method="path_integral")
    train(peft_model, token_ids, adamw(peft_model), lambda: None, steps=1)
    recorder.capture(LR)
    recorder.integrate()
    peft_model.to("meta")
    for parameter in adapter_parameters(peft_model):
        parameter.grad = torch.ones_like(parameter)
    with recorder.step(LR):
        torch.optim.SGD(adapter_parameters(peft_model), lr=LR).step()
    tensors = [t for omega in recorder.omega.values() for t in encodings.parts(omega).values()]
    assert {t.device.type for t in (*tensors, *sum(recorder._movement.start.values(), ()), recorder._skipped)} == {
        "meta"
    }
