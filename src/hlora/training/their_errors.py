"""Errors of the libraries that train, told apart from ours."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hlora.system.errors import TrainingError, first_line

_LIBRARIES = ("trl", "peft", "transformers")


@contextmanager
def their_errors(model: Any) -> Iterator[None]:
    """Raises TrainingError with library, file and line where one of them cannot train `model`.

    Only for the errors of a program that does not know the model: TRL 1.16 reads fields that the outputs of Llama 4 and
    the configuration of GraniteMoeHybrid lack.
    """
    try:
        yield
    except (AttributeError, TypeError, NotImplementedError, LookupError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        for frame in reversed(frames):  # the innermost that is not PyTorch's
            if frame.name.startswith("__getattr"):
                continue  # which says that a field is missing; the line that reads the field is to blame
            parts = Path(frame.filename).parts
            if "hlora" in parts:
                raise
            library = next((name for name in _LIBRARIES if name in parts), None)
            if library is not None:
                break
        else:
            raise
        get = getattr(model, "get_base_model", None)
        kind = type(model if get is None else get()).__name__
        file = "/".join(parts[parts.index(library) :])
        raise TrainingError(
            f"SFTTrainer cannot train this {kind}: {library} {version(library)} fails in {file}, line {frame.lineno} "
            f"({first_line(error)}). {_remedy(library, error)}"
        ) from error


def _remedy(library: str, error: Exception) -> str:
    if library == "peft":
        return "Name other lora.target_modules: PEFT does not fit one of these."
    if "num_experts" in str(error):  # which TRL reads for that loss alone
        return "Set training.common.router_aux_loss_coef: 0.0, which leaves out the balancing loss of the experts."
    return "In a script, use hlora.ImportanceRecorder and hlora.protect with transformers.Trainer."
