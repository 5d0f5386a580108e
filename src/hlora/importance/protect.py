"""`protect`, one line for an existing script, and `ProtectCallback` for any trainer that takes callbacks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from torch import nn
from transformers import Trainer

from hlora.importance.artefact import Importance
from hlora.importance.callbacks import PenaltyCallback
from hlora.importance.penalty import ImportancePenalty, PenaltyOptions, check_phi
from hlora.model.adapters import adapted_matrices, unwrapped
from hlora.model.initialisation import is_at_base
from hlora.system.errors import AdapterError
from hlora.training.trackers import LayerCoefficients, add_callback_first

logger = logging.getLogger("hlora")


def protect(
    trainer: Trainer, importance: Importance | str | Path, phi: float, **options: Unpack[PenaltyOptions]
) -> ImportancePenalty:
    """Protect the weights that `importance` covers while `trainer` trains; call it before `trainer.train()`.

    With the anchor "general", an untrained adapter is set to the general adapter θ^ν, where the paper starts the domain
    task. A trained adapter stays as it is, with a warning. With the anchor "base" every adapter stays as it is. A
    second call on the same trainer replaces the first penalty.

    Args:
        trainer: A transformers.Trainer, or a subclass such as SFTTrainer, with its model.
        importance: An Importance, a directory or a hub repository.
        phi: Weight φ of the penalty.
        options: Further arguments of ImportancePenalty: layer_weights, phi_scale, group, adapter_name, anchor.

    Returns:
        The penalty.

    In several processes (DDP, FSDP2) every one calls it.

    Raises:
        AdapterError: `trainer` is not a Trainer, or its model has no LoRA.
        ArtifactError: The importance cannot be read or does not fit the model.

    Source: Eq. 16.
    """
    if not hasattr(trainer, "callback_handler"):
        raise AdapterError(
            f"trainer: expected a transformers.Trainer or a child of it, got {type(trainer).__name__}. In a loop of "
            "your own, add hlora.ImportancePenalty(model, importance, phi) to the loss."
        )
    if trainer.model is None:
        raise AdapterError("the trainer has no model yet; build it with model=, not model_init=")
    callback, callbacks = ProtectCallback(importance, phi, **options), trainer.callback_handler.callbacks
    name = options.get("adapter_name")
    earlier = [c for c in callbacks if isinstance(c, ProtectCallback) and c.options.get("adapter_name") == name]
    replaced = [each.penalty for each in earlier if hasattr(each, "penalty")]  # one that waits for its model has none
    penalty = callback.start(trainer.model, replaced)
    coefficients = [each.coefficients for each in replaced]
    for each in [*callbacks]:
        if each in earlier or (isinstance(each, LayerCoefficients) and each.coefficients in coefficients):
            callbacks.remove(each)
    add_callback_first(trainer, callback)
    return penalty


class ProtectCallback(PenaltyCallback):
    """`protect` as a callback, for trainers that take callbacks before there is a model.

    When training begins, an untrained adapter is set to θ^ν and the penalty is made, as in `protect`. A training that
    resumes from a checkpoint keeps the checkpoint's adapter.

    Args:
        importance: An Importance, a directory or a hub repository.
        phi: Weight φ of the penalty.
        options: Further arguments of ImportancePenalty: layer_weights, phi_scale, group, adapter_name, anchor.

    Attributes:
        penalty: The ImportancePenalty, once training has begun.

    In several processes (DDP, FSDP2) every one has the callback.

    Raises:
        ArtifactError: The importance cannot be read or, when training begins, does not fit the model.
        AdapterError: When training begins: the model has no LoRA.
    """

    def __init__(self, importance: Importance | str | Path, phi: float, **options: Unpack[PenaltyOptions]) -> None:
        check_phi(phi)
        self.importance, self.phi, self.options = Importance.of(importance), phi, options
        self._model: nn.Module | None = None
        self._watch, self._handle = None, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._model is not unwrapped(kwargs["model"]):
            self.start(kwargs["model"], resumed=state.global_step > 0)
        super().on_train_begin(args, state, control, **kwargs)

    def start(
        self, model: nn.Module, earlier: Sequence[ImportancePenalty] = (), *, resumed: bool = False
    ) -> ImportancePenalty:
        """Set an untrained adapter of `model` to θ^ν and make the penalty.

        Args:
            model: The model to train.
            earlier: Penalties that this one replaces; an adapter at one of their anchors counts as untrained.
            resumed: Whether the adapter comes from a checkpoint. Then it stays as it is.

        Returns:
            The penalty.
        """
        untrained = False
        if self.options.get("anchor", "general") == "general" and not resumed:
            matrices = adapted_matrices(model, self.options.get("adapter_name"), unprotected="warn")
            untrained = all(is_at_base(matrix) for matrix in matrices) or any(p.is_at_anchor() for p in earlier)
            if untrained:
                self.importance.load_adapter_into(model, self.options.get("adapter_name"))
                logger.info("the adapter was untrained; it starts from the general adapter of the importance")
        self.penalty = ImportancePenalty(model, self.importance, self.phi, **self.options)
        if self.penalty.anchor == "general" and not untrained and not resumed and not self.penalty.is_at_anchor():
            logger.warning(
                "the adapter has been trained before, or is not PEFT's untrained one: it starts as it is, not from the "
                "general adapter. To start there, call importance.load_adapter_into(model) before training"
            )
        self._model = unwrapped(model)
        return self.penalty
