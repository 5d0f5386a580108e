"""`hlora chat`: answers to the lines of stdin, streamed, and a clean end."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from made_tokenizers import made_model, made_tokenizer, teach
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LlamaForCausalLM

from hlora.after.chat import Chat, _lines
from hlora.after.tuned import Tuned, load_tuned, model_config
from hlora.config.sections import ModelConfig
from hlora.data.example import Example
from hlora.data.rendering import render

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def tuned(tuned_run: Path) -> Tuned:
    return load_tuned(tuned_run, model_config(tuned_run))


def continued(tuned: Tuned, text: str, base: bool = False) -> str:
    """The likeliest six tokens after a text, by the model alone."""
    ids = tuned.tokenizer(text, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.inference_mode():
        for _ in range(6):
            if base:
                with tuned.model.disable_adapter():
                    logits = tuned.model(input_ids=ids).logits
            else:
                logits = tuned.model(input_ids=ids).logits
            if (token := int(logits[0, -1].argmax())) == tuned.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return tuned.tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_each_line_of_stdin_is_answered_by_the_tuned_model(
    tuned_run: Path, tuned: Tuned, hlora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 7 plus one?\n\nWhat is 9 plus one?"))
    status, out, err = hlora("chat", tuned_run, "--max-new-tokens", "6")
    assert status == 0, err
    expected = [continued(tuned, f"What is {n} plus one?") for n in (7, 9)]
    assert out == "".join(f"{text}\n" for text in expected)
    assert "greedy; at most 6 new tokens" in err and "Plain text" in err


def test_compare_answers_with_the_base_model_too(
    tuned_run: Path, tuned: Tuned, hlora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 7 plus one?\n"))
    status, out, err = hlora("chat", tuned_run, "--compare", "--max-new-tokens", "6")
    assert status == 0, err
    base, mine = (continued(tuned, "What is 7 plus one?", base=base) for base in (True, False))
    assert out == f"[base] {base}\n[tuned] {mine}\n" and base != mine


def test_a_conversation_goes_through_the_chat_template_and_new_begins_another(
    tuned: Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned.tokenizer, "chat_template", TEMPLATE)
    talk = Chat(tuned, max_new_tokens=6)
    assert "chat template" in talk.heading()
    first = talk.answer("one")["tuned"]
    second = talk.answer("two")["tuned"]
    assert first == continued(tuned, "<user>one</user><assistant>")
    history = f"<user>one</user><assistant>{first}</assistant><user>two</user><assistant>"
    assert second == continued(tuned, history)
    talk.forget()
    assert talk.answer("one")["tuned"] == first
    assert Chat(tuned, plain=True, max_new_tokens=6).answer("one")["tuned"] == continued(tuned, "one")


def test_an_answer_ends_where_the_chat_template_ends_a_turn(tmp_path: Path) -> None:
    tokenizer = made_tokenizer("bytes", "neither", "qwen")  # <|im_end|>, which no EOS of tokenizer or model is
    model = LlamaForCausalLM.from_pretrained(made_model(tmp_path / "model", tokenizer))
    row = render(tokenizer, Example([{"role": "user", "content": "Hi"}], "Hello."))
    teach(model, [*row.ids, *tokenizer("and more")["input_ids"]], row.start)
    talk = Chat(Tuned(get_peft_model(model, LoraConfig()), tokenizer, ModelConfig(name="made")))
    assert talk.answer("Hi") == {"tuned": "Hello."}


def test_a_plain_prompt_is_read_as_it_is_trained_without_the_eos_that_the_tokenizer_adds(tmp_path: Path) -> None:
    tokenizer = made_tokenizer("bytes", "both")
    model = LlamaForCausalLM.from_pretrained(made_model(tmp_path / "model", tokenizer))
    row = render(tokenizer, Example("What is it?", " seven"))
    teach(model, row.ids, row.start)
    talk = Chat(Tuned(get_peft_model(model, LoraConfig()), tokenizer, ModelConfig(name="made")), plain=True)
    assert talk.answer("What is it?") == {"tuned": " seven"}


def test_a_prompt_beyond_the_context_is_said_and_the_next_one_answered(
    tuned: Tuned, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Chat(tuned, max_new_tokens=6)
    assert talk.answer("word " * 300) == {}
    assert "too long" in capsys.readouterr().out
    assert talk.answer("one")["tuned"] == continued(tuned, "one")


def test_ctrl_c_ends_with_status_0(tuned_run: Path, hlora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(io.StringIO):
        def __iter__(self) -> Iterator[str]:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Interrupted())
    assert hlora("chat", tuned_run)[0] == 0


def test_sampling_is_said_and_differs_from_greedy(tuned: Tuned) -> None:
    torch.manual_seed(0)
    talk = Chat(tuned, max_new_tokens=6, temperature=50.0)
    assert "sampling at temperature 50" in talk.heading()
    assert talk.answer("one")["tuned"] != continued(tuned, "one")


@pytest.mark.parametrize(
    "own",
    [
        {"num_beams": 4},
        {"num_return_sequences": 2, "do_sample": True},
        {"return_dict_in_generate": True, "output_scores": True},
        {"suppress_tokens": list(range(5, 200)), "repetition_penalty": 3.0, "min_new_tokens": 6},
    ],
)
def test_the_models_own_generation_settings_change_no_answer(
    tuned: Tuned, own: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GenerationConfig(eos_token_id=1, **own)
    for model in (tuned.model, tuned.model.get_base_model()):
        monkeypatch.setattr(model, "generation_config", config)
    assert Chat(tuned, max_new_tokens=6).answer("one")["tuned"] == continued(tuned, "one")


def test_several_templates_without_a_default_are_no_chat_template(
    tuned: Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned.tokenizer, "chat_template", {"rag": TEMPLATE, "tool_use": TEMPLATE})
    assert Chat(tuned, max_new_tokens=6).answer("one")["tuned"] == continued(tuned, "one")
    monkeypatch.setattr(tuned.tokenizer, "chat_template", {"default": TEMPLATE, "rag": "x"})
    assert Chat(tuned, max_new_tokens=6).answer("one")["tuned"] == continued(tuned, "<user>one</user><assistant>")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_text_are_read_as_unknown_characters(errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nsecond\n"), "utf-8", errors=errors))
    assert list(_lines()) == ["caf\ufffd", "second"]


def test_a_closed_stdin_has_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert list(_lines()) == []
