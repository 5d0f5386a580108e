"""Numbers that are not finite, too large or all zero: skipped and counted, refused, or stopped with what to change.

What test_recorder.py, test_penalty.py, test_callbacks.py and test_artefact.py have of it is not repeated here.
SECURITY.md has the table of faults, outcomes and tests.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ReferenceOmega, move_adapter, record
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from hlora import pipeline
from hlora.config.reading import parse_config
from hlora.config.sections import EvaluationConfig
from hlora.evaluation.likelihood import text_likelihood
from hlora.importance.artefact import Importance
from hlora.importance.penalty import ImportancePenalty
from hlora.importance.recorder import ImportanceRecorder
from hlora.numerics import encodings, equations
from hlora.numerics.encodings import ENCODINGS, Factored
from hlora.system.errors import ArtifactError, ConfigError, HloraError, TrainingError
from hlora.training import checkpoint
from hlora.training.checkpoint_files import latest_checkpoint
from hlora.training.train import train

Tally = Callable[..., None]
NAN, INF = float("nan"), float("inf")
LR = 0.01
TEXT = Dataset.from_list([{"text": "Call me Ishmael. Some years ago, never mind how long precisely."}] * 64)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def all_finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def saved_numbers_are_finite(directory: Path) -> bool:
    """Of every safetensors file below the directory."""
    return all(all_finite(*load_file(path).values()) for path in directory.rglob("*.safetensors"))


def changed(importance: Importance, change: Callable[[Any], Any]) -> Importance:
    """With `change` made to Ω of the first matrix."""
    name, matrix = next(iter(importance.matrices.items()))
    return replace(importance, matrices={**importance.matrices, name: replace(matrix, omega=change(matrix.omega))})


def with_value(omega: Any, value: float) -> Any:
    parts = {name: part.clone() for name, part in encodings.parts(omega).items()}
    part = next(part for part in parts.values() if part.is_floating_point())
    part.view(-1)[0] = value
    return encodings.from_parts(parts)


# ω


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_recording_state_that_is_not_finite_is_refused_and_changes_nothing(
    peft_model: PeftModel, token_ids: Tensor, encoding: str, tally: Tally
) -> None:
    recorder = ImportanceRecorder(peft_model, encoding, method="path_integral")
    optimizer = torch.optim.AdamW(trained(peft_model), lr=LR)
    recorder.attach(optimizer)
    peft_model(input_ids=token_ids[:4], labels=token_ids[:4]).loss.backward()
    optimizer.step()
    state = recorder.state_dict()
    other = ImportanceRecorder(peft_model, encoding, method="path_integral")
    refused = 0
    for key in state["tensors"]:
        for value in (NAN, INF, -INF):
            bad = copy.deepcopy(state)
            bad["tensors"][key].view(-1)[-1] = value
            with pytest.raises(ArtifactError, match=f"{key} holds numbers that are not finite.*older checkpoint"):
                other.load_state_dict(bad)
            refused += 1
    untouched = all(not part.any() for omega in other.omega.values() for part in encodings.parts(omega).values())
    tally(f"ω not finite in a state, {encoding}", cases=3 * len(state["tensors"]), good=refused, bad=0)
    assert untouched and other.steps == 0
    other.load_state_dict(state)
    assert other.steps == 1


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_sum_that_overflows_is_neither_saved_in_a_checkpoint_nor_in_an_importance(
    peft_model: PeftModel, token_ids: Tensor, encoding: str, tmp_path: Path
) -> None:
    """Gradient and movement are finite, and so are their norms; their product is not."""
    recorder = ImportanceRecorder(peft_model, encoding, method="path_integral")
    peft_model(input_ids=token_ids[:4], labels=token_ids[:4]).loss.backward()
    with torch.no_grad():
        for matrix in recorder.matrices:
            matrix.B.grad.fill_(1e15)
    with recorder.step(LR), torch.no_grad():
        for matrix in recorder.matrices:
            matrix.A.fill_(1.0)
            matrix.B.fill_(-1e15)
    assert (recorder.steps, recorder.skipped_steps) == (1, 0)
    omega = recorder.omega
    name = recorder.matrices[0].name
    with torch.no_grad():
        for part in encodings.parts(omega[name]).values():
            part.mul_(1e30)
    with pytest.raises(ArtifactError, match=r"not finite.*smaller learning rate"):
        recorder.state_dict()
    importance = recorder.consolidate()
    with pytest.raises(ArtifactError, match=r"cannot be saved.*finite.*smaller learning rate"):
        importance.save(tmp_path / "importance")
    assert not list(tmp_path.iterdir())


class Poison(TrainerCallback):
    """Makes one value of the adapter's weights or gradients NaN, or the recorder's ω infinite, at one step."""

    def __init__(self, what: str, step: int, recorder: ImportanceRecorder | None = None) -> None:
        self.what, self.step, self.recorder = what, step, recorder

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step and self.what == "gradient":
            trained(kwargs["model"])[0].grad[0] = NAN

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.what == "weight":
            trained(kwargs["model"])[0].data[0] = NAN
        if state.global_step == self.step and self.what == "omega":
            next(iter(encodings.parts(next(iter(self.recorder.omega.values()))).values())).fill_(INF)


@pytest.mark.parametrize(
    ("what", "step", "error", "message"),
    [
        ("gradient", 4, TrainingError, r"step 4: \S+lora_A\S+ is not finite.*learning_rate"),
        ("weight", 4, TrainingError, r"step 4: \S+lora_A\S+ is not finite.*learning_rate"),
        ("weight", 2, TrainingError, r"step 2: \S+lora_A\S+ is not finite.*learning_rate"),
        ("omega", 2, ArtifactError, "recording state: .* holds numbers that are not finite"),
    ],
)
def test_what_is_lost_between_two_logs_or_in_the_last_step_is_not_saved(
    peft_model: PeftModel, model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    what: str, step: int, error: type[HloraError], message: str,
) -> None:  # fmt: skip
    """Logged once, at the end; a checkpoint after each step."""
    monkeypatch.setattr(checkpoint, "_EVERY", 0.0)
    recorder = ImportanceRecorder(peft_model, method="path_integral")
    callbacks = [Poison(what, step, recorder), recorder.callback()]
    settings = {"max_steps": 4, "max_length": 16, "logging_steps": 100, "report_to": [], "max_grad_norm": 0}
    tokenizer, output = AutoTokenizer.from_pretrained(model_dir), tmp_path / "phase"
    with warnings.catch_warnings(), pytest.raises(error, match=message):
        warnings.simplefilter("ignore", UserWarning)  # the recorder's
        train(
            peft_model, tokenizer, TEXT, output=output, arguments=settings, seed=0, callbacks=callbacks, resumable=True
        )
    kept = latest_checkpoint(output)
    assert kept == output / f"checkpoint-{step - 1}"
    assert saved_numbers_are_finite(kept)


# Ω


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_an_importance_that_is_not_finite_makes_no_penalty(
    peft_model: PeftModel, token_ids: Tensor, encoding: str, value: float, tally: Tally
) -> None:
    importance = changed(record(peft_model, token_ids, encoding), lambda omega: with_value(omega, value))
    first, refused = next(iter(importance.matrices)), 0
    for layer_weights in ("softmax", "norm_share", "uniform", "sum", "root"):
        for phi_scale in ("relative", "paper"):
            with pytest.raises(ArtifactError, match=f"{first}: the norm of the importance is (inf|nan).*larger xi"):
                ImportancePenalty(peft_model, importance, 1.0, layer_weights=layer_weights, phi_scale=phi_scale)
            refused += 1
    tally(f"Ω holds {value}, {encoding}", cases=10, good=refused, bad=10 - refused)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_importance_of_zeros_has_a_defined_penalty_or_is_refused(
    peft_model: PeftModel, token_ids: Tensor, encoding: str, tally: Tally
) -> None:
    importance = record(peft_model, token_ids, encoding)
    sizes = {name: encodings.shape(m.omega) for name, m in importance.matrices.items()}
    zero = replace(
        importance,
        matrices={
            name: replace(m, omega=encodings.zeros(encoding, *sizes[name], device=m.A.device), undo_cost=0.0)
            for name, m in importance.matrices.items()
        },
    )
    refused, free = 0, 0
    for layer_weights in ("softmax", "norm_share", "uniform", "sum", "root"):
        for phi_scale in ("relative", "paper"):
            for group in ("matrix", "block"):
                options = {"layer_weights": layer_weights, "phi_scale": phi_scale, "group": group}
                if phi_scale == "relative" or layer_weights == "norm_share":
                    with pytest.raises(ArtifactError, match=r"the importance is zero .*Record more steps"):
                        ImportancePenalty(peft_model, zero, 9.0, **options)
                    refused += 1
                    continue
                penalty = ImportancePenalty(peft_model, zero, 9.0, **options)
                count = 4 if group == "matrix" else 2
                shares = {"sum": 1.0, "root": 0.0}.get(layer_weights, 1 / count)
                assert penalty.coefficients == pytest.approx(dict.fromkeys(importance.matrices, shares))
                move_adapter(peft_model)
                value = penalty()
                value.backward()
                assert value.item() == 0.0 and all(not p.grad.any() for p in trained(peft_model))
                free += 1
    tally(f"Ω all zero, {encoding}", cases=20, good=refused + free, bad=0)
    assert (refused, free) == (12, 8)


def test_a_cost_that_is_not_finite_is_neither_saved_nor_loaded(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path
) -> None:
    importance = record(peft_model, token_ids)
    name, matrix = next(iter(importance.matrices.items()))
    for value in (NAN, INF):
        bad = replace(importance, matrices={**importance.matrices, name: replace(matrix, undo_cost=value)})
        with pytest.raises(ArtifactError, match=rf"cannot be saved: {name}\.undo_cost: expected a finite number"):
            bad.save(tmp_path / "importance")
        with pytest.raises(ArtifactError, match=r"undoing the general phase would cost (nan|inf).*larger xi"):
            ImportancePenalty(peft_model, bad, 1.0)
    assert not (tmp_path / "importance").exists()
    file = importance.save(tmp_path / "importance") / "importance.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    del document["sha256"]  # as from before there were checksums
    document["matrices"][name]["undo_cost"] = NAN
    file.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ArtifactError, match=rf"{name}\.undo_cost: expected a finite number, got nan"):
        Importance.load(tmp_path / "importance")


# Penalty


@pytest.mark.parametrize("phi_scale", ["relative", "paper"])
@pytest.mark.parametrize("way", ["value", "gradients"])
def test_a_penalty_that_overflows_stops_a_plain_loop_before_the_step(
    peft_model: PeftModel, token_ids: Tensor, phi_scale: str, way: str
) -> None:
    penalty = ImportancePenalty(peft_model, record(peft_model, token_ids), 1e38, phi_scale=phi_scale)
    for matrix in penalty.matrices:
        matrix.B.data.add_(1e4)
    with pytest.raises(TrainingError, match=r"the penalty is inf at phi 1e\+38.*lower penalty\.phi"):
        penalty() if way == "value" else penalty.add_gradients_()
    assert all(p.grad is None or not p.grad.any() for p in trained(peft_model))


@pytest.mark.parametrize("way", ["value", "gradients"])
def test_a_weight_that_is_not_finite_stops_the_penalty(peft_model: PeftModel, token_ids: Tensor, way: str) -> None:
    penalty = ImportancePenalty(peft_model, record(peft_model, token_ids), 1.0)
    penalty.matrices[0].B.data[0, 0] = NAN
    with pytest.raises(TrainingError, match=r"the penalty is nan at phi 1\. "):
        penalty() if way == "value" else penalty.add_gradients_()


def test_a_penalty_whose_value_is_finite_and_whose_float16_gradient_is_not_stops(
    peft_model: PeftModel, token_ids: Tensor
) -> None:
    importance = record(peft_model, token_ids)
    penalty = ImportancePenalty(peft_model, importance, 1.0)
    move_adapter(peft_model)
    penalty.phi = 1e6 / float(max(p.abs().max() for p in penalty._evaluate()[1]))
    assert penalty.add_gradients_().isfinite()  # in float32
    peft_model.half().zero_grad()
    with pytest.raises(TrainingError, match=r"a gradient of the penalty is not finite.*use bfloat16 or float32"):
        penalty.add_gradients_()
    assert all(p.grad is None for p in trained(peft_model))


@pytest.mark.parametrize("phi_scale", ["relative", "paper"])
@pytest.mark.parametrize(("logging_steps", "every"), [(1, 0.0), (100, 0.0), (100, 300.0)])
def test_a_phi_too_large_stops_the_training_and_nothing_is_saved(
    peft_model: PeftModel, token_ids: Tensor, model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    phi_scale: str, logging_steps: int, every: float,
) -> None:  # fmt: skip
    """Also where an accelerator is asked by a checkpoint or at the end alone, since no log came."""
    monkeypatch.setattr(checkpoint, "_EVERY", every)
    penalty = ImportancePenalty(peft_model, record(peft_model, token_ids), 1e30, phi_scale=phi_scale)
    if logging_steps == 100:
        monkeypatch.setattr(penalty, "_check", lambda *_: None)  # as on an accelerator
    settings = {"max_steps": 8, "learning_rate": 1e9, "max_grad_norm": 0, "optim": "sgd", "max_length": 16}
    settings |= {"logging_steps": logging_steps, "report_to": []}
    tokenizer, output = AutoTokenizer.from_pretrained(model_dir), tmp_path / "phase"
    with pytest.raises(TrainingError, match=r"step \d: the penalty is (inf|nan) at phi 1e\+30.*lower penalty\.phi"):
        train(
            peft_model,
            tokenizer,
            TEXT,
            output=output,
            arguments=settings,
            seed=0,
            callbacks=[penalty.callback()],
            resumable=True,
        )
    kept = latest_checkpoint(output)
    assert kept is None or saved_numbers_are_finite(kept)


# Half precision and gradient scalers


def scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **options)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("way", ["value", "gradients"])
def test_under_a_scaler_that_grows_and_backs_off_omega_and_weights_are_those_without_one(
    peft_model: PeftModel, token_ids: Tensor, fused: bool, way: str
) -> None:
    """The scale doubles after each step and is halved by an overflow in every third, which is not in the reference."""
    importance = record(peft_model, token_ids)
    ends = []
    for scaled in (False, True):
        model = copy.deepcopy(peft_model)
        penalty = ImportancePenalty(model, importance, 3.0)
        recorder, reference = ImportanceRecorder(model, "float32", method="path_integral"), ReferenceOmega(model)
        optimizer = torch.optim.AdamW(trained(model), lr=LR, fused=fused)
        grad_scaler = scaler(init_scale=2.0**8, growth_interval=1, enabled=scaled)
        scales = []
        for step in range(9):
            rows = token_ids[4 * (step % 4) :][:4]
            overflow = step % 3 == 2
            if overflow and not scaled:
                continue
            loss = model(input_ids=rows, labels=rows).loss
            grad_scaler.scale(loss).backward()
            if overflow:
                trained(model)[0].grad[0, 0] = INF
            grad_scaler.unscale_(optimizer)
            if not overflow:
                reference.before(LR)
            recorder.capture(LR)
            if way == "value":
                penalty().backward()
            elif not overflow:
                penalty.add_gradients_()
            before = [p.detach().clone() for p in trained(model)]
            grad_scaler.step(optimizer)
            moved = any(not torch.equal(a, b) for a, b in zip(before, trained(model), strict=True))
            assert moved != overflow
            if overflow:
                recorder.discard()
            else:
                recorder.integrate()
                reference.after()
            grad_scaler.update()
            scales.append(grad_scaler.get_scale())
            optimizer.zero_grad()
        assert (recorder.steps, recorder.skipped_steps) == (6, 0)
        reference.assert_matches(recorder.omega)
        ends.append((recorder.omega, [p.detach() for p in trained(model)]))
    assert max(scales) > scales[0] and any(b < a for a, b in pairwise(scales))
    for name, omega in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][name], omega, rtol=1e-4, atol=1e-5 * float(omega.abs().max()))
    for mine, other in zip(ends[0][1], ends[1][1], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


class Overflow(TrainerCallback):
    """An overflow at some steps, as the backward pass in half precision leaves it, before anyone unscales."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps
        self.scales: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.scales.append(kwargs["optimizer"].scaler.get_scale())
        if state.global_step + 1 in self.steps:
            trained(kwargs["model"])[0].grad[0, 0] = INF


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("max_norm", [0.0, 1e-3])
def test_in_trainer_omega_penalty_and_clip_are_those_without_a_scaler(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path, optim: str, max_norm: float
) -> None:
    """fp16 in Trainer wants an accelerator; the scaler in Accelerate's path is the real one, on the CPU."""
    importance = record(peft_model, token_ids)
    ids = token_ids.tolist()
    ends = []
    for scaled in (False, True):
        model = copy.deepcopy(peft_model)
        recorder = ImportanceRecorder(model, "float32", method="path_integral")
        penalty = ImportancePenalty(model, importance, 3.0)
        overflow = Overflow({3})
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=5 if scaled else 4, learning_rate=LR, lr_scheduler_type="constant",
            optim=optim, max_grad_norm=max_norm, per_device_train_batch_size=16, train_sampling_strategy="sequential",
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, bf16=False, logging_steps=1,
        )  # fmt: skip
        callbacks = [*([overflow] if scaled else []), recorder.callback(), penalty.callback()]
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
            callbacks=callbacks,
        )
        if scaled:
            trainer.accelerator.scaler = scaler(init_scale=2.0**10, growth_interval=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the recorder's, of a fused optimizer's skipped step
            trainer.train()
        assert recorder.steps == 4
        ends.append((recorder.omega, [p.detach() for p in trained(model)]))
    assert overflow.scales == [2.0**10, 2.0**11, 2.0**12, 2.0**11, 2.0**12]
    for name, omega in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][name], omega, rtol=1e-4, atol=1e-5 * float(omega.abs().max()))
    for mine, other in zip(ends[0][1], ends[1][1], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_importance_and_penalty_of_a_float16_adapter_do_not_overflow(
    peft_model: PeftModel, token_ids: Tensor, encoding: str
) -> None:
    """The norm of A, 9e4, and Ω(Δθ)² are beyond float16, which ends at 65,504."""
    model = peft_model.half()
    recorder = ImportanceRecorder(model, encoding, method="path_integral")
    A = recorder.matrices[0].A
    with torch.no_grad():
        A.fill_(8000.0)
    assert A.norm() == INF
    for matrix in recorder.matrices:
        matrix.A.grad, matrix.B.grad = torch.full_like(matrix.A, 2.0), torch.full_like(matrix.B, 2.0)
    with recorder.step(LR), torch.no_grad():
        for matrix in recorder.matrices:
            matrix.A.mul_(0.75)
            matrix.B.sub_(0.25)
    assert (recorder.steps, recorder.skipped_steps) == (1, 0)
    importance = recorder.consolidate()
    assert all(norm < INF for norm in importance.norms().values())
    penalty = ImportancePenalty(model, importance, 1.0, layer_weights="sum", phi_scale="paper")
    with torch.no_grad():
        for matrix in penalty.matrices:
            matrix.B.add_(1.0)
    value = penalty()
    expected = 0.0
    for matrix in penalty.matrices:
        mine = importance.matrices[matrix.name]
        dense = mine.omega if isinstance(mine.omega, Tensor) else mine.omega.dense()
        A, B, A_nu, B_nu = (t.detach().double() for t in (matrix.A, matrix.B, mine.A, mine.B))
        theta, theta_nu = matrix.scale * B @ A, matrix.scale * B_nu @ A_nu
        expected += float(equations.layer_penalty(dense.double(), theta, theta_nu))
    assert value.dtype == torch.float32 and 65_504 < expected < INF
    assert value.item() == pytest.approx(expected, rel=1e-4)


def test_a_model_whose_activations_overflow_is_not_measured(peft_model: PeftModel, model_dir: str) -> None:
    peft_model.base_model.model.model.norm.weight.data[0] = INF
    settings = EvaluationConfig(max_tokens=64, window=32, stride=32)
    with pytest.raises(TrainingError, match=r"mean token loss is nan.*model\.dtype bfloat16 or float32"):
        text_likelihood(peft_model, AutoTokenizer.from_pretrained(model_dir), TEXT[0]["text"] * 4, settings)


# A layer that nothing reaches


class Forked(nn.Module):
    """Two linear layers, the second of which only every other call goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 5, bias=False), nn.Linear(6, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_layer_that_no_token_reaches_has_no_importance_and_does_not_disturb_the_others(
    encoding: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Forked(), LoraConfig(r=2, lora_alpha=4, target_modules=["used", "unused"]))
    recorder = ImportanceRecorder(model, encoding, method="path_integral")
    optimizer = torch.optim.AdamW(trained(model), lr=LR, weight_decay=0.0)
    recorder.attach(optimizer)
    for _ in range(3):
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (recorder.steps, recorder.skipped_steps) == (3, 0)
    omega = recorder.omega
    assert all(not part.any() for part in encodings.parts(omega["unused"]).values())
    assert all(part.any() for part in encodings.parts(omega["used"]).values())
    importance = Importance.load(recorder.consolidate().save(tmp_path / "importance"))
    norms = importance.norms()
    assert norms["unused"] == 0 < norms["used"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one coefficient above 0.9
        for layer_weights in ("softmax", "norm_share", "uniform", "sum", "root"):
            penalty = ImportancePenalty(model, importance, 1.0, layer_weights=layer_weights)
            move_adapter(model)
            model.zero_grad()
            assert penalty.add_gradients_() > 0  # every .grad is None before
            unused = next(matrix for matrix in penalty.matrices if matrix.name == "unused")
            assert not unused.A.grad.any() and not unused.B.grad.any()
            assert all_finite(*(p.grad for p in trained(model)))


# Learning rates


def test_at_a_learning_rate_of_zero_nothing_is_recorded_and_the_penalty_says_so(
    peft_model: PeftModel, token_ids: Tensor
) -> None:
    recorder = ImportanceRecorder(peft_model, method="path_integral")
    peft_model(input_ids=token_ids[:4], labels=token_ids[:4]).loss.backward()
    optimizer = torch.optim.AdamW(trained(peft_model), lr=0.0)
    with recorder.step(0.0):
        optimizer.step()
    importance = recorder.consolidate()
    assert set(importance.norms().values()) == {0.0}
    with pytest.raises(ArtifactError, match="Record more steps, or at a larger learning rate"):
        ImportancePenalty(peft_model, importance, 1.0)


@pytest.mark.parametrize("phase", ["common", "record", "tune"])
@pytest.mark.parametrize("rate", [None, 0, 0.0, -1e-3, NAN, INF, "", "fast"])
def test_a_learning_rate_that_trains_nothing_is_refused_before_anything_is_trained(
    job_fields: dict[str, Any], tmp_path: Path, phase: str, rate: Any
) -> None:
    job_fields["training"][phase]["learning_rate"] = rate
    with pytest.raises(ConfigError, match=rf"training\.{phase}.*learning_rate"):
        pipeline.run(parse_config(job_fields))
    assert not (tmp_path / "out" / "importance").exists()


def test_factored_importance_of_one_row_far_above_the_others_stays_finite() -> None:
    """row ⊗ column / total: the product alone would overflow float32 from 1.8e19 on."""
    row, column = torch.tensor([3e37, 1.0, 0.0]), torch.tensor([1.5e37, 1.5e37, 1.0])
    dense = Factored(row, column).dense()
    assert all_finite(dense) and dense[0, 0] == pytest.approx(1.5e37, rel=1e-5)
