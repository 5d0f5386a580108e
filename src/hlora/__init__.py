"""hlora: fine-tune LLMs without catastrophic forgetting, by importance-regularised LoRA (HLoRA)."""

from typing import TYPE_CHECKING

from hlora.errors import AdapterError, ArtifactError, ConfigError, DataError, HloraError

if TYPE_CHECKING:
    from hlora.budget import ForgettingBudget, SampleProbe, TextProbe
    from hlora.importance import Importance
    from hlora.penalty import ImportancePenalty
    from hlora.protection import protect
    from hlora.recorder import ImportanceRecorder

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "ArtifactError",
    "ConfigError",
    "DataError",
    "ForgettingBudget",
    "HloraError",
    "Importance",
    "ImportancePenalty",
    "ImportanceRecorder",
    "SampleProbe",
    "TextProbe",
    "protect",
]

_LAZY = {
    "ForgettingBudget": "hlora.budget",
    "SampleProbe": "hlora.budget",
    "TextProbe": "hlora.budget",
    "Importance": "hlora.importance",
    "ImportancePenalty": "hlora.penalty",
    "ImportanceRecorder": "hlora.recorder",
    "protect": "hlora.protection",
}


def __getattr__(name: str) -> object:
    """Import what needs PyTorch on first use, so that `hlora --help` answers at once."""
    from importlib import import_module

    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'hlora' has no attribute {name!r}")
