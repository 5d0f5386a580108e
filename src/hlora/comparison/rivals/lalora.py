"""LaLoRA: a Laplace approximation over LoRA's own factors (Sliwa et al. 2025, arXiv 2512.17720)."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from hlora.comparison.rivals.added_term import trainer_adding
from hlora.comparison.rivals.common import at_least_0
from hlora.config.comparison import CellConfig
from hlora.data.packing import pack
from hlora.model.adapters import AdaptedMatrix, adapted_matrices
from hlora.model.layer_gradients import layer_gradients
from hlora.model.lora import attach_lora
from hlora.run.job import Job
from hlora.run.phases import History, train_on_domain


def lalora(job: Job, *, strength: float | None) -> tuple[PeftModel, History]:
    """LoRA under λ/2 · Σ over A and B of tr(G (θ − θ₀) X (θ − θ₀)ᵀ), with θ₀ the fresh A, or the fresh B = 0.

    X ⊗ G is K-FAC's estimate of the curvature at θ₀, one block for each A and each B (`curvature`). It is taken from
    the sequences of general text that EWC-LoRA's Fisher information is taken from (`fisher`), once more for each arm.

    At B = 0 the loss has no gradient for A, so G of A is zero: A is free, and B alone is held, in the metric of the
    fresh A's outputs. The change of the weight, sBA, is held with B. Where A and B both start away from zero, both are
    held.

    Followed: the abstract and public summaries of the paper, whose full text could not be read here. Chosen here: the
    true Fisher (labels drawn from the model), K-FAC's `expand` form (each token is an example), no damping, no prior
    besides, and the unit of λ. So λ is not the paper's number.

    Args:
        job: The job of a comparison's cell.
        strength: λ ≥ 0; at 1 the penalty estimates the KL divergence on general text, in nats per token.

    Raises:
        ConfigError: The strength is missing or negative.
        DataError: The general text is shorter than the sequences of `fisher`.
    """
    weight = at_least_0(strength, "lalora", "λ")
    assert isinstance(job.config, CellConfig)
    model = attach_lora(job.base, job.config.lora, job.config.seed)
    options = job.config.fisher
    sequences = pack(job.tokenizer, job.general.train, options.examples, options.max_length)
    blocks = curvature(model, sequences, job.config.seed, batch_size=options.batch_size)
    trainer_class = trainer_adding(weight, lambda batch: sum_of_blocks(blocks))
    return model, train_on_domain(job, model, "lalora", trainer_class=trainer_class)


class Block(NamedTuple):
    """The curvature X ⊗ G for one factor of LoRA, at its value then."""

    factor: nn.Parameter
    start: Tensor
    X: Tensor
    """Second moment of the factor's inputs, (its columns, its columns)."""
    G: Tensor
    """Second moment of the gradients at the factor's outputs, (its rows, its rows), nats per token."""


def curvature(
    model: PeftModel,
    sequences: Tensor,  # (examples, length) token ids
    seed: int,
    *,
    batch_size: int = 8,
) -> list[Block]:
    """K-FAC of the loss for every A and B, labels drawn from the model: F ≈ X ⊗ G, nats per token.

    X is the mean of x xᵀ over tokens. G is the sum of g gᵀ over tokens over the number of predicted tokens, g being the
    gradient of the sequence's loss. A reads the layer's input x and sees s Bᵀ g; B reads A x and sees s g. The block of
    an A whose B is zero is left out: it holds nothing, and its X would be the largest.

    Args:
        model: The base model with its adapter, in whatever state.
        sequences: Token ids (examples, length).
        seed: Seed of the labels.
        batch_size: Sequences in one pass.

    Source: Martens and Grosse 2015; Eschenhagen et al. 2023 (`expand`).
    """
    matrices = adapted_matrices(model)
    sums: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def add(key: tuple[str, str], x: Tensor, g: Tensor) -> None:
        X, G = x.T @ x, g.T @ g
        sums[key] = (sums[key][0] + X, sums[key][1] + G) if key in sums else (X, G)

    def use(matrix: AdaptedMatrix, x: Tensor, gradient: Tensor) -> None:
        dtype = torch.promote_types(matrix.A.dtype, torch.float32)
        x, g = x.flatten(0, -2).to(dtype), matrix.scale * gradient.flatten(0, -2).to(dtype)
        add((matrix.name, "B"), x @ matrix.A.to(dtype).T, g)
        if matrix.B.any():
            add((matrix.name, "A"), x, g @ matrix.B.to(dtype))

    draw = torch.Generator(model.device).manual_seed(seed)
    model.eval()
    with layer_gradients(matrices, lambda matrix: partial(use, matrix)):
        for batch in sequences.to(model.device).split(batch_size):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
            nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    model.zero_grad()
    model.train()
    factors = {(matrix.name, name): getattr(matrix, name) for matrix in matrices for name in "AB"}
    tokens, predicted = sequences.numel(), sequences[:, 1:].numel()
    return [
        Block(factors[key], factors[key].detach().clone(), X / tokens, G / predicted) for key, (X, G) in sums.items()
    ]


def sum_of_blocks(blocks: list[Block]) -> Tensor:
    """½ Σ tr(G (θ − θ₀) X (θ − θ₀)ᵀ), a scalar, nats per token."""
    total = blocks[0].G.new_zeros(())
    for factor, start, X, G in blocks:
        moved = (factor - start).to(G.dtype)
        total = total + ((G @ moved) * (moved @ X)).sum() / 2
    return total
