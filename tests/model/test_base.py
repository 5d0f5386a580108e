"""Base models load from a directory as they are, and what cannot be loaded says why and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hlora.config.sections import LoraSettings, ModelConfig
from hlora.model.adapters import adapted_matrices
from hlora.model.base import load_base, pick_device, pick_dtype
from hlora.model.lora import attach_lora
from hlora.system.errors import ConfigError
from hlora.system.quiet import quiet


def load(directory: str | Path, **settings: Any) -> tuple[Any, Any]:
    return load_base(ModelConfig(name=str(directory), **{"device": "cpu", **settings}))


@pytest.fixture
def copy(model_dir: str, tmp_path: Path) -> Path:
    """The model's directory, to break."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def test_a_directory_loads_frozen_in_evaluation_mode_with_a_pad_token(model_dir: str) -> None:
    model, tokenizer = load(model_dir)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    saved = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert tokenizer.pad_token == "<pad>"


def test_a_tokenizer_without_a_pad_token_pads_with_the_end_token(copy: Path) -> None:
    settings = json.loads((copy / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["pad_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    _, tokenizer = load(copy)
    assert tokenizer.pad_token == "<eos>"


def test_a_tokenizer_without_an_end_token_takes_that_of_the_models_configuration(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = json.loads((copy / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["eos_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with caplog.at_level("INFO", "hlora"):
        assert load(copy)[1].eos_token == "<eos>"
    assert "names no end token: '<eos>' is taken" in caplog.text
    for name in ("config.json", "generation_config.json"):
        found = json.loads((copy / name).read_text(encoding="utf-8")) | {"eos_token_id": None}
        (copy / name).write_text(json.dumps(found), encoding="utf-8")
    assert load(copy)[1].eos_token is None
    assert "text answers are trained without an end" in caplog.text


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_base_has_the_dtype_asked_for(name: str, model_dir: str) -> None:
    model, _ = load(model_dir, dtype=name)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, name)}


def test_dtype_auto_is_float32_on_a_cpu_whatever_the_files_hold(copy: Path) -> None:
    AutoModelForCausalLM.from_pretrained(copy, dtype=torch.bfloat16).save_pretrained(copy)
    model, _ = load(copy)
    assert model.dtype == torch.float32
    assert pick_dtype("auto", torch.device("mps")) == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_and_dtype_auto_are_the_gpu_and_its_half_precision(model_dir: str) -> None:
    model, _ = load_base(ModelConfig(name=model_dir))
    expected = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    assert (model.device.type, model.dtype) == ("cuda", expected)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 6), torch.bfloat16), ((7, 5), torch.float16), ((7, 0), torch.float16), ((6, 1), torch.float32)],
)
def test_dtype_auto_is_what_the_gpu_computes_fast(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    """T4 (7.5) and V100 (7.0) emulate bfloat16. Only what PyTorch says of the device is made up here."""
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_dtype("auto", torch.device("cuda")) == expected


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "cpu:x"])
def test_a_device_that_is_not_here_is_named_with_what_to_do(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"model.device: '{name}' cannot be used here .* Try auto"):
        pick_device(name)


# What cannot be loaded


TINY = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def saved_with_tokenizer(model: PreTrainedModel, model_dir: str, directory: Path) -> Path:
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(directory)
    model.save_pretrained(directory)
    return directory


def test_a_model_that_reads_ahead_is_refused(model_dir: str, tmp_path: Path) -> None:
    config = BertConfig(**TINY, intermediate_size=32)
    with pytest.raises(ConfigError, match=r"\(BertLMHeadModel\) attends to later tokens too"):
        load(saved_with_tokenizer(BertLMHeadModel(config), model_dir, tmp_path))


def test_a_causal_model_whose_configuration_denies_it_is_loaded(model_dir: str, tmp_path: Path) -> None:
    config = GPTNeoXConfig(**TINY, intermediate_size=32)
    assert config.is_decoder is False
    model, _ = load(saved_with_tokenizer(GPTNeoXForCausalLM(config), model_dir, tmp_path))
    assert isinstance(model, GPTNeoXForCausalLM)


def test_an_encoder_decoder_is_refused_with_the_way_that_works(model_dir: str, tmp_path: Path) -> None:
    config = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ConfigError, match=r"trains causal language models.*hlora\.protect with Seq2SeqTrainer"):
        load(saved_with_tokenizer(T5ForConditionalGeneration(config), model_dir, tmp_path))


def test_pickled_weights_are_refused_without_being_opened(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    ran = copy / "code-ran"
    torch.save({"x": _Spy(str(ran))}, copy / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"needs .* safetensors weights"):
        load(copy)
    assert not ran.exists()
    torch.load(copy / "pytorch_model.bin", weights_only=False)
    assert ran.exists()  # the trap works where it is opened


class _Spy:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.path, "w")


def test_a_gguf_file_without_its_name_in_the_configuration_is_hinted_at(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").touch()
    with pytest.raises(ConfigError, match=r"Set model.gguf_file to model-q4.gguf"):
        load(tmp_path)


def test_an_empty_directory_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.name: .* The directory needs config.json, safetensors weights and a"):
        load(tmp_path)


def test_damaged_weights_are_an_error_of_the_configuration(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"model.name: .* could not be loaded"):
        load(copy)


def test_weights_that_are_missing_are_named_and_not_made_up(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"its weights lack model.layers.1.self_attn.q_proj.weight"):
        load(copy)


@pytest.mark.parametrize("stated", [{}, {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}])
def test_weights_whose_scales_transformers_leaves_out_are_refused(copy: Path, stated: dict[str, Any]) -> None:
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(config | stated), encoding="utf-8")
    tensors, name = load_file(copy / "model.safetensors"), "model.layers.1.self_attn.q_proj.weight"
    scale = tensors[name].abs().max() / 448
    tensors |= {name: (tensors[name] / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"it took {name} without {name}_scale\. Name the model in full precision"):
        load(copy)


def test_a_tied_output_layer_does_not_count_as_missing(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")
    tensors = load_file(copy / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    model, _ = load(copy)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_model_that_is_no_causal_lm_is_an_error_of_the_configuration(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "t5"}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"model.name: .* could not be loaded"):
        load(copy)


def test_a_hub_name_that_cannot_be_reached_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"model.name: acme/absent .* no directory here; as a hub name it needs"):
        load("acme/absent")


def test_a_hub_model_with_pickles_only_says_where_safetensors_may_be(
    model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, commit = tmp_path / "models--acme--pickled", "0" * 40
    shutil.copytree(model_dir, cached / "snapshots" / commit)
    weights = cached / "snapshots" / commit / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^model.name: acme/pickled has no safetensors weights.*Set model.revision"):
        load("acme/pickled")


# LoRA


def adapter(model_dir: str, seed: int, **settings: Any) -> Any:
    base, _ = load(model_dir)
    return attach_lora(base, LoraSettings.model_validate(settings), seed)


def test_a_fresh_adapter_changes_nothing_and_is_the_only_thing_trained(model_dir: str) -> None:
    base, _ = load(model_dir)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        model = attach_lora(base, LoraSettings(), 0).eval()
        assert torch.equal(model(input_ids=ids).logits, before)
    matrices = adapted_matrices(model)
    assert [m.name.rsplit(".", 1)[-1] for m in matrices] == ["q_proj", "v_proj"] * 2
    assert all(m.A.any() and not m.B.any() for m in matrices)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 8 and all("lora_" in name for name in trained)


def test_the_adapter_is_the_same_for_the_same_seed_only(model_dir: str) -> None:
    first, again, other = (adapted_matrices(adapter(model_dir, seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a.A, b.A) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a.A, b.A) for a, b in zip(first, other, strict=True))


def test_rank_alpha_and_rslora_reach_the_adapter(model_dir: str) -> None:
    for rslora, scale in ((False, 12 / 4), (True, 12 / 2)):
        matrices = adapted_matrices(adapter(model_dir, 0, rank=4, alpha=12, rslora=rslora))
        assert {(m.A.shape[0], m.scale) for m in matrices} == {(4, scale)}


def test_all_linear_adapts_every_linear_layer_but_the_output(model_dir: str) -> None:
    assert len(adapted_matrices(adapter(model_dir, 0, target_modules="all-linear"))) == 2 * 7


def test_the_adapter_of_a_bfloat16_base_is_float32(model_dir: str) -> None:
    base, _ = load(model_dir, dtype="bfloat16")
    matrices = adapted_matrices(attach_lora(base, LoraSettings(), 0))
    assert {factor.dtype for m in matrices for factor in (m.A, m.B)} == {torch.float32}
    assert base.dtype == torch.bfloat16


@pytest.mark.parametrize("targets", [["query"], ["q_proj", "query"], "query", ["self_attn.query"], ["proj"]])
def test_a_target_that_the_model_lacks_is_named_beside_the_modules_it_has(targets: Any, model_dir: str) -> None:
    with pytest.raises(ConfigError) as caught:
        adapter(model_dir, 0, target_modules=targets)
    message = str(caught.value)
    missing = targets if isinstance(targets, str) else targets[-1]
    assert message.startswith("lora.target_modules: ") and missing in message
    assert all(name in message for name in ("q_proj", "v_proj", "down_proj", "lm_head"))


def test_a_target_may_be_a_path_and_matches_whole_names(model_dir: str) -> None:
    matrices = adapted_matrices(adapter(model_dir, 0, target_modules=["1.self_attn.q_proj", "o_proj"]))
    assert [m.name for m in matrices] == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.o_proj",
    ]


@pytest.mark.parametrize("bars", [True, False])
def test_quiet_gives_transformers_its_voice_back_as_it_was(bars: bool) -> None:
    level, shown = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    try:
        (transformers.logging.enable_progress_bar if bars else transformers.logging.disable_progress_bar)()
        with pytest.raises(RuntimeError), quiet():
            assert not transformers.logging.is_progress_bar_enabled()
            raise RuntimeError
        assert transformers.logging.is_progress_bar_enabled() == bars
        assert transformers.logging.get_verbosity() == level
    finally:
        (transformers.logging.enable_progress_bar if shown else transformers.logging.disable_progress_bar)()


def test_code_of_a_model_directory_does_not_run_unless_asked_for(copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    (copy / "theirs.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    theirs = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    text = json.dumps(config | {"model_type": "theirs", "auto_map": theirs})
    (copy / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"model\.name: .*trust_remote_code"):
        load(copy)
    assert not mark.exists()


def test_pickled_weights_are_not_read(copy: Path, tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(tmp_path / "it-ran"), "w")

    (copy / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Touch()}, copy / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"model\.name: .*safetensors"):
        load(copy)
    assert not (tmp_path / "it-ran").exists()
