"""Does a damped Kronecker form, recorded on a mixture of texts, hold more than row sums × column sums?

    python benchmarks/kronecker.py DATA OUTPUT.json

DATA is what `make data` makes. A general phase of SmolLM2-135M on WikiText (30 steps of 8×128 tokens), then QASC from
its end (60 steps of 8 questions): without a penalty, and under tr(G δ X δᵀ) for the move δ of each matrix:

- rows × columns: X and G diagonal, the sums of each sequence's squared gradients, as hlora keeps them;
- Kronecker, damping d: X the second moment of inputs, G of output gradients, plus d times their mean diagonal.

WikiText is recorded along the general phase; the mixture is half that, half Python's documentation (15×8×128 tokens),
read at its end. At strength n the penalty is n·½ nat at the end of the run without one. Measured: NLL of the answer,
nats; mean KL from the end of the general phase, nats per token, on 6 windows of 512 tokens of WikiText and of
Shakespeare, which nothing was recorded on. A run goes on from OUTPUT.json and OUTPUT.safetensors (300 MB).
"""

from __future__ import annotations

import json
import math
import pydoc_data.topics
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hlora.config.sections import LoraSettings, ModelConfig
from hlora.data.packing import pack
from hlora.model.adapters import AdaptedMatrix, adapted_matrices
from hlora.model.base import load_base
from hlora.model.layer_gradients import layer_gradients
from hlora.model.lora import attach_lora
from hlora.numerics import squares

FORMS = ("rows × columns", "Kronecker, damping 0.1", "Kronecker, damping 0", "Kronecker, damping 1")

data, output = Path(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
base, tokenizer = load_base(ModelConfig(name="smollm2-135m", device="cpu", dtype="float32"))
model = attach_lora(base, LoraSettings(), 0).eval()
matrices = adapted_matrices(model)
factors = {f"{m.name}/{part}": getattr(m, part) for m in matrices for part in "AB"}


def batches(rows: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """Eight questions each, with the answer's tokens as labels. Padding is at the end, where nothing sees it."""
    found = []
    for start in range(0, len(rows), 8):
        inputs, labels = [], []
        for row in rows[start : start + 8]:
            prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
            answer = tokenizer(f" {row['choices'][row['label']]}")["input_ids"]
            inputs.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([-100] * len(prompt) + answer))
        padded = pad_sequence(inputs, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=-100)
        found.append(dict(zip(("input_ids", "labels"), padded, strict=True)))
    return found


def train(steps: list[dict[str, Tensor]], rate: float, held: Callable[[], Tensor] | None = None) -> None:
    optimizer = torch.optim.AdamW(factors.values(), lr=rate, weight_decay=0.0)
    for n, step in enumerate(steps):
        optimizer.param_groups[0]["lr"] = rate * min((n + 1) / 5, (len(steps) - n) / (len(steps) - 5))
        loss = model(**step).loss
        (loss if held is None else loss + held()).backward()
        torch.nn.utils.clip_grad_norm_(factors.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def record(kind: str, run: Callable[[], Any]) -> None:
    def use(matrix: AdaptedMatrix, x: Tensor, g: Tensor) -> None:
        rows, columns = squares.exact_sums(x, g)
        X, G = (flat.T @ flat for flat in (x.flatten(0, 1), g.flatten(0, 1)))
        for part, value in {"X": X, "G": G, "rows": rows, "columns": columns}.items():
            key = f"{kind}/{matrix.name}/{part}"
            state[key] = state[key] + value if key in state else value

    with layer_gradients(matrices, lambda matrix: partial(use, matrix)):
        run()


def moments(text: str, matrix: str, form: str) -> tuple[Tensor, Tensor]:
    X, G, rows, columns = (state[f"{text}/{matrix}/{part}"] for part in ("X", "G", "rows", "columns"))
    if form == FORMS[0]:
        return torch.diag(columns / columns.sum()), torch.diag(rows)
    d = float(form.split()[-1])
    return X + d * X.diagonal().mean() * torch.eye(len(X)), G + d * G.diagonal().mean() * torch.eye(len(G))


def penalty(form: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """Σ tr(G δ X δᵀ), δ = s(BA − B₀A₀), from its 2r columns and rows."""
    total = torch.zeros(())
    for m in matrices:
        (X, G), A, B = form[m.name], state[f"start/{m.name}/A"], state[f"start/{m.name}/B"]
        P, Q = torch.cat([m.B, -B], 1), m.scale * torch.cat([m.A, A])
        total = total + ((P.T @ G @ P) * (Q @ X @ Q.T)).sum()
    return total


@torch.no_grad()
def log_p(text: str) -> list[Tensor]:
    return [model(input_ids=w[None]).logits[0, 63:-1].log_softmax(-1) for w in windows[text]]


@torch.no_grad()
def measure(name: str) -> None:
    nll = sum(float(model(**each).loss) * int((each["labels"] != -100).sum()) for each in test) / 160
    pairs = {text: zip(after[text], log_p(text), strict=True) for text in windows}
    kl = {text: sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in each) / 6 for text, each in pairs.items()}
    found[name] = {"answer NLL": nll, "KL": kl}
    output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(name, found[name], flush=True)


def keep(kind: str) -> None:
    state.update({f"{kind}/{key}": factor.detach().clone() for key, factor in factors.items()})


def to(kind: str) -> None:
    for key, factor in factors.items():
        factor.data.copy_(state[f"{kind}/{key}"])


windows = {t: pack(tokenizer, [(data / t / "test.txt").read_text()], 6, 512) for t in ("wikitext2", "shakespeare")}
rows, tests = ([json.loads(line) for line in (data / f"qasc/{n}.jsonl").open()] for n in ("train", "test"))
domain, test = batches(random.Random(0).sample(rows, 480)), batches(tests[:160])
found: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
kept = output.with_suffix(".safetensors")
state: dict[str, Tensor] = load_file(kept) if kept.exists() else {}  # kind/matrix/part
if not state:
    wiki = pack(tokenizer, [(data / "wikitext2/valid.txt").read_text()], 240, 128).split(8)
    topics = pydoc_data.topics.topics
    python = pack(tokenizer, [topics[name] for name in sorted(topics)], 120, 128).split(8)
    record("WikiText", lambda: train([{"input_ids": x, "labels": x} for x in wiki], 2e-4))
    keep("start")
    record("half Python", lambda: [model(input_ids=x, labels=x).loss.backward() for x in python])
    model.zero_grad()
    for key in [key for key in state if key.startswith("half Python/")]:
        state[key] = 2 * state[key] + state[key.replace("half Python", "WikiText")]
    train(domain, 8e-4)
    keep("end")
    save_file(state, kept)
to("start")
after = {text: log_p(text) for text in windows}
measure("after the general phase")
to("end")
measure("no penalty")
for strength in (10, 100):
    for form_name in FORMS:
        for text in ("WikiText", "half Python"):
            name = f"{form_name}, {text}, ×{strength}"
            if name not in found:
                form = {m.name: moments(text, m.name, form_name) for m in matrices}
                to("end")
                phi = 0.5 * strength / float(penalty(form).detach())
                to("start")
                train(domain, 8e-4, lambda form=form, phi=phi: phi * penalty(form))
                measure(name)
print("| penalty | NLL; drift on WikiText, Shakespeare: ×10 | ×100 | at NLL 9.4 |\n|---|---|---|---|")
for form_name in FORMS:
    for text in ("WikiText", "half Python"):
        ends = [found[f"{form_name}, {text}, ×{strength}"] for strength in (10, 100)]
        nll = [each["answer NLL"] for each in ends]
        share = (9.4 - nll[0]) / (nll[1] - nll[0])
        drift = [[each["KL"][of] for each in ends] for of in windows]
        between = [math.exp((1 - share) * math.log(x) + share * math.log(y)) for x, y in drift]  # straight in log drift
        cells = [f"{n:.3f}, " + ", ".join(f"{kl:.4f}" for kl in kls) for n, *kls in zip(nll, *drift, strict=True)]
        print(f"| {form_name}, {text} |", " | ".join([*cells, ", ".join(f"{kl:.4f}" for kl in between)]), "|")
