"""Adapters, tokenizers, lengths and links that do not fit: one message that names the culprit, nothing overwritten."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import record
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_corpus import HOSTILE, leaves
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hlora import pipeline
from hlora.comparison.compare import compare
from hlora.config.comparison import CompareConfig
from hlora.config.reading import parse_config
from hlora.config.sections import ModelConfig
from hlora.importance.artefact import Importance
from hlora.model.base import check_lengths, load_base, pick_device
from hlora.model.saved_adapter import load_adapter
from hlora.run.job import Job
from hlora.run.lengths import lengths
from hlora.system import files
from hlora.system.errors import ArtifactError, ConfigError, HloraError
from hlora.system.locks import lock_directory, try_lock

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 269060552\n"


@pytest.fixture
def base(model_dir: str) -> PreTrainedModel:
    return load_base(ModelConfig(name=model_dir, device="cpu"))[0]


@pytest.fixture
def adapter(peft_model: PeftModel, tmp_path: Path) -> Path:
    """A sound adapter of rank 4 of the tiny Llama."""
    peft_model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def adapter_of(directory: Path, rank: int = 4, targets: Any = ("q_proj", "v_proj"), **changes: Any) -> Path:
    """An adapter of a Llama like the tiny one but for `changes`."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=384, **{**shape, "num_key_value_heads": 2, **changes}))
    get_peft_model(model, LoraConfig(r=rank, target_modules=list(targets))).save_pretrained(str(directory))
    return directory


def change(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def test_a_sound_adapter_loads_and_the_base_is_as_before_after_it(base: PreTrainedModel, adapter: Path) -> None:
    names = [name for name, _ in base.named_modules()]
    load_adapter(base, adapter, rank=4).unload()
    assert [name for name, _ in base.named_modules()] == names


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": 64}, r"adapter: model\.layers\.0\.self_attn\.q_proj of .* has in_features 32, .*A is 4 × 64"),
        ({"num_key_value_heads": 4}, r"v_proj of .* has out_features 16, the adapter's B is 32 × 4.*set model\.name"),
        ({"num_hidden_layers": 3}, r"adapts 'model\.layers\.2\.self_attn\.q_proj', which .*tiny-llama\S* lacks"),
    ],
)
def test_an_adapter_of_another_base_says_what_is_unlike(
    changes: dict[str, int], expected: str, base: PreTrainedModel, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=expected):
        load_adapter(base, adapter_of(tmp_path / "adapter", **changes))


def test_an_adapter_of_another_rank_names_both(base: PreTrainedModel, adapter: Path) -> None:
    with pytest.raises(ArtifactError, match=r"adapter: the adapter has rank 4, lora\.rank is 8"):
        load_adapter(base, adapter, rank=8)
    change(adapter, r=8)
    with pytest.raises(ArtifactError, match=r"says rank 8, the matrices have 4"):
        load_adapter(base, adapter)
    change(adapter, r=4, rank_pattern={"q_proj": 2**40})  # PEFT would make room for it
    with pytest.raises(ArtifactError, match=r"says rank 4, 1099511627776, the matrices have 4"):
        load_adapter(base, adapter)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 16, "rank_pattern": {"q_proj": 2, "v_proj": 4}},  # as EVA may leave it: no matrix has the rank r
        {"r": 4, "rank_pattern": {"mlp.up_proj": 16}},  # a pattern of modules that are no targets
        {"r": 4, "target_modules": ["embed_tokens"]},
    ],
    ids=["r of no matrix", "pattern of no matrix", "embedding alone"],
)
def test_a_rank_that_no_matrix_has_does_not_make_an_adapter_unreadable(
    settings: dict[str, Any], base: PreTrainedModel, tmp_path: Path
) -> None:
    config = LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **settings})
    saved = get_peft_model(LlamaForCausalLM(base.config), config)
    saved.save_pretrained(str(tmp_path / "adapter"))
    factors = {name: factor for name, factor in saved.named_parameters() if "lora_" in name}
    loaded = dict(load_adapter(base, tmp_path / "adapter").named_parameters())
    assert factors and all(torch.equal(loaded[name], factor) for name, factor in factors.items())


@pytest.mark.parametrize("field", [{"target_modules": "*q_proj"}, {"rank_pattern": {"(": 4}}])
def test_an_expression_that_cannot_be_read_is_refused(
    field: dict[str, Any], base: PreTrainedModel, adapter: Path
) -> None:
    change(adapter, **field)
    with pytest.raises(ArtifactError, match=r"adapter: PEFT cannot read this adapter"):
        load_adapter(base, adapter)


def test_an_adapter_without_all_its_matrices_is_refused_and_none_is_made_up(
    base: PreTrainedModel, adapter: Path
) -> None:
    path = adapter / "adapter_model.safetensors"
    factors = load_file(path)
    save_file({name: tensor for name, tensor in factors.items() if "layers.1.self_attn.v_proj" not in name}, path)
    with pytest.raises(ArtifactError, match=r"adapter: PEFT cannot read this adapter .*missing adapter keys"):
        load_adapter(base, adapter)


def test_an_adapter_with_a_number_that_is_not_finite_is_refused(base: PreTrainedModel, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    factors = load_file(path)
    next(iter(factors.values()))[0, 0] = float("nan")
    save_file(factors, path)
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors: .*not every number is finite"):
        load_adapter(base, adapter)


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_an_adapter_with_a_hostile_header_is_refused(content: bytes, base: PreTrainedModel, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"adapter"):
        load_adapter(base, adapter)


def test_an_adapter_cut_anywhere_is_refused_and_one_with_a_flipped_bit_is_too_or_loads(
    base: PreTrainedModel, adapter: Path
) -> None:
    draw, refused = random.Random(0), 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        whole = (adapter / name).read_bytes()
        for step in range(64):
            (adapter / name).write_bytes(whole[: len(whole) * step // 64])
            with pytest.raises(ArtifactError, match=name):
                load_adapter(base, adapter)
        for place in draw.sample(range(min(2_000, len(whole))), 64):  # the header, and a little of the numbers
            flipped = bytearray(whole)
            flipped[place] ^= 1 << draw.randrange(8)
            (adapter / name).write_bytes(flipped)
            try:
                load_adapter(base, adapter).unload()
            except HloraError:
                refused += 1
        (adapter / name).write_bytes(whole)
    assert refused >= 40


def test_wrong_values_in_an_adapters_settings_are_refused_or_harmless(base: PreTrainedModel, adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    cases = refused = 0
    for place in leaves(
        {key: document[key] for key in ("peft_type", "r", "lora_alpha", "target_modules", "rank_pattern")}
    ):
        for value in (None, "", "text", -1, 0, 2**40, 1.5, True, [], {}, [None], {"a": {}}, "x" * 10_000):
            cases += 1
            path.write_text(json.dumps({**document, place[0]: value}), encoding="utf-8")
            try:
                load_adapter(base, adapter).unload()
            except HloraError:
                refused += 1
    assert cases >= 65 and refused >= 40
    for content in (b"[" * 20_000, b"", b"[]", b"null", b"\xff", b"{}"):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"adapter_config\.json: not a readable LoRA"):
            load_adapter(base, adapter)


def test_evaluating_an_adapter_of_another_model_costs_no_earlier_result(
    job_fields: dict[str, Any], tmp_path: Path, peft_model: PeftModel, token_ids: Tensor
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "results.json").write_text("{}", encoding="utf-8")
    config = parse_config(job_fields)
    adapter_of(output / "adapter", hidden_size=64)
    with pytest.raises(ArtifactError, match=r"out/adapter: .*q_proj of .* has in_features 32"):
        pipeline.evaluate_output(config)
    shutil.rmtree(output / "adapter")
    adapter_of(output / "adapter")  # of the same shape: the importance beside it knows the weights
    with torch.no_grad():
        for parameter in peft_model.base_model.model.parameters():
            parameter.mul_(1.5)
    record(peft_model, token_ids, "factored", steps=1).save(output / "importance")
    with pytest.raises(ArtifactError, match=r"out/importance: .*the base weights are not those"):
        pipeline.evaluate_output(config)
    assert (output / "results.json").read_text(encoding="utf-8") == "{}"


# Tokenizers, lengths, devices


@pytest.fixture
def copy(model_dir: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def test_a_tokenizer_without_pad_and_end_token_is_refused(copy: Path) -> None:
    path = copy / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({k: v for k, v in settings.items() if k not in ("pad_token", "eos_token")}))
    for name in ("config.json", "generation_config.json"):  # which may name an end token, too
        named = json.loads((copy / name).read_text(encoding="utf-8"))
        (copy / name).write_text(json.dumps({**named, "eos_token_id": None}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"model\.name: the tokenizer of .* neither a pad nor an end token"):
        load_base(ModelConfig(name=str(copy), device="cpu"))


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused(copy: Path) -> None:
    _, tokenizer = load_base(ModelConfig(name=str(copy), device="cpu"))
    tokenizer.add_tokens(["<one-too-many>"])
    tokenizer.save_pretrained(copy)
    with pytest.raises(ConfigError, match=r"token 384, '<one-too-many>'; the model's vocabulary ends at 383"):
        load_base(ModelConfig(name=str(copy), device="cpu"))


def with_special_token(copy: Path, token: str, **fields: Any) -> None:
    """Add a special token, which has no embedding, and fields of the tokenizer's configuration."""
    _, tokenizer = load_base(ModelConfig(name=str(copy), device="cpu"))
    tokenizer.add_tokens([token], special_tokens=True)
    tokenizer.save_pretrained(copy)
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


def test_an_image_token_without_an_embedding_is_read_as_text(copy: Path, tmp_path: Path) -> None:
    token = "<image_soft_token>"  # as in Gemma 3 1B, at 262,144 of 262,144 embeddings
    with_special_token(copy, token, extra_special_tokens={"image_token": token})
    model, tokenizer = load_base(ModelConfig(name=str(copy), device="cpu"))
    text = f"It is {token}, written out."
    ids = tokenizer(text)["input_ids"]
    assert max(ids) < model.get_input_embeddings().weight.shape[0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    tokenizer.save_pretrained(tmp_path / "saved")
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "saved")("It is plain.")["input_ids"]
        == (tokenizer("It is plain.")["input_ids"])
    )


@pytest.mark.parametrize(
    "fields", [{"extra_special_tokens": ["<turn>"]}, {"pad_token": "<turn>"}, {"chat_template": "<turn>{{ messages }}"}]
)
def test_a_special_token_that_texts_or_padding_need_is_refused_without_an_embedding(
    fields: dict[str, Any], copy: Path
) -> None:
    with_special_token(copy, "<turn>", **fields)
    with pytest.raises(ConfigError, match=r"token 384, '<turn>'; the model's vocabulary ends at 383"):
        load_base(ModelConfig(name=str(copy), device="cpu"))


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (LFS_POINTER, r"model\.safetensors is a Git LFS pointer\. Fetch the file itself with: git lfs pull\.$"),
        (b"half", r"model\.safetensors is cut short or damaged\. Download it again\.$"),
        (None, r"The directory needs config\.json, safetensors weights and a tokenizer\.$"),
    ],
)
def test_weights_that_did_not_arrive_are_named_with_what_to_do(content: bytes | None, remedy: str, copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100] if content == b"half" else content or b"")
    if content is None:
        weights.unlink()
    with pytest.raises(ConfigError, match=rf"^model\.name: {copy} could not be loaded .*{remedy}"):
        load_base(ModelConfig(name=str(copy), device="cpu"))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_attention_heads", 3, "The hidden size .* is not a multiple of the number of attention heads"),
        ("rope_parameters", {"rope_type": "yarn"}, "Missing required keys"),
        ("dtype", "float7", "float7"),
        ("model_type", "llama9", "llama9"),
        ("attn_implementation", "flash_attention_9", "flash_attention_9"),
    ],
)
def test_a_wrong_field_of_the_models_config_is_one_message(field: str, value: Any, said: str, copy: Path) -> None:
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {field: value}), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"^model\.name: {copy} could not be loaded \(.*{said}.*\)\. \w"):
        load_base(ModelConfig(name=str(copy), device="cpu"))


@pytest.mark.parametrize(
    "field",
    ["evaluation.window", "training.common.max_length", "training.record.max_length", "training.tune.max_length",
     "importance.sequence_length", "general.sample_tokens"],
)  # fmt: skip
def test_a_length_above_the_models_context_is_refused_by_its_field(
    field: str, job_fields: dict[str, Any], base: PreTrainedModel
) -> None:
    job_fields["penalty"] = {"anchor": "base"}
    job_fields["importance"] = {"method": "squared_gradients"}
    job_fields["general"]["source"] = "model"
    for length, fits in ((256, True), (257, False)):
        config = parse_config(job_fields, overrides=[f"{field}={length}"])
        if fits:
            check_lengths(base, lengths(config))
            continue
        with pytest.raises(ConfigError, match=rf"^{field}: 257 tokens, but the model's context is 256"):
            Job.open(config)


def test_a_comparison_refuses_a_length_above_the_models_context(comparison_config: CompareConfig) -> None:
    comparison_config.evaluation.window, comparison_config.evaluation.max_tokens = 257, 300
    with pytest.raises(ConfigError, match=r"evaluation\.window: 257 tokens"):
        compare(comparison_config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the GPU that must be absent")
def test_a_gpu_that_is_not_here_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.device: 'cuda' cannot be used here .* Try auto"):
        pick_device("cuda")


# Symbolic links


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A directory that nothing may change, with a file in it."""
    directory = tmp_path / "elsewhere"
    (directory / "checkpoint-1").mkdir(parents=True)
    (directory / "file").write_text("mine", encoding="utf-8")
    return directory


def test_a_file_that_is_a_link_is_replaced_and_its_target_stays(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "results.json").symlink_to(elsewhere / "file")
    files.write_text(tmp_path / "results.json", "new")
    assert not (tmp_path / "results.json").is_symlink()
    assert (elsewhere / "file").read_text(encoding="utf-8") == "mine"


def test_a_directory_that_is_a_link_is_replaced_and_its_target_stays(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "adapter").symlink_to(elsewhere)
    with files.atomic_directory(tmp_path / "adapter") as fresh:
        (fresh / "new").touch()
    assert names(tmp_path / "adapter") == ["new"] and not (tmp_path / "adapter").is_symlink()
    assert names(elsewhere) == ["checkpoint-1", "file"]
    assert names(tmp_path) == ["adapter", "elsewhere"]
    (tmp_path / f".adapter.999999999-0-{files._machine()}.old").symlink_to(elsewhere)  # an interrupted one's
    files.remove_leftovers(tmp_path / "adapter")
    assert names(elsewhere) == ["checkpoint-1", "file"]
    assert names(tmp_path) == ["adapter", "elsewhere"]


@pytest.mark.parametrize("place", [".lock", "logs", "logs/record", "logs/record/checkpoint-1"])
def test_a_link_that_would_be_followed_is_refused_by_name(
    place: str, job_fields: dict[str, Any], comparison_config: CompareConfig, tmp_path: Path, elsewhere: Path
) -> None:
    output = tmp_path / "out"
    job_fields["domain"] = next(iter(comparison_config.tasks.values())).model_dump()
    (output / place).parent.mkdir(parents=True)
    (output / place).symlink_to(elsewhere / "file" if place == ".lock" else elsewhere)
    comparison_config.output = str(output)
    for refused in (lambda: pipeline.run(parse_config(job_fields)), lambda: compare(comparison_config)):
        with pytest.raises(ConfigError, match=rf"output: \S*{place} is a link to \S*elsewhere"):
            refused()
    assert (elsewhere / "file").read_text(encoding="utf-8") == "mine"
    assert names(elsewhere) == ["checkpoint-1", "file"]


def test_the_lock_of_a_cell_does_not_follow_a_link(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "cell.json.lock").symlink_to(elsewhere / "file")
    with pytest.raises(OSError, match=r"cell\.json\.lock"), try_lock(tmp_path / "cell.json.lock"):
        pass
    assert (elsewhere / "file").read_text(encoding="utf-8") == "mine"


def test_the_output_directory_itself_may_be_a_link(tmp_path: Path, elsewhere: Path) -> None:
    (tmp_path / "out").symlink_to(elsewhere)
    with lock_directory(tmp_path / "out"):
        files.write_text(tmp_path / "out" / "results.json", "{}")
    assert (elsewhere / "results.json").is_file()


def test_an_importance_through_a_link_reads(tmp_path: Path, peft_model: PeftModel, token_ids: Tensor) -> None:
    saved = record(peft_model, token_ids, "factored", steps=1).save(tmp_path / "importance")
    (tmp_path / "linked").symlink_to(saved)
    assert Importance.load(tmp_path / "linked").norms() == Importance.load(saved).norms()
