"""What is measured is what is trained: against plain Transformers, on tokenizers and templates of the usual kinds."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from conftest import GENERAL_TEXT
from made_tokenizers import TEMPLATES, made_model, made_tokenizer, teach
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerCallback
from trl import SFTTrainer

from hlora.budget.probes import TextProbe
from hlora.config.sections import DomainConfig, EvaluationConfig, GeneralSource
from hlora.data.domain import DomainRows, TokenLimits, domain_rows
from hlora.data.example import Example
from hlora.data.packing import pack
from hlora.data.rendering import render
from hlora.data.samples import model_samples
from hlora.evaluation.answers import generate_answers
from hlora.evaluation.evaluate import evaluate
from hlora.evaluation.harness import harness_accuracy
from hlora.evaluation.likelihood import losses_and_drift, scored_logits, text_likelihood, windows
from hlora.system.errors import TrainingError
from hlora.training.train import train

SHORT = EvaluationConfig(max_tokens=100, window=32, generate=2, batch_size=3)


def load(directory: str) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)


def rows_of(make: Any, limits: TokenLimits, tmp_path: Path) -> DomainRows:
    files = []
    for name, numbers in (("train", range(8)), ("test", range(20, 26))):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(make(n)) + "\n" for n in numbers), encoding="utf-8")
    return domain_rows(DomainConfig(task="rows", train=str(files[0]), test=str(files[1])), None, 0, limits)


def chat(number: int) -> dict[str, Any]:
    question, answer = f"What is {number} plus one?", f"  It is {number + 1},\n  {'and so on ' * (number % 3)}so."
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def by_hand(model: Any, whole: list[int], start: int, end: int) -> float:
    """−log p of tokens start to end of a row, in float64."""
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return -sum(float(log_p[k - 1, whole[k]]) for k in range(start, end))


def shared(one: list[int], other: list[int]) -> int:
    pairs = list(zip(one, other, strict=False))
    return next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))


CLOSINGS = {"mistral": 1, "llama3": 1}  # tokens that end the turn: EOS, <|eot_id|>; elsewhere there is a new line too


@pytest.mark.parametrize("adds", ["bos", "neither"])
@pytest.mark.parametrize("template", list(TEMPLATES))
def test_the_answer_nll_of_a_conversation_is_that_of_the_tokens_that_trl_trains(
    template: str, adds: Any, tmp_path: Path
) -> None:
    model, tokenizer = load(made_model(tmp_path / "model", made_tokenizer("bytes", adds, template)))
    domain = rows_of(chat, TokenLimits.of(model, tokenizer, {"max_length": 128}), tmp_path)
    found = evaluate(model, tokenizer, {}, domain, SHORT)["domain"]["answer_nll_each"]
    for number, nll in zip(range(20, 26), found, strict=True):
        turns = chat(number)["messages"]
        opened = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(turns, return_dict=False)
        hand = by_hand(model, whole, shared(opened, whole), len(whole) - CLOSINGS.get(template, 2))
        assert nll == pytest.approx(hand, abs=1e-4)
    labels = labels_of(model, tokenizer, domain)
    turns = chat(3)["messages"]
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    opened = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
    start = shared(opened, whole)
    assert [-100] * start + whole[start:] in labels


def labels_of(model: Any, tokenizer: Any, domain: DomainRows) -> list[list[int]]:
    """The labels of the rows that SFTTrainer trains."""
    seen: list[list[int]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
            seen.extend(row["labels"] for row in train_dataloader.dataset)

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    arguments = {"max_steps": 1, "max_length": 128, "report_to": []}
    logs = Path(tokenizer.name_or_path).parent / "logs" / "tune"
    train(adapted, tokenizer, domain.dataset(tokenizer), output=logs, arguments=arguments, seed=0, callbacks=[Watch()])
    return seen


@pytest.mark.parametrize("adds", ["bos", "both", "eos", "neither"])
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_the_answer_nll_of_a_completion_keeps_its_indentation(kind: Any, adds: Any, tmp_path: Path) -> None:
    def code(number: int) -> dict[str, str]:
        return {"prompt": f"def plus_{number}(x):\n", "completion": f"    y = x + {number}\n    return y\n"}

    model, tokenizer = load(made_model(tmp_path / "model", made_tokenizer(kind, adds)))
    domain = rows_of(code, TokenLimits.of(model, tokenizer, {"max_length": 128}), tmp_path)
    found = evaluate(model, tokenizer, {}, domain, SHORT)["domain"]["answer_nll_each"]
    before = [0] if adds in ("bos", "both") else []
    for number, nll in zip(range(20, 26), found, strict=True):
        row = code(number)
        opened, whole = (
            [*before, *tokenizer(text, add_special_tokens=False)["input_ids"]]
            for text in (row["prompt"], row["prompt"] + row["completion"])
        )
        assert nll == pytest.approx(by_hand(model, whole, shared(opened, whole), len(whole)), abs=1e-4)
    prompt, completion = code(3).values()
    opened, whole = (
        [*before, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in (prompt, prompt + completion)
    )
    start = shared(opened, whole)
    assert [*[-100] * start, *whole[start:], 1] in labels_of(model, tokenizer, domain)  # EOS is trained


def test_choices_are_scored_by_the_harness_with_bos_and_as_they_are_trained(tmp_path: Path) -> None:
    model, tokenizer = load(made_model(tmp_path / "model", made_tokenizer("pieces", "both")))
    files = []
    for name, start in (("train", 0), ("test", 9)):
        rows = [
            {"question": f"{n}?", "choices": ["one", f"{n} b", "c"], "label": n % 3} for n in range(start, start + 6)
        ]
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = DomainConfig(task="multiple_choice", train=str(files[0]), test=str(files[1]))
    domain = domain_rows(config, None, 0)
    found = harness_accuracy(model, tokenizer, domain, 4)
    right = []
    for n, nll in zip(range(9, 15), found["answer_nll_each"], strict=True):
        hand = []
        for choice in ("one", f"{n} b", "c"):
            prompt = f"Question: {n}?\nAnswer:"
            opened, whole = (
                [0, *tokenizer(t, add_special_tokens=False)["input_ids"]] for t in (prompt, f"{prompt} {choice}")
            )
            hand.append(by_hand(model, whole, shared(opened, whole), len(whole)))
        assert nll == pytest.approx(hand[n % 3], abs=1e-4)
        right.append(float(hand.index(min(hand)) == n % 3))
    assert found["acc_each"] == right


# Texts


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("adds", ["bos", "both", "eos", "neither"])
def test_every_window_of_a_text_begins_with_bos_where_the_tokenizer_adds_one(
    kind: Any, adds: Any, tmp_path: Path
) -> None:
    model, tokenizer = load(made_model(tmp_path / "model", made_tokenizer(kind, adds)))
    found = text_likelihood(model, tokenizer, GENERAL_TEXT, SHORT)
    before = [0] if adds in ("bos", "both") else []
    ids = [*before, *tokenizer(GENERAL_TEXT, add_special_tokens=False)["input_ids"]][:100]
    total, done, end = 0.0, 1, 32
    while done < 100:  # half a window is context
        window = [*before, *ids[end - 32 + len(before) : end]]
        total += by_hand(model, window, 32 - (end - done), 32)
        done, end = end, min(end + 16, 100)
    assert found["nll"] == pytest.approx(total / 99, abs=1e-4) and found["tokens"] == 99
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    first = "" if before else str(tokenizer.decode(ids[:1]))
    assert found["bytes"] == len(text.encode()) - len(first.encode())
    packed = pack(tokenizer, [GENERAL_TEXT], 3, 20)
    assert packed.shape == (3, 20) and (packed[:, 0] == 0).tolist() == [bool(before)] * 3
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    probe = TextProbe(adapted, tokenizer, {"": GENERAL_TEXT}, tokens=256, most_tokens=256, window=32)
    assert (probe._rows[""][:, 0] == 0).tolist() == [bool(before)] * len(probe._rows[""])
    assert probe.measure(64).nats == pytest.approx(0, abs=1e-6)


def test_bytes_are_the_texts_own_where_the_tokenizer_does_not_know_its_letters(tmp_path: Path) -> None:
    tokenizer = made_tokenizer("pieces")
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    made["model"]["byte_fallback"] = False
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(made))
    model, _ = load(made_model(tmp_path / "model", tokenizer))
    text = "a Ο ποταμός κατεβαίνει"
    first = len(str(tokenizer.decode(tokenizer(text)["input_ids"][:1])))
    assert text_likelihood(model, tokenizer, text, SHORT)["bytes"] == len(text[first:].encode())


# What a model writes


LEAKS = [
    {"repetition_penalty": 5.0},
    {"no_repeat_ngram_size": 1},
    {"min_p": 0.9, "typical_p": 0.1, "top_k": 1, "do_sample": True},
    {"suppress_tokens": list(range(20, 400))},
    {"bad_words_ids": [[30]], "min_new_tokens": 30, "forced_eos_token_id": 1, "max_length": 3},
    {"num_beams": 3, "length_penalty": 5.0},
]


@pytest.mark.parametrize("leak", LEAKS, ids=lambda leak: next(iter(leak)))
def test_what_a_model_writes_depends_on_nothing_in_its_generation_config(leak: dict[str, Any], tmp_path: Path) -> None:
    model, tokenizer = load(made_model(tmp_path / "model", made_tokenizer("bytes")))
    rows = [render(tokenizer, Example("The river", f" is{' long' * n}")) for n in range(1, 4)]
    source = GeneralSource(source="model", samples=8, sample_tokens=16)

    def written(name: str) -> tuple[list[str], list[str]]:
        return model_samples(source, model, tokenizer, 0, tmp_path / name), generate_answers(
            model, tokenizer, rows, SHORT
        )

    plain = written("plain")
    kept = model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2, **leak)
    assert written("leaking") == plain
    assert model.generation_config is kept


def test_samples_are_drawn_from_the_models_distribution(tmp_path: Path) -> None:
    model, tokenizer = load(made_model(tmp_path / "model", made_tokenizer("bytes")))
    model.generation_config = GenerationConfig(eos_token_id=1, top_k=3, repetition_penalty=2.0)
    texts = model_samples(GeneralSource(source="model", samples=800, sample_tokens=8), model, tokenizer, 0, tmp_path)
    with torch.no_grad():
        p = model(input_ids=torch.tensor([[0]])).logits[0, -1].softmax(-1)
    likely = [i for i in p.topk(6).indices.tolist() if str(tokenizer.decode([i])).isalnum()]
    for token in likely:
        share = sum(tokenizer(text)["input_ids"][:1] == [token] for text in texts) / 800
        assert share == pytest.approx(float(p[token]), abs=4 * math.sqrt(float(p[token]) / 800) + 0.01)


def test_answers_may_be_as_long_as_the_longest_expected_one_and_stay_within_the_context(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = load(made_model(tmp_path / "model", made_tokenizer("bytes"), context=64))
    examples = [Example("Q " * 20, " a"), Example("Q:", " a" * 30), Example("R:", " b")]
    rows = [render(tokenizer, example) for example in examples]
    longest = len(rows[1].ids) - rows[1].start
    answers = generate_answers(model, tokenizer, rows, SHORT)
    for row, answer in zip(rows, answers, strict=True):
        ids = row.prompt_ids
        while len(ids) < min(64, len(row.prompt_ids) + longest) and ids[-1] != 1:
            with torch.no_grad():
                ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        text = tokenizer.decode(ids[len(row.prompt_ids) :], skip_special_tokens=True)
        assert answer == (text.strip().splitlines() or [""])[0]
    domain = DomainRows([], examples, [{}] * 3, {"task": "rows"})
    with caplog.at_level("WARNING", "hlora"):
        short = evaluate(model, tokenizer, {}, domain, EvaluationConfig(max_new_tokens=5, generate=3))
    assert short["domain"]["generated_too_short"] == 1
    assert "1 of 3 expected answers have more than 5 tokens" in caplog.text
    assert "generated_too_short" not in evaluate(model, tokenizer, {}, domain, SHORT)["domain"]


REAL = Path(trl.__file__).parent / "chat_templates"
OPENERS = ["qwen3", "qwen3_5_think", "gptoss", "glm4moe", "nemotron_3_nano", "gemma3", "llama3_1", "deepseekv3"]


@pytest.mark.parametrize("template", [*TEMPLATES, *OPENERS])
def test_a_model_that_knows_the_answer_is_right_whatever_the_template_writes_before_it(
    template: str, tmp_path: Path
) -> None:
    written = TEMPLATES.get(template) or (REAL / f"{template}.jinja").read_text(encoding="utf-8")
    model, tokenizer = load(made_model(tmp_path / "model", made_tokenizer("bytes", "neither", written), context=1024))
    chat = [{"role": "user", "content": "What is 7?"}]
    row = render(tokenizer, Example(chat, "It is seven,\n  so."))
    teach(model, row.ids, row.start)
    assert generate_answers(model, tokenizer, [row], EvaluationConfig()) == [row.answer] == ["It is seven,\n  so."]


# Divergence


def test_the_mean_divergence_on_a_text_is_that_of_the_dense_distributions(tmp_path: Path) -> None:
    model, tokenizer = load(made_model(tmp_path / "model", made_tokenizer("bytes", "bos")))
    other, _ = load(made_model(tmp_path / "other", tokenizer, seed=1))
    ids = torch.tensor(tokenizer(GENERAL_TEXT)["input_ids"][:70])

    references = {"model": partial(scored_logits, model), "itself": partial(scored_logits, other)}
    expected = []
    with torch.no_grad():
        for window, new in windows(ids, 24, 12, before=[0]):
            p, q = (of(input_ids=window[None]).logits[0, :-1].double().log_softmax(-1) for of in (model, other))
            expected.append((p.exp() * (p - q)).sum(-1)[-new:])
    for size in (1, 3, 50):
        losses, drift = losses_and_drift(other, ids, 24, 12, batch_size=size, before=[0], references=references)
        assert torch.equal(losses, losses_and_drift(other, ids, 24, 12, batch_size=size, before=[0])[0])
        assert drift["model"].shape == losses.shape == (69,)
        torch.testing.assert_close(drift["model"], torch.cat(expected), rtol=1e-3, atol=1e-6)
        assert float(drift["model"].mean()) == pytest.approx(float(torch.cat(expected).mean()), rel=1e-5)
        torch.testing.assert_close(drift["itself"], torch.zeros(69).double(), rtol=0, atol=1e-6)


def test_a_trainer_that_trains_other_tokens_than_are_scored_is_refused(tmp_path: Path) -> None:
    model, tokenizer = load(made_model(tmp_path / "model", made_tokenizer("bytes", "bos", "qwen")))
    domain = rows_of(chat, TokenLimits.of(model, tokenizer, {"max_length": 128}), tmp_path)

    class Whole(SFTTrainer):
        def _prepare_dataset(self, *args: Any, **options: Any) -> Any:
            return super()._prepare_dataset(*args, **options).map(lambda row: {"labels": row["input_ids"]})

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    arguments = {"max_steps": 1, "max_length": 128, "report_to": []}
    with pytest.raises(TrainingError, match="TRL trains other tokens than those that are scored"):
        train(
            adapted,
            tokenizer,
            domain.dataset(tokenizer),
            output=tmp_path / "l/t",
            arguments=arguments,
            seed=0,
            trainer_class=Whole,
        )
