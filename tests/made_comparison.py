"""A made-up comparison as comparison.json holds it, and a made-up cost.json, for figures and the report."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

TASKS, SEEDS, TEXTS = ["piqa", "medmcqa", "qasc"], [0, 1, 2], ["wikitext", "shakespeare"]
ARMS: dict[str, tuple[str, tuple[float, ...], tuple[float, float, float]]] = {
    # method, strengths, (general NLL, answer NLL, accuracy) at a middling strength
    "Base": ("base", (), (3.35, 84.0, 0.57)),
    "LoRA(μ)": ("lora", (), (3.40, 74.0, 0.655)),
    "LoRA(ν+μ)": ("lora_after_general", (), (3.08, 74.4, 0.64)),
    "rsLoRA": ("rslora", (), (3.55, 73.5, 0.65)),
    "EWC-LoRA": ("ewc", (1.0, 10.0, 100.0), (3.28, 75.5, 0.64)),
    "HLoRA": ("hlora", (3.0, 9.0, 30.0, 100.0), (2.94, 75.6, 0.645)),
    "HLoRA float32": ("hlora", (3.0, 9.0, 30.0), (2.945, 75.7, 0.645)),
    "HLoRA w/o layer weights": ("hlora", (3.0, 9.0, 30.0), (2.96, 75.8, 0.64)),
    "HLoRA ξ 1e-6, share": ("hlora", (3.0, 9.0, 30.0), (2.93, 76.0, 0.63)),
    "HLoRA exact gradient": ("hlora", (3.0, 9.0, 30.0), (2.95, 75.5, 0.65)),
    "uniform importance": ("uniform", (3.0, 9.0, 30.0), (3.01, 75.4, 0.64)),
    "replay": ("replay", (0.05, 0.2, 0.5), (3.05, 75.0, 0.645)),
    "KL to base": ("kl", (0.1, 1.0, 10.0), (3.30, 76.0, 0.63)),
    "OSF": ("osf", (), (3.33, 78.0, 0.61)),
    "CorDA": ("corda", (), (3.36, 75.0, 0.64)),
    "LoRA on the MLP": ("mlp", (), (3.38, 73.9, 0.66)),
}
SMALL = ["Base", "LoRA(μ)", "EWC-LoRA", "HLoRA"]
"""Arms that have a result everywhere, one of each kind."""
NORMS = {
    f"model.layers.{i}.self_attn.{kind}": 0.05 + i * 0.07 * (5 if kind == "v_proj" else 1)
    for i in range(30)
    for kind in ("q_proj", "v_proj")
}
COST: dict[str, Any] = {
    "model": "smollm2-135m",
    "scale": 1 / 200,
    "command": "hlora cost configs/x.yaml",
    "notes": ["Measured at 1/200 of the paper's sequences, not extrapolated."],
    "provenance": {"hardware": "2 cores"},
    "rows": [
        {
            "method": method, "encoding": encoding, "counting": counting, "samples": samples, "epochs": epochs,
            "tokens": samples * epochs * 127, "seconds": seconds, "bytes": size, **more,
        }
        for counting, factor in (("paper", 1.0), ("equal", 0.9))
        for method, encoding, samples, epochs, seconds, size, more in (
            ("EWC-LoRA", "float32", 100, 1, 93.1, 53_084_160, {"whole_model_bytes": 538_060_032}),
            ("HLoRA", "float32", 20 if factor == 1 else 100, 5 if factor == 1 else 1, 41.0 * factor, 53_084_160,
             {"seconds_beyond_training": 0.71}),
            ("HLoRA", "factored", 20 if factor == 1 else 100, 5 if factor == 1 else 1, 39.8 * factor, 230_400,
             {"seconds_beyond_training": 0.021}),
        )
    ],
}  # fmt: skip
CONFIG = {
    "model": {"name": "smollm2-135m", "dtype": None, "device": None},
    "lora": {"rank": 8, "alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    "general": {"paths": ["data/wikitext2/valid.txt"]},
    "penalty": {"phi": 9, "phi_scale": "relative", "layer_weights": "softmax"},
}


def answers(acc: float, questions: int = 2000) -> list[int]:
    """Which questions are answered right; two models of nearly one accuracy differ in few."""
    right = round(acc * questions)
    return [1] * right + [0] * (questions - right)


def cell(arm: str, task: str, seed: int | None, strength: float | None) -> dict[str, Any]:
    """A finished cell: the more strength, the lower the general loss and the less is learned."""
    method, strengths, (general, answer, acc) = ARMS[arm]
    place = math.log10(strength / strengths[1]) if strength else 0.0
    noise = np.random.default_rng([len(arm), TASKS.index(task), 0 if seed is None else seed + 1])
    shift = TASKS.index(task) * 0.02 + (noise.normal(0, 0.006) if seed is not None else 0)
    general, answer = (
        general + shift - 0.06 * place,
        answer - 20 * TASKS.index(task) + 1.2 * place**2 + 0.8 * place + noise.normal(0, 0.3),
    )
    acc = acc - 0.1 * TASKS.index(task) - 0.01 * place + (noise.normal(0, 0.006) if seed is not None else 0)
    texts = {
        name: {
            "nll": nll, "perplexity": math.exp(nll), "bits_per_byte": nll / 3, "nll_stderr": 0.02,
            "nll_each": [nll - 0.1, nll + 0.1] * 2, "forgetting": nll - base,
        }
        for name, nll, base in (
            ("wikitext", general, 3.35), ("shakespeare", 3.45 + 0.3 * abs(general - 3.3) + noise.normal(0, 0.004), 3.4)
        )
    }  # fmt: skip
    domain = {
        "rows": 4, "answer_nll": answer, "answer_nll_stderr": 2.0, "answer_nll_each": [answer - 9, answer + 9] * 2,
        "acc": acc, "acc_stderr": 0.03, "acc_norm": acc, "acc_each": answers(acc),
    }  # fmt: skip
    steps = np.arange(1, 61)
    task_loss = 2.0 + 1.5 * np.exp(-steps / 12) + noise.normal(0, 0.12, 60)
    penalty = 0.4 * steps / 20 * np.exp(1 - steps / 20) * noise.uniform(0.8, 1.2)
    history = [{"step": int(step), "loss": loss} for step, loss in zip(steps, task_loss, strict=True)]
    if strength:
        for entry, extra in zip(history, penalty, strict=True):
            entry |= {"weighted_regularisation_loss": extra, "total_loss": entry["loss"] + extra}
    importance = {"encoding": "factored", "bytes": 230_400, "layer_norms": NORMS} if method == "hlora" else None
    return {
        "key": f"{arm}-{task}-{seed}-{strength}", "arm": arm, "method": method, "task": task, "seed": seed,
        "strength": strength, "status": "done", "error": None, "test": {"texts": texts, "domain": domain},
        "validation": None, "history": history if method != "base" else [], "importance": importance,
        "seconds": {"importance": 0.1, "train": 61.2, "evaluate": 40.0}, "peak_memory_bytes": None,
        "config": {**CONFIG, "method": method, "strength": strength, "seed": seed, "domain": {"task": task}},
    }  # fmt: skip


def undone(like: dict[str, Any], status: str, error: str) -> dict[str, Any]:
    nothing = {"test": None, "validation": None, "history": [], "importance": None, "seconds": {}}
    return {**like, **nothing, "status": status, "error": error}


def make_comparison(arms: list[str] | None = None, tasks: list[str] | None = None) -> dict[str, Any]:
    """All strengths on the first seed, the chosen one on all; CorDA cannot run, one of KL failed, one is missing."""
    arms, tasks = arms or list(ARMS), tasks or TASKS
    chosen = {arm: dict.fromkeys(tasks, (ARMS[arm][1] or (None, None))[1]) for arm in arms}
    cells = []
    for arm in arms:
        for task in tasks:
            for seed in [None] if arm == "Base" else SEEDS:
                for strength in ARMS[arm][1] or (None,):
                    if seed in (None, 0) or strength == chosen[arm][task]:
                        cells.append(cell(arm, task, seed, strength))
    for place, each in enumerate(cells):
        if each["arm"] == "CorDA":
            cells[place] = undone(each, "cannot", "CorDA needs a calibration set of 256 rows; got 40. Give more rows.")
        if (each["arm"], each["task"], each["seed"]) == ("KL to base", "qasc", 1):
            cells[place] = {**undone(each, "failed", "RuntimeError: out of memory"), "traceback": "Traceback: …"}
        if (each["arm"], each["task"], each["seed"]) == ("replay", "qasc", 2):
            cells[place] = undone(each, "missing", None)  # type: ignore[arg-type]
    return {
        "config": {**CONFIG, "output": "runs/compare"}, "command": "hlora compare configs/compare-smollm2.yaml",
        "provenance": {"versions": {"torch": "2.13.0"}, "hardware": "2 CPU cores", "parameters": 134515008},
        "model": "smollm2-135m", "arms": arms, "tasks": tasks, "seeds": SEEDS, "texts": TEXTS, "ours": "HLoRA",
        "rival": "EWC-LoRA", "unprotected": "LoRA(μ)",
        "ablation": [arm for arm in ("LoRA(ν+μ)", "HLoRA w/o layer weights", "HLoRA") if arm in arms],
        "chosen": chosen, "cells": cells,
    }  # fmt: skip
