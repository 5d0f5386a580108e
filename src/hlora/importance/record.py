"""`RecordCallback`: records importance in any trainer that takes callbacks, and saves it when training ends."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hlora.importance.artefact import Importance
from hlora.importance.artefact_files import refuse_foreign
from hlora.importance.callbacks import RecordingCallback
from hlora.importance.recorder import ImportanceRecorder
from hlora.model.adapters import unwrapped
from hlora.parallel.group import on_main

logger = logging.getLogger("hlora")


class RecordCallback(RecordingCallback):
    """Records importance while a trainer trains on general text, and saves it when training ends.

    For trainers that take callbacks before there is a model: the recorder is made as training begins.

    Args:
        directory: Where to save: a new directory, or one that holds an importance, which is replaced.
        xi: Damping ξ of Eq. 13, unit weight².
        stop_at_move: Ends the training once the adapter has moved the recorded matrices by this share of their norm.
        data: A description of the general text, kept as provenance.
        options: Further arguments of ImportanceRecorder.

    Attributes:
        importance: The importance that was saved; None until training ends.

    In several processes every one has the callback, and the main one saves.

    Raises:
        ArtifactError: When training begins: `directory` holds anything but an importance.
        AdapterError: When training begins: the model has no LoRA, or trains parts that cannot be protected.
    """

    def __init__(
        self,
        directory: str | Path,
        xi: float = 1e-3,
        *,
        stop_at_move: float | None = None,
        data: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.directory, self.xi, self.data, self.options = Path(directory), xi, data, options
        self.stop_at_move = stop_at_move
        self.importance: Importance | None = None
        self._detach, self._watch = None, None
        self._model: nn.Module | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_main(lambda: refuse_foreign(self.directory))
        if self._model is not unwrapped(kwargs["model"]):
            self._model = unwrapped(kwargs["model"])
            self.recorder = ImportanceRecorder(kwargs["model"], **self.options)
        super().on_train_begin(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_end(args, state, control, **kwargs)
        self.importance = self.recorder.consolidate(self.xi, self.data)
        self.importance.save(self.directory)
        logger.info("importance of %d steps is in %s", self.importance.provenance["steps"], self.directory)
