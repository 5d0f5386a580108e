"""Inputs and output gradients of the adapted layers: G = Σ g ⊗ x against autograd, in every way that people train."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from conftest import move_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaForCausalLM

from hlora.model.adapters import AdaptedMatrix, adapted_matrices
from hlora.model.layer_gradients import layer_gradients
from hlora.numerics import equations


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


def true_gradients(model: PeftModel, rows: Tensor) -> dict[str, Tensor]:
    """∂L/∂θ by autograd on the dense float64 weights θ = W₀ + sBA that PEFT's own merge makes."""
    names = [matrix.name for matrix in adapted_matrices(model)]
    merged = copy.deepcopy(model).double().eval().merge_and_unload().requires_grad_(False)
    weights = [merged.get_submodule(name).weight.requires_grad_() for name in names]
    return dict(zip(names, torch.autograd.grad(loss_of(merged, rows), weights), strict=True))


class Sums(dict[str, Tensor]):
    """G of each matrix by name, summed over all backward passes."""

    def of(self, matrix: AdaptedMatrix) -> Callable[[Tensor, Tensor], None]:
        return partial(self.add, matrix)

    def add(self, matrix: AdaptedMatrix, x: Tensor, gradient: Tensor) -> None:
        assert not torch.is_grad_enabled()
        wide = torch.promote_types(matrix.B.dtype, torch.float32)
        G = equations.exact_gradient(x.flatten(0, -2).to(wide), gradient.flatten(0, -2).to(wide))
        self[matrix.name] = self.get(matrix.name, 0) + G


@pytest.fixture
def watching() -> Iterator[Callable[..., Sums]]:
    """Sums of a model from now on."""
    with ExitStack() as stack:

        def start(model: Any, adapter: bool = True) -> Sums:
            sums = Sums()
            stack.enter_context(layer_gradients(adapted_matrices(model), sums.of, adapter))
            return sums

        yield start


Watching = Callable[..., Sums]


def assert_sums(sums: Sums, expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert set(sums) == set(expected)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(sums[name].double(), gradient, rtol=0, atol=tolerance * float(gradient.abs().max()))


def test_g_is_autograds_gradient_of_the_dense_weight(model: PeftModel, token_ids: Tensor, watching: Watching) -> None:
    sums = watching(model)
    loss_of(model, token_ids[:4]).backward()
    assert_sums(sums, true_gradients(model, token_ids[:4]))


def test_the_factors_gradients_are_g_seen_through_the_other_factor(
    model: PeftModel, token_ids: Tensor, watching: Watching
) -> None:
    """g^B = s G Aᵀ and g^A = s Bᵀ G, so to first order g̃ = s²(G AᵀA + B Bᵀ G) (reading 7)."""
    sums = watching(model)
    loss_of(model, token_ids[:4]).backward()
    for m in adapted_matrices(model):
        G, A, B = sums[m.name], m.A.detach(), m.B.detach()
        torch.testing.assert_close(m.B.grad, m.scale * G @ A.T, rtol=1e-10, atol=1e-15)
        torch.testing.assert_close(m.A.grad, m.scale * B.T @ G, rtol=1e-10, atol=1e-15)
        effective = equations.effective_gradient(A, B, m.A.grad, m.B.grad, lr=0.0, scale=m.scale)
        torch.testing.assert_close(effective, m.scale**2 * (G @ A.T @ A + B @ B.T @ G), rtol=1e-10, atol=1e-15)


def test_g_adds_up_over_micro_batches(model: PeftModel, token_ids: Tensor, watching: Watching) -> None:
    sums = watching(model)
    for rows in token_ids[:8].chunk(4):
        (loss_of(model, rows) / 4).backward()
    assert_sums(sums, true_gradients(model, token_ids[:8]))


def checkpointed(model: PeftModel, reentrant: bool) -> None:
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("passes", ["one", "two backward passes", "two forward passes, one backward pass"])
def test_a_recomputed_forward_pass_counts_once(
    model: PeftModel, token_ids: Tensor, watching: Watching, reentrant: bool, passes: str
) -> None:
    expected = true_gradients(model, token_ids[:4])
    checkpointed(model, reentrant)
    sums, runs = watching(model), []
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
    assert_sums(sums, expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_still_frees_the_inputs_of_the_watched_layers(
    model: PeftModel, token_ids: Tensor, watching: Watching, reentrant: bool
) -> None:
    inputs: list[StorageWeakRef] = []
    layer = adapted_matrices(model)[-1].module
    layer.register_forward_hook(lambda module, args, output: inputs.append(StorageWeakRef(args[0].untyped_storage())))
    sums = watching(model)
    kept = loss_of(model, token_ids[:4])
    gc.collect()
    assert not inputs.pop().expired()  # without checkpointing the graph holds them
    del kept
    checkpointed(model, reentrant)
    loss = loss_of(model, token_ids[:4])
    gc.collect()
    assert inputs.pop().expired()
    loss.backward()
    assert_sums(sums, true_gradients(model, token_ids[:4]))


def test_evaluation_in_between_adds_nothing(model: PeftModel, token_ids: Tensor, watching: Watching) -> None:
    sums = watching(model)
    (loss_of(model, token_ids[:4]) / 2).backward()
    model.eval()
    with torch.no_grad():
        loss_of(model, token_ids[8:])
    with torch.inference_mode():
        loss_of(model, token_ids[8:])
    loss_of(model, token_ids[8:])  # with a graph, that no backward pass runs through
    model.train()
    (loss_of(model, token_ids[4:8]) / 2).backward()
    assert_sums(sums, true_gradients(model, token_ids[:8]))


def test_forward_passes_with_and_without_the_adapter_are_told_apart(
    model: PeftModel, token_ids: Tensor, watching: Watching
) -> None:
    """Without it W₀ alone is in them."""
    sums, of_base = watching(model), watching(model, adapter=False)
    embedded = model.get_input_embeddings()(token_ids[8:]).detach().requires_grad_()
    with model.disable_adapter():
        model(inputs_embeds=embedded, labels=token_ids[8:]).loss.backward()
    assert sums == {} and len(of_base) == 4
    before = dict(of_base)
    model.set_adapter("default")
    loss_of(model, token_ids[:4]).backward()
    assert_sums(sums, true_gradients(model, token_ids[:4]))
    assert of_base == before


def test_under_dropout_g_is_of_the_input_before_dropout(model_dir: str, token_ids: Tensor, watching: Watching) -> None:
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(LlamaForCausalLM.from_pretrained(model_dir), config).double().train()
    move_adapter(model)
    sums, seen = watching(model), {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            output.retain_grad()
            seen[name] = (args[0].detach(), output)

        return hook

    for m in adapted_matrices(model):
        m.module.register_forward_hook(keep(m.name))
    loss_of(model, token_ids[:4]).backward()
    flat = {name: (x.flatten(0, 1), y.grad.flatten(0, 1)) for name, (x, y) in seen.items()}
    assert_sums(sums, {name: equations.exact_gradient(x, grad_y) for name, (x, grad_y) in flat.items()})


def test_g_of_a_bfloat16_model_is_summed_in_float32(model_dir: str, token_ids: Tensor, watching: Watching) -> None:
    base = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    move_adapter(model)
    sums = watching(model)
    for rows in token_ids.chunk(4):
        (loss_of(model, rows) / 4).backward()
    assert {G.dtype for G in sums.values()} == {torch.float32}
    assert_sums(sums, true_gradients(model, token_ids), 0.05)  # activations of 8 bits


def test_autocast_does_not_round_the_sum(peft_model: PeftModel, token_ids: Tensor, watching: Watching) -> None:
    """Backward inside autocast, as some loops have it: the same G as outside."""
    move_adapter(peft_model)
    sums, results = watching(peft_model), []
    for inside in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(peft_model, token_ids[:4])
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        results.append(dict(sums))
        sums.clear()
        peft_model.zero_grad()
    for name, G in results[0].items():
        assert G.dtype == torch.float32
        assert torch.equal(results[1][name], G)


def test_a_model_that_goes_on_in_place_trains_and_records_the_same(
    model: PeftModel, token_ids: Tensor, watching: Watching
) -> None:
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
    sums = watching(model)
    for m in adapted_matrices(model):
        m.module.register_forward_hook(clamp)
    loss_of(model, token_ids[:4]).backward()
    assert all(torch.equal(p.grad, before) for p, before in zip(adapter_parameters(model), plain, strict=True))
    for m in adapted_matrices(model):
        torch.testing.assert_close(m.B.grad, m.scale * sums[m.name] @ m.A.detach().T, rtol=1e-10, atol=1e-15)


def hooks_on(model: PeftModel) -> int:
    return sum(len(module._forward_hooks) for m in adapted_matrices(model) for module in m.module.modules())


def test_the_hooks_leave_with_the_context_whatever_ends_it(model: PeftModel, token_ids: Tensor) -> None:
    sums, before = Sums(), hooks_on(model)
    with pytest.raises(KeyError), layer_gradients(adapted_matrices(model), sums.of):
        assert hooks_on(model) == before + 4
        raise KeyError
    assert hooks_on(model) == before
    loss_of(model, token_ids[:4]).backward()
    assert sums == {}


def test_watching_does_not_change_the_gradients(model: PeftModel, token_ids: Tensor, watching: Watching) -> None:
    loss_of(model, token_ids[:4]).backward()
    plain = [parameter.grad for parameter in adapter_parameters(model)]
    model.zero_grad()
    sums = watching(model)
    loss_of(model, token_ids[:4]).backward()
    assert sums and all(torch.equal(p.grad, g) for p, g in zip(adapter_parameters(model), plain, strict=True))
