"""The paper's methods, and HLoRA with uniform importance. Each takes a job and returns the tuned model and its losses.

All have the same number of steps, data order, seed and evaluation. Plain LoRA is in run/phases.py, since `hlora run`
trains it too. Methods of others are in rivals/, and hlora/methods.py lists all of them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel

from hlora.importance.artefact import Importance
from hlora.importance.penalty import ImportancePenalty
from hlora.model.lora import attach_lora
from hlora.numerics import encodings, ops
from hlora.numerics.encodings import Factored
from hlora.run.job import Job
from hlora.run.phases import History, at_general_adapter, protected, train_on_domain
from hlora.system.choices import LayerWeights


def base(job: Job) -> tuple[Any, History]:
    """The base model, untouched."""
    return job.base, []


def after_general(job: Job, *, importance: Importance) -> tuple[PeftModel, History]:
    """The general phase alone: θ^ν."""
    return at_general_adapter(job, importance), []


def rslora(job: Job) -> tuple[PeftModel, History]:
    """LoRA on the domain with the scale α/√r. Source: Kalajdzievski 2023."""
    settings = job.config.lora.model_copy(update={"rslora": True})
    model = attach_lora(job.base, settings, job.config.seed)
    return model, train_on_domain(job, model, "rslora")


def hlora(job: Job, *, importance: Importance, strength: float | None) -> tuple[PeftModel, History]:
    """The paper's method: tune from the general adapter, under the penalty of Eqs. 14–16.

    With `penalty.anchor: base`, tune from the base model, under the penalty of the distance to it.

    Args:
        job: The cell's settings, model and data.
        importance: Recorded importance, with the general adapter.
        strength: φ; None for `penalty.phi`.

    Source: Eqs. 14–16.
    """
    return _protected(job, importance, strength, job.config.penalty.layer_weights, "hlora")


def uniform(job: Job, *, importance: Importance, strength: float | None) -> tuple[PeftModel, History]:
    """HLoRA with the mean importance for every weight: plain L2 towards the anchor.

    Args:
        job: The cell's settings, model and data.
        importance: Recorded importance, of which the mean is taken.
        strength: φ, in the unit of HLoRA's; None for `penalty.phi`.
    """
    return _protected(job, uniform_importance(importance), strength, "uniform", "uniform")


def ewc(job: Job, *, importance: Importance, strength: float | None) -> tuple[PeftModel, History]:
    """EWC-LoRA: a new adapter on the domain, under λ Σ F (sBA)².

    Args:
        job: The cell's settings, model and data.
        importance: The Fisher information F.
        strength: λ, nats/token; None for 1.

    Source: Xiang et al. 2023.
    """
    model = attach_lora(job.base, job.config.lora, job.config.seed)
    weight = 1.0 if strength is None else strength
    penalty = ImportancePenalty(model, importance, weight, layer_weights="sum", phi_scale="paper", anchor="base")
    return model, train_on_domain(job, model, "ewc", penalty)


def _protected(
    job: Job, importance: Importance, strength: float | None, layer_weights: LayerWeights | None, name: str
) -> tuple[PeftModel, History]:
    phi = job.config.penalty.phi if strength is None else strength
    model, penalty = protected(job, importance, phi, layer_weights)
    return model, train_on_domain(job, model, name, penalty)


def uniform_importance(importance: Importance) -> Importance:
    """The mean importance for every weight, with the cost of undoing the general phase recomputed."""
    kept = importance.matrices.values()
    mean = sum(float(encodings.total(m.omega)) for m in kept) / sum(math.prod(encodings.shape(m.omega)) for m in kept)
    matrices = {}
    for name, matrix in importance.matrices.items():
        d_out, d_in = encodings.shape(matrix.omega)
        same = Factored(torch.full((d_out,), mean * d_in), torch.full((d_in,), mean * d_out))
        delta = ops.difference(matrix.A, matrix.B, None, scale=matrix.scale)
        matrices[name] = replace(matrix, omega=same, undo_cost=float(ops.penalty(same, delta)))
    return replace(importance, matrices=matrices, encoding="factored")
