"""`protect`, the two-line way in for an existing script."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import Trainer

from hlora.importance.artefact import Importance
from hlora.importance.penalty import ImportancePenalty
from hlora.model.adapters import adapted_matrices
from hlora.parallel.dtensor import whole
from hlora.system.errors import AdapterError
from hlora.training.train import add_callback_first

logger = logging.getLogger("hlora")


def protect(
    trainer: Trainer,
    importance: Importance | str | Path,
    phi: float,
    layer_weights: str = "softmax",
    phi_scale: str = "relative",
    group: str = "matrix",
    adapter_name: str | None = None,
    anchor: str = "general",
) -> ImportancePenalty:
    """Protect what `importance` covers while `trainer` trains: the two-line way in for an existing script.

    importance: an Importance, a directory or a hub repository. With the anchor "general" an untouched adapter (all B
    zero) is first set to θ^ν, the general adapter in the artefact, where the paper starts the domain task; any other is
    left as it is, and so is any with the anchor "base". The rest are arguments of ImportancePenalty, which is returned.

    Raises AdapterError when `trainer` is no Trainer or its model has no LoRA, ArtifactError when the importance does
    not fit it.
    """
    if not hasattr(trainer, "callback_handler"):
        raise AdapterError(
            f"trainer: expected a transformers.Trainer or a child of it, got {type(trainer).__name__}. In a loop of "
            "your own, add hlora.ImportancePenalty(model, importance, phi) to the loss."
        )
    importance = Importance.of(importance)
    model = trainer.model
    if model is None:
        raise AdapterError("the trainer has no model yet; build it with model=, not model_init=")
    untouched = all(not whole(matrix.B).any() for matrix in adapted_matrices(model, adapter_name, unprotected="warn"))
    if untouched and anchor == "general":
        importance.load_adapter_into(model, adapter_name)
        logger.info("the adapter was untouched; it starts from the general adapter of the importance")
    penalty = ImportancePenalty(model, importance, phi, layer_weights, phi_scale, group, adapter_name, anchor)
    add_callback_first(trainer, penalty.callback())
    return penalty
