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
from hlora.importance.consolidation import check_consolidation
from hlora.importance.recorder import ImportanceRecorder
from hlora.model.adapters import unwrapped
from hlora.parallel.group import on_main
from hlora.system.errors import ArtifactError

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
        ValueError: `xi` is not above 0, or `data` is no mapping.
        ArtifactError: When training begins: `directory` holds anything but an importance, or the trainer writes there.
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
        check_consolidation(xi, data)
        self.directory, self.xi, self.data, self.options = Path(directory).expanduser(), xi, data, options
        self.stop_at_move = stop_at_move
        self.importance: Importance | None = None
        self._detach, self._watch = None, None
        self._model: nn.Module | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_main(lambda: self._check_directory(Path(args.output_dir or ".")))
        if self._model is not unwrapped(kwargs["model"]):
            self._model = unwrapped(kwargs["model"])
            self.recorder = ImportanceRecorder(kwargs["model"], **self.options)
        super().on_train_begin(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_end(args, state, control, **kwargs)
        self.importance = found = self.recorder.consolidate(self.xi, self.data)
        on_main(lambda: str(found.save(self.directory)))  # the others may read it next
        logger.info("importance of %d steps is in %s", found.provenance["steps"], self.directory)

    def _check_directory(self, output: Path) -> None:
        if output.resolve().is_relative_to(self.directory.resolve()):
            raise ArtifactError(
                f"{self.directory}: the trainer writes its checkpoints there (output_dir {output}). "
                f"Save to a directory of its own, such as {output / 'importance'}."
            )
        refuse_foreign(self.directory)
