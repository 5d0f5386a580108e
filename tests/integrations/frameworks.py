"""What the tests of the frameworks share: the data, and the distance that the penalty shortens."""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM

from hlora import Importance, ImportancePenalty

STEPS = 4


def rows(path: Path, words: str) -> Path:
    """Instructions in the format that all three frameworks read."""
    lines = [{"instruction": f"{words} {n}", "input": "", "output": f"{n} is what {words} says."} for n in range(16)]
    path.write_text(json.dumps(lines), encoding="utf-8")
    return path


def distance(model_dir: str, adapter: Path, importance: Path) -> float:
    """Weighted distance of a saved adapter from the general one, in units of the general phase's own move."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), str(adapter))
    return float(ImportancePenalty(model, Importance.load(importance), 1.0).regularisation_loss())
