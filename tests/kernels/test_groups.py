"""What the kernels need: which devices, and importing where there is no Triton."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from hlora import kernels


def test_the_package_can_be_imported_and_says_no_where_triton_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("kernels_without_triton", kernels.__file__)
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert not fresh.available(torch.device("cuda"))


def test_the_kernels_are_not_for_a_cpu() -> None:
    assert not kernels.available(torch.device("cpu"))


def test_the_environment_can_turn_the_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA on Linux, and is not installed here")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda")
    assert kernels.available.__wrapped__(gpu) == (torch.version.hip is None)
    monkeypatch.setenv("HLORA_KERNELS", "0")
    assert not kernels.available.__wrapped__(gpu)


def test_every_public_name_of_the_package_is_there() -> None:
    pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA on Linux, and is not installed here")
    for name in kernels.__all__:
        assert callable(getattr(kernels, name))
    with pytest.raises(AttributeError, match="has no attribute 'accumulate_all'"):
        kernels.accumulate_all  # noqa: B018
