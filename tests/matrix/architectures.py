"""Tiny random models, one for each architecture of the table: a configuration, and the modules that people adapt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

VOCABULARY = 704  # as many as the tokenizer of the runs and trainers has, or more
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_SHARED = {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16}
_DELTA = {  # Qwen's linear attention
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
_LATENT = {  # DeepSeek's attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}


@dataclass(frozen=True)
class Architecture:
    """A tiny configuration of one architecture."""

    model_type: str
    modules: list[str]
    """LoRA's targets, of which every architecture has its own names."""
    settings: dict[str, Any]
    auto: Any = AutoModelForCausalLM
    parameters: tuple[str, ...] = ()
    """Experts that all-linear does not take by itself."""

    def build(self) -> Any:
        """The model with random weights, the same at each call."""
        torch.manual_seed(0)
        special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        settings = {**special, **self.settings}
        if self.model_type != "gemma3":
            settings = {"vocab_size": VOCABULARY, **settings}
        config = AutoConfig.for_model(self.model_type, **settings)
        model = self.auto.from_config(config, dtype=torch.float32, attn_implementation=self.attention)
        return model.train(self.model_type == "rwkv")  # which scales its weights in place in evaluation

    @property
    def attention(self) -> str | None:
        return None if self.model_type in ("rwkv", "mamba", "mamba2", "falcon_mamba", "mpt") else "eager"


def _gpt(**sizes: Any) -> dict[str, Any]:
    return {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, **sizes}


def _neox(**sizes: Any) -> dict[str, Any]:
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    return {**{key: _LLAMA[key] for key in kept}, **sizes}


_GEMMA = {**_LLAMA, "head_dim": 8}
_SMALL_IMAGE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture("gpt2", ["c_attn", "c_proj", "c_fc"], _gpt()),
    "llama": Architecture("llama", ATTENTION, _LLAMA),
    "qwen3_moe": Architecture(
        "qwen3_moe", ATTENTION, {**_LLAMA, **_EXPERTS, "num_experts": 4, "head_dim": 8, "decoder_sparse_step": 1}
    ),
    "gptj": Architecture("gptj", ["q_proj", "v_proj"], _gpt(rotary_dim=8)),
    "gpt_neox": Architecture("gpt_neox", ["query_key_value"], _neox()),
    "opt": Architecture(
        "opt",
        ["q_proj", "v_proj"],
        {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32},
    ),
    "bloom": Architecture("bloom", ["query_key_value"], {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": Architecture(
        "falcon", ["query_key_value"], {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    ),
    "mpt": Architecture("mpt", ["Wqkv"], {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}),
    "mistral": Architecture("mistral", ATTENTION, _LLAMA),
    "qwen2": Architecture("qwen2", ATTENTION, _LLAMA),
    "qwen3": Architecture("qwen3", ATTENTION, {**_LLAMA, "head_dim": 8}),
    "qwen3_next": Architecture(
        "qwen3_next",
        [*ATTENTION, "in_proj_qkvz", "out_proj"],
        {**_LLAMA, **_SHARED, **_DELTA, "head_dim": 8},
    ),
    "qwen3_5_text": Architecture("qwen3_5_text", [*ATTENTION, *MLP], {**_LLAMA, **_DELTA, "head_dim": 8}),
    "qwen3_5_moe_text": Architecture(
        "qwen3_5_moe_text", [*ATTENTION, *MLP], {**_LLAMA, **_SHARED, **_DELTA, "head_dim": 8}
    ),
    "qwen2_moe": Architecture("qwen2_moe", [*ATTENTION, *MLP], {**_LLAMA, **_SHARED}),
    "mixtral": Architecture("mixtral", ATTENTION, {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": Architecture("gemma2", ATTENTION, _GEMMA),
    "gemma3_text": Architecture("gemma3_text", ATTENTION, _GEMMA),
    "gemma3": Architecture(
        "gemma3",
        ["q_proj", "v_proj"],
        {
            "text_config": {**_GEMMA, "vocab_size": VOCABULARY},
            "vision_config": _SMALL_IMAGE,
            "mm_tokens_per_image": 4,
            "boi_token_index": 701,
            "eoi_token_index": 702,
            "image_token_index": 703,
        },
    ),
    "phi3": Architecture("phi3", ["qkv_proj", "o_proj"], _LLAMA),
    "cohere": Architecture("cohere", ATTENTION, _LLAMA),
    "cohere2": Architecture("cohere2", ATTENTION, _LLAMA),
    "olmo2": Architecture("olmo2", ATTENTION, _LLAMA),
    "smollm3": Architecture("smollm3", ATTENTION, _LLAMA),
    "gpt_oss": Architecture(
        "gpt_oss",
        ATTENTION,
        {**_LLAMA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    ),
    "mamba": Architecture("mamba", ["in_proj", "x_proj"], _MAMBA),
    "mamba2": Architecture(
        "mamba2", ["in_proj"], {**_MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2}
    ),
    "falcon_mamba": Architecture("falcon_mamba", ["in_proj", "x_proj"], _MAMBA),
    "zamba2": Architecture(
        "zamba2",
        ATTENTION,
        {
            **_LLAMA,
            "num_key_value_heads": 4,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 8,
            "n_mamba_heads": 4,
            "mamba_ngroups": 1,
        },
    ),
    "jamba": Architecture(
        "jamba",
        ["q_proj", "v_proj", "in_proj"],
        {
            **_LLAMA,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "lfm2": Architecture(
        "lfm2",
        ["q_proj", "v_proj", "in_proj"],
        {**_LLAMA, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "deepseek_v3": Architecture(
        "deepseek_v3",
        ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        {
            **_LLAMA,
            **_EXPERTS,
            **_LATENT,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "glm4": Architecture("glm4", ATTENTION, {**_LLAMA, "head_dim": 8}),
    "glm4_moe": Architecture(
        "glm4_moe",
        ATTENTION,
        {
            **_LLAMA,
            **_EXPERTS,
            "head_dim": 8,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "llama4_text": Architecture(
        "llama4_text",
        ATTENTION,
        {
            **_LLAMA,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 128,
        },
    ),
    "granitemoehybrid": Architecture(
        "granitemoehybrid",
        ["q_proj", "v_proj", "in_proj"],
        {
            **_LLAMA,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "shared_intermediate_size": 16,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_d_head": 16,
        },
    ),
    "rwkv": Architecture(
        "rwkv",
        ["key", "value", "receptance"],
        {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 256},
    ),
    "t5": Architecture(
        "t5",
        ["q", "v"],
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 2},
        AutoModelForSeq2SeqLM,
    ),
    "bert": Architecture("bert", ["query", "value"], _neox(), AutoModelForMaskedLM),
}
