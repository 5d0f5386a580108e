"""Uploads a folder of safetensors and JSON files to the hub, with its card, in one commit."""

from __future__ import annotations

from pathlib import Path

from hlora.system.errors import ArtifactError, ConfigError, first_line
from hlora.system.redaction import redact_text

UPLOADED = ("*.safetensors", "*.json", "*.jinja", "README.md")
"""Files to upload: weights, settings, the chat template and the card. Never a pickle or code."""


def upload(directory: Path, repo: str, message: str, *, private: bool = False) -> str:
    """Upload a folder to a model repository, which is created if it does not exist.

    Args:
        directory: The folder.
        repo: Repository, user/name.
        message: Message of the commit.
        private: Whether a new repository is private.

    Returns:
        The repository's address.

    Raises:
        ConfigError: `repo` is not of the form user/name.
        ArtifactError: The hub refuses the upload or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"REPO: expected user/name, got {repo!r} ({first_line(error)}).") from None
    if repo.count("/") != 1:
        raise ConfigError(f"REPO: expected user/name, got {repo!r}.")
    api = HfApi(library_name="hlora")
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=directory, allow_patterns=[*UPLOADED], commit_message=message)
    except Exception as error:  # the hub client raises many types; to the user all mean the same
        raise ArtifactError(
            f"{repo}: could not be uploaded ({redact_text(first_line(error))}). Check the network, and log in with an "
            "account that may write there: hf auth login, or set HF_TOKEN."
        ) from None
    return str(address)
