"""The arms of a comparison, each one short function: a job and a strength in, the tuned model and its losses out.

All share budget, data order, seed and evaluation. The methods of the paper are here; what people use beside them,
replay, KL to the base model, OSF, CorDA and LoRA on the MLP, is in rivals/.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from hlora.comparison import shared
from hlora.comparison.rivals.corda import corda
from hlora.comparison.rivals.kl import kl_to_base
from hlora.comparison.rivals.mlp import mlp
from hlora.comparison.rivals.osf import osf
from hlora.comparison.rivals.replay import replay
from hlora.config.comparison import CellConfig
from hlora.importance.artefact import Importance
from hlora.importance.penalty import ImportancePenalty
from hlora.importance.squared_gradients import fisher_information
from hlora.model.lora import attach_lora
from hlora.numerics import encodings, ops
from hlora.numerics.encodings import Factored
from hlora.run.job import Job
from hlora.run.phases import History, protected, train_on_domain

ALTERS_BASE = frozenset({"corda"})
"""Methods that leave `job.base` with other weights, also when they raise: load it again before it is used again."""

Method = Callable[[Job, float | None], tuple[Any, History]]


def base(job: Job, strength: float | None) -> tuple[Any, History]:
    """The base model, untouched."""
    return job.base, []


def after_general(job: Job, strength: float | None) -> tuple[PeftModel, History]:
    """The general phase alone: θ^ν."""
    importance = shared.importance(job)
    model = attach_lora(job.base, job.config.lora, job.config.seed)
    importance.load_adapter_into(model)
    return model, []


def lora(job: Job, strength: float | None) -> tuple[PeftModel, History]:
    """LoRA(μ): a fresh adapter on the domain."""
    model = attach_lora(job.base, job.config.lora, job.config.seed)
    return model, train_on_domain(job, model, "lora")


def rslora(job: Job, strength: float | None) -> tuple[PeftModel, History]:
    """LoRA(μ) with the scale α/√r (Kalajdzievski 2023)."""
    settings = job.config.lora.model_copy(update={"rslora": True})
    model = attach_lora(job.base, settings, job.config.seed)
    return model, train_on_domain(job, model, "rslora")


def lora_after_general(job: Job, strength: float | None) -> tuple[PeftModel, History]:
    """LoRA(ν+μ): from θ^ν on the domain, without a penalty."""
    model, _ = after_general(job, None)
    return model, train_on_domain(job, model, "lora_after_general")


def hlora(job: Job, strength: float | None) -> tuple[PeftModel, History]:
    """The paper's method: from θ^ν under φ Σ_l c_l Σ_i Ω_i (θ_i − θ_i^ν)² (Eqs. 14–16). strength: φ.

    With penalty.anchor base from the base model, under the same sum over (θ_i − W₀_i)².
    """
    return _protected(job, shared.importance(job), strength, job.config.penalty.layer_weights)


def l2(job: Job, strength: float | None) -> tuple[PeftModel, History]:
    """Plain L2 towards the anchor: HLoRA with its mean importance everywhere. Relative φ matches the strength."""
    return _protected(job, _uniform(shared.importance(job)), strength, "uniform")


def ewc(job: Job, strength: float | None) -> tuple[PeftModel, History]:
    """EWC-LoRA (Xiang et al. 2023): a fresh adapter on the domain under λ Σ F (sBA)². strength: λ, nats/token."""
    information = fisher(job)
    model = attach_lora(job.base, job.config.lora, job.config.seed)
    weight = 1.0 if strength is None else strength
    penalty = ImportancePenalty(model, information, weight, "sum", "paper", anchor="base")
    return model, train_on_domain(job, model, "ewc", penalty)


def fisher(job: Job) -> Importance:
    """The Fisher information of the job's base model on its general text, measured once a seed and kept."""
    config = job.config
    assert isinstance(config, CellConfig)
    options = config.fisher

    def measure(directory: Path) -> None:
        model = attach_lora(job.base, config.lora, config.seed)
        texts, sizes = job.general.train, (options.examples, options.max_length)
        information = fisher_information(
            model, job.tokenizer, texts, *sizes, config.seed, batch_size=options.batch_size
        )
        information.save(directory)
        model.unload()

    made_from = {**config.model_dump(include={"model", "lora", "fisher", "seed"}), "text": job.general.facts}
    return Importance.load(shared.once(job, "fisher", made_from, measure))


METHODS: dict[str, Method] = {
    "base": base,
    "after_general": after_general,
    "lora": lora,
    "lora_after_general": lora_after_general,
    "rslora": rslora,
    "ewc": ewc,
    "hlora": hlora,
    "l2": l2,
    "replay": replay,
    "kl": kl_to_base,
    "osf": osf,
    "corda": corda,
    "mlp": mlp,
}
"""By the name that a configuration uses."""


def _protected(
    job: Job, importance: Importance, strength: float | None, layer_weights: str
) -> tuple[PeftModel, History]:
    phi = job.config.penalty.phi if strength is None else strength
    model, penalty = protected(job, importance, phi, layer_weights)
    return model, train_on_domain(job, model, "hlora", penalty)


def _uniform(importance: Importance) -> Importance:
    """The mean importance everywhere; what undoing the general phase costs is counted anew."""
    kept = importance.matrices.values()
    mean = sum(float(encodings.total(m.omega)) for m in kept) / sum(math.prod(encodings.shape(m.omega)) for m in kept)
    matrices = {}
    for name, matrix in importance.matrices.items():
        d_out, d_in = encodings.shape(matrix.omega)
        same = Factored(torch.full((d_out,), mean * d_in), torch.full((d_in,), mean * d_out))
        delta = ops.difference(matrix.A, matrix.B, None, matrix.scale)
        matrices[name] = replace(matrix, omega=same, undo_cost=float(ops.penalty(same, delta)))
    return replace(importance, matrices=matrices, encoding="factored")
