"""Recording and penalty of a compiled, checkpointed or distributed model equal those of the plain one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import move_adapter, record
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hlora.importance.artefact import Importance
from hlora.importance.penalty import ImportancePenalty
from hlora.importance.recorder import ImportanceRecorder
from hlora.model.adapters import AdaptedMatrix, adapted_matrices
from hlora.model.layer_gradients import layer_gradients
from hlora.numerics import equations

LR = 0.05
Wrap = Callable[[Any], Any]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def model(peft_model: PeftModel) -> PeftModel:
    move_adapter(peft_model)
    return peft_model.train()


@pytest.fixture
def data_parallel(tmp_path: Path) -> Iterator[Wrap]:
    """Wraps a model in DistributedDataParallel, in a group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield torch.nn.parallel.DistributedDataParallel
    torch.distributed.destroy_process_group()


def as_it_is(model: Any) -> Any:
    return model


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_by_block(model: Any) -> Any:
    layers = model.base_model.model.model.layers
    for number, layer in enumerate(layers):
        layers[number] = torch.compile(layer, backend="aot_eager")
    return model


def checkpoint_wrapped(model: Any) -> Any:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    return model


def checkpointed(model: Any, reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()


def recorded(model: Any, rows: Tensor) -> ImportanceRecorder:
    """The recorder of two SGD steps."""
    recorder = ImportanceRecorder(model, "float32", method="path_integral")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    for part in rows[:8].chunk(2):
        model(input_ids=part, labels=part).loss.backward()
        with recorder.step(LR):
            optimizer.step()
        optimizer.zero_grad()
    return recorder


def assert_same_omega(mine: ImportanceRecorder, other: ImportanceRecorder) -> None:
    assert list(mine.omega) == list(other.omega)
    assert mine.steps == other.steps > 0
    for name, omega in other.omega.items():
        assert isinstance(omega, Tensor) and omega.abs().max() > 0
        torch.testing.assert_close(mine.omega[name], omega, rtol=0, atol=5e-5 * float(omega.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrap", "checkpointing"),
    [
        (as_it_is, "reentrant"),
        (as_it_is, "not reentrant"),
        (compiled, None),
        (compiled, "reentrant"),
        (compiled, "not reentrant"),
        (compiled_by_block, None),
    ],
)
def test_compiled_and_checkpointed_models_record_what_the_plain_one_does(
    model: PeftModel, token_ids: Tensor, wrap: Wrap, checkpointing: str | None
) -> None:
    plain = copy.deepcopy(model)
    expected = recorded(plain, token_ids)
    if checkpointing is not None:
        checkpointed(model, checkpointing == "reentrant")
    wrapped = wrap(model)
    assert_same_omega(recorded(wrapped, token_ids), expected)


def test_checkpoint_wrapped_blocks_keep_their_names_and_record_the_same(model: PeftModel, token_ids: Tensor) -> None:
    plain = copy.deepcopy(model)
    expected = recorded(plain, token_ids)
    wrapped = checkpoint_wrapped(model)
    assert any("_checkpoint_wrapped_module" in name for name, _ in wrapped.named_modules())
    assert_same_omega(recorded(wrapped, token_ids), expected)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["distributed alone", "compiled inside", "compiled outside"])
def test_a_distributed_model_records_the_same_names_and_adapter_settings(
    model: PeftModel, token_ids: Tensor, data_parallel: Wrap, order: str
) -> None:
    plain = copy.deepcopy(model)
    expected = recorded(plain, token_ids)
    wrapped = data_parallel(compiled(model) if order == "compiled inside" else model)
    if order == "compiled outside":
        wrapped = compiled(wrapped)
    got = recorded(wrapped, token_ids)
    assert_same_omega(got, expected)
    mine, other = got.consolidate(), expected.consolidate()
    assert mine.lora_config == other.lora_config != {}
    assert mine.provenance["base_model"] == other.provenance["base_model"] != ""


def test_a_module_that_is_named_module_keeps_its_name(model_dir: str) -> None:
    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = LlamaForCausalLM.from_pretrained(model_dir)

    held = get_peft_model(Holder(), LoraConfig(r=2, target_modules=["q_proj"]))
    names = ["module.model.layers.0.self_attn.q_proj", "module.model.layers.1.self_attn.q_proj"]
    assert [matrix.name for matrix in adapted_matrices(held)] == names
    assert [matrix.name for matrix in adapted_matrices(compiled(held))] == names


@pytest.mark.slow
def test_an_artefact_recorded_compiled_holds_the_plain_model_and_the_other_way_round(
    model: PeftModel, token_ids: Tensor, tmp_path: Path
) -> None:
    plain = copy.deepcopy(model)
    wrapped = compiled(model)
    recorded(wrapped, token_ids).consolidate().save(tmp_path / "compiled")
    recorded(copy.deepcopy(plain), token_ids).consolidate().save(tmp_path / "plain")
    for source in ("compiled", "plain"):
        importance, ends = Importance.load(tmp_path / source), []
        for each in (wrapped, plain):
            importance.load_adapter_into(each)
            penalty = ImportancePenalty(each, importance, phi=3.0)
            move_adapter(each, seed=7)
            each.zero_grad()
            (each(input_ids=token_ids[:4], labels=token_ids[:4]).loss + penalty()).backward()
            ends.append([penalty().detach(), *(factor.grad for m in penalty.matrices for factor in (m.A, m.B))])
        assert ends[1][0] > 0
        for mine, other in zip(*ends, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5 * float(other.abs().max()))


def layer_sums(model: Any, rows: Tensor) -> dict[str, Tensor]:
    """Σ g ⊗ x of each layer over two backward passes."""
    found: dict[str, Tensor] = {}

    def add(matrix: AdaptedMatrix, x: Tensor, gradient: Tensor) -> None:
        G = equations.exact_gradient(x.flatten(0, -2), gradient.flatten(0, -2))
        found[matrix.name] = found.get(matrix.name, 0) + G

    with layer_gradients(adapted_matrices(model), lambda matrix: partial(add, matrix)):
        for part in rows[:8].chunk(2):
            model(input_ids=part, labels=part).loss.backward()
    return found


def assert_same_sums(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert mine.keys() == other.keys() and len(mine) == 4
    for name, G in other.items():
        assert G.abs().max() > 0
        torch.testing.assert_close(mine[name], G, rtol=0, atol=5e-5 * float(G.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrap", "checkpointing"),
    [(as_it_is, "reentrant"), (compiled, None), (compiled, "not reentrant"), (compiled_by_block, None)],
)
def test_compiled_and_checkpointed_models_show_the_gradients_of_their_layers(
    model: PeftModel, token_ids: Tensor, wrap: Wrap, checkpointing: str | None
) -> None:
    plain = copy.deepcopy(model)
    if checkpointing is not None:
        checkpointed(model, checkpointing == "reentrant")
    assert_same_sums(layer_sums(wrap(model), token_ids), layer_sums(plain, token_ids))


@pytest.mark.slow
def test_a_compiled_model_that_ran_before_shows_its_layers_after_a_reset(model: PeftModel, token_ids: Tensor) -> None:
    """Under checkpointing its compiled code does not look for new hooks."""
    plain = copy.deepcopy(model)
    checkpointed(model, reentrant=False)
    wrapped = compiled(model)
    wrapped(input_ids=token_ids[:4], labels=token_ids[:4]).loss.backward()
    torch.compiler.reset()
    assert_same_sums(layer_sums(wrapped, token_ids), layer_sums(plain, token_ids))


@pytest.mark.slow
def test_trainer_with_torch_compile_and_checkpointing_records_and_protects_the_same(
    model: PeftModel, token_ids: Tensor, tmp_path: Path
) -> None:
    importance = record(copy.deepcopy(model), token_ids)
    ids = token_ids[:8].tolist()
    ends = []
    for compile_it in (False, True):
        trained = copy.deepcopy(model)
        recorder = ImportanceRecorder(trained, "float32", method="path_integral")
        penalty = ImportancePenalty(trained, importance, phi=3.0)
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=2,
            learning_rate=LR,
            optim="sgd",
            gradient_checkpointing=compile_it,
            torch_compile=compile_it,
            torch_compile_backend="eager" if compile_it else None,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        data = Dataset.from_dict({"input_ids": ids, "labels": ids})
        callbacks = [recorder.callback(), penalty.callback()]
        trainer = Trainer(model=trained, args=arguments, train_dataset=data, callbacks=callbacks)
        trainer.train()
        ends.append((recorder, {m.name: (m.A.detach(), m.B.detach()) for m in recorder.matrices}))
    assert any(counts for counts in torch._dynamo.utils.counters["stats"].values())  # it was compiled
    assert_same_omega(ends[1][0], ends[0][0])
    for name, factors in ends[0][1].items():
        for mine, other in zip(ends[1][1][name], factors, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
