"""`hlora.protect` on the trainers of Transformers and TRL: the gradient that it adds to each step, against dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES, Architecture
from datasets import Dataset
from dense import ALPHA, PHI, RANK, adapted, verdict
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from trl import (
    DistillationConfig,
    DistillationTrainer,
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
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

import hlora
from hlora.importance.artefact import Importance
from hlora.numerics import equations

STEPS = 3
LORA = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj", "q", "v"]}  # of Llama and of T5
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
TRIPLES = PAIRS.add_column("reference", [f" It is the number {n + 1}." for n in range(16)])
SHOWN = PROMPTS.add_column("privileged_context", ROWS["completion"])
CHATS = Dataset.from_dict(
    {
        "messages": [
            [{"role": "user", "content": question}, {"role": "assistant", "content": f"It is {n + 1}."}]
            for n, question in enumerate(QUESTIONS)
        ]
    }
)
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def _length(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(completion) % 7) for completion in completions]


_SAMPLED = {"num_generations": 2, "max_completion_length": 6, "per_device_train_batch_size": 4}
TRAINERS: dict[str, tuple[type, type, Dataset | None, dict[str, Any]]] = {
    "Trainer": (Trainer, TrainingArguments, None, {}),
    "SFT": (SFTTrainer, SFTConfig, TEXTS, {}),
    "Seq2Seq": (Seq2SeqTrainer, Seq2SeqTrainingArguments, None, {}),
    "SFT packing": (SFTTrainer, SFTConfig, TEXTS, {"packing": True, "packing_strategy": "wrapped", "max_length": 24}),
    "SFT completions": (SFTTrainer, SFTConfig, ROWS, {}),
    "SFT packing bfd": (SFTTrainer, SFTConfig, TEXTS, {"packing": True, "max_length": 64}),
    "SFT padding-free": (SFTTrainer, SFTConfig, TEXTS, {"padding_free": True, "max_length": None}),
    "SFT assistant only": (SFTTrainer, SFTConfig, CHATS, {"assistant_only_loss": True}),
    "SFT dft": (SFTTrainer, SFTConfig, TEXTS, {"loss_type": "dft"}),
    "SFT NEFTune": (SFTTrainer, SFTConfig, TEXTS, {"neftune_noise_alpha": 5}),
    "SFT label smoothing": (SFTTrainer, SFTConfig, TEXTS, {"label_smoothing_factor": 0.1}),
    "SFT finding its batch size": (SFTTrainer, SFTConfig, TEXTS, {"auto_find_batch_size": True}),
    "SFT accumulation": (SFTTrainer, SFTConfig, TEXTS, {"gradient_accumulation_steps": 2}),
    "SFT checkpointing": (SFTTrainer, SFTConfig, TEXTS, {"gradient_checkpointing": True}),
    "SFT checkpointing, reentrant": (
        SFTTrainer,
        SFTConfig,
        TEXTS,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "SFT bf16": (SFTTrainer, SFTConfig, TEXTS, {"bf16": True}),
    "SFT clipping": (SFTTrainer, SFTConfig, TEXTS, {"max_grad_norm": 0.01}),
    "SFT no clipping": (SFTTrainer, SFTConfig, TEXTS, {"max_grad_norm": 0.0}),
    "SFT evaluation": (SFTTrainer, SFTConfig, TEXTS, {"eval_strategy": "steps", "eval_steps": 2}),
    "SFT compiled": (SFTTrainer, SFTConfig, TEXTS, {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    "DPO": (DPOTrainer, DPOConfig, PAIRS, {}),
    "DPO ipo": (DPOTrainer, DPOConfig, PAIRS, {"loss_type": "ipo"}),
    "DPO precomputed": (DPOTrainer, DPOConfig, PAIRS, {"precompute_ref_log_probs": True}),
    "KTO": (KTOTrainer, KTOConfig, JUDGED, {}),
    "Reward": (RewardTrainer, RewardConfig, PAIRS, {}),
    "GRPO": (GRPOTrainer, GRPOConfig, PROMPTS, _SAMPLED),
    "GRPO beta": (GRPOTrainer, GRPOConfig, PROMPTS, {**_SAMPLED, "beta": 0.1}),
    "GRPO twice": (GRPOTrainer, GRPOConfig, PROMPTS, {**_SAMPLED, "num_iterations": 2}),
    "RLOO": (RLOOTrainer, RLOOConfig, PROMPTS, _SAMPLED),
    "ORPO": (ORPOTrainer, ORPOConfig, PAIRS, {}),
    "CPO": (CPOTrainer, CPOConfig, PAIRS, {}),
    "TPO": (TPOTrainer, TPOConfig, TRIPLES, {}),
    "Online DPO": (OnlineDPOTrainer, OnlineDPOConfig, PROMPTS, {"max_new_tokens": 6}),
    "GKD": (GKDTrainer, GKDConfig, CHATS, {"max_new_tokens": 6}),
    "Distillation": (DistillationTrainer, DistillationConfig, PROMPTS, {"max_completion_length": 6}),
    "SDFT": (SDFTTrainer, SDFTConfig, SHOWN, {"max_completion_length": 6, "num_generations": 1}),
}
_PROJECTED = {"optim_target_modules": ["lora_A", "lora_B"]}
_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW fused": {"optim": "adamw_torch_fused"},
    "SGD": {"optim": "sgd"},
    "RMSprop": {"optim": "rmsprop"},
    "Adagrad": {"optim": "adagrad"},
    "Adafactor": {"optim": "adafactor"},
    "AdamW8bit": {"optim": "adamw_bnb_8bit"},
    "AdamW, paged": {"optim": "paged_adamw_32bit"},
    "Lion8bit": {"optim": "lion_8bit"},
    "AdEMAMix": {"optim": "ademamix"},
    "AdamW of torchao, 8 bits": {"optim": "adamw_torch_8bit"},
    "AdamW of torchao, 4 bits": {"optim": "adamw_torch_4bit"},
    "GaLore": {"optim": "galore_adamw", **_PROJECTED},
    "GaLore layer-wise": {"optim": "galore_adamw_layerwise", **_PROJECTED},
    "Apollo": {"optim": "apollo_adamw", **_PROJECTED},
    "GrokAdamW": {"optim": "grokadamw"},
    "stable AdamW": {"optim": "stable_adamw"},
    "schedule-free": {"optim": "schedule_free_adamw"},
    "LOMO": {"optim": "lomo"},
    "AdaLOMO": {"optim": "adalomo"},
}
TRAINERS |= {f"SFT {name}": (SFTTrainer, SFTConfig, TEXTS, changes) for name, changes in _OPTIMIZERS.items()}


def _architecture(name: str) -> Architecture:
    return ARCHITECTURES["t5" if name == "Seq2Seq" else "llama"]


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
    built = _architecture(name).build()
    options: dict[str, Any] = {"args": arguments(**{**settings, **changes})}
    if kind is RewardTrainer:
        from transformers import LlamaForSequenceClassification

        torch.manual_seed(0)
        built = LlamaForSequenceClassification(built.config.__class__(**{**built.config.to_dict(), "num_labels": 1}))
    if kind in (GKDTrainer, DistillationTrainer):
        options["teacher_model"] = ARCHITECTURES["llama"].build()
    task = {RewardTrainer: "SEQ_CLS", Seq2SeqTrainer: "SEQ_2_SEQ_LM"}.get(kind, "CAUSAL_LM")
    config = LoraConfig(**LORA, task_type=task)
    config.modules_to_save = None
    if kind in (GRPOTrainer, RLOOTrainer, OnlineDPOTrainer):
        options["reward_funcs"] = _length
    if data is CHATS:
        tokenizer.chat_template = TEMPLATE
    if data is None:
        data = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})
    else:
        options["processing_class"] = tokenizer
        if not wrapped:
            options["peft_config"] = config
    if "eval_strategy" in changes:
        options["eval_dataset"] = data
    torch.manual_seed(1)
    model = get_peft_model(built, config) if wrapped else built
    return kind(model=model, train_dataset=data, **options)


def of_trainer(name: str, tokenizer: Any, rows: Tensor, output: Path, wrapped: bool = True) -> str:
    """Train under `protect`: it starts at θ^ν, and each step's gradient grows by that of φ·L_reg and nothing else."""
    torch.manual_seed(1)
    importance = importance_of(get_peft_model(_architecture(name).build(), LoraConfig(**LORA)), rows)
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
