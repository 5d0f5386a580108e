"""Squared gradients at the base model: the diagonal Fisher information of the adapted matrices, without training.

This is EWC-LoRA's importance (Kirkpatrick et al. 2017; Xiang et al. 2023, *Language Models Meet World Models*), dense
and with labels drawn from the model: λ Σ_i F_i (sBA)_i², here `ImportancePenalty(model, importance, phi=λ,
layer_weights="sum", phi_scale="paper", anchor="base")`. It is also HLoRA's path integral if nothing moves: under SGD
ω = Σ η g̃² (Eq. 12). So the squared gradients of a few hundred sequences, kept factored, serve as importance that costs
one pass. The model's own samples are drawn from the model already, and need no other labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from hlora.data.packing import pack
from hlora.importance.artefact import Importance, ImportanceMatrix
from hlora.model.adapters import AdaptedMatrix, adapted_matrices
from hlora.model.initialisation import check_base_without_adapter
from hlora.model.layer_gradients import by_row, layer_gradients
from hlora.numerics import encodings, squares
from hlora.numerics.encodings import Encoded, Factored
from hlora.numerics.precision import wide_dtype, widened
from hlora.system.choices import EncodingName
from hlora.system.errors import AdapterError
from hlora.system.progress import counted


def fisher_information(
    model: PeftModel,
    tokenizer: Any,
    documents: list[str],
    *,
    examples: int,
    max_length: int,
    seed: int,
    at_most: bool = False,
    **options: Any,
) -> Importance:
    """Squared gradients of the adapted matrices on general text: `pack`, then `fisher_of_sequences`.

    Args:
        model: The base model with its adapter.
        tokenizer: The model's.
        documents: General text.
        examples: Sequences to make of it.
        max_length: Tokens in a sequence.
        seed: Seed of the sampled labels.
        at_most: Accept text that is too short for so many sequences.
        options: Further arguments of `fisher_of_sequences`.

    Raises:
        DataError: The text is too short.
        AdapterError: As `fisher_of_sequences`.
    """
    return fisher_of_sequences(
        model, pack(tokenizer, documents, examples, max_length, at_most=at_most), seed, **options
    )


def fisher_of_sequences(
    model: PeftModel,
    sequences: Tensor,  # (examples, length) token ids
    seed: int,
    *,
    batch_size: int = 8,
    encoding: EncodingName = "float32",
    labels: Literal["sampled", "text"] = "sampled",
    gradient: Literal["exact", "effective"] = "exact",
) -> Importance:
    """F = E_b[(∂ Σ_t log p(y_bt | x_b,<t) / ∂W)²] / T at the pretrained weights W, T = length − 1 tokens predicted.

    Given the true prefix, the scores at two sampled positions are uncorrelated. So the square of the sum over a
    sequence is an unbiased estimate of the sum of squares. ½ Σ F δ² is the diagonal part of the second-order KL
    divergence that a change δ of W makes, in nats per token: the unit of λ, and of a relative φ.

    Args:
        model: The base model with its adapter. The adapter's state does not matter, except A to the effective gradient.
        sequences: Token ids (examples, length).
        seed: Seed of the sampled labels, which do not depend on `batch_size`.
        batch_size: Sequences in one pass.
        encoding: "float32" forms the dense gradient of each example, "factored" never does (`add_squares_`). Sums are
            kept in float32 or wider. Memory on top of them: two matrices of a layer and one batch's activations.
        labels: "sampled", y drawn from the model (EWC); or "text", the next tokens of the text, which are such a draw
            if the model generated the text.
        gradient: "exact", G = ∂L/∂W; or "effective", g̃ of Eq. 11, which is s² G AᵀA if B = 0.

    Returns:
        An importance anchored at the adapter's A and B = 0, which is W itself.

    Raises:
        AdapterError: The model has no LoRA, or a layer's input mixes the examples (experts of a mixture).

    Source: Kirkpatrick et al. 2017 (EWC), docs/equations.md.
    """
    matrices = {matrix.name: matrix for matrix in adapted_matrices(model, unprotected="warn")}
    check_base_without_adapter(matrices.values())
    wide = {name: wide_dtype(matrix.A) for name, matrix in matrices.items()}
    encodings.zeros(encoding, 1, 1, device=torch.device("cpu"))  # refuse an unknown encoding before the pass
    sums: dict[str, Encoded] = {}
    for name, m in matrices.items():
        sums[name] = encodings.zeros(encoding, m.B.shape[0], m.A.shape[1], device=m.A.device, dtype=wide[name])
    examples, predicted = sequences.shape[0], sequences.shape[1] - 1
    uniform = torch.rand(examples, predicted, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    seen: set[str] = set()

    def add(matrix: AdaptedMatrix, x: Tensor, output_gradient: Tensor) -> None:
        name, dtype = matrix.name, wide[matrix.name]
        x, output_gradient = by_row(x, *batch.shape), by_row(output_gradient, *batch.shape)
        if x.dim() != 3 or len(x) != len(batch) or name in seen:
            raise AdapterError(
                f"{name}: expected one input of shape ({len(batch)}, tokens, d_in) a forward pass, got "
                f"{'a second one' if name in seen else tuple(x.shape)}, so the gradients of the examples cannot be "
                "told apart. Leave it out of lora.target_modules."
            )
        seen.add(name)
        x, output_gradient = x.to(dtype), output_gradient.to(dtype)
        if gradient == "effective":
            A = matrix.A.detach().to(dtype)
            x = matrix.scale**2 * (x @ A.T) @ A
        add_squares_(sums[name], x, output_gradient)

    batches = [range(examples)[start : start + batch_size] for start in range(0, examples, batch_size)]
    watched = layer_gradients(list(matrices.values()), lambda matrix: partial(add, matrix), adapter=False)
    with _at_pretrained_weights(model), watched, torch.enable_grad():
        for rows in counted(batches, "squared gradients, sequence", len):
            batch = sequences[rows.start : rows.stop].to(model.device)
            seen.clear()
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            logits = widened(logits)
            targets = batch[:, 1:].flatten()
            if labels == "sampled":
                targets = _sample(logits.detach(), uniform[rows.start : rows.stop].flatten())
            nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    for total in sums.values():
        for part in encodings.parts(total).values():
            part.div_(examples * predicted)
    return Importance(
        matrices={
            name: ImportanceMatrix(
                omega=sums.pop(name),
                A=m.A.detach().clone(),
                B=torch.zeros_like(m.B),
                scale=m.scale,
                undo_cost=0.0,  # nothing moved
                base_sample=m.base_sample(),
            )
            for name, m in matrices.items()
        },
        encoding=encoding,
        lora_config=model.peft_config[next(iter(matrices.values())).adapter_name].to_dict(),
        provenance={
            "method": "squared_gradients",
            "labels": labels,
            "gradient": gradient,
            "examples": examples,
            "max_length": predicted + 1,
            "tokens": examples * predicted,
            "seed": seed,
            "base_model": str(getattr(model.config, "_name_or_path", "")),
        },
    )


def add_squares_(total: Encoded, x: Tensor, gradient: Tensor) -> None:
    """total += Σ_b G_b², G_b = Σ_t gradient[b, t] ⊗ x[b, t], in place.

    Factored sums form no (d_out, d_in) tensor (`squares.exact_sums`).

    Args:
        total: The sums so far, a (d_out, d_in) matrix.
        x: Inputs (n, T, d_in).
        gradient: Gradients of the outputs (n, T, d_out).
    """
    if isinstance(total, Factored):
        row, column = squares.exact_sums(x, gradient)
        total.row.add_(row)
        total.column.add_(column)
        return
    for x_b, gradient_b in zip(x, gradient, strict=True):
        of_example = gradient_b.T @ x_b
        total.addcmul_(of_example, of_example)


def whole_model_bytes(model: nn.Module) -> int:
    """Bytes of a float32 Fisher of every base parameter, which is how the paper counts EWC's storage (Fig. 5)."""
    return 4 * sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" not in name)


def _sample(logits: Tensor, uniform: Tensor) -> Tensor:  # (n, vocabulary), (n,) in [0, 1) → (n,)
    """Draw one label for each row from its distribution, by inverting the cumulative sum."""
    cumulated = logits.softmax(-1).cumsum(-1)
    # The last sum is 1 up to rounding; scaling by it keeps every draw inside.
    drawn = uniform.to(cumulated)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, drawn, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


@contextmanager
def _at_pretrained_weights(model: PeftModel) -> Iterator[None]:
    """Adapter off, evaluation mode, no parameter trained, a graph from the embeddings on. Restores all of it."""
    modes = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with model.disable_adapter():
            model.eval()
            model.requires_grad_(False)
            embedded = model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())
            try:
                yield
            finally:
                embedded.remove()
    finally:
        model.requires_grad_(False)  # leaving disable_adapter sets requires_grad, even of a frozen adapter
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, training in modes.items():
            module.training = training
