"""The numbers of the paper's tables, to stand beside ours."""

from __future__ import annotations

import re

PAPER: dict[str, dict[str, dict[str, tuple[float, float]]]] = {
    "llama-3.2-3b": {
        "Base": {"sciq": (4.94, 95.10), "piqa": (4.94, 48.53), "medmcqa": (4.94, 18.50)},
        "LoRA(μ)": {"sciq": (5.05, 96.20), "piqa": (5.43, 48.75), "medmcqa": (5.04, 53.69)},
        "LoRA(ν+μ)": {"sciq": (5.31, 96.10), "piqa": (5.58, 46.91), "medmcqa": (5.15, 53.12)},
        "rsLoRA": {"sciq": (5.28, 96.50), "piqa": (5.71, 47.50), "medmcqa": (5.24, 51.92)},
        "EWC-LoRA": {"sciq": (4.88, 96.30), "piqa": (4.98, 48.45), "medmcqa": (4.79, 56.39)},
        "HLoRA": {"sciq": (4.64, 97.10), "piqa": (4.90, 51.14), "medmcqa": (4.64, 55.80)},
        "HLoRA w/o layer weights": {"sciq": (4.75, 96.80), "piqa": (4.96, 49.70), "medmcqa": (4.74, 54.41)},
    },
    "gpt-j-6b": {
        "Base": {"sciq": (3.28, 91.60), "piqa": (3.28, 49.13), "medmcqa": (3.28, 21.30)},
        "LoRA(μ)": {"sciq": (3.43, 96.50), "piqa": (3.54, 50.16), "medmcqa": (3.49, 38.35)},
        "LoRA(ν+μ)": {"sciq": (3.39, 96.20), "piqa": (3.52, 49.51), "medmcqa": (3.37, 33.66)},
        "rsLoRA": {"sciq": (3.50, 96.20), "piqa": (3.65, 49.62), "medmcqa": (3.35, 35.69)},
        "EWC-LoRA": {"sciq": (3.38, 96.10), "piqa": (3.47, 49.40), "medmcqa": (3.38, 36.48)},
        "HLoRA": {"sciq": (3.35, 96.80), "piqa": (3.40, 50.49), "medmcqa": (3.34, 36.10)},
        "HLoRA w/o layer weights": {"sciq": (3.36, 96.30), "piqa": (3.41, 49.95), "medmcqa": (3.35, 35.62)},
    },
}
"""The paper's Tables 1 and 2: model → arm → task → (perplexity on the Pile, accuracy in %)."""


def published_numbers(model: str) -> dict[str, dict[str, tuple[float, float]]]:
    """The paper's numbers for a model, by its name anywhere in a path; a model made from it is another."""
    for name, numbers in PAPER.items():
        if re.search(rf"(?<![\w.]){re.escape(name)}(?![-\w.])", model.lower().replace("--", "/")):
            return numbers
    return {}
