"""The kernels compiled for an H100: what the interpreter lets pass, such as too much shared memory, stops here.

Runs as a script of its own, because what is compiled must not have been imported for the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

H100_SHARED, SMALLEST_SHARED = 227 << 10, 99 << 10  # bytes of a program: H100; the least from Ampere on (RTX 30, 40)


@pytest.mark.slow
def test_every_kernel_compiles_for_an_h100(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA on Linux, and is not installed here")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(" bytes of shared memory") == 12


def compile_all() -> None:
    import triton
    import triton.language as tl

    from hlora.kernels import accumulate, consolidate, penalties

    sums = {"table": "*i64", "scales": "*fp32", "matrices": "i32", "width": "i32"}
    accumulates = {
        "table": "*i64",
        "numbers": "*fp32",
        "counted": "*i8",
        "matrices": "i32",
        "steps": "i32",
        "seed": "i32",
    }
    consolidates = {**sums, "sums": "*fp32", "xi": "fp32"}
    penalises = {**sums, "values": "*fp32", "grads_A": "*fp32", "grads_B": "*fp32"}
    first, *_, last = accumulate._CANDIDATES
    compiled(accumulate._accumulate, accumulates, first, OMEGA=tl.float32)
    compiled(accumulate._accumulate, accumulates, last, OMEGA=tl.bfloat16)
    compiled(accumulate._accumulate, accumulates, first, OMEGA=tl.float32, ALIGNMENT=1)
    (only,) = consolidate._consolidate.configs
    compiled(consolidate._consolidate, consolidates, only, OMEGA=tl.float32, EIGHT=False)
    compiled(consolidate._consolidate, consolidates, only, OMEGA=tl.bfloat16, EIGHT=True)
    for config in penalties._CANDIDATES:
        compiled(penalties._penalties, penalises, config, OMEGA=tl.float32, IN_ORDER=False, RANK=16)
    smallest = triton.Config({"ROWS": 32, "COLUMNS": 32})  # with the options of a launch that is not tuned
    bytes_used = compiled(penalties._penalties, penalises, smallest, OMEGA=tl.uint8, IN_ORDER=False, RANK=128)
    assert bytes_used <= SMALLEST_SHARED
    compiled(penalties._penalties, penalises, smallest, OMEGA=tl.bfloat16, IN_ORDER=True, RANK=64, ALIGNMENT=1)


def compiled(kernel: Any, types: dict[str, str], config: Any, **constants: Any) -> int:
    """The shared memory that a program takes, in bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"ALIGNMENT": 16, "MATRICES": 64, **config.kwargs, **constants}
    signature = {name: types.get(name, "constexpr") for name in kernel.fn.arg_names}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    source = ASTSource(kernel.fn, signature, constexprs=constants)
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert result.asm["cubin"]
    assert result.metadata.shared <= H100_SHARED
    print(source.name, config, constants, result.metadata.shared, "bytes of shared memory", flush=True)
    return result.metadata.shared


if __name__ == "__main__":
    compile_all()
