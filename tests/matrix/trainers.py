"""`hlora.protect` on the trainers of Transformers and TRL: the gradient that it adds to each step, against dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES
from datasets import Dataset
from dense import ALPHA, PHI, RANK, adapted, verdict
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

import hlora
from hlora.importance.artefact import Importance
from hlora.numerics import equations

STEPS = 3
LORA = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"]}
QUESTIONS = [f"What is {n} plus one?" for n in range(16)]
TEXTS = Dataset.from_dict({"text": [f"{question} It is {n + 1}." for n, question in enumerate(QUESTIONS)]})
ROWS = Dataset.from_dict({"prompt": QUESTIONS, "completion": [f" It is {n + 1}." for n in range(16)]})
PAIRS = Dataset.from_dict(
    {"prompt": QUESTIONS, "chosen": ROWS["completion"], "rejected": [f" Who knows, {n}?" for n in range(16)]}
)
JUDGED = Dataset.from_dict(
    {"prompt": QUESTIONS, "completion": ROWS["completion"], "label": [n % 2 == 0 for n in range(16)]}
)
PROMPTS = Dataset.from_dict({"prompt": QUESTIONS})


def _length(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(completion) % 7) for completion in completions]


_SAMPLED = {"num_generations": 2, "max_completion_length": 6, "per_device_train_batch_size": 4}
TRAINERS: dict[str, tuple[type, type, Dataset | None, dict[str, Any]]] = {
    "Trainer": (Trainer, TrainingArguments, None, {}),
    "SFT": (SFTTrainer, SFTConfig, TEXTS, {}),
    "SFT packing": (SFTTrainer, SFTConfig, TEXTS, {"packing": True, "packing_strategy": "wrapped", "max_length": 24}),
    "SFT completions": (SFTTrainer, SFTConfig, ROWS, {}),
    "SFT accumulation": (SFTTrainer, SFTConfig, TEXTS, {"gradient_accumulation_steps": 2}),
    "SFT checkpointing": (SFTTrainer, SFTConfig, TEXTS, {"gradient_checkpointing": True}),
    "SFT bf16": (SFTTrainer, SFTConfig, TEXTS, {"bf16": True}),
    "SFT clipping": (SFTTrainer, SFTConfig, TEXTS, {"max_grad_norm": 0.01}),
    "SFT Adafactor": (SFTTrainer, SFTConfig, TEXTS, {"optim": "adafactor"}),
    "DPO": (DPOTrainer, DPOConfig, PAIRS, {}),
    "DPO ipo": (DPOTrainer, DPOConfig, PAIRS, {"loss_type": "ipo"}),
    "KTO": (KTOTrainer, KTOConfig, JUDGED, {}),
    "Reward": (RewardTrainer, RewardConfig, PAIRS, {}),
    "GRPO": (GRPOTrainer, GRPOConfig, PROMPTS, _SAMPLED),
    "GRPO beta": (GRPOTrainer, GRPOConfig, PROMPTS, {**_SAMPLED, "beta": 0.1}),
    "RLOO": (RLOOTrainer, RLOOConfig, PROMPTS, _SAMPLED),
}


def importance_of(model: Any, rows: Tensor) -> Importance:
    """Dense importance after two steps."""
    recorder = hlora.ImportanceRecorder(model, "float32", method="path_integral")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    recorder.attach(optimizer)
    for part in rows.split(4)[:2]:
        optimizer.zero_grad()
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
    return recorder.consolidate()


def make_trainer(name: str, tokenizer: Any, rows: Tensor, output: Path, wrapped: bool) -> Any:
    """The trainer on a fresh adapter, given by hand or by `peft_config`."""
    kind, arguments, data, changes = TRAINERS[name]
    settings = {
        "output_dir": str(output),
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    built = ARCHITECTURES["llama"].build()
    options: dict[str, Any] = {"args": arguments(**{**settings, **changes})}
    if kind is RewardTrainer:
        from transformers import LlamaForSequenceClassification

        torch.manual_seed(0)
        built = LlamaForSequenceClassification(built.config.__class__(**{**built.config.to_dict(), "num_labels": 1}))
    config = LoraConfig(**LORA, task_type="SEQ_CLS" if kind is RewardTrainer else "CAUSAL_LM")
    config.modules_to_save = None
    if kind in (GRPOTrainer, RLOOTrainer):
        options["reward_funcs"] = _length
    if kind is Trainer:
        data = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})
    else:
        options["processing_class"] = tokenizer
        if not wrapped:
            options["peft_config"] = config
    torch.manual_seed(1)
    model = get_peft_model(built, config) if wrapped else built
    return kind(model=model, train_dataset=data, **options)


def of_trainer(name: str, tokenizer: Any, rows: Tensor, output: Path, wrapped: bool = True) -> str:
    """Train under `protect`: it starts at θ^ν, and each step's gradient grows by that of φ·L_reg and nothing else."""
    torch.manual_seed(1)
    importance = importance_of(get_peft_model(ARCHITECTURES["llama"].build(), LoraConfig(**LORA)), rows)
    trainer = make_trainer(name, tokenizer, rows, output, wrapped)
    penalty = hlora.protect(trainer, importance, PHI, layer_weights="uniform", phi_scale="paper")
    if not penalty.is_at_anchor():
        return "WRONG: starts elsewhere than the general adapter"
    factors = {n: f for n, f in adapted(trainer.model).items() if n in importance.matrices}
    parameters = [parameter for f in factors.values() for parameter in f.parameters]
    general = {n: f.copies() for n, f in factors.items()}
    add, worst, calls = penalty.add_gradients_, [0.0], [0]

    def watched() -> Tensor:
        before = [p.grad.double().clone() if p.grad is not None else torch.zeros_like(p).double() for p in parameters]
        leaves = {n: [each.requires_grad_() for each in f.copies()] for n, f in factors.items()}
        value = add()
        terms = [
            equations.layer_penalty(
                importance.matrices[n].omega.double(),  # type: ignore[union-attr]
                factors[n].scale * B @ A,
                factors[n].scale * b @ a,
            )
            for (n, (A, B)), (a, b) in zip(leaves.items(), general.values(), strict=True)
        ]
        (PHI * torch.stack(terms).mean()).backward()
        added = [p.grad.double() - kept for p, kept in zip(parameters, before, strict=True)]
        expected = [leaf.grad for pair in leaves.values() for leaf in pair]
        largest = max(float(p.grad.abs().max()) for p in parameters)  # float32: what is added is rounded to that
        worst.append(max(float((a - e).abs().max()) for a, e in zip(added, expected, strict=True)) / largest)
        calls[0] += 1
        return value

    penalty.add_gradients_ = watched  # type: ignore[method-assign]
    trainer.train()
    logged = sum("regularisation_loss" in entry for entry in trainer.state.log_history)
    moved = max(float((f.copies()[1] - general[n][1]).abs().max()) for n, f in factors.items())
    if calls[0] != STEPS or logged != STEPS or moved == 0:
        return f"WRONG: {calls[0]} calls and {logged} log entries in {STEPS} steps, moved by {moved:.1e}"
    return verdict(max(worst), f"{calls[0]}/{STEPS} steps")
