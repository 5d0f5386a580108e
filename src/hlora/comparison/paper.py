"""The methods of the paper, and HLoRA with uniform importance: each takes a job, and gives the tuned model and its
losses.

All share budget, data order, seed and evaluation. Plain LoRA, from the base model or from θ^ν, is in run/phases.py, as
a run trains it too; what people use besides is in rivals/. hlora/methods.py lists them all.
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
    """LoRA(μ) with the scale α/√r (Kalajdzievski 2023)."""
    settings = job.config.lora.model_copy(update={"rslora": True})
    model = attach_lora(job.base, settings, job.config.seed)
    return model, train_on_domain(job, model, "rslora")


def hlora(job: Job, *, importance: Importance, strength: float | None) -> tuple[PeftModel, History]:
    """The paper's method: from θ^ν under φ Σ_l c_l Σ_i Ω_i (θ_i − θ_i^ν)² (Eqs. 14–16). strength: φ.

    With penalty.anchor base from the base model, under the same sum over (θ_i − W₀_i)².
    """
    return _protected(job, importance, strength, job.config.penalty.layer_weights, "hlora")


def uniform(job: Job, *, importance: Importance, strength: float | None) -> tuple[PeftModel, History]:
    """HLoRA with its mean importance everywhere: plain L2 towards the anchor. strength: φ, relative as HLoRA's."""
    return _protected(job, uniform_importance(importance), strength, "uniform", "uniform")


def ewc(job: Job, *, importance: Importance, strength: float | None) -> tuple[PeftModel, History]:
    """EWC-LoRA (Xiang et al. 2023): a fresh adapter on the domain under λ Σ F (sBA)².

    importance: the Fisher information F. strength: λ, nats/token; 1 where it is None.
    """
    model = attach_lora(job.base, job.config.lora, job.config.seed)
    weight = 1.0 if strength is None else strength
    penalty = ImportancePenalty(model, importance, weight, layer_weights="sum", phi_scale="paper", anchor="base")
    return model, train_on_domain(job, model, "ewc", penalty)


def _protected(
    job: Job, importance: Importance, strength: float | None, layer_weights: LayerWeights, name: str
) -> tuple[PeftModel, History]:
    phi = job.config.penalty.phi if strength is None else strength
    model, penalty = protected(job, importance, phi, layer_weights)
    return model, train_on_domain(job, model, name, penalty)


def uniform_importance(importance: Importance) -> Importance:
    """The mean importance everywhere; what undoing the general phase costs is recomputed."""
    kept = importance.matrices.values()
    mean = sum(float(encodings.total(m.omega)) for m in kept) / sum(math.prod(encodings.shape(m.omega)) for m in kept)
    matrices = {}
    for name, matrix in importance.matrices.items():
        d_out, d_in = encodings.shape(matrix.omega)
        same = Factored(torch.full((d_out,), mean * d_in), torch.full((d_in,), mean * d_out))
        delta = ops.difference(matrix.A, matrix.B, None, scale=matrix.scale)
        matrices[name] = replace(matrix, omega=same, undo_cost=float(ops.penalty(same, delta)))
    return replace(importance, matrices=matrices, encoding="factored")
