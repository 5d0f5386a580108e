"""Other ways to forget less, to compare with: each trains on the domain with the budget, data and order of the rest.

Every method is `method(job, strength) -> (tuned model, losses)`, where `strength` is what a grid searches, and raises
CannotRun when it does not work on the job's model. Learning rate, steps and batches are those of training.common and
training.tune, unless the method says otherwise.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, OSFConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.osf import OSFModel
from peft.tuners.osf.layer import OSFLayer
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.pytorch_utils import Conv1D

from hlora.errors import CannotRun, ConfigError, first_line
from hlora.models import attach_lora
from hlora.pipeline import History, Job
from hlora.trainer import sft_arguments, train

if TYPE_CHECKING:
    from trl import SFTTrainer

ALTERS_BASE = frozenset({"corda"})
"""Methods that leave `job.base` with other weights, also when they raise: load it again before it is used again."""

OSF_LEARNING_RATE = 0.5
"""OSF's learning rate to LoRA's: 5e-5 to 1e-4 in PEFT's method_comparison/MetaMathQA."""

CORDA_SAMPLES = 256
"""General texts that the covariance is taken from (PEFT's documentation of CorDA)."""

_MLP_NAMES = {"mlp", "feed_forward", "ffn"}
_TOKENS_AT_ONCE = 512  # rows of logits in float32: 100 MB at a vocabulary of 49,152


def replay(job: Job, strength: float | None) -> tuple[PeftModel, History]:
    """LoRA on the domain with general text mixed in. strength: share p of the rows that is general, 0 < p < 1.

    All domain rows are kept and general ones added, D·p/(1 − p) to D, each as long as the mean domain row in tokens.
    The steps stay those of the unmixed rows, so of what is seen a share p is general instead of domain. All tokens of a
    general row count in the loss, of a domain row those of the answer: the share of loss terms is larger than p.
    """
    p = _between_0_and_1(strength, "replay", "the share of general rows")
    domain = job.domain.dataset()
    arguments = sft_arguments(job.output, _arguments(job), job.config.seed)
    length = _mean_tokens(domain, job.tokenizer)
    if arguments.max_length is not None:
        length = min(length, arguments.max_length)
    count = max(1, round(len(domain) * p / (1 - p)))
    pieces = _pieces(job.general.train, job.tokenizer, length, count, job.config.seed)
    texts = [str(job.tokenizer.decode(pieces[n % len(pieces)])) for n in range(count)]  # again, where the text is short
    mixed = concatenate_datasets([domain, Dataset.from_list([_general_row(domain, text) for text in texts])])
    steps = arguments.max_steps
    if steps <= 0:
        batches = math.ceil(len(domain) / (arguments.train_batch_size * arguments.world_size))
        steps = math.ceil(arguments.num_train_epochs * math.ceil(batches / arguments.gradient_accumulation_steps))
    model = attach_lora(job.base, job.config.lora, job.config.seed)
    return model, _train(job, model, "replay", dataset=mixed, max_steps=steps)


def kl_to_base(job: Job, strength: float | None) -> tuple[PeftModel, History]:
    """LoRA under L_task + β · KL(p_base ‖ p_model). strength: β ≥ 0, nats per token to nats per token.

    The divergence is that of the next-token distributions, over the whole vocabulary, mean over the tokens of the
    domain batch (prompts too, padding not); under gradient accumulation the mean of its parts' means. p_base is the
    model with its adapter off. `loss` in the history is the task's, as for ImportancePenalty.

    A step reads each batch twice, and keeps 512 rows of logits at a time.

    Raises CannotRun when the output layer is trained, or the model changes its logits after it (Gemma 2, Cohere).
    """
    if strength is None or strength < 0:
        raise ConfigError(f"kl_to_base: expected a strength β of 0 or more, got {strength}")
    model = attach_lora(job.base, job.config.lora, job.config.seed)
    _check_head(model, job.tokenizer)
    return model, _train(job, model, "kl_to_base", trainer_class=kl_trainer(float(strength)))


def osf(job: Job, strength: float | None) -> tuple[PeftModel, History]:
    """Orthogonal subspace fine-tuning, PEFT's. strength: share of each matrix' singular directions kept, 0 < s < 1.

    The s·min(out, in) largest singular directions of each of lora.target_modules are frozen, and gradients projected
    off them; the others are trained in full, at OSF_LEARNING_RATE of the configured learning rate. Not low-rank: at
    s = 0.5 SmolLM2-135M trains 12 M numbers on q_proj and v_proj where LoRA of rank 8 trains 0.46 M. What is frozen is
    the gradient only: AdamW rescales it by element, and after six steps of that model on PIQA the part of a matrix'
    change in the frozen directions had 0.25 of its norm (mean over matrices; 0.71 would be chance).

    Raises CannotRun for a quantised model and for matrices that are not nn.Linear (Conv1D of GPT-2).
    """
    share = _between_0_and_1(strength, "osf", "the share of singular directions kept")
    _check_not_quantised(job.base, "OSF")
    set_seed(job.config.seed)
    config = OSFConfig(effective_rank=share, target_modules=job.config.lora.target_modules, task_type="CAUSAL_LM")
    model = _adapt(job.base, config, "OSF")
    assert isinstance(model.base_model, OSFModel)
    for name in model.base_model.targeted_module_names:
        module = model.base_model.model.get_submodule(name)
        if not isinstance(module, OSFLayer):
            model.unload()
            raise CannotRun(f"OSF works on nn.Linear only, and {name} is a {type(module).__name__}")
    rate = sft_arguments(job.output, _arguments(job), job.config.seed).learning_rate
    return model, _train(job, model, "osf", learning_rate=OSF_LEARNING_RATE * rate)


def corda(job: Job, strength: float | None) -> tuple[PeftModel, History]:
    """CorDA in its knowledge-preserving mode, PEFT's. No strength.

    LoRA that starts from the r directions of each matrix that matter least to general text, by the singular values of
    W·C with C the covariance of the layer's inputs; the matrix keeps the rest. C is taken from CORDA_SAMPLES pieces of
    the general text, of hidden_size/2 tokens each, so 128 tokens for each input dimension as PEFT advises: for
    SmolLM2-135M a forward pass over 74,000 tokens before training starts.

    Changes the weights of `job.base` (see ALTERS_BASE).

    Raises CannotRun for a quantised model and where PEFT cannot decompose a matrix (a singular covariance).
    """
    settings = job.config.lora
    _check_not_quantised(job.base, "CorDA")
    set_seed(job.config.seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        use_rslora=settings.rslora,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm"),
        task_type="CAUSAL_LM",
    )
    text_config = job.base.config.get_text_config()
    length = min(text_config.hidden_size // 2, getattr(text_config, "max_position_embeddings", None) or math.inf)
    pieces = _pieces(job.general.train, job.tokenizer, length, CORDA_SAMPLES, job.config.seed)

    def read_general_text() -> None:
        for piece in pieces:  # without the output layer, a fifth of the work
            job.base.base_model(input_ids=torch.tensor([piece], device=job.base.device), use_cache=False)

    try:
        preprocess_corda(job.base, config, run_model=read_general_text)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        raise CannotRun(f"CorDA cannot decompose the matrices of this model ({first_line(error)})") from None
    model = _adapt(job.base, config, "CorDA")
    return model, _train(job, model, "corda")


def mlp(job: Job, strength: float | None) -> tuple[PeftModel, History]:
    """LoRA on the MLP's matrices in place of lora.target_modules, at the same rank. No strength.

    Raises CannotRun when no linear layer lies in a module named mlp, feed_forward or ffn.
    """
    names = [
        name
        for name, module in job.base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and _MLP_NAMES.intersection(name.split("."))
    ]
    if not names:
        raise CannotRun(f"no linear layer of this model lies in a module named {', '.join(sorted(_MLP_NAMES))}")
    settings = job.config.lora.model_copy(update={"target_modules": names})
    model = attach_lora(job.base, settings, job.config.seed)
    return model, _train(job, model, "mlp")


class _SummedKL(torch.autograd.Function):
    """Σ over tokens of KL(softmax(head(reference)) ‖ softmax(head(hidden))), its gradient for `hidden` beside it.

    The gradient for the logits is q − p, so that of each part is known as soon as the part is, and no logits stay.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, reference: Tensor, head: nn.Linear) -> Tensor:
        precision = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=precision, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), _TOKENS_AT_ONCE):
            part = slice(start, start + _TOKENS_AT_ONCE)
            log_p = log_softmax(head(reference[part]).to(precision), dim=-1)
            log_q = log_softmax(head(hidden[part]).to(precision), dim=-1)
            p = log_p.exp()
            total += torch.sum(p * (log_p - log_q))
            gradient[part] = ((log_q.exp_() - p).to(head.weight.dtype) @ head.weight).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None


def summed_kl(hidden: Tensor, reference: Tensor, head: nn.Linear) -> Tensor:
    """Σ_t KL(p_t ‖ q_t) in nats, p = softmax(head(reference)) and q = softmax(head(hidden)); a scalar.

    hidden, reference: last hidden states (tokens, hidden size). Differentiable in `hidden` alone: the head is frozen.
    """
    return _SummedKL.apply(hidden, reference, head)


def kl_trainer(beta: float) -> type[SFTTrainer]:
    """An SFTTrainer whose loss is the task's plus beta times the divergence from the model with its adapter off."""
    from trl import SFTTrainer

    class KLTrainer(SFTTrainer):
        def compute_loss(
            self,
            model: Any,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Tensor | int | None = None,
        ) -> Any:
            if not model.training:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            peft_model = self.accelerator.unwrap_model(model)
            backbone = peft_model.get_base_model().base_model
            head = peft_model.get_output_embeddings()
            reference = _hidden_states_of_base(peft_model, backbone, inputs)
            seen: list[Tensor] = []
            hook = backbone.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
            try:
                loss = super().compute_loss(model, inputs, False, num_items_in_batch)
            finally:
                hook.remove()
            has_next = _has_next(inputs)
            kl = summed_kl(seen[0][:, :-1][has_next], reference[:, :-1][has_next], head) / has_next.sum().clamp(min=1)
            self.divergences = [*getattr(self, "divergences", []), kl.detach()]
            # Trainer leaves the division by the accumulation to a loss that is told the number of items.
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            return loss + beta * kl / steps

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs and getattr(self, "divergences", []):
                value = float(torch.stack(self.divergences).mean())
                self.divergences = []
                logs["regularisation_loss"] = value
                logs["weighted_regularisation_loss"] = beta * value
                logs["total_loss"] = logs["loss"]
                logs["loss"] -= beta * value
            super().log(logs, start_time)

    return KLTrainer


@torch.no_grad()
def _hidden_states_of_base(model: PeftModel, backbone: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Last hidden states (rows, tokens, hidden size) with the adapter and all dropout off."""
    model.eval()
    with model.disable_adapter():
        states = backbone(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
    model.train()
    return states.last_hidden_state


def _has_next(inputs: dict[str, Any]) -> Tensor:
    """Whether a next token follows, for every token but the row's last: (rows, tokens − 1)."""
    mask = inputs.get("attention_mask")
    return (torch.ones_like(inputs["input_ids"]) if mask is None else mask)[:, 1:].bool()


@torch.no_grad()
def _check_head(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """That logits are the frozen output layer's product and no more, as `summed_kl` takes them."""
    base: Any = model.get_base_model()
    head = model.get_output_embeddings()
    if any(parameter.requires_grad for parameter in head.parameters()):
        raise CannotRun("KL to the base model needs a frozen output layer; take it out of lora.target_modules")
    ids = torch.tensor([tokenizer("A short text.")["input_ids"]], device=model.device)
    logits = base(input_ids=ids, use_cache=False).logits
    product = head(base.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(logits.float(), product.float(), rtol=1e-2, atol=1e-2):
        raise CannotRun(
            "KL to the base model needs logits that come straight from the output layer; this model's do not"
        )


def _arguments(job: Job) -> dict[str, Any]:
    return job.config.training.of_tune()


def _train(
    job: Job,
    model: PeftModel,
    name: str,
    dataset: Dataset | None = None,
    trainer_class: type[SFTTrainer] | None = None,
    **changes: Any,
) -> History:
    """Train on `dataset`, or the domain, with the arguments of the domain phase but for `changes`."""
    rows = job.domain.dataset() if dataset is None else dataset
    arguments = {**_arguments(job), **changes}
    logs = job.output / "logs" / name
    return train(model, job.tokenizer, rows, logs, arguments, job.config.seed, trainer_class=trainer_class)


def _adapt(base: PreTrainedModel, config: PeftConfig, method: str) -> PeftModel:
    try:
        model = get_peft_model(base, config)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise CannotRun(f"PEFT's {method} does not take this model ({first_line(error)})") from None
    assert isinstance(model, PeftModel)
    return model


def _check_not_quantised(base: PreTrainedModel, method: str) -> None:
    if getattr(base, "is_quantized", False):
        raise CannotRun(f"{method} decomposes the weights themselves, and those of this model are quantised")


def _between_0_and_1(strength: float | None, method: str, meaning: str) -> float:
    if strength is None or not 0 < strength < 1:
        raise ConfigError(f"{method}: expected a strength between 0 and 1, {meaning}; got {strength}")
    return float(strength)


def _pieces(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int
) -> list[list[int]]:
    """Up to `count` pieces of `length` token ids cut from the documents, in an order that the seed gives."""
    order = random.Random(seed).sample(documents, len(documents))
    pieces: list[list[int]] = []
    for document in order:
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        whole = range(0, max(len(ids) - length, 0) + 1, length)  # a document shorter than `length` is one piece
        pieces += [ids[start : start + length] for start in whole if ids]
        if len(pieces) >= count:
            break
    return pieces[:count]


def _mean_tokens(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> int:
    """Mean length of the rows in tokens, prompt and completion, chat templates left out; at least 1."""
    texts = [_text(row["prompt"]) + _text(row["completion"]) for row in rows]
    return max(1, round(sum(map(len, tokenizer(texts)["input_ids"])) / len(texts)))


def _text(part: str | list[dict[str, str]]) -> str:
    return part if isinstance(part, str) else "\n".join(message["content"] for message in part)


def _general_row(domain: Dataset, text: str) -> dict[str, Any]:
    """As TRL reads it: a completion of nothing; among chat rows, the answer to an empty message."""
    if isinstance(domain[0]["prompt"], str):
        return {"prompt": "", "completion": text}
    return {
        "prompt": [{"role": "user", "content": ""}],
        "completion": [{"role": "assistant", "content": text}],
    }
