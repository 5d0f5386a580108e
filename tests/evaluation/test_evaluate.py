"""Every measure against a slow, obvious way to compute it, and that measuring changes nothing."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GENERAL_TEXT, move_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from hlora.config.sections import DomainConfig, EvaluationConfig
from hlora.data.domain import DomainRows, domain_rows
from hlora.data.example import Example
from hlora.data.rendering import render
from hlora.evaluation.answers import answer_nll, generate_answers, scoring_passes
from hlora.evaluation.evaluate import _normal, evaluate
from hlora.evaluation.harness import harness_accuracy
from hlora.evaluation.likelihood import losses_and_drift, text_likelihood
from hlora.system.errors import DataError
from hlora.system.progress import Line

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def model(model_dir: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir).eval()


@pytest.fixture
def tokenizer(model_dir: str) -> Any:
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture
def domain(questions: tuple[str, str]) -> DomainRows:
    return domain_rows(DomainConfig(task="multiple_choice", train=questions[0], test=questions[1]), None, 0)


@torch.no_grad()
def one_by_one(model: Any, tokens: torch.Tensor, window: int, stride: int) -> list[float]:
    """−log p of each token but the first, each by a forward of its own.

    The first window's tokens see all before them; after it, each next `stride` tokens share one window's start.
    """
    count = len(tokens)
    window = min(window, count)
    stride = min(stride, window - 1)
    values = []
    end = window
    for position in range(1, count):
        if position >= end:
            end = min(end + stride, count)
        context = tokens[end - window : position]
        logits = model(input_ids=context[None]).logits[0, -1].double()
        values.append(float(torch.logsumexp(logits, 0) - logits[tokens[position]]))
    return values


# Sliding window


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_sliding_window_scores_each_token_once_with_its_context(model: Any, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 40), "tokens")
    window = data.draw(st.integers(2, 24), "window")
    stride = data.draw(st.integers(1, 30), "stride")
    batch_size = data.draw(st.integers(1, 5), "batch size")
    tokens = torch.randint(3, 384, (count,), generator=torch.Generator().manual_seed(count * 31 + window))
    with torch.no_grad():
        losses = losses_and_drift(model, tokens, window, stride, batch_size=batch_size)[0]
    assert losses.dtype == torch.float64
    expected = one_by_one(model, tokens, window, stride)
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-5)


def context_model() -> Any:
    """A random Llama whose next token depends strongly on the context, so that a wrong context shows."""
    torch.manual_seed(3)
    small = LlamaConfig(vocab_size=24, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(small).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 if parameter.dim() == 1 else 15)
    return model


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 5, 7])
def test_the_reference_would_notice_one_token_of_context_more_or_less(stride: int) -> None:
    model = context_model()
    tokens = torch.randint(0, 24, (30,), generator=torch.Generator().manual_seed(0))
    losses = losses_and_drift(model, tokens, 8, stride, batch_size=4)[0]
    torch.testing.assert_close(losses.tolist(), one_by_one(model, tokens, 8, stride), rtol=0, atol=1e-4)
    for window in (7, 9):
        other = one_by_one(model, tokens, window, min(stride, window - 1))
        assert max(abs(a - b) for a, b in zip(losses.tolist(), other, strict=True)) > 0.1


@torch.no_grad()
def test_a_stride_of_the_whole_window_is_that_of_all_but_one_token(model: Any) -> None:
    tokens = torch.randint(3, 384, (50,), generator=torch.Generator().manual_seed(0))
    losses = [losses_and_drift(model, tokens, 16, stride, batch_size=4)[0] for stride in (15, 16, 1000)]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])
    assert len(losses[0]) == 49


@torch.no_grad()
def test_a_text_within_one_window_is_scored_in_one_forward(model: Any) -> None:
    tokens = torch.randint(3, 384, (20,), generator=torch.Generator().manual_seed(0))
    whole = model(input_ids=tokens[None], labels=tokens[None]).loss
    for window in (20, 21, 512):
        torch.testing.assert_close(losses_and_drift(model, tokens, window, 4, batch_size=4)[0].mean().float(), whole)


@torch.no_grad()
def test_the_batch_size_does_not_change_what_is_measured(model: Any, tokenizer: Any, domain: DomainRows) -> None:
    texts = [
        text_likelihood(
            model, tokenizer, GENERAL_TEXT, EvaluationConfig(max_tokens=300, window=32, stride=20, batch_size=size)
        )
        for size in (1, 3, 64)
    ]
    answers = [answer_nll(model, tokenizer, domain.test, size) for size in (1, 3, 64)]
    for text, answer in zip(texts[1:], answers[1:], strict=True):
        assert text["nll"] == pytest.approx(texts[0]["nll"], abs=1e-6)
        assert answer == pytest.approx(answers[0], abs=1e-4)


class WithoutLogitsToKeep(LlamaForCausalLM):
    """As models of remote code and of old are: the forward takes nothing that it does not name."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
    ) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


LLAMA = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
IDS = {"vocab_size": 384, "bos_token_id": 0, "eos_token_id": 1}


@torch.no_grad()
@pytest.mark.parametrize("wrapped", [False, True], ids=["base", "peft"])
@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: WithoutLogitsToKeep(LlamaConfig(**LLAMA, **IDS)), id="no-logits-to-keep"),
        pytest.param(lambda: GPT2LMHeadModel(GPT2Config(**GPT2, **IDS)), id="gpt2"),
        pytest.param(lambda: GPTJForCausalLM(GPTJConfig(**GPT2, rotary_dim=4, **IDS)), id="gptj"),
    ],
)
def test_models_of_other_makes_are_scored_whether_or_not_they_can_keep_fewer_logits(
    build: Any, wrapped: bool, tokenizer: Any, domain: DomainRows
) -> None:
    torch.manual_seed(0)
    model = build().eval()
    tokens = torch.randint(3, 384, (40,), generator=torch.Generator().manual_seed(0))
    expected = one_by_one(model, tokens, 16, 5)
    if wrapped:
        targets = [name for name in ("q_proj", "c_attn") if any(n.endswith(name) for n, _ in model.named_modules())]
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")).eval()
    torch.testing.assert_close(
        losses_and_drift(model, tokens, 16, 5, batch_size=3)[0].tolist(), expected, rtol=0, atol=2e-5
    )
    assert all(value > 0 for value in answer_nll(model, tokenizer, domain.test, 4))


# Text likelihood


@torch.no_grad()
def test_perplexity_and_bits_per_byte_are_those_of_the_first_tokens(model: Any, tokenizer: Any) -> None:
    scores = text_likelihood(model, tokenizer, GENERAL_TEXT, EvaluationConfig(max_tokens=50))
    ids = tokenizer(GENERAL_TEXT)["input_ids"][:50]
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    losses = -torch.log_softmax(logits, -1)[torch.arange(49), ids[1:]]
    assert scores["tokens"] == 49
    assert scores["nll"] == pytest.approx(float(losses.mean()), abs=1e-6)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["nll"]), rel=1e-12)
    assert scores["nll_stderr"] == pytest.approx(float(losses.std()) / 7, abs=1e-6)
    scored_text = GENERAL_TEXT[len(tokenizer.decode(ids[:1])) : len(tokenizer.decode(ids))]
    assert scores["bytes"] == len(scored_text.encode("utf-8"))
    assert scores["bits_per_byte"] == pytest.approx(float(losses.sum()) / math.log(2) / scores["bytes"], abs=1e-6)


@torch.no_grad()
def test_bytes_are_those_of_utf8_and_not_characters(model: Any, tokenizer: Any) -> None:
    scores = text_likelihood(model, tokenizer, "xéΩ漢", EvaluationConfig())
    assert scores["bytes"] == 2 + 2 + 3


def test_a_uniform_model_has_the_vocabulary_as_perplexity(model: Any, tokenizer: Any) -> None:
    class Uniform(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 384)})

    scores = text_likelihood(Uniform(), tokenizer, GENERAL_TEXT, EvaluationConfig(max_tokens=100))
    assert scores["perplexity"] == pytest.approx(384, rel=1e-6)
    assert scores["nll_stderr"] == pytest.approx(0, abs=1e-9)


@torch.no_grad()
def test_the_paired_blocks_average_to_the_whole(model: Any, tokenizer: Any) -> None:
    scores = text_likelihood(model, tokenizer, GENERAL_TEXT, EvaluationConfig(max_tokens=151, window=64, stride=32))
    blocks = scores["nll_each"]
    assert len(blocks) == 3  # 64 + 64 + 22 tokens
    assert (64 * blocks[0] + 64 * blocks[1] + 22 * blocks[2]) / 150 == pytest.approx(scores["nll"], rel=1e-12)


@torch.no_grad()
def test_as_many_tokens_are_scored_as_asked_even_of_long_tokens(model: Any, tokenizer: Any) -> None:
    """A token of 24 characters is past the eight that are taken for each at first."""
    tokenizer.add_tokens(["x" * 24])
    big = type(model)(model.config)
    big.resize_token_embeddings(len(tokenizer))
    scores = text_likelihood(big.eval(), tokenizer, "x" * 24 * 100, EvaluationConfig(max_tokens=50))
    assert scores["tokens"] == 49


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_without_a_token_to_score_is_an_error(text: str, model: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=rf"a text of {len(text)} tokens has nothing to score"):
        text_likelihood(model, tokenizer, text, EvaluationConfig())


# Answers


@torch.no_grad()
def test_answer_nll_is_what_the_harness_gives_the_answer(model: Any, tokenizer: Any, domain: DomainRows) -> None:
    examples = [*domain.test, Example("A much longer prompt, of another length:", " and an answer of several tokens")]
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    requests = [
        Instance("loglikelihood", {}, (example.prompt, example.join + example.answer), 0) for example in examples
    ]
    expected = [-value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    assert answer_nll(model, tokenizer, examples, 4) == pytest.approx(expected, abs=1e-4)
    assert len(set(expected)) > 4


@torch.no_grad()
def test_answer_nll_of_messages_is_that_of_the_answer_after_the_template(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Capital of France?"}]
    (value,) = answer_nll(model, tokenizer, [Example(turns, "Paris")], 4)
    before = "<system>Be short.\n<user>Capital of France?\n<assistant>"
    start = len(tokenizer(before)["input_ids"])
    ids = torch.tensor([tokenizer(f"{before}Paris")["input_ids"]])
    logits = model(input_ids=ids).logits[0, :-1].double()
    losses = -torch.log_softmax(logits, -1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
    assert value == pytest.approx(float(losses[start - 1 :].sum()), abs=1e-5)


def test_messages_without_a_chat_template_say_what_to_use_instead(model: Any, tokenizer: Any) -> None:
    example = Example([{"role": "user", "content": "Hi"}], "Hello")
    with pytest.raises(DataError, match=r"no chat template: .* use prompt and completion"):
        answer_nll(model, tokenizer, [example], 4)


@torch.no_grad()
def test_accuracy_is_that_of_the_likeliest_choice(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [
        {
            "question": f"{n}?",
            "choices": [
                " ".join(draw.choices(["red", "a b c", "42", "Où"], k=draw.randint(1, 3))) + str(i) for i in range(3)
            ],
            "label": draw.randrange(3),
        }
        for n in range(20)
    ]
    for name, some in (("train", [{**rows[0], "question": "other"}]), ("test", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    config = DomainConfig(
        task="multiple_choice", train=str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl")
    )
    domain = domain_rows(config, None, 0)
    right, right_by_length = [], []
    for row, example in zip(rows, domain.test, strict=True):
        nll = answer_nll(model, tokenizer, [replace(example, answer=choice) for choice in example.choices], 3)
        right.append(float(np.argmin(nll) == row["label"]))
        lengths = [len(choice) for choice in example.choices]
        right_by_length.append(float(np.argmin(np.array(nll) / lengths) == row["label"]))
    scores = harness_accuracy(model, tokenizer, domain, 4)
    assert scores["acc_each"] == right and 0 < sum(right) < 20
    assert scores["acc_norm_each"] == right_by_length != right
    assert scores["acc"] == pytest.approx(sum(right) / 20)
    share = sum(right) / 20
    assert scores["acc_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 19))


@torch.no_grad()
def test_no_prompt_is_cut_where_the_models_configuration_names_no_context(tokenizer: Any, domain: DomainRows) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.5}
    model = BloomForCausalLM(BloomConfig(vocab_size=384, **sizes)).eval()
    tokenizer.model_max_length = 8  # of a tokenizer, which says nothing about a model without positions
    found = harness_accuracy(model, tokenizer, domain, 4)["answer_nll_each"]
    assert found == pytest.approx(answer_nll(model, tokenizer, domain.test, 4), abs=1e-4)


@torch.no_grad()
def test_the_scores_of_a_model_in_bfloat16_are_not_rounded_to_it(
    model_dir: str, tokenizer: Any, domain: DomainRows
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    found = torch.tensor(harness_accuracy(model, tokenizer, domain, 1)["answer_nll_each"])
    assert not torch.equal(found, found.bfloat16().float())  # of 18 nats, steps of an eighth of a nat
    assert found.tolist() == pytest.approx(answer_nll(model, tokenizer, domain.test, 1), abs=1e-3)


@pytest.mark.parametrize(
    ("written", "expected", "same"),
    [
        (" Paris. ", "paris", True),
        ("New   York", "new york", True),
        ("STRASSE", "straße", True),
        ("Paris, France", "Paris", False),
        ("3.5", "35", False),
        ("", "Paris", False),
    ],
)
def test_exact_match_ignores_case_spaces_and_a_final_stop_only(written: str, expected: str, same: bool) -> None:
    assert (_normal(written) == _normal(expected)) == same


class Scripted:
    """A model that writes given tokens, whatever it is asked."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: Any, texts: list[str]) -> None:
        self.tokenizer, self.texts = tokenizer, list(texts)
        self.config = LlamaConfig(max_position_embeddings=64)

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        self.options, self.asked = options, self.tokenizer.batch_decode(input_ids)
        assert attention_mask[:, -1].all()  # padded on the left
        texts, self.texts = self.texts[: len(input_ids)], self.texts[len(input_ids) :]
        written = self.tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, written], 1)


def test_a_generated_answer_is_cut_after_as_many_lines_as_the_expected_one_has(tokenizer: Any) -> None:
    examples = [Example("Q:", "one"), Example("A longer Q:", "one\ntwo"), Example("Q:", "x")]
    model = Scripted(tokenizer, [" one\nQ: and on", "\n one\ntwo\nthree", " \n"])
    rows = [render(tokenizer, example) for example in examples]
    answers = generate_answers(model, tokenizer, rows, EvaluationConfig(batch_size=2, max_new_tokens=9))
    assert answers == ["one", "one\ntwo", ""]
    settings = model.options["generation_config"]
    assert (settings.max_new_tokens, settings.do_sample) == (9, False)


@torch.no_grad()
def test_a_generated_answer_is_the_likeliest_token_after_token(model: Any, tokenizer: Any, domain: DomainRows) -> None:
    rows = [render(tokenizer, example) for example in domain.test[:3]]
    answers = generate_answers(model, tokenizer, rows, EvaluationConfig(max_new_tokens=4, batch_size=3))
    for example, answer in zip(domain.test, answers, strict=False):
        ids = tokenizer(example.prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(4):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        assert answer == (tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip().splitlines() or [""])[0]


# All of it


def small(**changes: Any) -> EvaluationConfig:
    return EvaluationConfig(
        **{"max_tokens": 64, "window": 32, "stride": 16, "generate": 2, "max_new_tokens": 4, **changes}
    )


def test_evaluation_reports_every_measure_and_each_item_for_paired_tests(
    model: Any, tokenizer: Any, domain: DomainRows
) -> None:
    result = evaluate(model, tokenizer, {"one": GENERAL_TEXT, "two": GENERAL_TEXT[500:]}, domain, small())
    assert json.loads(json.dumps(result)) == result
    assert list(result["texts"]) == ["one", "two"]
    scores = result["domain"]
    assert (scores["rows"], scores["generated"]) == (8, 2)
    assert {"answer_nll", "acc", "acc_norm", "exact_match"} <= set(scores)
    for name in ("answer_nll", "acc", "acc_norm"):
        assert scores[name] == pytest.approx(np.mean(scores[f"{name}_each"]))
        assert scores[f"{name}_stderr"] == pytest.approx(np.std(scores[f"{name}_each"], ddof=1) / math.sqrt(8))
    assert [set(sample) for sample in result["samples"]] == [{"prompt", "expected", "answer"}] * 2


def test_accuracy_and_samples_are_left_out_when_not_asked_for(model: Any, tokenizer: Any, domain: DomainRows) -> None:
    result = evaluate(model, tokenizer, {}, domain, small(accuracy=False, generate=0))
    assert set(result["domain"]) == {"rows", "answer_nll", "answer_nll_stderr", "answer_nll_each"}
    assert result["samples"] == []


def test_choices_of_one_token_count_as_done_with_the_pass_that_scores_them(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, numbers in (("train", range(8)), ("test", range(20, 26))):
        rows = [
            {"question": f"{n}?", "opa": f"{n}", "opb": f"{n + 1}", "opc": "c", "opd": "d", "cop": n % 4}
            for n in numbers
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = DomainConfig(task="medmcqa", train=str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"))
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(Line, "update", lambda line, done, note="": seen.append((done, line.total)))
    domain = domain_rows(config, None, 0)
    harness_accuracy(model, tokenizer, domain, 1)
    assert seen == [(4 * n, 24) for n in range(1, 7)]
    assert scoring_passes(tokenizer, domain.test, accuracy=True) == 6
    domain = replace(domain, test=[replace(row, choices=("one", "two words", "2 3")) for row in domain.test])
    assert scoring_passes(tokenizer, domain.test, accuracy=True) == 18
    assert scoring_passes(tokenizer, domain.test, accuracy=False) == 6


def test_rows_without_choices_are_evaluated_without_accuracy(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT
    examples = [
        Example([{"role": "user", "content": "Hi"}], "Hello"),
        Example([{"role": "user", "content": "Bye"}], "x"),
    ]
    result = evaluate(model, tokenizer, {}, DomainRows([], examples, [{}, {}], {"task": "rows"}), small())
    assert "acc" not in result["domain"]
    assert result["samples"][0]["prompt"] == "<user>Hi\n<assistant>"


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_mode_padding_side_random_state_and_weights_as_they_were(
    training: bool, peft_model: Any, tokenizer: Any, domain: DomainRows
) -> None:
    peft_model.train(training)
    tokenizer.padding_side = "right"
    torch.manual_seed(77)
    random.seed(2)
    np.random.seed(3)  # the legacy state is the one that the harness seeds
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    weights = {name: value.clone() for name, value in peft_model.state_dict().items()}
    evaluate(peft_model, tokenizer, {"text": GENERAL_TEXT}, domain, small())
    assert peft_model.training == training
    assert all(module.training == training for module in peft_model.modules())
    assert tokenizer.padding_side == "right"
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[2], strict=True))
    assert all(torch.equal(value, weights[name]) for name, value in peft_model.state_dict().items())
    assert any(parameter.requires_grad for parameter in peft_model.parameters())


@pytest.mark.slow
def test_an_untouched_adapter_measures_exactly_as_the_base_and_a_moved_one_does_not(
    model: Any, peft_model: Any, tokenizer: Any, domain: DomainRows
) -> None:
    texts = {"text": GENERAL_TEXT}
    base = evaluate(model, tokenizer, texts, domain, small())
    assert evaluate(peft_model, tokenizer, texts, domain, small()) == base
    move_adapter(peft_model, deviation=0.5)
    moved = evaluate(peft_model, tokenizer, texts, domain, small())
    assert moved["texts"]["text"]["nll"] != base["texts"]["text"]["nll"]
    assert moved["domain"]["answer_nll"] != base["domain"]["answer_nll"]


def test_evaluation_twice_gives_the_same_numbers(peft_model: Any, tokenizer: Any, domain: DomainRows) -> None:
    move_adapter(peft_model)
    first, second = (evaluate(peft_model, tokenizer, {"text": GENERAL_TEXT}, domain, small()) for _ in range(2))
    assert first == second
