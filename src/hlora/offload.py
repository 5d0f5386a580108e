"""Importance in host memory: it passes through the device in blocks, the next on its way while this is computed.

Two blocks at a time are on the device, whatever the model's size. The copies run on a stream of their own, from and to
pinned memory, and the host waits for none of them. On a CPU the same copies are made, without streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hlora.encodings import Dense, Encoded, Factored, from_parts, parts, row_blocks, rows_of, shape


def to_host(matrix: Encoded) -> Encoded:
    """The matrix in host memory, pinned where there is CUDA. A factored one is small and stays where it is."""
    if isinstance(matrix, Factored):
        return matrix
    return from_parts({name: _pinned(part.cpu()) for name, part in parts(matrix).items()})


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


@dataclass
class _Slot:
    """Room for one block on the device."""

    buffers: dict[str, Tensor] = field(default_factory=dict)
    arrived: Any = None
    """Event: its copy to the device is complete."""
    used: Any = None
    """Event: the computation on it is complete."""


class Offload:
    """The way of matrices in host memory through their devices; one object for all matrices of a model."""

    def __init__(self) -> None:
        self._slots: dict[torch.device, list[_Slot]] = {}
        self._streams: dict[torch.device, Any] = {}

    def blocks(self, matrix: Dense, device: torch.device, changed: bool) -> Iterator[tuple[slice, Dense]]:
        """Rows and their block on `device`, valid until the next; with `changed` it is copied back after that."""
        slots = self._of(device)
        spans = list(row_blocks(*shape(matrix), device))
        coming = self._send(matrix, spans[0], slots[0], device)
        for number, rows in enumerate(spans):
            block, slot = coming, slots[0]
            slots.reverse()
            if number + 1 < len(spans):
                coming = self._send(matrix, spans[number + 1], slots[0], device)
            stream = self._streams[device]
            if stream is not None:
                torch.cuda.current_stream(device).wait_event(slot.arrived)
            yield rows, block
            if stream is not None:
                slot.used.record(torch.cuda.current_stream(device))
            if changed:
                with self._copying(device, slot):
                    for name, part in parts(rows_of(matrix, rows)).items():
                        part.copy_(parts(block)[name], non_blocking=True)

    def wait(self) -> None:
        """Until all that was changed is back in host memory."""
        for stream in self._streams.values():
            if stream is not None:
                stream.synchronize()

    def _send(self, matrix: Dense, rows: slice, slot: _Slot, device: torch.device) -> Dense:
        block = {}
        for name, part in parts(rows_of(matrix, rows)).items():
            buffer = slot.buffers.get(name)
            if buffer is None or buffer.numel() < part.numel() or buffer.dtype != part.dtype:
                buffer = slot.buffers[name] = torch.empty(part.numel(), dtype=part.dtype, device=device)
                stream = self._streams[device]
                if stream is not None:
                    stream.wait_stream(torch.cuda.current_stream(device))  # its memory may still be in use there
                    buffer.record_stream(stream)
            block[name] = buffer[: part.numel()].view(part.shape)
        with self._copying(device, slot):
            for name, part in parts(rows_of(matrix, rows)).items():
                block[name].copy_(part, non_blocking=True)
            if slot.arrived is not None:
                slot.arrived.record()
        return from_parts(block)  # type: ignore[return-value]

    def _copying(self, device: torch.device, slot: _Slot) -> Any:
        """On the stream of copies, after the computation on the slot's block."""
        stream = self._streams[device]
        if stream is None:
            return nullcontext()
        stream.wait_event(slot.used)
        return torch.cuda.stream(stream)

    def _of(self, device: torch.device) -> list[_Slot]:
        if device not in self._slots:
            cuda = device.type == "cuda"
            self._streams[device] = torch.cuda.Stream(device) if cuda else None
            event = torch.cuda.Event if cuda else lambda: None
            self._slots[device] = [_Slot({}, event(), event()) for _ in range(2)]
        return self._slots[device]
