"""Tiny tokenizers and chat templates of the kinds that people have: Qwen-, Mistral-, Gemma- and Llama-3-like."""

from __future__ import annotations

import json
import pydoc_data.topics
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Kind = Literal["bytes", "pieces"]
Adds = Literal["bos", "eos", "both", "neither"]

_TURNS = "{% for m in messages %}"
TEMPLATES = {
    # the turn's name and content between two tokens, an end of turn that is not EOS
    "qwen": (
        "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
        "{% endif %}"
        + _TURNS
        + "<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} "
        "{{ c.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # a space before the answer, which the prompt has not; roles alternate
    "mistral": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    # BOS in the template, contents stripped, no system turn
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}"
        + _TURNS
        + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    # BOS in the template, contents stripped, an end of turn without a new line
    "llama3": (
        "{{ bos_token }}" + _TURNS + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    # the generation prompt opens a thought that the row has not
    "opens a thought": (
        _TURNS + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    ),
    # the row has an empty thought that the generation prompt has not, as Qwen 3 has
    "empty thought": (
        _TURNS + "<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n"
        "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}  # fmt: skip
_SPECIAL = [
    "<bos>", "<eos>", "<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip


@cache
def _trained(kind: Kind) -> str:
    """A tokenizer of 500 tokens as JSON: byte-level like GPT-2's, or of pieces with byte fallback like Llama 2's."""
    text = [pydoc_data.topics.topics[name] for name in ("assert", "booleans", "calls")]
    special = [AddedToken(token, special=True, normalized=False) for token in _SPECIAL]
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special += [AddedToken(f"<0x{byte:02X}>", special=False, normalized=False) for byte in range(256)]
        text = [part.replace(" ", "▁") for document in text for part in document.splitlines(keepends=True)]
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    made = json.loads(tokenizer.to_str())
    made["added_tokens"] = made["added_tokens"][: len(_SPECIAL)]  # bytes are not found in text as they are written
    return json.dumps(made)


def made_tokenizer(kind: Kind = "bytes", adds: Adds = "neither", template: str | None = None) -> Any:
    """A fast tokenizer of the kind that puts BOS, EOS, both or neither around a text."""
    tokenizer = Tokenizer.from_str(_trained(kind))
    before, after = adds in ("bos", "both"), adds in ("eos", "both")
    if before or after:
        single = f"{'<bos> ' if before else ''}$A{' <eos>' if after else ''}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} $B", special_tokens=[("<bos>", 0), ("<eos>", 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    if template is not None:
        fast.chat_template = TEMPLATES.get(template, template)
    return fast


def made_model(directory: Path, tokenizer: Any, seed: int = 0, context: int = 256) -> str:
    """A random Llama of one layer whose predictions depend strongly on the text, saved with the tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def teach(model: Any, ids: list[int], start: int) -> None:
    """Train all of the model until it writes the ids from `start` on, token after token, by itself."""
    whole = torch.tensor([ids])
    labels = whole.masked_fill(torch.arange(len(ids)) < start, -100)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    while True:
        found = model(input_ids=whole, labels=labels)
        if torch.equal(found.logits[0, start - 1 : -1].argmax(-1), whole[0, start:]):
            return
        found.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
