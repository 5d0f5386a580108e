"""EWC-LoRA's importance: the diagonal Fisher information of the adapted matrices (Kirkpatrick et al. 2017).

Xiang et al. 2023, *Language Models Meet World Models*, hold a LoRA update near the pretrained weights with it:
λ Σ_i F_i (sBA)_i², here `ImportancePenalty(model, importance, phi=λ, layer_weights="sum", phi_scale="paper")`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from hlora import encodings
from hlora.adapters import AdaptedMatrix, adapted_matrices
from hlora.encodings import Encoded, Factored
from hlora.errors import AdapterError, DataError
from hlora.importance import Importance, ImportanceMatrix


def fisher_information(
    model: PeftModel,
    tokenizer: Any,
    documents: list[str],
    examples: int,
    max_length: int,
    seed: int,
    batch_size: int = 8,
    encoding: str = "float32",
) -> Importance:
    """Fisher information of the adapted matrices on general text: `pack`, then `fisher_of_sequences`.

    Raises DataError when the text is too short for so many examples, AdapterError as `fisher_of_sequences` does.
    """
    sequences = pack(tokenizer, documents, examples, max_length)
    return fisher_of_sequences(model, sequences, seed, batch_size, encoding)


def pack(tokenizer: Any, documents: list[str], examples: int, max_length: int) -> Tensor:  # (examples, max_length)
    """The first `examples` sequences of `max_length` token ids of the documents, joined by the end token.

    Raises DataError that says how many sequences the text has when they are too few.
    """
    if examples < 1 or max_length < 2:
        raise DataError(f"expected at least 1 sequence of at least 2 tokens, got {examples} of {max_length}")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    wanted, ids = examples * max_length, []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + end
        if len(ids) >= wanted:
            return torch.tensor(ids[:wanted]).view(examples, max_length)
    raise DataError(
        f"the general text has {len(ids) // max_length} sequences of {max_length} tokens, expected {examples}. "
        "Give more text in general.paths, or ask for fewer or shorter sequences."
    )


def fisher_of_sequences(
    model: PeftModel,
    sequences: Tensor,  # (examples, length) token ids
    seed: int,
    batch_size: int = 8,
    encoding: str = "float32",
) -> Importance:
    """F = E_b[(∂ Σ_t log p(ŷ_bt | x_b,<t) / ∂W)²] / T at the pretrained weights W, ŷ_bt drawn from the model itself.

    T is the predicted tokens of a sequence, length − 1. Given the true prefix the scores of two positions do not
    correlate, so the squared sum over a sequence is an unbiased estimate of the sum of squares, and ½ Σ F δ² is the
    second-order KL divergence that a change δ of W makes, diagonal part, in nats a token: the unit of λ.

    seed: of the sampled labels; they do not depend on `batch_size`. encoding: what the result is kept in. The sum is
    float32 (or wider) and dense in any case, and memory beyond it is one matrix and one batch's activations.
    The result is anchored at the adapter's A and B = 0, W itself, and the adapter's state does not matter to it. So
    its undo_cost is 0, and a penalty needs phi_scale "paper".

    Raises AdapterError without LoRA, or where a layer's input keeps no example apart (experts of a mixture).
    """
    matrices = adapted_matrices(model, unprotected="warn")
    encodings.zeros(encoding, 1, 1, torch.device("cpu"))  # an unknown encoding is refused now
    fisher = {m.name: torch.zeros(m.B.shape[0], m.A.shape[1], dtype=_wide(m.A), device=m.A.device) for m in matrices}
    examples, predicted = sequences.shape[0], sequences.shape[1] - 1
    uniform = torch.rand(examples, predicted, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def add_squares(name: str, x: Tensor, gradient: Tensor) -> None:
        total = fisher[name]
        for x_b, gradient_b in zip(x.to(total.dtype), gradient.to(total.dtype), strict=True):
            of_example = gradient_b.T @ x_b  # Σ_t gradient[t] ⊗ x[t], (d_out, d_in)
            total.addcmul_(of_example, of_example)

    batches = range(0, examples, batch_size)
    steps = track(batches, description="Fisher information", transient=True, console=Console(stderr=True))
    with _at_pretrained_weights(model), torch.enable_grad():
        for start in steps:
            batch = sequences[start : start + batch_size].to(model.device)
            with _output_gradients(matrices, len(batch), add_squares):
                logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
                logits = logits.to(_wide(logits))
                labels = _sample(logits.detach(), uniform[start : start + batch_size].flatten())
                nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    return Importance(
        matrices={
            m.name: ImportanceMatrix(
                omega=_encode(fisher.pop(m.name).div_(examples * predicted), encoding),
                A=m.A.detach().clone(),
                B=torch.zeros_like(m.B),
                scale=m.scale,
                undo_cost=0.0,
                base_sample=m.base_sample(),
            )
            for m in matrices
        },
        encoding=encoding,
        lora_config=model.peft_config[matrices[0].adapter_name].to_dict(),
        provenance={
            "method": "ewc",
            "examples": examples,
            "max_length": predicted + 1,
            "tokens": examples * predicted,
            "seed": seed,
            "base_model": str(getattr(model.config, "_name_or_path", "")),
        },
    )


def whole_model_bytes(model: nn.Module) -> int:
    """Bytes of a float32 Fisher of every base parameter, as the paper counts EWC's storage (Fig. 5)."""
    return 4 * sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" not in name)


def _sample(logits: Tensor, uniform: Tensor) -> Tensor:  # (n, vocabulary), (n,) in [0, 1) → (n,)
    """One label a row from its distribution, by the inverse of its cumulative sum."""
    cumulated = logits.softmax(-1).cumsum(-1)
    # The last sum is 1 up to rounding; scaled by it, no draw falls beyond.
    drawn = uniform.to(cumulated)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, drawn, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


@contextmanager
def _at_pretrained_weights(model: PeftModel) -> Iterator[None]:
    """Adapter off, evaluation mode, no parameter trained; all as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with model.disable_adapter():
            model.eval()
            model.requires_grad_(False)
            yield
    finally:
        model.requires_grad_(False)  # leaving disable_adapter makes the active adapter trained, also a frozen one
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, training in modes.items():
            module.training = training


@contextmanager
def _output_gradients(
    matrices: list[AdaptedMatrix], examples: int, use: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Calls use(name, input, gradient of the output) for each base layer during the backward pass.

    Input (examples, tokens, d_in), gradient (examples, tokens, d_out).
    """
    seen: set[str] = set()

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def after_forward(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            x = arguments[0].detach()
            if x.dim() != 3 or len(x) != examples or name in seen:
                raise AdapterError(
                    f"{name}: expected one input of shape ({examples}, tokens, d_in) a forward pass, got "
                    f"{'a second one' if name in seen else tuple(x.shape)}, so the gradients of the examples cannot be "
                    "told apart. Leave it out of lora.target_modules."
                )
            seen.add(name)
            if not output.requires_grad:  # the first adapted layers: nothing below them is trained
                output.requires_grad_()
            output.register_hook(lambda gradient: use(name, x, gradient))

        return after_forward

    handles = [m.module.get_base_layer().register_forward_hook(watch(m.name)) for m in matrices]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _encode(dense: Tensor, encoding: str) -> Encoded:
    if encoding == "factored":
        return Factored(dense.sum(1), dense.sum(0))
    return dense.to(torch.bfloat16) if encoding == "bfloat16" else dense


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
