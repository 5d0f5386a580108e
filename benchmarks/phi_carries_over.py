"""Does a relative φ carry over between run lengths, adapters and models, where a raw φ does not?

    python benchmarks/phi_carries_over.py GENERAL.txt HELD_OUT.txt QUESTIONS.jsonl [--method path_integral]

For each setting: one general phase, which records the importance, then the same domain phase unprotected, with
φ_relative (1 for squared gradients, 9 for a path integral), and with the raw φ of Eq. 16 that equals it in the first
setting. Reported: the raw φ that φ_relative stands for, and two measures on held-out general text after each domain
phase, in nats per token and as a share of the unprotected phase's: the loss that comes back, and the drift
KL(after the general phase ‖ after the domain phase). A φ carries over if its share stays alike from row to row.

The small Llama (2 layers of 64) is trained here, from scratch, on the first half of GENERAL: a model unlike SmolLM2 in
size, depth and quality. Layer weights of a path integral are norm shares, since the softmax of Eq. 15 changes with ξ by
itself (docs/equations.md); those of squared gradients are the default, roots. A setting takes some minutes on one
thread; finished ones are kept in --output, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hlora import Importance, ImportancePenalty, ImportanceRecorder
from hlora.config.sections import EvaluationConfig, ModelConfig
from hlora.data.rows import read_rows
from hlora.data.tasks import read_example
from hlora.evaluation.likelihood import Reference, scored_logits, text_likelihood
from hlora.importance.recorder import Method
from hlora.model.base import load_base
from hlora.system.choices import LayerWeights, PhiScale
from hlora.system.files import write_text

LR, ROWS, TOKENS = 8e-4, 2, 128
METHODS: dict[str, tuple[float, LayerWeights]] = {
    "squared_gradients": (1.0, "root"),
    "path_integral": (9.0, "norm_share"),
}


@dataclass
class Setting:
    name: str
    steps: int = 50
    xi: float = 1e-3
    rank: int = 8
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    small: bool = False


SETTINGS = (
    Setting("reference: 50 steps, r 8, q v"),
    Setting("ξ 1e-5 in place of 1e-3", xi=1e-5),  # squared gradients have no ξ
    Setting("25 steps", steps=25),
    Setting("100 steps", steps=100),
    Setting("r 16, q k v o", rank=16, targets=("q_proj", "k_proj", "v_proj", "o_proj")),
    Setting("small Llama", small=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("general", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("questions")
    parser.add_argument("--method", choices=METHODS, default="squared_gradients")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--domain-steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("runs/phi_carries_over.json"))
    options = parser.parse_args()

    base, tokenizer = load_base(ModelConfig(name=options.model))
    text = options.general.read_text(encoding="utf-8")
    held_out = options.held_out.read_text(encoding="utf-8")
    general = tokenizer(text, return_tensors="pt")["input_ids"][0]
    questions = [read_example("multiple_choice", r) for r in list(read_rows(options.questions).kept.values())[:2000]]
    domain = [_tokens(tokenizer, example.prompt, f" {example.answer}{tokenizer.eos_token}") for example in questions]
    small = _small_llama(base.config.vocab_size, general)
    evaluation = EvaluationConfig(max_tokens=2048, window=TOKENS, stride=TOKENS - 1)

    phi, layer_weights = METHODS[options.method]
    rows: list[dict[str, Any]] = json.loads(options.output.read_text()) if options.output.exists() else []
    raw = rows[0]["raw"] if rows else None
    for setting in SETTINGS:
        unused = setting.xi != SETTINGS[0].xi and options.method == "squared_gradients"
        if unused or setting.name in [row["setting"] for row in rows]:
            continue
        started = time.perf_counter()
        torch.manual_seed(0)  # of LoRA's A
        model = get_peft_model(
            copy.deepcopy(small) if setting.small else base,
            LoraConfig(
                r=setting.rank, lora_alpha=4 * setting.rank, target_modules=list(setting.targets), task_type="CAUSAL_LM"
            ),
        )
        importance = record(model, general, setting, options.method)
        references = {"from_general": kept_predictions(model)}
        before = text_likelihood(model, tokenizer, held_out, evaluation, references=references)["nll"]
        unit = ImportancePenalty(model, importance, 1.0, layer_weights=layer_weights).unit
        raw = phi / unit if raw is None else raw
        lost, drift = {}, {}
        arms: tuple[tuple[str, float, PhiScale], ...] = (
            ("unprotected", 0.0, "paper"),
            ("relative", phi, "relative"),
            ("raw", raw, "paper"),
        )
        for arm, strength, scale in arms:
            importance.load_adapter_into(model)
            penalty = ImportancePenalty(model, importance, strength, layer_weights=layer_weights, phi_scale=scale)
            tune(model, domain, penalty, options.domain_steps)
            found = text_likelihood(model, tokenizer, held_out, evaluation, references=references)
            lost[arm], drift[arm] = found["nll"] - before, found["kl_from_general"]
        model.unload()
        row = {"setting": setting.name, "phi_relative_is_raw": phi / unit, "lost": lost, "drift": drift, "raw": raw}
        rows.append(row)
        print(f"{time.perf_counter() - started:.0f} s, {row}", file=sys.stderr)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.output, json.dumps(rows, indent=1))
    print(table(rows, phi))


def record(model: Any, tokens: Tensor, setting: Setting, method: Method) -> Importance:
    recorder = ImportanceRecorder(model, method=method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    for batch, _ in zip(batches(tokens), range(setting.steps), strict=False):
        model(input_ids=batch, labels=batch).loss.backward()
        with recorder.step(LR):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad()
    return recorder.consolidate(setting.xi)


def kept_predictions(model: Any) -> Reference:
    """What the model predicts as it is when a sequence is first asked for: here at the end of the general phase."""
    kept: dict[tuple[int, ...], list[Tensor]] = {}

    def reference(sequences: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        key = tuple(torch.cat(list(sequences)).tolist())
        if key not in kept:
            kept[key] = [row.clone() for row in scored_logits(model, sequences, counts)]
        return kept[key]

    return reference


def tune(model: Any, rows: list[tuple[list[int], int]], penalty: ImportancePenalty, steps: int) -> None:
    draw = random.Random(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    for _ in range(steps):
        chosen = draw.sample(rows, 16)
        width = max(len(ids) for ids, _ in chosen)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in chosen])
        position = torch.arange(width)
        scored = torch.stack([(position >= prompt) & (position < len(row)) for row, prompt in chosen])
        loss = model(input_ids=ids, labels=ids.masked_fill(~scored, -100)).loss + penalty()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def batches(tokens: Tensor) -> Iterator[Tensor]:  # (ROWS, TOKENS)
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(0, len(tokens) - TOKENS, (ROWS,), generator=generator)
        yield torch.stack([tokens[start : start + TOKENS] for start in starts])


def table(rows: list[dict[str, Any]], phi: float) -> str:
    arms = ("unprotected", f"φ_relative {phi:g}", "raw φ of row 1")
    heads = ["setting", f"raw φ of φ_relative {phi:g}"]
    heads += [f"{what}, {arm}" for what in ("comes back", "drift") for arm in arms]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        shown = []
        for name in ("lost", "drift"):
            found = row[name]
            shown.append(f"{found['unprotected']:+.4f}")
            shown += [
                f"{found[arm]:+.4f} ({100 * found[arm] / found['unprotected']:.0f} %)" for arm in ("relative", "raw")
            ]
        lines.append(f"| {row['setting']} | {row['phi_relative_is_raw']:.3g} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _tokens(tokenizer: Any, prompt: Any, answer: str) -> tuple[list[int], int]:
    return tokenizer(prompt + answer)["input_ids"], len(tokenizer(prompt)["input_ids"])


def _small_llama(vocabulary: int, tokens: Tensor) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch, _ in zip(batches(tokens[: len(tokens) // 2]), range(150), strict=False):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False).eval()


if __name__ == "__main__":
    main()
