"""A model split over two devices: meta and fake tensors refuse to meet one of another device."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import move_adapter, record
from peft import PeftModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hlora.importance.penalty import ImportancePenalty, _Regularisation
from hlora.importance.recorder import ImportanceRecorder
from hlora.numerics.encodings import ENCODINGS


class OtherDevice(TorchDispatchMode):
    """Makes the meta device one that can be read, as a GPU can: every number there is 1.

    Like Apple's GPUs it has no float64.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func is torch.ops.aten._local_scalar_dense.default:
                return torch.ones((), dtype=args[0].dtype).item()
            if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("device") == torch.device("cpu"):
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            assert not (isinstance(each, Tensor) and each.is_meta and each.dtype == torch.float64), func
        return made


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_penalty_of_a_model_on_two_devices_has_each_gradient_where_its_factor_is(
    peft_model: PeftModel, token_ids: Tensor, encoding: str
) -> None:
    """Block 0 is on the meta device, which refuses to meet a CPU tensor; block 1 has its usual gradients."""
    importance = record(copy.deepcopy(peft_model), token_ids, encoding)
    move_adapter(peft_model)
    whole = ImportancePenalty(copy.deepcopy(peft_model), importance, phi=3.0)
    penalty = ImportancePenalty(peft_model, importance, phi=3.0)
    whole.add_gradients_()
    peft_model.get_submodule("base_model.model.model.layers.0").to("meta")
    assert penalty.add_gradients_().is_meta
    for matrix, same in zip(penalty.matrices, whole.matrices, strict=True):
        for factor, other in ((matrix.A, same.A), (matrix.B, same.B)):
            assert factor.grad is not None and other.grad is not None and factor.grad.device == factor.device
            assert factor.is_meta == ("layers.0" in matrix.name)
            if not factor.is_meta:
                torch.testing.assert_close(factor.grad, other.grad)


def test_the_backward_pass_takes_its_gradient_to_each_gpu() -> None:
    """By itself: without a GPU, PyTorch's autograd does not run on fake ones."""
    with FakeTensorMode():
        there = [torch.empty(2, 3, device=device) for device in ("cuda:0", "cuda:1")]
        context = SimpleNamespace(saved_tensors=there, dtypes=[torch.bfloat16, torch.float32])
        _, *gradients = _Regularisation.backward(context, torch.empty((), device="cuda:0"))
    assert [str(each.device) for each in gradients] == ["cuda:0", "cuda:1"]
    assert [each.dtype for each in gradients] == [torch.bfloat16, torch.float32]


def test_the_penalty_as_a_loss_reaches_the_factors_on_both_devices(peft_model: PeftModel, token_ids: Tensor) -> None:
    importance = record(copy.deepcopy(peft_model), token_ids, "factored")
    move_adapter(peft_model)
    whole, penalty = (ImportancePenalty(model, importance, 1.0) for model in (copy.deepcopy(peft_model), peft_model))
    whole().backward()
    peft_model.get_submodule("base_model.model.model.layers.0").to("meta")
    with OtherDevice():
        penalty().backward()
    for matrix, same in zip(penalty.matrices, whole.matrices, strict=True):
        for factor, other in ((matrix.A, same.A), (matrix.B, same.B)):
            assert factor.grad is not None and other.grad is not None and factor.grad.device == factor.device
            if not factor.is_meta:
                torch.testing.assert_close(factor.grad, other.grad)


@pytest.mark.parametrize(
    ("method", "encoding"),
    [("squared_gradients", "factored"), ("path_integral", "factored"), ("path_integral", "float32")],
)
def test_a_model_split_over_two_devices_is_consolidated(
    peft_model: PeftModel, token_ids: Tensor, method: Any, encoding: Any
) -> None:
    """Block 0 is on the other device; the importance of block 1 is that of the model in one piece.

    Sums of squared gradients are all on the device of block 0, whose numbers are not real ones here.
    """

    def recorded(model: PeftModel) -> ImportanceRecorder:
        recorder = ImportanceRecorder(model, encoding, method=method)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        recorder.attach(optimizer)
        model(input_ids=token_ids, labels=token_ids).loss.backward()
        optimizer.step()
        return recorder

    whole = recorded(copy.deepcopy(peft_model)).consolidate()
    recorder = recorded(peft_model)
    peft_model.get_submodule("base_model.model.model.layers.0").to("meta")
    with OtherDevice():
        importance = recorder.consolidate()
    assert importance.matrices.keys() == whole.matrices.keys()
    for name in filter(lambda name: "layers.1" in name, whole.matrices):
        got, expected = importance.matrices[name], whole.matrices[name]
        torch.testing.assert_close((got.A, got.B), (expected.A, expected.B))
        if method == "path_integral":
            torch.testing.assert_close(got.omega, expected.omega)
            assert got.undo_cost == pytest.approx(expected.undo_cost)


def test_each_matrix_of_a_model_split_over_two_gpus_is_recorded_where_it_is(
    peft_model: PeftModel,
) -> None:
    """Fake tensors refuse to meet one of another GPU."""
    with FakeTensorMode():
        for number in (0, 1):
            for module in peft_model.get_submodule(f"base_model.model.model.layers.{number}").modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    there = torch.empty(parameter.shape, device=f"cuda:{number}")
                    setattr(module, name, torch.nn.Parameter(there, parameter.requires_grad))
        recorder = ImportanceRecorder(peft_model, method="path_integral")
        for matrix in recorder.matrices:
            for factor in matrix.parameters:
                factor.grad = torch.zeros_like(factor)
        recorder.capture(lr=0.1)
        recorder.integrate()
    for name, omega in recorder.omega.items():
        assert {str(part.device) for part in omega} == {f"cuda:{int('layers.1' in name)}"}
