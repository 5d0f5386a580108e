"""hlora: fine-tune LLMs without catastrophic forgetting, by importance-regularised LoRA (HLoRA)."""

from typing import TYPE_CHECKING

from hlora.system.errors import AdapterError, ArtifactError, ConfigError, DataError, HloraError, TrainingError

if TYPE_CHECKING:
    from hlora.budget.budget import ForgettingBudget
    from hlora.budget.probes import SampleProbe, TextProbe
    from hlora.importance.artefact import Importance
    from hlora.importance.penalty import ImportancePenalty
    from hlora.importance.protect import ProtectCallback, protect
    from hlora.importance.record import RecordCallback
    from hlora.importance.recorder import ImportanceRecorder
    from hlora.model.four_bits import keep_trainable

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
    "ProtectCallback",
    "RecordCallback",
    "SampleProbe",
    "TextProbe",
    "TrainingError",
    "keep_trainable",
    "protect",
]

_LAZY = {
    "ForgettingBudget": "hlora.budget.budget",
    "SampleProbe": "hlora.budget.probes",
    "TextProbe": "hlora.budget.probes",
    "Importance": "hlora.importance.artefact",
    "ImportancePenalty": "hlora.importance.penalty",
    "ImportanceRecorder": "hlora.importance.recorder",
    "keep_trainable": "hlora.model.four_bits",
    "ProtectCallback": "hlora.importance.protect",
    "protect": "hlora.importance.protect",
    "RecordCallback": "hlora.importance.record",
}


def __getattr__(name: str) -> object:
    """Import what needs PyTorch on first use, so that `hlora --help` answers at once."""
    from importlib import import_module

    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'hlora' has no attribute {name!r}")
