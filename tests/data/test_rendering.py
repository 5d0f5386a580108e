"""What is trained is what is scored, and decodes to what the file says, for any template and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import TEMPLATES, Adds, Kind, made_tokenizer

from hlora.data.example import Example
from hlora.data.rendering import Rendered, prompt_identity, render, render_text
from hlora.data.tasks import read_example
from hlora.data.tokens import text_start
from hlora.system.errors import DataError

CHAT_OPENERS = {"mistral": " ", "empty thought": "<think>\n\n</think>\n\n"}  # before the answer, in trained and scored

TURN = "{%% for m in messages %%}%s{%% endfor %%}"

texts = st.text(
    st.one_of(st.sampled_from("abc .,:\n<|>/[]{}\"'"), st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"))),
    min_size=1,
    max_size=24,
).filter(lambda text: text.strip() and not any(mark in text for mark in ("<eos>", "<bos>", "▁")))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def answer_of(tokenizer: Any, row: Rendered) -> str:
    return tokenizer.decode(row.ids[row.start : row.end])


def trl_mask(tokenizer: Any, prompt: list[int], whole: list[int]) -> list[int]:
    """As trl.SFTTrainer makes it: the completion starts where prompt and whole row differ."""
    shared = next(
        (n for n, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
    )
    return [0] * shared + [1] * (len(whole) - shared)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["bytes", "pieces"]),
    adds=st.sampled_from(["bos", "eos", "both", "neither"]),
    prompt=texts,
    answer=texts,
    join=st.sampled_from(["", " ", "\n"]),
)
def test_a_text_row_is_trained_and_scored_as_the_file_has_it(
    kind: Kind, adds: Adds, prompt: str, answer: str, join: str
) -> None:
    tokenizer = made_tokenizer(kind, adds)
    row = render(tokenizer, Example(prompt, answer, join=join))
    before = [0] if adds in ("bos", "both") else []
    prompt_ids, bare = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, prompt + join + answer))
    if not before and bare[0] != prompt_ids[0]:  # one token of both, with nothing before it that would predict it
        bare = [*prompt_ids, *tokenizer(join + answer, add_special_tokens=False)["input_ids"]]
    assert row.ids == [*before, *bare, 1]  # BOS and EOS once each
    trained = row.training_row()
    assert trained["completion_mask"] == [0] * row.start + [1] * (len(row.ids) - row.start)
    alone = [*before, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    assert trained["completion_mask"] == trl_mask(tokenizer, alone, row.ids)
    assert row.end == len(row.ids) - 1  # EOS is trained, and not scored
    assert tokenizer.decode(row.ids[: row.end], skip_special_tokens=True) == prompt + join + answer
    # The answer's first token may hold the end of the prompt too, or of a letter of it.
    assert answer_of(tokenizer, row).endswith((join + answer)[1:])
    if not row.prompt_rest:
        assert answer_of(tokenizer, row) == join + answer


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["bytes", "pieces"]),
    adds=st.sampled_from(["bos", "eos", "both", "neither"]),
    template=st.sampled_from(list(TEMPLATES)),
    question=texts,
    answer=texts,
    earlier=st.booleans(),
)
def test_a_row_of_messages_is_trained_and_scored_as_its_template_renders_it(
    kind: Kind, adds: Adds, template: str, question: str, answer: str, earlier: bool
) -> None:
    tokenizer = made_tokenizer(kind, adds, template)
    messages = [user("Hi there"), assistant("Hello."), user(question)] if earlier else [user(question)]
    row = render(tokenizer, read_example("rows", {"messages": [*messages, assistant(answer)]}))
    rendered = [
        tokenizer.apply_chat_template(some, add_generation_prompt=opened, return_dict=False)
        for some, opened in ((messages, True), ([*messages, assistant(answer)], False))
    ]
    assert row.ids == rendered[1]  # the template's own BOS and end, nothing twice
    expected = answer.strip() if template in ("gemma", "llama3") else answer
    found = answer_of(tokenizer, row)
    assert found == CHAT_OPENERS.get(template, "") + expected or found.strip().endswith(expected.strip())
    assert row.answer == expected
    if template != "opens a thought":  # there the answer may begin as the thought does
        assert row.training_row()["completion_mask"] == trl_mask(tokenizer, *rendered)


CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [user("What is 7?"), assistant("  It is\n  seven.\n")],
    "system": [{"role": "system", "content": "Be brief."}, user("What is 7?"), assistant("It is seven.")],
    "three turns": [user("Hi"), assistant("Hello."), user("What is 7?"), assistant("It is seven.")],
    "thought": [user("What is 7?"), assistant("It is seven.", reasoning_content="I count.")],
}
LISTS_ONLY = ("idefics3", "llava_next", "smolvlm")  # their contents are lists of texts and images
TRL_TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*_training.jinja"))


@pytest.mark.parametrize("path", TRL_TEMPLATES, ids=lambda path: path.stem)
def test_real_templates_are_trained_as_trl_marks_them_but_for_what_the_prompt_ends_with(path: Path) -> None:
    tokenizer = made_tokenizer("bytes", "neither", path.read_text(encoding="utf-8"))
    for name, chat in CHATS.items():
        try:
            row = render(tokenizer, read_example("rows", {"messages": chat}))
        except DataError:
            assert name in ("system", "thought") or path.stem.startswith(LISTS_ONLY)
            continue
        theirs = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        mask = "".join(map(str, theirs["assistant_masks"]))
        assert row.ids == theirs["input_ids"]
        assert row.start < row.end <= len(row.ids) and set(mask[row.start :]) == {"1"}
        before = tokenizer.decode(row.ids[len(mask.rstrip("1")) : row.start])
        assert row.prompt.rstrip().endswith(before.rstrip())


@pytest.mark.parametrize("end", ["", "\n"])
def test_eos_ends_an_answer_that_the_template_does_not_end(end: str) -> None:
    tokenizer = made_tokenizer("bytes", "neither", TURN % f"<|im_start|>{{{{ m.role }}}}: {{{{ m.content }}}}{end}")
    row = render(tokenizer, Example([user("Hi")], "Hello."))
    assert row.ids.count(1) == 1 and row.ids[-1] == 1 and row.training_row()["completion_mask"][-1] == 1
    assert tokenizer.decode(row.ids[row.start : row.end]).endswith("Hello.")


def test_bos_is_what_the_tokenizer_puts_before_a_text() -> None:
    for kind in ("bytes", "pieces"):
        starts = {adds: text_start(made_tokenizer(kind, adds)) for adds in ("bos", "eos", "both", "neither")}
        assert starts == {"bos": [0], "eos": [], "both": [0], "neither": []}


def test_bos_and_eos_that_the_text_has_already_are_not_doubled() -> None:
    row = render_text(made_tokenizer("bytes", "both"), "<bos>[INST] Hi [/INST]", " Hello<eos>")
    assert row.ids.count(0) == row.ids.count(1) == 1
    assert (row.ids[0], row.ids[-1], row.end) == (0, 1, len(row.ids) - 1)


def test_the_answer_begins_as_the_thought_that_the_template_opens_does() -> None:
    template = TEMPLATES["opens a thought"]
    tokenizer = made_tokenizer("bytes", "neither", template)
    row = render(tokenizer, Example([user("Hi")], "<b>Yes"))
    assert answer_of(tokenizer, row) == "<b>Yes" and row.prompt.endswith("<|im_start|>assistant\n")


CALLS = [
    {"type": "function", "function": {"name": "weather", "arguments": {"city": "Où"}}},
    {"type": "function", "function": {"name": "convert", "arguments": {"amount": 3, "unit": None}}},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def test_tool_calls_and_tools_reach_the_model_as_the_file_has_them() -> None:
    tokenizer = made_tokenizer("bytes", "neither", "qwen")
    for content in (None, "Let me see. "):
        example = read_example("rows", {"tools": TOOLS, "messages": [user("Hi"), assistant(content, tool_calls=CALLS)]})
        row = render(tokenizer, example)
        expected = (
            '<tool_call>weather {"city": "Où"}</tool_call><tool_call>convert {"amount": 3, "unit": null}</tool_call>'
        )
        assert answer_of(tokenizer, row) == row.answer == (content or "") + expected
        assert row.prompt.startswith('<|im_start|>system\n{"type": "function", "function": {"name": "weather"')


@pytest.mark.parametrize("path", sorted(TRL_TEMPLATES[0].parent.glob("*.jinja")), ids=lambda path: path.stem)
def test_arguments_as_json_text_are_rendered_as_objects_are(path: Path) -> None:
    tokenizer = made_tokenizer("bytes", "neither", path.read_text(encoding="utf-8"))
    found: list[Rendered | str] = []
    for arguments in ({"city": "Où"}, '{"city":"O\\u00f9"}'):
        calls = [{"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": arguments}}]
        try:
            found.append(
                render(tokenizer, read_example("rows", {"messages": [user("Hi"), assistant("", tool_calls=calls)]}))
            )
        except DataError as error:
            found.append(str(error))
    objects, text = found
    if path.stem.startswith("deepseekv3"):  # takes text only, and as it is
        objects, text = (tokenizer.decode(row.ids).replace("\\u00f9", "ù").replace(": ", ":") for row in found)
    assert objects == text


@pytest.mark.parametrize(
    ("template", "row", "problem"),
    [
        (TURN % "{% if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content }}{% endif %}",
         {"messages": [{"role": "human", "content": "Hi"}, assistant("x")]},
         "leaves out the content of turn 1 (role 'human')"),
        (TURN % "<{{ m.role }}>{{ m.content }}",
         {"messages": [user("Hi"), assistant("", tool_calls=CALLS)]},
         "the name of a tool call of turn 2 (role 'assistant')"),
        (TURN % "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}",
         {"messages": [user("Hi"), assistant("", tool_calls=CALLS)]}, "the arguments of a tool call of turn 2"),
        (TURN % "<{{ m.role }}>{{ m.content }}",
         {"messages": [user("Hi"), assistant("x")], "tools": TOOLS}, "leaves out the row's tools"),
        (TURN % "<{{ m.role }}>{{ m.content.split('</think>')[-1] }}",
         {"messages": [user("Hi"), assistant("so</think>x")]}, "leaves out content of a turn (role 'assistant')"),
        (TEMPLATES["gemma"], {"messages": [{"role": "system", "content": "s"}, user("Hi"), assistant("x")]},
         "the model's chat template refuses them (TemplateError: System role not supported)"),
        (TEMPLATES["mistral"], {"messages": [user("Hi"), assistant("x"), assistant("y")]}, "roles must alternate"),
        (None, {"messages": [user("Hi"), assistant("x")]}, "no chat template"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_render_is_refused_with_role_and_template(
    template: str | None, row: dict[str, Any], problem: str
) -> None:
    tokenizer = made_tokenizer("bytes", "neither", template)
    with pytest.raises(DataError) as caught:
        render(tokenizer, read_example("rows", row))
    assert problem in str(caught.value)


MEANT = [user("Hi"), assistant("Hello."), user("What is 7?")]
FORGETFUL = TURN % (  # of earlier reasoning, as Qwen 3 is before the user's last turn, and gpt-oss before an answer
    "<{{ m.role }}>{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
)


@pytest.mark.parametrize("role", ["user", "tool"])
@pytest.mark.parametrize(
    "turn", [assistant("Hello.", reasoning_content="I greet."), assistant("<think>I greet.</think>Hello.")]
)
@pytest.mark.parametrize(
    "answer", [assistant("seven", reasoning_content="I count."), assistant("<think>I count.</think>seven")]
)
def test_reasoning_of_earlier_turns_may_be_left_out_as_reasoning_models_leave_it(
    turn: dict[str, Any], role: str, answer: dict[str, Any]
) -> None:
    tokenizer = made_tokenizer("bytes", "neither", FORGETFUL)
    chat = [user("Hi"), turn, {"role": role, "content": "What is 7?"}, answer]
    row = render(tokenizer, read_example("rows", {"messages": chat}))
    expected = f"<user>Hi<assistant>Hello.<{role}>What is 7?<assistant><think>I count.</think>seven<eos>"
    assert tokenizer.decode(row.ids) == expected
    assert "I count." in answer_of(tokenizer, row)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_of_the_answer_is_not_left_out(key: str) -> None:
    tokenizer = made_tokenizer("bytes", "neither", TURN % "<{{ m.role }}>{{ m.content }}")
    with pytest.raises(DataError, match=rf"leaves out the {key} of turn 4 \(role 'assistant'\)"):
        render(tokenizer, read_example("rows", {"messages": [*MEANT, assistant("seven", **{key: "I count."})]}))


PARTS = [{"type": "text", "text": "What "}, {"type": "text", "text": "is 7?"}]


@pytest.mark.parametrize(
    "content",
    [
        "m.content",
        "m.content | tojson if m.content is not string else m.content",
        "m.role + m.content",
        "m.content if m.content is string else ''",
        "m.content if m.content is string else m.content | map(attribute='text') | join",
    ],
)
def test_a_content_of_texts_is_rendered_as_the_texts_that_it_joins(content: str) -> None:
    tokenizer = made_tokenizer("bytes", "neither", TURN % f"<{{{{ m.role }}}}>{{{{ {content} }}}}")
    rows = [
        render(tokenizer, read_example("rows", {"messages": [user(asked), assistant("seven")]}))  # type: ignore[arg-type]
        for asked in (PARTS, "What is 7?")
    ]
    assert rows[0] == rows[1]


def test_a_tool_whose_name_the_template_does_not_write_is_named() -> None:
    flat = TURN % "<{{ m.role }}>{{ m.content }}{% for t in tools or [] %}- {{ t.name }}\n{% endfor %}"
    tokenizer = made_tokenizer("bytes", "neither", flat)
    row: dict[str, Any] = {"messages": [user("Hi"), assistant("x")]}
    with pytest.raises(DataError, match=r"leaves out the tool 'weather'"):
        render(tokenizer, read_example("rows", {**row, "tools": TOOLS}))
    assert "weather" in render(tokenizer, read_example("rows", {**row, "tools": [TOOLS[0]["function"]]})).prompt


def test_a_rows_own_options_reach_its_template_wherever_it_is_rendered() -> None:
    template = "{% if enable_thinking %}Think.{% endif %}" + TURN % "<{{ m.role }}>{{ m.content }}"
    tokenizer = made_tokenizer("bytes", "neither", template)
    row = {"messages": [user("Hi"), assistant("x")]}
    plain, thinking = (
        read_example("rows", {**row, "chat_template_kwargs": {"enable_thinking": value}}) for value in (False, True)
    )
    assert render(tokenizer, thinking).prompt == "Think." + render(tokenizer, plain).prompt
    assert prompt_identity(tokenizer, thinking) == "Think." + prompt_identity(tokenizer, plain)


def test_an_answer_is_trained_from_its_start_where_one_token_would_hold_it_and_the_prompt() -> None:
    tokenizer = made_tokenizer("bytes", "neither")
    word = next(each for each in tokenizer.get_vocab() if each.isalpha() and each.isascii() and len(each) > 4)
    assert len(tokenizer(word)["input_ids"]) == 1
    row = render(tokenizer, Example(word[:2], word[2:]))
    assert tokenizer.decode(row.prompt_ids) == word[:2] and answer_of(tokenizer, row) == word[2:]
    with_bos = render(made_tokenizer("bytes", "bos"), Example(word[:2], word[2:]))  # BOS predicts that token
    assert len(with_bos.ids) == 3 and with_bos.start == 1


def test_the_same_prompt_is_known_by_its_rendering() -> None:
    tokenizer = made_tokenizer("bytes", "neither", "qwen")
    one = Example([{"role": "user", "content": "Hi "}], "a")
    other = Example([{"content": "Hi", "role": "user", "id": 3}], "b")
    assert prompt_identity(tokenizer, one) == prompt_identity(tokenizer, other)
    assert prompt_identity(tokenizer, one) != prompt_identity(tokenizer, Example([user("Ho")], "a"))
