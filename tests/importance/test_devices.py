"""A model split over two devices: meta and fake tensors refuse to meet one of another device."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import move_adapter, record
from peft import PeftModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hlora.importance.penalty import ImportancePenalty, _Regularisation
from hlora.importance.recorder import ImportanceRecorder
from hlora.numerics.encodings import ENCODINGS


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


def test_each_matrix_of_a_model_split_over_two_gpus_is_recorded_where_it_is(
    peft_model: PeftModel,
) -> None:
    """Fake tensors refuse to meet one of another GPU. Consolidation slices, which needs a real one."""
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
