"""A tiny random Llama with a byte-level tokenizer, built once a session and saved as a real model directory."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GENERAL_TEXT = "\n\n".join(pydoc_data.topics.topics[name] for name in ("assert", "booleans", "break", "calls", "class"))
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a 2-layer random Llama (hidden 32, 4 heads, 2 KV heads, vocabulary 384)."""
    directory = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([GENERAL_TEXT], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=256
    )
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return str(directory)


@pytest.fixture
def peft_model(model_dir: str):
    """The tiny Llama with LoRA (r 4, alpha 8) on q_proj and v_proj; B is zero."""
    torch.manual_seed(1)
    model = LlamaForCausalLM.from_pretrained(model_dir)
    return get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )


@pytest.fixture
def general_file(tmp_path: Path) -> str:
    path = tmp_path / "general.txt"
    path.write_text(GENERAL_TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture
def questions(tmp_path: Path) -> tuple[str, str]:
    """A train and a test file of multiple-choice rows (question, choices, label)."""
    paths = []
    for name, start, count in (("train", 0, 24), ("test", 100, 8)):
        path = tmp_path / f"{name}.jsonl"
        rows = [
            {"question": f"What is {n} plus one?", "choices": [str(n + 1), str(n + 2), str(n)], "label": 0}
            for n in range(start, start + count)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        paths.append(str(path))
    return paths[0], paths[1]


@pytest.fixture
def shared_data() -> Path:
    """The project's shared data sets; tests that need them skip where they are absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the data sets in {SHARED_DATA}, which are not here")
    return SHARED_DATA
