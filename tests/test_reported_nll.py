"""The answer NLL that a run reports is the one computed by hand, for each family of chat templates.

By hand: plain Transformers and PEFT on a text that this file writes itself, not on a rendered template.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from conftest import Invoke
from made_tokenizers import Adds, Kind, made_model, made_tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

TRAIN, TEST = range(12), range(40, 46)
FAMILIES: dict[str, tuple[Kind, Adds, str, str, str]] = {
    # the tokenizer; what stands before the answer; the answer; what ends it, which is trained but not scored
    "qwen": (
        "bytes",
        "neither",
        "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
        "{answer}",
        "<|im_end|>\n",
    ),
    "mistral": ("pieces", "bos", "<bos>[INST] {question} [/INST]", " {answer}", "<eos>"),
    "gemma": (
        "pieces",
        "bos",
        "<bos><start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n",
        "{answer}",
        "<end_of_turn>\n",
    ),
    "llama3": (
        "bytes",
        "bos",
        "<bos><|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "{answer}",
        "<|eot_id|>",
    ),
}


def turns(number: int) -> tuple[str, str]:
    return f"What is {number} plus one?", f"It is {number + 1},\n  {'and so on ' * (number % 3)}so."


def by_hand(model: Any, tokenizer: Any, family: str) -> list[float]:
    """−log p of the answer of each test row, summed over its tokens, in nats."""
    *_, before, written, after = FAMILIES[family]
    found = []
    for question, answer in map(turns, TEST):
        texts = (before.format(question=question), written.format(answer=answer), after)
        opened, whole, closing = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (texts[0], "".join(texts), after)
        )
        assert whole[: len(opened)] == opened and whole[-len(closing) :] == closing
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
        scored = range(len(opened), len(whole) - len(closing))
        found.append(-sum(float(log_p[place - 1, whole[place]]) for place in scored))
    return found


@pytest.mark.parametrize(
    "family", [name if name == "llama3" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_the_answer_nll_of_a_run_is_the_one_by_hand_before_and_after_tuning(
    family: str, hlora: Invoke, job_fields: dict[str, Any], tmp_path: Path
) -> None:
    kind, adds, *_ = FAMILIES[family]
    model = made_model(tmp_path / "model", made_tokenizer(kind, adds, family))
    for name, numbers in (("train", TRAIN), ("test", TEST)):
        rows = [
            {
                "messages": [
                    {"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)
                ]
            }
            for pair in map(turns, numbers)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    job_fields["model"]["name"], job_fields["domain"]["task"] = model, "rows"
    job_fields["evaluation"] = {"max_tokens": 64, "window": 32, "generate": 0, "batch_size": 4}
    job_fields["training"] = {
        "common": {"learning_rate": 2e-2, "per_device_train_batch_size": 4, "max_steps": 2, "max_length": 128}
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(job_fields), encoding="utf-8")
    status, _, err = hlora("run", file)
    assert status == 0, err

    reported = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["arms"]
    base, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    untuned = by_hand(base, tokenizer, family)
    tuned = by_hand(PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).eval(), tokenizer, family)
    assert abs(fmean(tuned) - fmean(untuned)) > 0.1
    for arm, hand in (("base", untuned), ("hlora", tuned)):
        assert reported[arm]["domain"]["answer_nll_each"] == pytest.approx(hand, abs=1e-4)
        assert reported[arm]["domain"]["answer_nll"] == pytest.approx(fmean(hand), abs=1e-4)
