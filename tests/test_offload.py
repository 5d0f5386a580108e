"""Matrices in host memory that pass through the device in blocks."""

from __future__ import annotations

import pytest
import torch

from hlora import encodings
from hlora.encodings import ENCODINGS, Eight
from hlora.offload import Offload, to_host

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]
DENSE = ["float32", "bfloat16", "int8"]


def matrix_of(encoding: str, d_out: int = 7, d_in: int = 130) -> encodings.Dense:
    values = torch.rand(d_out, d_in, generator=torch.Generator().manual_seed(0))
    return to_host(encodings.encode(values, encoding))  # type: ignore[return-value]


@pytest.fixture(params=[1, 300, 1 << 18], ids=["one-row-blocks", "small-blocks", "one-block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(encodings, "_BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("encoding", DENSE)
@pytest.mark.parametrize("device", DEVICES)
def test_every_row_comes_once_as_a_copy_on_the_device(encoding: str, device: str, block: int) -> None:
    matrix, seen = matrix_of(encoding), []
    for rows, part in Offload().blocks(matrix, torch.device(device), changed=False):
        for name, tensor in encodings.parts(part).items():
            source = encodings.parts(encodings.rows_of(matrix, rows))[name]
            assert tensor.device.type == device and tensor.data_ptr() != source.data_ptr()
            assert torch.equal(tensor.cpu(), source)
        seen += range(rows.start, rows.stop)
    assert seen == list(range(7))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("changed", [True, False])
def test_what_is_written_to_a_block_is_in_the_matrix_afterwards_only_if_it_is_said_to_change(
    device: str, changed: bool, block: int
) -> None:
    """Two matrices of different sizes after each other through the same two blocks, three times."""
    offload = Offload()
    matrices = [matrix_of("float32"), matrix_of("float32", 5, 200)]
    before = [matrix.clone() for matrix in matrices]
    for _ in range(3):
        for matrix in matrices:
            for _, part in offload.blocks(matrix, torch.device(device), changed):
                part.add_(1.0)
    offload.wait()
    for matrix, old in zip(matrices, before, strict=True):
        assert torch.equal(matrix, old + 1 + 1 + 1 if changed else old)


def test_no_more_than_two_blocks_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "_BLOCK", 300)
    offload, seen = Offload(), set()
    for matrix in (matrix_of("int8"), matrix_of("int8"), matrix_of("int8")):
        for _, part in offload.blocks(matrix, torch.device("cpu"), changed=False):
            assert isinstance(part, Eight)
            seen.add(part.codes.data_ptr())
    assert len(seen) == 2


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_host_memory_is_pinned_where_there_is_cuda_and_factored_stays_where_it_is(encoding: str) -> None:
    matrix = encodings.zeros(encoding, 3, 5, torch.device("cpu"))
    there = to_host(matrix)
    pinned = torch.cuda.is_available() and encoding != "factored"
    assert all(part.is_pinned() == pinned for part in encodings.parts(there).values())
    assert (there is matrix) or encoding != "factored"
