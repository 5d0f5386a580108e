"""How far a tuned model's predictions on general text have drifted from the models that it was before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from torch import Tensor

from hlora.config.sections import EvaluationConfig
from hlora.evaluation.evaluate import evaluate
from hlora.evaluation.likelihood import Reference, scored_logits
from hlora.importance.artefact import Importance
from hlora.model.adapters import AdaptedMatrix, adapted_matrices
from hlora.parallel.fsdp import is_sharded
from hlora.run.job import Job
from hlora.system.errors import AdapterError, ArtifactError


def measure_with_drift(
    job: Job, model: Any, settings: EvaluationConfig, importance: Importance | None, *, base_changed: bool
) -> dict[str, Any]:
    """Every measure of one model (see evaluation.evaluate), and the drift of a tuned one on each text.

    Each text gets `kl_from_base`, and `kl_from_general` where the arm has a general phase. `drift_left_out` says why
    one of the two is missing. Each costs one more pass over the texts, unless the job keeps its predictions.

    Args:
        importance: where the general phase ended; None for the base model and for arms without a general phase.
        base_changed: whether the weights under the adapter are no longer those of the base model.
    """
    references, left_out = references_of(model, importance, base_changed=base_changed)
    models = {"from_base": "base", "from_general": "" if importance is None else _digest_of_factors(importance)}
    references = {name: job.predictions.of(name, models[name], each) for name, each in references.items()}
    found = evaluate(model, job.tokenizer, job.general.evaluation, job.domain, settings, references=references)
    return {**found, "drift_left_out": left_out} if left_out else found


def references_of(
    model: Any, importance: Importance | None, *, base_changed: bool
) -> tuple[dict[str, Reference], dict[str, str]]:
    """What the model was before, and why a reference cannot be had; by name, arguments as `measure_with_drift`'s.

    Both run in the model itself: `from_base` with its adapter off, `from_general` with the factors of the general phase
    in place of its own. No second model is held in memory.
    """
    if not isinstance(model, PeftModel):
        return {}, {}
    if is_sharded(model):
        return {}, {"from_base": "the model is sharded over several processes (FSDP2)"}
    if base_changed or not isinstance(model.base_model, LoraModel):
        return {}, {"from_base": "this method changes the base model's weights, which its adapter cannot take back"}
    references: dict[str, Reference] = {"from_base": partial(_logits, partial(_without_adapter, model))}
    if importance is None or importance.without_move:  # recorded without training: its θ^ν is the base model
        return references, {}
    try:
        matrices = adapted_matrices(model)
        importance.check(matrices)
    except (AdapterError, ArtifactError) as error:
        return references, {"from_general": str(error)}
    at_general_phase = partial(_at_general_phase, model, matrices, importance)
    return {**references, "from_general": partial(_logits, at_general_phase)}, {}


def _digest_of_factors(importance: Importance) -> str:
    found = hashlib.sha256()
    for each in importance.matrices.values():
        for factor in (each.A, each.B):
            found.update(factor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _logits(
    opened: Callable[[], AbstractContextManager[PeftModel]], sequences: Sequence[Tensor], counts: Sequence[int]
) -> list[Tensor]:
    with opened() as model:
        return scored_logits(model, sequences, counts)


@contextmanager
def _without_adapter(model: PeftModel) -> Iterator[PeftModel]:
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with model.disable_adapter():
        yield model
    for parameter, requires_grad in trained.items():  # leaving disable_adapter makes a frozen adapter trained
        parameter.requires_grad_(requires_grad)


@contextmanager
def _at_general_phase(model: PeftModel, matrices: list[AdaptedMatrix], importance: Importance) -> Iterator[PeftModel]:
    """The model with the general phase's factors; its own are put back."""
    mine = [(matrix.A.detach().clone(), matrix.B.detach().clone()) for matrix in matrices]
    general = [importance.matrices[matrix.name] for matrix in matrices]
    _put(matrices, [(each.A, each.B) for each in general])
    try:
        yield model
    finally:
        _put(matrices, mine)


@torch.no_grad()
def _put(matrices: list[AdaptedMatrix], factors: list[tuple[Tensor, Tensor]]) -> None:
    for matrix, (A, B) in zip(matrices, factors, strict=True):
        matrix.A.copy_(A)
        matrix.B.copy_(B)
