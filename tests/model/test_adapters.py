"""Which matrices of a PEFT model are found, with which scale, and what is refused by name."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import move_adapter, record
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora import KasaConfig
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)
from transformers.optimization import Adafactor
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from hlora.importance.artefact import Importance
from hlora.importance.penalty import ImportancePenalty
from hlora.importance.recorder import ImportanceRecorder
from hlora.model.adapters import AdaptedMatrix, adapted_matrices
from hlora.model.optimizers import check_trained_by
from hlora.report.heatmap import layer_number
from hlora.system.errors import AdapterError

Q_AND_V = ["q_proj", "v_proj"]


def llama(model_dir: str, **config: Any) -> PeftModel:
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": Q_AND_V, "task_type": "CAUSAL_LM", **config}
    return get_peft_model(LlamaForCausalLM.from_pretrained(model_dir), LoraConfig(**settings))


def names(matrices: list[AdaptedMatrix]) -> list[str]:
    return [matrix.name for matrix in matrices]


def weight_change(matrix: AdaptedMatrix) -> torch.Tensor:
    """What PEFT itself adds to the weight, (d_out, d_in)."""
    delta = matrix.module.get_delta_weight(matrix.adapter_name).detach()
    return delta.T if matrix.module.fan_in_fan_out else delta


def test_every_target_matrix_is_found_in_module_order(peft_model: PeftModel) -> None:
    expected = [f"model.layers.{layer}.self_attn.{which}" for layer in (0, 1) for which in Q_AND_V]
    matrices = adapted_matrices(peft_model)
    assert names(matrices) == expected
    assert [layer_number(matrix.name) for matrix in matrices] == [0, 0, 1, 1]
    assert [tuple(matrix.B.shape) for matrix in matrices] == [(32, 4), (16, 4)] * 2
    assert all(matrix.A.shape == (4, 32) for matrix in matrices)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="plain"),
        pytest.param({"use_rslora": True}, id="rslora"),
        pytest.param({"target_modules": "all-linear"}, id="all-linear"),
        pytest.param({"target_modules": r".*\.1\..*(up|down)_proj"}, id="regex"),
        pytest.param({"target_modules": ["lm_head", "q_proj"]}, id="lm_head"),
        pytest.param({"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 5}}, id="patterns"),
        pytest.param({"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 5}, "use_rslora": True}, id="both"),
    ],
)
def test_scale_times_B_times_A_is_what_peft_adds_to_the_weight(model_dir: str, config: dict[str, Any]) -> None:
    matrices = adapted_matrices(llama(model_dir, **config))
    for matrix in matrices:
        nn.init.normal_(matrix.B)
        torch.testing.assert_close(matrix.scale * matrix.B @ matrix.A, weight_change(matrix))


def test_scale_is_alpha_over_rank_by_pattern_and_over_its_root_for_rslora(model_dir: str) -> None:
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 5}}
    plain = {m.name.rsplit(".", 1)[1]: m.scale for m in adapted_matrices(llama(model_dir, **patterns))}
    assert plain == {"q_proj": 5 / 4, "v_proj": 8 / 2}
    root = {m.name.rsplit(".", 1)[1]: m.scale for m in adapted_matrices(llama(model_dir, **patterns, use_rslora=True))}
    assert root == {"q_proj": 5 / math.sqrt(4), "v_proj": 8 / math.sqrt(2)}


def test_gpt2_convolution_named_linear_layers_are_read_in_the_right_orientation() -> None:
    """GPT-2's Conv1D keeps its weight as (d_in, d_out); A and B are (r, d_in) and (d_out, r) all the same."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True)
    matrices = adapted_matrices(get_peft_model(base, config))
    assert names(matrices) == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    for matrix in matrices:
        assert tuple(matrix.B.shape) == (48, 2)
        assert tuple(matrix.A.shape) == (2, 16)
        assert tuple(matrix.module.get_base_layer().weight.shape) == (16, 48)
        assert len(matrix.base_sample()) == 16
        nn.init.normal_(matrix.B)
        torch.testing.assert_close(matrix.scale * matrix.B @ matrix.A, weight_change(matrix))


def tied_llama(model_dir: str) -> PreTrainedModel:
    config = LlamaForCausalLM.from_pretrained(model_dir).config
    config.tie_word_embeddings = True
    return LlamaForCausalLM(config)


def gpt2(model_dir: str) -> PreTrainedModel:
    """Conv1D layers, query, key and value in one."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def phi3(model_dir: str) -> PreTrainedModel:
    """Query, key and value in one linear layer, gate and up in another."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Phi3ForCausalLM(Phi3Config(vocab_size=384, num_key_value_heads=2, pad_token_id=2, **sizes))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (tied_llama, "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        (gpt2, "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
        (phi3, "o_proj qkv_proj gate_up_proj down_proj"),
    ],
)
def test_all_linear_layers_are_recorded_saved_loaded_held_and_merged(
    model_dir: str, token_ids: torch.Tensor, tmp_path: Path, make: Any, layers: str
) -> None:
    torch.manual_seed(0)
    make(model_dir).save_pretrained(tmp_path / "base")

    def fresh() -> PeftModel:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        return get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))

    importance = Importance.load(record(fresh(), token_ids, "factored").save(tmp_path / "importance"))
    assert len(importance.matrices) == 2 * len(layers.split())
    for name in importance.matrices:
        assert layer_number(name) in (0, 1) and name.endswith(tuple(layers.split()))
    assert all(norm > 0 for norm in importance.norms().values())

    model = fresh()
    importance.load_adapter_into(model)
    penalty = ImportancePenalty(model, importance, phi=1.0)
    move_adapter(model)
    (model(input_ids=token_ids, labels=token_ids).loss + penalty()).backward()
    expected = 0.0
    for m in penalty.matrices:
        assert m.A.grad is not None and m.A.grad.any() and m.B.grad is not None and m.B.grad.any()
        mine = importance.matrices[m.name]
        moved = (m.scale * (m.B @ m.A - mine.B @ mine.A)).detach()
        expected += penalty.coefficients[m.name] / penalty.unit * float((mine.omega.dense() * moved**2).sum())
    assert float(penalty.regularisation_loss()) == pytest.approx(expected, rel=1e-4)

    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        unmerged = model(input_ids=token_ids).logits
        merged = loaded.merge_and_unload()(input_ids=token_ids).logits
    torch.testing.assert_close(merged, unmerged, rtol=1e-3, atol=1e-4)


def test_an_adapter_of_any_name_is_found(model_dir: str) -> None:
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(model_dir), LoraConfig(target_modules=["q_proj"]), adapter_name="général"
    )
    for matrices in (adapted_matrices(model), adapted_matrices(model, "général")):
        assert [matrix.adapter_name for matrix in matrices] == ["général"] * 2


def test_an_adapter_that_transformers_injected_has_the_same_names_as_one_of_peft(
    model_dir: str, peft_model: PeftModel
) -> None:
    model = LlamaForCausalLM.from_pretrained(model_dir)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=Q_AND_V))
    assert names(adapted_matrices(model)) == names(adapted_matrices(peft_model))


def test_a_module_that_holds_a_model_has_the_names_of_that_model(model_dir: str, peft_model: PeftModel) -> None:
    held = nn.ModuleDict({"llm": torch.compile(peft_model)})
    assert names(adapted_matrices(held)) == names(adapted_matrices(peft_model))
    two = names(adapted_matrices(nn.ModuleDict({"query": peft_model, "document": llama(model_dir)})))
    assert len(set(two)) == 2 * len(adapted_matrices(peft_model))


def test_matrices_follow_a_parameter_that_peft_replaces(peft_model: PeftModel) -> None:
    matrix = adapted_matrices(peft_model)[0]
    matrix.module.lora_B["default"].weight = nn.Parameter(torch.full((32, 4), 7.0))
    assert float(matrix.B.detach().mean()) == 7.0


def test_a_model_without_lora_is_refused_with_what_to_do(model_dir: str) -> None:
    with pytest.raises(AdapterError, match=r"LlamaForCausalLM has no LoRA layers.*get_peft_model"):
        adapted_matrices(LlamaForCausalLM.from_pretrained(model_dir))


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (VeraConfig(target_modules=Q_AND_V), "VERA"),
        (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), "IA3"),
        (LoHaConfig(target_modules=Q_AND_V), "LOHA"),
        (OFTConfig(target_modules=["q_proj"], oft_block_size=8), "OFT"),
        (AdaLoraConfig(target_modules=Q_AND_V, total_step=10), "ADALORA"),
        (PromptTuningConfig(num_virtual_tokens=2), "PROMPT_TUNING"),
    ],
)
def test_another_method_of_peft_is_named_with_what_to_use(model_dir: str, config: Any, method: str) -> None:
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(LlamaForCausalLM.from_pretrained(model_dir), config)
    with pytest.raises(AdapterError, match=rf"adapted by {method}; .* Use peft\.LoraConfig"):
        adapted_matrices(model)


def test_dora_under_warn_protects_the_factors(model_dir: str, token_ids: torch.Tensor) -> None:
    model = llama(model_dir, use_dora=True)
    with pytest.warns(UserWarning, match=r"q_proj \(DoRA's magnitude; A and B are covered\)"):
        importance = record(llama(model_dir, use_dora=True), token_ids, unprotected="warn")
        penalty = ImportancePenalty(model, importance, phi=1.0, layer_weights="uniform", phi_scale="paper")
    move_adapter(model, unprotected="warn")
    expected = 0.0
    for m in penalty.matrices:
        mine = importance.matrices[m.name]
        moved = m.scale * (m.B @ m.A - mine.B @ mine.A).detach()
        expected += float((mine.omega * moved**2).sum()) / len(penalty.matrices)  # type: ignore[operator]
    assert len(penalty.matrices) == 4 and penalty().item() == pytest.approx(expected, rel=1e-4)


def test_an_unknown_adapter_name_is_refused_with_the_known_ones(peft_model: PeftModel) -> None:
    with pytest.raises(AdapterError, match=r"no adapter 'medical' in this model; it has 'default'"):
        adapted_matrices(peft_model, "medical")


NOT_LORA = r" \(trained, but not a LoRA matrix of adapter 'default'\)"
EMBEDDING = ["embed_tokens", "q_proj"]
REFUSED = [
    pytest.param(
        {"use_dora": True}, r"model\.layers\.0\.self_attn\.q_proj \(DoRA's magnitude; A and B are covered\)", id="dora"
    ),
    pytest.param({"target_modules": EMBEDDING}, r"model\.embed_tokens \(LoRA on an embedding\)", id="embedding"),
    pytest.param({"bias": "all"}, r"q_proj\.base_layer\.bias" + NOT_LORA, id="bias-all"),
    pytest.param({"bias": "lora_only"}, r"q_proj\.base_layer\.bias" + NOT_LORA, id="bias-lora-only"),
    pytest.param(
        {"modules_to_save": ["lm_head"]}, r"lm_head\.modules_to_save\.default\.weight" + NOT_LORA, id="modules-to-save"
    ),
    pytest.param(
        {"trainable_token_indices": [5, 6]}, r"embed_tokens\S*trainable_tokens_delta\S*" + NOT_LORA, id="tokens"
    ),
    pytest.param({"lora_bias": True}, r"q_proj \(the bias of lora_bias; A and B are covered\)", id="lora-bias"),
    pytest.param({"kasa_config": KasaConfig()}, r"q_proj \(LoRA variant KasaLinearVariant\)", id="kasa"),
    pytest.param({"alora_invocation_tokens": [5]}, r"q_proj \(LoRA variant ALoraLinearVariant\)", id="alora"),
]


@pytest.fixture
def biased_dir(model_dir: str, tmp_path: Any) -> str:
    """The tiny Llama with biases on its attention."""
    model = LlamaForCausalLM.from_pretrained(model_dir)
    model.config.attention_bias = True
    LlamaForCausalLM(model.config).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_importance_cannot_protect_is_refused_by_name(
    biased_dir: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        adapted_matrices(llama(biased_dir, **config))


@pytest.mark.parametrize(
    ("config", "message"), [case for case in REFUSED if case.id in ("bias-all", "modules-to-save", "dora", "lora-bias")]
)
def test_unprotected_warn_names_the_same_parts_and_yields_the_rest(
    biased_dir: str, config: dict[str, Any], message: str
) -> None:
    model = llama(biased_dir, **config)
    with pytest.warns(UserWarning, match=message):
        matrices = adapted_matrices(model, unprotected="warn")
    assert matrices


def test_nothing_is_warned_of_a_plain_adapter(peft_model: PeftModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted_matrices(peft_model, unprotected="warn")


@pytest.mark.parametrize(
    "config", [{"target_modules": ["embed_tokens"]}, {"kasa_config": KasaConfig()}], ids=["embedding", "variant"]
)
@pytest.mark.parametrize("unprotected", ["refuse", "warn"])
def test_where_nothing_is_left_to_protect_training_it_unprotected_is_not_advised(
    model_dir: str, config: dict[str, Any], unprotected: Any
) -> None:
    with pytest.raises(AdapterError, match=r"cannot protect model\..*Use plain LoRA") as refusal:
        adapted_matrices(llama(model_dir, **config), unprotected=unprotected)
    assert "unprotected=" not in str(refusal.value)


def test_a_long_list_of_refused_parts_is_cut_with_their_number(model_dir: str) -> None:
    with pytest.raises(AdapterError, match=r"and 10 more\."):
        adapted_matrices(llama(model_dir, target_modules="all-linear", use_dora=True))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(3, 6, 3)
        self.linear = nn.Linear(6, 4)


def test_lora_on_a_convolution_is_refused_by_name() -> None:
    model = get_peft_model(Small(), LoraConfig(r=2, target_modules=["convolution", "linear"]))
    with pytest.raises(AdapterError, match=r"convolution \(LoRA on a Conv1d\)"):
        adapted_matrices(model)


def test_two_active_adapters_are_refused_until_one_is_named_and_the_other_frozen(peft_model: PeftModel) -> None:
    config = peft_model.peft_config["default"]
    peft_model.add_adapter("second", config)
    assert {matrix.adapter_name for matrix in adapted_matrices(peft_model)} == {"default"}
    peft_model.base_model.set_adapter(["default", "second"])
    with pytest.raises(AdapterError, match=r"one active adapter, found \['default', 'second'\].*adapter_name="):
        adapted_matrices(peft_model)
    with pytest.raises(
        AdapterError, match=r"q_proj\.lora_A\.second\.weight \(trained, but not a LoRA matrix of adapter"
    ):
        adapted_matrices(peft_model, "default")
    for name, parameter in peft_model.named_parameters():
        if ".second." in name:
            parameter.requires_grad_(False)
    assert {matrix.adapter_name for matrix in adapted_matrices(peft_model, "default")} == {"default"}


def test_a_second_adapter_named_like_a_module_hides_nothing(peft_model: PeftModel) -> None:
    peft_model.add_adapter("lm_head", peft_model.peft_config["default"])
    peft_model.base_model.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(AdapterError, match=r"lm_head\.weight \(trained, but not"):
        adapted_matrices(peft_model)


def test_lora_on_a_tied_head_is_found_and_a_trained_tied_weight_is_refused(model_dir: str) -> None:
    base = LlamaForCausalLM.from_pretrained(model_dir)
    base.config.tie_word_embeddings = True
    base.tie_weights()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    assert "lm_head" in names(adapted_matrices(model))
    base.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(AdapterError, match=r"embed_tokens\.weight \(trained, but not"):
        adapted_matrices(model)


def test_tied_lora_factors_on_the_embedding_are_refused_by_name(model_dir: str) -> None:
    base = LlamaForCausalLM.from_pretrained(model_dir)
    base.config.tie_word_embeddings = True
    base.tie_weights()
    config = LoraConfig(r=2, target_modules=["lm_head", "embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(AdapterError, match=r"embed_tokens \(LoRA on an embedding\)"):
        adapted_matrices(get_peft_model(base, config))


def test_base_sample_recognises_the_weights_and_reaches_both_ends(peft_model: PeftModel) -> None:
    matrix = adapted_matrices(peft_model)[0]
    weight = matrix.module.get_base_layer().weight.detach().flatten()
    sample = matrix.base_sample()
    assert len(sample) == 16
    assert sample[0] == weight[0]
    assert sample[-1] == weight[-1]


@pytest.mark.parametrize("shape", [(8192, 4096), (4096, 11008)])
def test_base_sample_of_a_matrix_above_two_to_the_24_elements_stays_inside(
    peft_model: PeftModel, shape: tuple[int, int]
) -> None:
    matrix = adapted_matrices(peft_model)[0]
    matrix.module.base_layer.weight = nn.Parameter(torch.zeros(1, 1).expand(shape), requires_grad=False)
    assert torch.equal(matrix.base_sample(), torch.zeros(16))


def test_base_sample_of_a_quantised_weight_is_empty(peft_model: PeftModel) -> None:
    matrix = adapted_matrices(peft_model)[0]
    packed = torch.zeros(512, 1, dtype=torch.uint8)
    matrix.module.base_layer.weight = nn.Parameter(packed, requires_grad=False)
    assert len(adapted_matrices(peft_model)[0].base_sample()) == 0


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("model.layers.3.self_attn.q_proj", 3),
        ("transformer.h.11.mlp.experts.5.up", 11),
        ("0.linear", 0),
        ("lm_head", None),
        ("model.layer2.q_proj", None),
    ],
)
def test_layer_number_is_the_first_number_in_the_name(name: str, number: int | None) -> None:
    assert layer_number(name) == number


def test_a_layerwise_optimizer_is_refused_with_what_it_does(peft_model: PeftModel) -> None:
    with pytest.raises(AdapterError, match=r"a layer-wise optimizer steps inside the backward pass.*galore_adamw"):
        check_trained_by(LayerWiseDummyOptimizer(), adapted_matrices(peft_model))


def test_an_optimizer_of_another_model_is_refused(model_dir: str, peft_model: PeftModel) -> None:
    matrices = adapted_matrices(peft_model)
    check_trained_by(torch.optim.SGD(peft_model.parameters(), lr=0.1), matrices)
    with pytest.raises(AdapterError, match=r"does not train model\.layers\.0\.self_attn\.q_proj"):
        check_trained_by(torch.optim.SGD(llama(model_dir).parameters(), lr=0.1), matrices)


def test_an_optimizer_that_chooses_its_own_step_is_refused_when_recording(
    peft_model: PeftModel, token_ids: torch.Tensor
) -> None:
    recorder = ImportanceRecorder(peft_model, method="path_integral")
    optimizer = Adafactor([p for p in peft_model.parameters() if p.requires_grad])
    recorder.attach(optimizer)
    peft_model(input_ids=token_ids, labels=token_ids).loss.backward()
    with pytest.raises(AdapterError, match=r"Adafactor with lr=None.*Give it one"):
        optimizer.step()
