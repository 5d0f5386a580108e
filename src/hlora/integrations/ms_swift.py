"""ms-swift: the callback `hlora`, for a file that `swift sft --external_plugins FILE --callbacks hlora` reads.

from hlora.integrations.ms_swift import register
register(hlora.ProtectCallback("runs/general/importance", phi=1.0))
"""

from __future__ import annotations

from swift.callbacks.mapping import callbacks_map
from transformers import TrainerCallback


def register(callback: TrainerCallback, name: str = "hlora") -> None:
    """Make `callback` known to ms-swift under `name`. A ProtectCallback or RecordCallback needs no model yet."""
    callbacks_map[name] = lambda args, trainer: callback
