"""A tuned adapter onto the hub, with its card and its tokenizer, and without anything of this machine."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path

from hlora.model.saved_adapter import check_files
from hlora.report.card import named_card, public_name
from hlora.system.errors import DataError
from hlora.system.hub import UPLOADED, upload
from hlora.system.redaction import redacted, without_paths

logger = logging.getLogger("hlora")


def push_adapter(directory: Path, repo: str, *, private: bool = False, licence: str | None = None) -> str:
    """Upload an adapter directory to the hub; returns the repository's address.

    Sent are safetensors, JSON, the chat template and the card. Paths of this machine become their last part, also in
    adapter_config.json.

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
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in UPLOADED):
                shutil.copy(path, scratch)
            else:
                logger.warning("%s: not sent; only safetensors, JSON, the chat template and the card are", path)
        config = Path(scratch) / "adapter_config.json"
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = public_name(str(settings.get("base_model_name_or_path") or ""))
        config.write_text(json.dumps(without_paths(redacted(settings)), indent=2), encoding="utf-8")
        (Path(scratch) / "README.md").write_text(named_card(card, repo, licence), encoding="utf-8")
        return upload(Path(scratch), repo, "Adapter, written by hlora", private=private)
