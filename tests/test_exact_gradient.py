"""G = ∂L/∂θ from the backward pass, against autograd on the dense weight, in every way that people train."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ReferenceOmega, move_adapter
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from hlora import encodings, equations
from hlora.adapters import adapted_matrices
from hlora.encodings import ENCODINGS
from hlora.errors import AdapterError, ArtifactError, ConfigError
from hlora.exact_gradient import ExactGradient
from hlora.recorder import ImportanceRecorder

LR = 0.05
Optimizer = torch.optim.Optimizer


@pytest.fixture
def model(peft_model: PeftModel) -> PeftModel:
    """The tiny Llama in float64, its adapter moved: q_proj is 32×32, v_proj 16×32."""
    peft_model.double()
    move_adapter(peft_model)
    return peft_model


def loss_of(model: Any, rows: Tensor) -> Tensor:
    return model(input_ids=rows, labels=rows).loss


def adapter_parameters(model: PeftModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def sgd(model: PeftModel) -> Optimizer:
    return torch.optim.SGD(adapter_parameters(model), lr=LR)


def adamw(model: PeftModel) -> Optimizer:
    return torch.optim.AdamW(adapter_parameters(model), lr=0.01)


def true_gradients(model: PeftModel, rows: Tensor) -> dict[str, Tensor]:
    """∂L/∂θ by autograd on the dense float64 weights θ = W₀ + sBA that PEFT's own merge makes."""
    names = [matrix.name for matrix in adapted_matrices(model)]
    merged = copy.deepcopy(model).double().eval().merge_and_unload().requires_grad_(False)
    weights = [merged.get_submodule(name).weight.requires_grad_() for name in names]
    return dict(zip(names, torch.autograd.grad(loss_of(merged, rows), weights), strict=True))


class ExactReference(ReferenceOmega):
    """ω with G in the place of g̃: `before_on` the rows of the step, then `after` it."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__(model)
        self.model = model

    def before_on(self, rows: Tensor) -> None:
        gradients = true_gradients(self.model, rows)
        self.kept = {
            m.name: (m.A.detach().double().clone(), m.B.detach().double().clone(), gradients[m.name])
            for m in self.matrices
        }


def watching(model: PeftModel) -> ExactGradient:
    exact = ExactGradient(adapted_matrices(model))
    exact.open()
    return exact


def assert_sums(exact: ExactGradient, expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert set(exact.sums) == set(expected)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(
            exact.sums[name].double(), gradient, rtol=0, atol=tolerance * float(gradient.abs().max())
        )


def hooks_on(model: PeftModel) -> int:
    """On the LoRA layers and their factors."""
    layers = {matrix.module for matrix in adapted_matrices(model)}
    on_layers = sum(len(module._forward_hooks) for layer in layers for module in layer.modules())
    return on_layers + sum(len(p._post_accumulate_grad_hooks or {}) for p in model.parameters())


# G


def test_g_is_autograds_gradient_of_the_dense_weight(model: PeftModel, token_ids: Tensor) -> None:
    exact = watching(model)
    loss_of(model, token_ids[:4]).backward()
    assert_sums(exact, true_gradients(model, token_ids[:4]))
    assert exact.unit() == 1


def test_the_factors_gradients_are_g_seen_through_the_other_factor(model: PeftModel, token_ids: Tensor) -> None:
    """g^B = s G Aᵀ and g^A = s Bᵀ G, so to first order g̃ = s²(G AᵀA + B Bᵀ G) (reading 7)."""
    exact = watching(model)
    loss_of(model, token_ids[:4]).backward()
    for m in adapted_matrices(model):
        G, A, B = exact.sums[m.name], m.A.detach(), m.B.detach()
        torch.testing.assert_close(m.B.grad, m.scale * G @ A.T, rtol=1e-10, atol=1e-15)
        torch.testing.assert_close(m.A.grad, m.scale * B.T @ G, rtol=1e-10, atol=1e-15)
        effective = equations.effective_gradient(A, B, m.A.grad, m.B.grad, 0.0, m.scale)
        torch.testing.assert_close(effective, m.scale**2 * (G @ A.T @ A + B @ B.T @ G), rtol=1e-10, atol=1e-15)


def test_g_adds_up_over_micro_batches(model: PeftModel, token_ids: Tensor) -> None:
    exact = watching(model)
    for rows in token_ids[:8].chunk(4):
        (loss_of(model, rows) / 4).backward()
    assert_sums(exact, true_gradients(model, token_ids[:8]))


def checkpointed(model: PeftModel, reentrant: bool) -> None:
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("passes", ["one", "two backward passes", "two forward passes, one backward pass"])
def test_a_recomputed_forward_pass_counts_once(
    model: PeftModel, token_ids: Tensor, reentrant: bool, passes: str
) -> None:
    expected = true_gradients(model, token_ids[:4])
    checkpointed(model, reentrant)
    exact, runs = watching(model), []
    layer = adapted_matrices(model)[0].module.base_layer
    handle = layer.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    if passes == "one":
        loss_of(model, token_ids[:4]).backward()
    elif passes == "two backward passes":
        for rows in token_ids[:4].chunk(2):
            (loss_of(model, rows) / 2).backward()
    else:
        sum(loss_of(model, rows) / 2 for rows in token_ids[:4].chunk(2)).backward()
    handle.remove()
    assert len(runs) == (2 if passes == "one" else 4)  # each forward pass ran again
    assert runs.count(False) == (len(runs) / 2 if reentrant else 0)
    assert_sums(exact, expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_still_frees_the_inputs_of_the_watched_layers(
    model: PeftModel, token_ids: Tensor, reentrant: bool
) -> None:
    inputs: list[StorageWeakRef] = []
    layer = adapted_matrices(model)[-1].module
    layer.register_forward_hook(lambda module, args, output: inputs.append(StorageWeakRef(args[0].untyped_storage())))
    exact = watching(model)
    kept = loss_of(model, token_ids[:4])
    gc.collect()
    assert not inputs.pop().expired()  # without checkpointing the graph holds them
    del kept
    checkpointed(model, reentrant)
    loss = loss_of(model, token_ids[:4])
    gc.collect()
    assert inputs.pop().expired()
    loss.backward()
    assert_sums(exact, true_gradients(model, token_ids[:4]))


def test_evaluation_in_between_adds_nothing(model: PeftModel, token_ids: Tensor) -> None:
    exact = watching(model)
    (loss_of(model, token_ids[:4]) / 2).backward()
    model.eval()
    with torch.no_grad():
        loss_of(model, token_ids[8:])
    with torch.inference_mode():
        loss_of(model, token_ids[8:])
    loss_of(model, token_ids[8:])  # with a graph, that no backward pass runs through
    model.train()
    (loss_of(model, token_ids[4:8]) / 2).backward()
    assert_sums(exact, true_gradients(model, token_ids[:8]))


def test_a_forward_pass_without_the_adapter_adds_nothing(model: PeftModel, token_ids: Tensor) -> None:
    """θ is not in it: W₀ alone is."""
    exact = watching(model)
    embedded = model.get_input_embeddings()(token_ids[8:]).detach().requires_grad_()
    with model.disable_adapter():
        model(inputs_embeds=embedded, labels=token_ids[8:]).loss.backward()
    assert embedded.grad is not None
    assert exact.sums == {}
    model.set_adapter("default")
    loss_of(model, token_ids[:4]).backward()
    assert_sums(exact, true_gradients(model, token_ids[:4]))


def test_what_zero_grad_threw_away_is_not_in_the_sum(model: PeftModel, token_ids: Tensor) -> None:
    exact = watching(model)
    loss_of(model, token_ids[8:]).backward()
    model.zero_grad()
    for rows in token_ids[:4].chunk(2):
        (loss_of(model, rows) / 2).backward()
    assert_sums(exact, true_gradients(model, token_ids[:4]))


def test_a_backward_pass_that_broke_off_is_not_in_the_sum_after_zero_grad(model: PeftModel, token_ids: Tensor) -> None:
    """As an out-of-memory error in the middle does, between the layer's output and its factors."""
    exact = watching(model)
    module = adapted_matrices(model)[0].module

    def fail(gradient: Tensor) -> None:
        raise RuntimeError("out of memory")

    handle = module.lora_B["default"].register_forward_hook(lambda m, args, output: output.register_hook(fail) and None)
    with pytest.raises(RuntimeError, match="out of memory"):
        loss_of(model, token_ids[8:]).backward()
    handle.remove()
    assert exact.sums.keys() == {m.name for m in adapted_matrices(model)}
    model.zero_grad()
    loss_of(model, token_ids[:4]).backward()
    assert_sums(exact, true_gradients(model, token_ids[:4]))


def test_clear_forgets_where_zero_grad_keeps_zeros(model: PeftModel, token_ids: Tensor) -> None:
    exact = watching(model)
    loss_of(model, token_ids[8:]).backward()
    model.zero_grad(set_to_none=False)
    exact.clear()
    loss_of(model, token_ids[:4]).backward()
    assert_sums(exact, true_gradients(model, token_ids[:4]))


def test_under_dropout_g_is_of_the_input_before_dropout(model_dir: str, token_ids: Tensor) -> None:
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(LlamaForCausalLM.from_pretrained(model_dir), config).double().train()
    move_adapter(model)
    exact, seen = watching(model), {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            output.retain_grad()
            seen[name] = (args[0].detach(), output)

        return hook

    for m in adapted_matrices(model):
        m.module.register_forward_hook(keep(m.name))
    loss_of(model, token_ids[:4]).backward()
    flat = {name: (x.flatten(0, 1), y.grad.flatten(0, 1)) for name, (x, y) in seen.items()}
    assert_sums(exact, {name: equations.exact_gradient(x, grad_y) for name, (x, grad_y) in flat.items()})


def test_g_of_a_bfloat16_model_is_summed_in_float32(model_dir: str, token_ids: Tensor) -> None:
    base = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    move_adapter(model)
    exact = watching(model)
    for rows in token_ids.chunk(4):
        (loss_of(model, rows) / 4).backward()
    assert {G.dtype for G in exact.sums.values()} == {torch.float32}
    assert_sums(exact, true_gradients(model, token_ids), 0.05)  # activations of 8 bits


def test_autocast_does_not_round_the_sum(peft_model: PeftModel, token_ids: Tensor) -> None:
    """Backward inside autocast, as some loops have it: the same G as outside."""
    move_adapter(peft_model)
    exact, results = watching(peft_model), []
    for inside in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(peft_model, token_ids[:4])
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        results.append(dict(exact.sums))
        exact.clear()
        peft_model.zero_grad()
    for name, G in results[0].items():
        assert G.dtype == torch.float32
        assert torch.equal(results[1][name], G)


def test_a_model_that_goes_on_in_place_trains_and_records_the_same(model: PeftModel, token_ids: Tensor) -> None:
    """Some models clamp their queries in place."""

    def clamp(module: Any, args: Any, output: Tensor) -> Tensor:
        return output.clamp_(-0.05, 0.05)

    def clamp_a_copy(module: Any, args: Any, output: Tensor) -> Tensor:
        return output.clamp(-0.05, 0.05)

    handles = [m.module.register_forward_hook(clamp_a_copy) for m in adapted_matrices(model)]
    loss_of(model, token_ids[:4]).backward()
    plain = [parameter.grad.clone() for parameter in adapter_parameters(model)]
    model.zero_grad()
    for handle in handles:
        handle.remove()
    exact = watching(model)
    for m in adapted_matrices(model):
        m.module.register_forward_hook(clamp)
    loss_of(model, token_ids[:4]).backward()
    assert all(torch.equal(p.grad, before) for p, before in zip(adapter_parameters(model), plain, strict=True))
    for m in adapted_matrices(model):
        torch.testing.assert_close(m.B.grad, m.scale * exact.sums[m.name] @ m.A.detach().T, rtol=1e-10, atol=1e-15)


def test_more_than_one_process_is_refused(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with pytest.raises(ConfigError, match="one process, this is one of 4"):
        ImportanceRecorder(model, gradient="exact")
    assert hooks_on(model) == 0


# ω


def train(
    model: PeftModel, token_ids: Tensor, optimizer: Optimizer, recorder: ImportanceRecorder, steps: int = 3
) -> ExactReference:
    """Plain steps on four rows each, in `recorder.step`; returns what the equations say."""
    reference = ExactReference(model)
    for step in range(steps):
        rows = token_ids[4 * step :][:4]
        reference.before_on(rows)
        loss_of(model, rows).backward()
        with recorder.step(optimizer.param_groups[0]["lr"]):
            optimizer.step()
        reference.after()
        optimizer.zero_grad()
    return reference


@pytest.mark.parametrize("encoding", ["float32", "factored"])
@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("start", ["zero B", "moved"])
def test_exact_omega_follows_the_equations_from_any_start_under_any_optimizer(
    peft_model: PeftModel, token_ids: Tensor, encoding: str, make: Callable[[PeftModel], Optimizer], start: str
) -> None:
    peft_model.double()
    if start == "moved":
        move_adapter(peft_model)
    recorder = ImportanceRecorder(peft_model, encoding, gradient="exact")
    train(peft_model, token_ids, make(peft_model), recorder).assert_matches(recorder.omega, 1e-6)
    assert (recorder.steps, recorder.skipped_steps) == (3, 0)


def test_exact_omega_in_bfloat16_follows_the_equations_to_its_precision(model: PeftModel, token_ids: Tensor) -> None:
    torch.manual_seed(0)
    recorder = ImportanceRecorder(model, "bfloat16", gradient="exact")
    train(model, token_ids, adamw(model), recorder).assert_matches(recorder.omega, 2**-6)


def test_exact_omega_sums_to_the_decrease_of_the_loss_and_effective_omega_does_not(
    model: PeftModel, token_ids: Tensor
) -> None:
    """Eq. 3: full-batch SGD along one path of 16 lr; half the step, half the error (a left Riemann sum)."""
    rows, errors = token_ids[:8], []
    for steps in (16, 32, 64):
        walker = copy.deepcopy(model)
        optimizer = torch.optim.SGD(adapter_parameters(walker), lr=16 * 0.5 / steps)
        recorders = {kind: ImportanceRecorder(walker, "factored", gradient=kind) for kind in ("exact", "effective")}
        for recorder in recorders.values():
            recorder.attach(optimizer)
        before = float(loss_of(walker, rows).detach())
        for _ in range(steps):
            loss_of(walker, rows).backward()
            optimizer.step()
            optimizer.zero_grad()
        decrease = before - float(loss_of(walker, rows).detach())
        totals = {kind: sum(float(o.row.sum()) for o in r.omega.values()) for kind, r in recorders.items()}
        errors.append(abs(totals["exact"] / decrease - 1))
        assert abs(totals["effective"] / decrease - 1) > 0.5
    assert decrease > 0.01
    assert errors[2] < 0.01
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.6 * errors[1]


def test_several_recorders_of_one_training_do_not_disturb_each_other(model: PeftModel, token_ids: Tensor) -> None:
    alone, optimizer = copy.deepcopy(model), sgd(model)
    options = [("float32", "exact"), ("factored", "exact"), ("float32", "effective"), ("factored", "effective")]
    together = [ImportanceRecorder(model, encoding, gradient=kind) for encoding, kind in options]
    for recorder in together[1:]:
        recorder.attach(optimizer)
    train(model, token_ids, optimizer, together[0])
    for recorder, (encoding, kind) in zip(together, options, strict=True):
        other = copy.deepcopy(alone)
        single = ImportanceRecorder(other, encoding, gradient=kind)
        train(other, token_ids, sgd(other), single)
        assert recorder.steps == single.steps == 3
        for name, omega in recorder.omega.items():
            for part, tensor in encodings.parts(omega).items():
                assert tensor.any()
                assert torch.equal(tensor, encodings.parts(single.omega[name])[part])


def test_exact_recording_does_not_change_what_training_does(model: PeftModel, token_ids: Tensor) -> None:
    other = copy.deepcopy(model)
    recorder = ImportanceRecorder(model, gradient="exact")
    optimizer, plain = adamw(model), adamw(other)
    recorder.attach(optimizer)
    for trained, which in ((model, optimizer), (other, plain)):
        for step in range(3):
            loss_of(trained, token_ids[4 * step :][:4]).backward()
            which.step()
            which.zero_grad()
    assert recorder.steps == 3
    for mine, theirs in zip(adapter_parameters(model), adapter_parameters(other), strict=True):
        assert torch.equal(mine, theirs)


def test_clipping_inside_the_step_leaves_the_exact_gradient_unclipped(model: PeftModel, token_ids: Tensor) -> None:
    recorder, reference, optimizer = ImportanceRecorder(model, gradient="exact"), ExactReference(model), sgd(model)
    for step in range(3):
        rows = token_ids[4 * step :][:4]
        reference.before_on(rows)
        loss_of(model, rows).backward()
        with recorder.step(LR):
            assert torch.nn.utils.clip_grad_norm_(adapter_parameters(model), 1e-3) > 1e-2
            optimizer.step()
        reference.after()
        optimizer.zero_grad()
    reference.assert_matches(recorder.omega, 1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("unscaling", ["fused", "by step", "by hand"])
def test_the_scale_of_a_gradient_scaler_and_the_steps_it_skips_are_not_in_exact_omega(
    model: PeftModel, token_ids: Tensor, unscaling: str
) -> None:
    """The scaler multiplies the loss, and then divides the factors' gradients only."""
    recorder, reference = ImportanceRecorder(model, "float32", gradient="exact"), ExactReference(model)
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=0.01, fused=unscaling == "fused")
    recorder.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        rows = token_ids[4 * step :][:4]
        reference.before_on(rows)
        scaler.scale(loss_of(model, rows)).backward()
        if step == 1:
            recorder.matrices[0].A.grad[0, 0] = float("inf")
            recorder._exact.sums[recorder.matrices[0].name][0, 0] = float("inf")
        if unscaling == "by hand":
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            reference.after()
        optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**9
    assert recorder.steps == 3
    reference.assert_matches(recorder.omega, 1e-5)


def test_a_step_that_is_not_finite_is_skipped_and_the_next_one_counts(model: PeftModel, token_ids: Tensor) -> None:
    recorder, reference, optimizer = ImportanceRecorder(model, gradient="exact"), ExactReference(model), sgd(model)
    recorder.attach(optimizer)
    for step in range(3):
        rows = token_ids[4 * step :][:4]
        loss_of(model, rows).backward()
        if step == 1:
            for parameter in adapter_parameters(model):
                parameter.grad.zero_()  # a training script's own guard
            recorder._exact.sums[recorder.matrices[-1].name][0, 0] = float("nan")
            with pytest.warns(UserWarning, match="not finite"):
                optimizer.step()
        else:
            reference.before_on(rows)
            optimizer.step()
            reference.after()
        optimizer.zero_grad()
    assert (recorder.steps, recorder.skipped_steps) == (2, 1)
    reference.assert_matches(recorder.omega, 1e-6)


def test_discard_forgets_the_gradient_of_a_step_that_was_not_taken(model: PeftModel, token_ids: Tensor) -> None:
    recorder, optimizer = ImportanceRecorder(model, "float32", gradient="exact"), sgd(model)
    loss_of(model, token_ids[8:12]).backward()
    recorder.discard()
    optimizer.zero_grad(set_to_none=False)
    train(model, token_ids, optimizer, recorder, steps=1).assert_matches(recorder.omega, 1e-6)


# Trainer, lifetime of the hooks, artefact


def trainer_of(model: PeftModel, token_ids: Tensor, output: Path, recorder: ImportanceRecorder, **changes: Any) -> Any:
    ids = token_ids.tolist()
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 3,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 1e-3,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(str(output), **settings),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        eval_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        callbacks=[recorder.callback()],
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", ["1 by 8", "4 by 2", "4 by 2, evaluated, checkpointed"])
def test_trainer_records_the_exact_gradient_of_the_whole_step_unclipped(
    model: PeftModel, token_ids: Tensor, tmp_path: Path, way: str
) -> None:
    other, rows = copy.deepcopy(model), token_ids[:8]  # one step an epoch, on all rows, in any order
    recorder = ImportanceRecorder(model, "float32", gradient="exact")
    changes: dict[str, Any] = {}
    if way != "1 by 8":
        changes |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    if way.endswith("checkpointed"):
        changes |= {"gradient_checkpointing": True, "eval_strategy": "steps", "eval_steps": 1}
    trainer_of(model, rows, tmp_path, recorder, **changes).train()
    assert hooks_on(model) == 0

    reference, optimizer = ExactReference(other), sgd(other)
    for _ in range(3):
        reference.before_on(rows)
        loss_of(other, rows).backward()
        torch.nn.utils.clip_grad_norm_(adapter_parameters(other), 1e-3)
        optimizer.step()
        reference.after()
        optimizer.zero_grad()
    assert recorder.steps == 3
    reference.assert_matches(recorder.omega, 1e-5)
    assert recorder.consolidate().provenance["gradient"] == "exact"
    assert hooks_on(model) == 0


def test_hooks_leave_with_detaching_and_closing_and_come_back_with_attaching(
    model: PeftModel, token_ids: Tensor
) -> None:
    before = hooks_on(model)
    optimizer = sgd(model)
    with contextlib.closing(ImportanceRecorder(model, gradient="exact")) as recorder:
        assert hooks_on(model) > before
        train(model, token_ids, optimizer, recorder, steps=1)
    assert hooks_on(model) == before
    detach = recorder.attach(optimizer)
    loss_of(model, token_ids[:4]).backward()
    optimizer.step()
    optimizer.zero_grad()
    detach()
    assert hooks_on(model) == before
    assert recorder.steps == 2
    assert recorder.consolidate().matrices
    assert hooks_on(model) == before


def test_an_encoding_that_is_refused_leaves_no_hooks(model: PeftModel) -> None:
    with pytest.raises(ValueError, match="got 'int3'"):
        ImportanceRecorder(model, "int3", gradient="exact")
    assert hooks_on(model) == 0


def test_an_unknown_gradient_is_refused(model: PeftModel) -> None:
    with pytest.raises(ValueError, match="expected effective or exact, got 'true'"):
        ImportanceRecorder(model, gradient="true")  # type: ignore[arg-type]


def test_a_step_whose_backward_pass_was_not_seen_is_refused(model: PeftModel, token_ids: Tensor) -> None:
    recorder, optimizer = ImportanceRecorder(model, gradient="exact"), sgd(model)
    recorder.close()
    loss_of(model, token_ids[:4]).backward()
    with pytest.raises(AdapterError, match=r"q_proj has a gradient, but no backward pass.*gradient='effective'"):
        recorder.capture(LR)
    optimizer.zero_grad(set_to_none=False)
    recorder.capture(LR)  # zeros are no gradient


def test_a_layer_that_no_token_reached_keeps_its_omega(model: PeftModel, token_ids: Tensor) -> None:
    """As an expert that the router left out."""
    recorder, optimizer = ImportanceRecorder(model, "float32", gradient="exact"), sgd(model)
    left_out = recorder.matrices[-1]
    plain = left_out.module.base_layer
    parent = model.get_submodule("base_model.model." + left_out.name.rsplit(".", 1)[0])
    parent.v_proj = plain
    loss_of(model, token_ids[:4]).backward()
    with recorder.step(LR):
        optimizer.step()
    assert recorder.steps == 1
    assert not recorder.omega[left_out.name].any()
    assert all(omega.any() for name, omega in recorder.omega.items() if name != left_out.name)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_exact_recording_goes_on_from_a_saved_state(
    model: PeftModel, token_ids: Tensor, encoding: str, tmp_path: Path
) -> None:
    recorder, optimizer = ImportanceRecorder(model, encoding, gradient="exact"), sgd(model)
    train(model, token_ids, optimizer, recorder, steps=1)
    torch.save(recorder.state_dict(), tmp_path / "recorder.pt")
    other = copy.deepcopy(model)
    resumed = ImportanceRecorder(other, encoding, gradient="exact")
    resumed.load_state_dict(torch.load(tmp_path / "recorder.pt", weights_only=True))
    for walker, which in ((model, recorder), (other, resumed)):
        torch.manual_seed(0)
        train(walker, token_ids, sgd(walker), which, steps=1)
    for name, omega in recorder.omega.items():
        for part, tensor in encodings.parts(omega).items():
            assert torch.equal(tensor, encodings.parts(resumed.omega[name])[part])


def test_a_state_of_the_other_gradient_is_refused_and_an_old_one_is_effective(model: PeftModel) -> None:
    exact, effective = (ImportanceRecorder(model, gradient=kind) for kind in ("exact", "effective"))
    assert exact.state_dict()["tensors"].keys() == effective.state_dict()["tensors"].keys()
    with pytest.raises(ArtifactError, match="of the exact gradient, this recorder is of the effective one"):
        effective.load_state_dict(exact.state_dict())
    with pytest.raises(ArtifactError, match="of the effective gradient, this recorder is of the exact one"):
        exact.load_state_dict(effective.state_dict())
    old = effective.state_dict()
    del old["gradient"]
    effective.load_state_dict(old)
    with pytest.raises(ArtifactError, match="of the effective gradient"):
        exact.load_state_dict(old)
