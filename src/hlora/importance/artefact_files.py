"""The files of an importance: where they are, what importance.json holds, and how they are written and read.

importance.safetensors   Ω of each matrix in its encoding, and a few values of each base matrix
importance.json          encoding, per-matrix numbers, provenance, checksums
adapter_model.safetensors, adapter_config.json   θ^ν, an ordinary PEFT adapter
README.md                the card: what the importance is, and how to load it
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hlora.numerics import encodings
from hlora.report.card import importance_card
from hlora.system.errors import ArtifactError
from hlora.system.files import sha256, write_json

FORMAT = 1
FILES = ("importance.json", "importance.safetensors", "adapter_model.safetensors", "adapter_config.json")

_NOT_KEPT = ("modules_to_save", "trainable_token_indices")
"""Parts that train beside LoRA, whose weights PEFT would look for in the adapter's file."""

_WITH_A_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Tasks for which PEFT adds the head to modules_to_save, and looks for its weights too."""


def write_files(
    directory: Path,
    document: dict[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    factors: Mapping[str, Tensor],
    lora_config: Mapping[str, Any],
) -> None:
    """Write every file of an importance, with its card, into an empty directory.

    Args:
        directory: Where to write.
        document: What importance.json holds, without checksums.
        tensors: Ω and base values by their names in importance.safetensors.
        factors: θ^ν by PEFT's names.
        lora_config: LoRA settings of θ^ν; without any, no adapter_config.json is written.
    """
    save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, directory / "importance.safetensors")
    save_file({k: v.contiguous().cpu() for k, v in factors.items()}, directory / "adapter_model.safetensors")
    if lora_config:
        kept = {k: v for k, v in constructible(lora_config).items() if k not in _NOT_KEPT and v not in _WITH_A_HEAD}
        LoraConfig(**kept).save_pretrained(str(directory))
    (directory / "README.md").write_text(importance_card(document), encoding="utf-8")
    sums = {name: sha256(directory / name) for name in FILES[1:] if (directory / name).exists()}
    write_json(
        directory / "importance.json",
        {**document, "sha256": {**sums, "importance.json": _digest(document)}},
        indent=1,
    )


def read_files(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """What `write_files` was given, once format, encoding and checksums are right.

    Raises:
        ArtifactError: Another format or encoding than this hlora reads.
        Exception: Whatever reading a damaged file raises; `Importance.load` turns it into an ArtifactError.
    """
    document = json.loads((directory / "importance.json").read_text(encoding="utf-8"))
    if document.get("format") != FORMAT:
        raise ArtifactError(
            f"{directory}/importance.json: format {document.get('format')!r}, this hlora reads {FORMAT}. "
            "Use the hlora that wrote it, or record again."
        )
    if document["encoding"] not in encodings.ENCODINGS:
        raise ArtifactError(
            f"{directory}: importance in {document['encoding']!r}, this hlora reads "
            f"{' and '.join(encodings.ENCODINGS)}. Record again in one of them."
        )
    for name, expected in document.pop("sha256", {}).items():  # finds damage; an author could change both
        found = _digest(document) if name == "importance.json" else sha256(directory / Path(name).name)
        if found != expected:
            raise ValueError(f"{name} is not the file that was saved")
    return document, _read(directory / "importance.safetensors"), _read(directory / "adapter_model.safetensors")


def refuse_foreign(directory: Path) -> None:
    """Raises ArtifactError if `directory` holds anything but an importance."""
    if not directory.exists():
        return
    found = [path.name for path in directory.iterdir()] if directory.is_dir() else ["a file"]
    card = ("README.md",) if "importance.json" in found else ()  # otherwise the README is of something else
    foreign = sorted(name for name in found if name not in (*FILES, *card))
    if foreign:
        raise ArtifactError(
            f"{directory}: holds {foreign[0]}, which is not part of an importance and would be lost. "
            "Save to a directory of its own."
        )


def locate(source: str | Path) -> Path:
    """The directory of an importance; downloads a hub repository. Raises ArtifactError if there is neither."""
    directory = Path(source).expanduser()
    if directory.is_dir():
        inside = directory / "importance"
        if (inside / "importance.json").is_file() and not (directory / "importance.json").exists():
            raise ArtifactError(f"{source}: the output of a run, not an importance. Name the one in it: {inside}")
        return directory
    if isinstance(source, Path) or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ArtifactError(f"{source}: no such directory. Record one with `hlora record CONFIG`.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(FILES)))
    except Exception as error:  # the hub client raises many kinds; to the user all mean the same
        raise ArtifactError(
            f"{source}: neither a directory here nor a hub repository that can be reached "
            f"({type(error).__name__}). Check the name and the network, or pass a directory."
        ) from None


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def short(lora_config: Mapping[str, Any]) -> str:
    """The LoRA settings that an error names, in one line."""
    keys = ("r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern")
    shown = {k: plain(lora_config[k]) for k in keys if lora_config.get(k)}
    return ", ".join(f"{key}={value}" for key, value in shown.items()) or "not kept"


def constructible(lora_config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that LoraConfig takes, as plain values, without empty ones."""
    names = LoraConfig.__dataclass_fields__
    kept = {k: plain(v) for k, v in lora_config.items() if k in names and v not in (None, {}, [])}
    return {k: v for k, v in kept.items() if k not in ("auto_mapping", "runtime_config", "peft_version")}


def plain(value: Any) -> Any:
    """A value as JSON can hold it: a set as a list, an enum as its value, any other object as text."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if hasattr(value, "value"):
        return value.value
    return value if isinstance(value, str | int | float | bool | list | dict | tuple) or value is None else str(value)
