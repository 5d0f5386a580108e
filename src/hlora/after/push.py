"""A tuned adapter onto the hub, with its card and its tokenizer, and without anything of this machine."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path

from hlora.model.saved_adapter import check_files
from hlora.report.card import named_card, public_card, public_name
from hlora.system.errors import DataError, culprit
from hlora.system.hub import upload
from hlora.system.redaction import redacted, without_paths

logger = logging.getLogger("hlora")

_SENT = (
    "*.safetensors",
    "adapter_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "*.jinja",
    "README.md",
)
"""Weights, settings, tokenizer, chat template and card. A checkpoint's trainer_state.json has paths of this machine."""


def push_adapter(directory: Path, repo: str, *, private: bool = False, licence: str | None = None) -> str:
    """Upload an adapter directory to the hub; returns the repository's address.

    Sent are the weights, their settings, the tokenizer, the chat template and the card. Paths of this machine become
    their last part, also in a card that PEFT or TRL wrote.

    Args:
        directory: of the adapter, such as runs/mine/adapter.
        repo: user/name; made if it is new.
        private: of a new repository.
        licence: for the card, such as apache-2.0.

    Raises:
        ArtifactError: the adapter is damaged, or the hub refused it or cannot be reached.
        DataError: the directory has no card.
    """
    check_files(directory)
    try:
        card = (directory / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise DataError(
            f"{directory}: no readable README.md, the card. `hlora evaluate` writes it anew for a run; for another "
            "adapter, write one."
        ) from None
    with tempfile.TemporaryDirectory() as scratch:
        for path in sorted(directory.iterdir()):
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in _SENT):
                shutil.copy(path, scratch)
            else:
                logger.warning("%s: not sent; only weights, settings, tokenizer, chat template and card are", path)
        config = Path(scratch) / "adapter_config.json"
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = public_name(str(settings.get("base_model_name_or_path") or ""))
        config.write_text(json.dumps(without_paths(redacted(settings)), indent=2), encoding="utf-8")
        _without_places(Path(scratch) / "tokenizer_config.json")
        (Path(scratch) / "README.md").write_text(named_card(public_card(card), repo, licence), encoding="utf-8")
        return upload(Path(scratch), repo, "Adapter, written by hlora", private=private)


def _without_places(path: Path) -> None:
    """Reduce the paths in a tokenizer's settings, where older versions of Transformers name its files."""
    if not path.is_file():
        return
    with culprit(path, "Save the tokenizer again."):
        settings = json.loads(path.read_text(encoding="utf-8"))
        places = {name: without_paths(value) for name, value in settings.items() if name.endswith(("_path", "_file"))}
        if places:
            path.write_text(json.dumps({**settings, **places}, indent=2), encoding="utf-8")
