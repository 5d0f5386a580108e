"""How one model learns one domain after another: ours, and what others do. hlora/methods.py lists them.

Each takes the jobs of a chain and yields the model after each domain, which is valid until the next one is asked for.
All train the same rows of each domain in the same number of steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from datasets import concatenate_datasets
from peft import PeftModel
from torch import Tensor

from hlora.comparison.paper import uniform_importance
from hlora.comparison.rivals.added_term import Batch, trainer_adding
from hlora.importance.artefact import Importance
from hlora.importance.penalty import ImportancePenalty
from hlora.importance.recorder import ImportanceRecorder
from hlora.model.lora import attach_lora
from hlora.run.job import Job
from hlora.run.phases import lora, record_phase, train_on_domain, tune_phase
from hlora.run.reuse import importance_here

REPLAYED = 0.2
"""Replay: the share of the rows that are of earlier domains."""
ORTHOGONAL = 0.5
"""O-LoRA: the weight of its term, which is its authors'."""

Models = Iterator[PeftModel]


def hlora(jobs: list[Job]) -> Models:
    """The general phase, then each domain under the importance of everything before, as `hlora run` does."""
    return _held(jobs, lambda importance: importance)


def uniform(jobs: list[Job]) -> Models:
    """The same with equal importance everywhere."""
    return _held(jobs, uniform_importance)


def sequential(jobs: list[Job]) -> Models:
    """One LoRA adapter, trained on one domain after another."""
    model = _fresh(jobs[0])
    for job in jobs:
        train_on_domain(job, model, "sequential")
        yield model
    model.unload()


def replay(jobs: list[Job]) -> Models:
    """Sequential LoRA with rows of the earlier domains mixed in. The number of steps stays the same."""
    model = _fresh(jobs[0])
    for number, job in enumerate(jobs):
        rows = [job.domain.dataset(job.tokenizer)]
        for earlier in jobs[:number]:
            count = round(len(rows[0]) * REPLAYED / (1 - REPLAYED) / number)
            kept = earlier.domain.dataset(job.tokenizer)
            drawn = random.Random(job.config.seed).sample(range(len(kept)), min(count, len(kept)))
            rows.append(kept.select(drawn))
        train_on_domain(job, model, "replay", dataset=concatenate_datasets(rows))
        yield model
    model.unload()


def online_ewc(jobs: list[Job]) -> Models:
    """Sequential LoRA, held to the last adapter by the squared gradients of all earlier domains (γ = 1).

    They are recorded along each domain's training, as hlora's own are, not at its end.

    Source: Schwarz et al. 2018.
    """
    model = _fresh(jobs[0])
    squares: Importance | None = None
    for job in jobs:
        penalty = None
        if squares is not None:
            penalty = ImportancePenalty(model, squares, job.config.penalty.phi, layer_weights="sum")
        recorder = ImportanceRecorder(model, seed=job.config.seed)
        train_on_domain(job, model, "online_ewc", penalty, recorder=recorder)
        recorded = recorder.consolidate(data=job.domain.facts)
        squares = recorded if squares is None else squares + recorded
        yield model
    model.unload()


def olora(jobs: list[Job]) -> Models:
    """O-LoRA: new factors for each domain; the earlier ones stay, frozen and active.

    The rows of the new A are held orthogonal to those of every earlier A, by the sum of their squared products.

    Source: Wang et al. 2023.
    """
    model = _fresh(jobs[0])
    adapters = ["default"]
    for number, job in enumerate(jobs):
        if number:
            adapters.append(f"domain-{number}")
            model.add_adapter(adapters[-1], model.peft_config["default"])
            model.base_model.set_adapter(adapters)  # type: ignore[operator]  # PeftModel declares no type for it
            for name, values in model.named_parameters():
                values.requires_grad = f".{adapters[-1]}." in name
        named = list(model.named_parameters())
        *before, new = [[values for name, values in named if f".lora_A.{adapter}." in name] for adapter in adapters]
        trainer_class = trainer_adding(ORTHOGONAL, partial(_overlap, before, new))
        train_on_domain(job, model, "olora", trainer_class=trainer_class)
        yield model
    model.unload()


def _overlap(before: Sequence[Sequence[Tensor]], new: Sequence[Tensor], batch: Batch) -> Tensor:
    """Sum of the squared products of the rows of the new A with those of every earlier A of the same matrix."""
    squares = [(a @ b.T).square().sum() for earlier in before for a, b in zip(earlier, new, strict=True)]
    return torch.stack(squares).sum() if squares else new[0].new_zeros(())


def one_each(jobs: list[Job]) -> Models:
    """A fresh adapter for each domain, which forgets no other: the bound that a single adapter is compared with."""
    for job in jobs:
        model, _ = lora(job)
        yield model
        model.unload()


def _held(jobs: list[Job], used: Callable[[Importance], Importance]) -> Models:
    importance = _general_importance(jobs[0])
    for job in jobs:
        model, _, total = tune_phase(job, used(importance))
        yield model
        model.unload()
        assert total is not None
        importance = total


def _general_importance(job: Job) -> Importance:
    """The importance of the general phase, recorded once a seed, and again where settings or text have changed."""
    importance = importance_here(job, overwrite=True)
    if importance is None:
        model, importance, _ = record_phase(job)
        importance.save(job.output / "importance")
        model.unload()
    return importance


def _fresh(job: Job) -> PeftModel:
    return attach_lora(job.base, job.config.lora, job.config.seed)
