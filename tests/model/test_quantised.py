"""Importance on a base in 4 or 8 bits equals that on a plain base with the same, rounded weights; and what differs."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY, Invoke, move_adapter, record
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from hlora import pipeline
from hlora.config.reading import parse_config
from hlora.config.sections import LoraSettings, ModelConfig
from hlora.importance.artefact import Importance
from hlora.importance.penalty import ImportancePenalty
from hlora.importance.recorder import ImportanceRecorder
from hlora.model.adapters import adapted_matrices
from hlora.model.base import load_base
from hlora.model.four_bits import keep_trainable
from hlora.model.lora import attach_lora
from hlora.system.errors import AdapterError, ArtifactError, ConfigError

bitsandbytes = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BITS: Any = ["4bit", "8bit"]
LORA = LoraSettings(rank=4, alpha=8, target_modules="all-linear")


@pytest.fixture(scope="session")
def wide_dir(model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """As model_dir, 64 wide: bitsandbytes takes 64 weights at a time, and on a CPU a row has to be whole blocks."""
    return other_model(model_dir, tmp_path_factory.mktemp("wide-llama"), seed=0)


def base_of(model_dir: str, bits: Any, **settings: Any) -> Any:
    return load_base(ModelConfig(name=model_dir, quantization=bits, **{"device": "cpu", **settings}))[0]


def adapted(base: Any) -> PeftModel:
    return attach_lora(base, LORA, seed=0)


def dequantised(layer: nn.Module) -> Tensor:
    """By bitsandbytes, torchao or HQQ themselves."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        return layer.weight.data.float() * (layer.weight.SCB / 127)[:, None]
    return layer.dequantize() if hasattr(layer, "W_q") else layer.weight.dequantize()


def plain_of(quantised: Any, model_dir: str) -> LlamaForCausalLM:
    """A plain base with the weights that the quantised one has."""
    plain = LlamaForCausalLM.from_pretrained(model_dir)
    for name, layer in plain.named_modules():
        other = quantised.get_submodule(name)
        if isinstance(layer, nn.Linear) and (type(other) is not nn.Linear or type(other.weight) is not nn.Parameter):
            layer.weight.data = dequantised(other).detach().clone()
    return plain


def other_model(model_dir: str, directory: Path, seed: int) -> str:
    """A random Llama of two layers, 64 wide, with the tokenizer of model_dir."""
    torch.manual_seed(seed)
    config = LlamaForCausalLM.from_pretrained(model_dir).config
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    LlamaForCausalLM(config).save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (directory / file).write_bytes((Path(model_dir) / file).read_bytes())
    return str(directory)


def omega_of(model: PeftModel, rows: Tensor) -> dict[str, Any]:
    move_adapter(model)
    model.train()
    recorder = ImportanceRecorder(model, "float32", method="path_integral")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for part in rows[:8].chunk(2):
        model(input_ids=part, labels=part).loss.backward()
        with recorder.step(0.05):
            optimizer.step()
        optimizer.zero_grad()
    assert recorder.steps == 2
    return recorder.omega


def assert_same_omega(mine: dict[str, Any], other: dict[str, Any]) -> None:
    assert list(mine) == list(other)
    for name, omega in other.items():
        assert omega.abs().max() > 0
        torch.testing.assert_close(mine[name], omega, rtol=0, atol=1e-4 * float(omega.abs().max()))


# Loading


@pytest.mark.parametrize(("bits", "layer", "bytes_of_64"), [("4bit", "Linear4bit", 32), ("8bit", "Linear8bitLt", 64)])
def test_every_linear_layer_but_the_output_is_kept_in_few_bits(
    wide_dir: str, bits: Any, layer: str, bytes_of_64: int
) -> None:
    base = base_of(wide_dir, bits)
    plain = LlamaForCausalLM.from_pretrained(wide_dir)
    linear = {name: module for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    assert len(linear) == 15
    for name, module in linear.items():
        got = base.get_submodule(name)
        assert type(got).__name__ == ("Linear" if name == "lm_head" else layer)
        if name != "lm_head":
            assert got.weight.nbytes == module.weight.numel() * bytes_of_64 // 64
            if bits == "4bit":
                assert (got.weight.quant_type, got.weight.quant_state.nested) == ("nf4", True)
                assert got.compute_dtype == torch.float32
    assert not base.training and not any(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_base_without_its_package_says_what_to_install(
    wide_dir: str, bits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hlora.model.base.is_bitsandbytes_available", lambda: False)
    with pytest.raises(
        ConfigError, match=rf"model.quantization: {bits} needs bitsandbytes.*pip install '\.\[quantised\]'"
    ):
        base_of(wide_dir, bits)


def test_a_gguf_file_is_not_quantised_again(wide_dir: str) -> None:
    fields = {"name": wide_dir, "gguf_file": "model.gguf", "quantization": "4bit"}
    with pytest.raises(ValueError, match="a GGUF file cannot be quantised again"):
        ModelConfig.model_validate(fields)


# Recording and penalty


@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_base_records_what_a_plain_one_with_its_weights_does(
    wide_dir: str, token_ids: Tensor, bits: Any
) -> None:
    base = base_of(wide_dir, bits)
    plain = plain_of(base, wide_dir)
    omega = omega_of(adapted(base), token_ids)
    assert len(omega) == 14
    assert_same_omega(omega, omega_of(adapted(plain), token_ids))


@pytest.mark.parametrize("bits", BITS)
def test_evaluation_in_between_leaves_the_gradients_of_a_quantised_base(
    wide_dir: str, token_ids: Tensor, bits: Any
) -> None:
    """As `hlora run` does, which evaluates the base first."""
    omegas = []
    for evaluated in (False, True):
        model = adapted(base_of(wide_dir, bits))
        if evaluated:
            with torch.no_grad():
                model.eval()(input_ids=token_ids)
        omegas.append(omega_of(model, token_ids))
    assert_same_omega(omegas[1], omegas[0])


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit:UserWarning")
def test_a_4_bit_base_is_refused_exactly_where_this_cpu_would_lose_its_gradients(
    wide_dir: str, token_ids: Tensor
) -> None:
    """bitsandbytes packs a 4-bit weight for inference, for good, on a CPU with AVX512-BF16 alone."""
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    refusal = r"q_proj: on this CPU bitsandbytes packs a 4-bit weight .*keep_trainable\(model\) before"
    packs = bitsandbytes.functional.has_avx512bf16()

    def load() -> PeftModel:
        base = AutoModelForCausalLM.from_pretrained(wide_dir, quantization_config=how, device_map={"": "cpu"})
        return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))

    def reaches_the_first_layer(model: PeftModel) -> bool:
        model.zero_grad()
        model.train()(input_ids=token_ids, labels=token_ids).loss.backward()
        gradient = model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.grad
        return gradient is not None and bool(gradient.any())

    def is_refused(model: PeftModel) -> None:
        with pytest.raises(AdapterError, match=refusal) if packs else nullcontext():
            assert len(adapted_matrices(model)) == 4

    model = load()
    is_refused(model)
    assert reaches_the_first_layer(model)
    with torch.no_grad():
        model.eval()(input_ids=token_ids)
    keep_trainable(model)  # too late
    assert reaches_the_first_layer(model) is not packs  # what the refusal is for
    is_refused(model)

    model = load()
    keep_trainable(model)
    assert len(adapted_matrices(model)) == 4
    with torch.no_grad():
        model.eval()(input_ids=token_ids)
    assert reaches_the_first_layer(model)


@pytest.mark.parametrize("bits", BITS)
def test_the_move_of_a_quantised_base_is_a_share_of_its_dequantised_norm(
    wide_dir: str, token_ids: Tensor, bits: Any
) -> None:
    base = base_of(wide_dir, bits)
    plain = plain_of(base, wide_dir)
    moves = []
    for model in (adapted(base), adapted(plain)):
        recorder = ImportanceRecorder(model, method="path_integral")
        move_adapter(model)
        moves.append(recorder.move())
    assert moves[0] == pytest.approx(moves[1], rel=1e-6)
    assert moves[1] > 0


# Recognising the base


@pytest.mark.parametrize("bits", BITS)
def test_reading_a_quantised_base_is_repeatable_and_leaves_it_as_it_was(
    wide_dir: str, token_ids: Tensor, bits: Any
) -> None:
    """PEFT's own dequantisation breaks an 8-bit layer on a CPU that has run forward."""
    model = adapted(base_of(wide_dir, bits))
    matrices = adapted_matrices(model)
    before = [m.base_sample() for m in matrices]
    loss = model(input_ids=token_ids, labels=token_ids).loss
    for _ in range(2):
        for m, sample in zip(matrices, before, strict=True):
            assert torch.equal(m.base_sample(), sample)
            assert m.base_square() > 0
        assert torch.equal(model(input_ids=token_ids, labels=token_ids).loss, loss)
    again = adapted_matrices(adapted(base_of(wide_dir, bits)))
    assert all(torch.equal(m.base_sample(), sample) for m, sample in zip(again, before, strict=True))


@pytest.mark.parametrize("bits", BITS)
def test_the_sample_of_a_quantised_base_is_near_the_true_one_and_says_that_it_is_rough(
    wide_dir: str, bits: Any
) -> None:
    quantised, plain = (
        adapted_matrices(adapted(base_of(wide_dir, bits))),
        adapted_matrices(adapted(base_of(wide_dir, None))),
    )
    for mine, true in zip(quantised, plain, strict=True):
        sample, exact = mine.base_sample(), true.base_sample()
        assert (sample.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
        assert len(sample) == len(exact) == 16
        distance = (sample.float() - exact).norm() / exact.norm()
        assert 0 < distance < (0.25 if bits == "4bit" else 0.03)


KINDS: Any = [None, "4bit", "8bit"]


@pytest.mark.parametrize(("recorded_on", "used_on"), [(a, b) for a in KINDS for b in KINDS if a or b])
@pytest.mark.parametrize("anchor", ["general", "base"])
def test_importance_holds_the_same_base_in_any_precision_and_refuses_another(
    wide_dir: str, token_ids: Tensor, tmp_path: Path, recorded_on: Any, used_on: Any, anchor: str
) -> None:
    model = adapted(base_of(wide_dir, recorded_on))
    directory = record(model, token_ids, "factored").save(tmp_path / "importance")
    importance = Importance.load(directory)

    used = adapted(base_of(wide_dir, used_on))
    if anchor == "general":
        importance.load_adapter_into(used)
    penalty = ImportancePenalty(used, importance, phi=1.0, anchor=anchor)
    assert penalty.regularisation_loss() == 0
    if anchor == "base":
        importance.load_adapter_into(used)
        assert penalty.regularisation_loss() == pytest.approx(
            1, rel=1e-4
        )  # the unit of a relative phi: the general move

    other = adapted(base_of(other_model(wide_dir, tmp_path / "other", seed=7), used_on))
    with pytest.raises(ArtifactError, match=r"q_proj: the base weights are not those the importance was recorded on"):
        ImportancePenalty(other, importance, phi=1.0, anchor=anchor)


def test_full_precision_is_still_compared_to_one_rounding(wide_dir: str) -> None:
    model = adapted(base_of(wide_dir, None))
    matrix = adapted_matrices(model)[0]
    kept = matrix.base_sample()
    assert matrix.is_on_base_of(kept)
    assert matrix.is_on_base_of(kept.bfloat16().float())
    assert not matrix.is_on_base_of(1.05 * kept)
    assert matrix.is_on_base_of((1.05 * kept).bfloat16())  # a quantised base's is known roughly
    assert matrix.is_on_base_of(torch.empty(0))


# The whole job, and merging


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "method", "anchor"),
    [
        ("4bit", "path_integral", "general"),
        ("8bit", "path_integral", "general"),
        ("4bit", "squared_gradients", "base"),
        ("8bit", "squared_gradients", "general"),
    ],
)
def test_the_whole_job_runs_on_a_quantised_base_and_its_adapter_fits_the_plain_one(
    job_fields: dict[str, Any], wide_dir: str, token_ids: Tensor, bits: Any, method: str, anchor: str
) -> None:
    common = job_fields["training"]["common"]
    fields = {
        **job_fields,
        "model": {"name": wide_dir, "device": "cpu", "quantization": bits},
        "lora": {**job_fields["lora"], "target_modules": "all-linear"},
        "importance": {"method": method, "sequences": 4, "sequence_length": 16},
        "penalty": {"anchor": anchor},
        "training": {**job_fields["training"], "common": {**common, "gradient_checkpointing": bits == "4bit"}},
        "evaluation": {"max_tokens": 100, "window": 64, "stride": 48, "generate": 0, "accuracy": False},
    }
    results = pipeline.run(parse_config(fields))
    output = Path(results["config"]["output"])
    last = results["history"]["tune"][-1]
    assert last["weighted_regularisation_loss"] > 0
    importance = Importance.load(output / "importance")
    assert len(importance.matrices) == 14

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(wide_dir), str(output / "adapter")).eval()
    assert all(matrix.B.any() for matrix in adapted_matrices(plain))
    assert any(not torch.equal(m.B, m.B.bfloat16().float()) for m in adapted_matrices(plain)), "trained in bfloat16"
    ImportancePenalty(plain, importance, phi=1.0, anchor=fields["penalty"]["anchor"])
    with torch.no_grad():
        before = plain(input_ids=token_ids).logits
        after = plain.merge_and_unload()(input_ids=token_ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    settings = json.loads((output / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert "lm_head" not in settings["target_modules"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bits", BITS)
def test_the_whole_job_runs_on_a_quantised_base_on_a_gpu(job_fields: dict[str, Any], wide_dir: str, bits: Any) -> None:
    fields = {
        **job_fields,
        "model": {"name": wide_dir, "quantization": bits},
        "lora": {**job_fields["lora"], "target_modules": "all-linear"},
        "evaluation": {"max_tokens": 100, "window": 64, "stride": 48, "generate": 0, "accuracy": False},
    }
    results = pipeline.run(parse_config(fields))
    assert "cuda" in results["provenance"]["hardware"]
    assert results["history"]["tune"][-1]["weighted_regularisation_loss"] > 0
    importance = Importance.load(Path(results["config"]["output"]) / "importance")
    assert all(float(norm) > 0 for norm in importance.norms().values())
    plain = adapted(base_of(wide_dir, None))
    importance.load_adapter_into(plain)  # the same base on a CPU, in full precision


def test_the_guide_tunes_in_4_bits_and_merges_in_full(
    hlora: Invoke,
    wide_dir: str,
    job_fields: dict[str, Any],
    token_ids: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    guide = (REPOSITORY / "docs" / "guides" / "quantised.md").read_text(encoding="utf-8")
    guide = guide.replace("meta-llama/Llama-3.1-8B", wide_dir)
    (settings,) = re.findall(r"^```yaml\n(.*?)^```$", guide, flags=re.MULTILINE | re.DOTALL)
    (tune,) = re.findall(r"^```python\n(.*?)^```$", guide, flags=re.MULTILINE | re.DOTALL)

    config = parse_config({**job_fields, **yaml.safe_load(settings)})
    model = attach_lora(load_base(config.model)[0], config.lora, seed=0)
    record(model, token_ids.to(model.device), "factored").save(tmp_path / "runs" / "general" / "importance")

    names: dict[str, Any] = {}
    exec(tune, names)
    penalty = names["penalty"]
    assert len(penalty.matrices) == 14 and penalty.regularisation_loss() == 0
    assert type(penalty.matrices[0].module).__name__ == "Linear4bit"

    move_adapter(names["model"])
    names["model"].save_pretrained("runs/mine/adapter")
    (tmp_path / "runs" / "mine" / "config.yaml").write_text(yaml.safe_dump(config.model_dump()), encoding="utf-8")
    (merge,) = re.findall(r"^hlora (merge .*)$", guide, flags=re.MULTILINE)
    status, _, err = hlora(*merge.split())
    assert status == 0, err
    merged = AutoModelForCausalLM.from_pretrained("runs/merged", dtype=torch.float32)
    for m in penalty.matrices:
        base = LlamaForCausalLM.from_pretrained(wide_dir).get_submodule(m.name).weight
        expected = (base + m.scale * m.B @ m.A).detach().cpu()
        torch.testing.assert_close(merged.get_submodule(m.name).weight, expected, rtol=0.02, atol=1e-3)  # bfloat16


# Other quantisations, where their package is there


def by_torchao(wide_dir: str) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    base = LlamaForCausalLM.from_pretrained(wide_dir)
    quantization.quantize_(base.model, quantization.Int8WeightOnlyConfig())
    return base


def by_hqq(wide_dir: str) -> Any:
    """Its layers have no .weight."""
    hqq = pytest.importorskip("hqq.core.quantize")
    base = LlamaForCausalLM.from_pretrained(wide_dir)
    how = hqq.BaseQuantizeConfig(nbits=4, group_size=16)
    for layer in base.model.layers:
        for name in ("q_proj", "v_proj"):
            whole = getattr(layer.self_attn, name)
            setattr(layer.self_attn, name, hqq.HQQLinear(whole, how, compute_dtype=torch.float32, device="cpu"))
    return base


@pytest.mark.filterwarnings("ignore:.*get_apply_tensor_subclass:UserWarning")
@pytest.mark.parametrize("quantise", [by_torchao, by_hqq])
def test_a_base_quantised_by_torchao_or_hqq_records_what_a_plain_one_with_its_weights_does(
    wide_dir: str, token_ids: Tensor, quantise: Callable[[str], Any]
) -> None:
    base = quantise(wide_dir)
    plain = plain_of(base, wide_dir)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    samples = [m.base_sample() for m in adapted_matrices(model)]
    assert {sample.dtype for sample in samples} == {torch.bfloat16}
    omega = omega_of(model, token_ids)
    assert len(omega) == 4
    assert_same_omega(omega, omega_of(get_peft_model(plain, copy.deepcopy(config)), token_ids))
    true = adapted_matrices(get_peft_model(LlamaForCausalLM.from_pretrained(wide_dir), copy.deepcopy(config)))
    assert all(m.is_on_base_of(sample) for m, sample in zip(true, samples, strict=True))
