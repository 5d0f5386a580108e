"""Malformed input of each kind that hlora reads, from one valid sample each: an error of ours, or a valid reading.

"An error of ours" is HloraError: one message that names the culprit, status 2, no traceback (test_pipeline.py has that
of the command line). Anything else that is raised, or a damaged file that is taken for a good one, fails.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

from hlora.config.reading import load_config, parse_config
from hlora.config.sections import DomainConfig
from hlora.data.domain import DomainRows, domain_rows
from hlora.importance.artefact import Importance
from hlora.system.errors import ArtifactError, ConfigError, DataError, HloraError

DEEP = 20_000


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


WRONG: list[Any] = [
    None, "", "text", "\x00", "../../etc/passwd", "1e999", "nan", -1, 0, 2**70, -1.5, 1e308, float("nan"), float("inf"),
    True, [], [None], [1, "a"], nested(50), {}, {"a": {"b": []}}, "x" * 10_000,
]  # fmt: skip


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from leaves(each, (*path, key))
    elif isinstance(value, list) and value:
        for number, each in enumerate(value):
            yield from leaves(each, (*path, number))
    else:
        yield path


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    whole = copy.deepcopy(value)
    target = whole
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = new
    return whole


FREE = {
    "output", "name", "revision", "gguf_file", "target_modules", "exclude_modules", "use", "after", "paths", "dataset",
    "subset", "split", "column", "train", "train_split", "test", "validation", "join", "texts",
}  # fmt: skip
"""Fields that any text but an empty one may stand in: names and paths."""

MEANT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("trust_remote_code", "rslora", "offload", "accuracy"), (0, True)),
    **dict.fromkeys(("preset", "revision", "gguf_file", "quantization", "dataset", "subset", "gradient"), (None,)),
    **dict.fromkeys(("max_documents", "max_train_rows", "probe_every", "max_rows", "max_length"), (None,)),
    **dict.fromkeys(("after", "use", "stride", "max_new_tokens", "validation", "patience", "layer_weights"), (None,)),
    **dict.fromkeys(("alpha", "xi", "temperature", "general_rate"), (2**70, 1e308)),
    **dict.fromkeys(("stop_at_move", "budget"), (None, 2**70, 1e308)),
    **dict.fromkeys(("phi", "strengths"), (0, 2**70, 1e308, [])),
    **dict.fromkeys(("seed", "seeds", "dropout", "generate", "kept_learning", "max_unusable"), (0,)),
    **dict.fromkeys(("mixture", "baselines", "domains"), (None, [])),
    **dict.fromkeys(("probe_texts", "texts", "tune", "columns"), (None, {})),
    "exclude_modules": (None, []),
    "join": (None, ""),
    "learning_rate": (1e308,),
    "max_steps": (-1,),
    "report_to": (None, []),
}
"""Of the wrong values, those that a field of this name may have."""


def meant(path: tuple[Any, ...], value: Any) -> bool:
    """Whether a configuration may have one of the wrong values there."""
    *above, last = [key for key in path if isinstance(key, str)]
    names = {last, *above[-1:]} if above[-1:] in (["texts"], ["probe_texts"]) else {last}
    if isinstance(value, str):
        return last == "join" or (bool(names & FREE) and value not in ("", "\x00"))
    return any(type(value) is type(good) and value == good for name in names for good in MEANT.get(name, ()))


@pytest.fixture
def full(job_fields: dict[str, Any]) -> dict[str, Any]:
    """Every field of a configuration that stands in one with defaults."""
    fields = parse_config(copy.deepcopy(job_fields)).model_dump()
    fields["training"]["common"]["learning_rate"] = 5e-3
    return fields


def test_every_field_takes_a_valid_value_or_is_refused_by_its_name(full: dict[str, Any], tally: Any) -> None:
    cases, refused = 0, 0
    for path in leaves(full):
        for value in WRONG:
            cases += 1
            try:
                parse_config(changed(full, path, value))
                assert meant(path, value), f"{path} = {value!r:.60} is accepted"
            except ConfigError as error:
                refused += 1
                named = {str(key) for key in path if isinstance(key, str)}
                assert any(name in str(error) for name in named), f"{path} = {value!r}: {error}"
    assert cases >= 500 and refused >= cases // 3
    tally("configuration: fields × values, parsed", cases=cases, good=cases, bad=0)


def test_a_configuration_cut_anywhere_is_read_or_refused(full: dict[str, Any], tmp_path: Path) -> None:
    text, path = yaml.safe_dump(full), tmp_path / "c.yaml"
    for length in range(0, len(text), max(1, len(text) // 128)):
        path.write_text(text[:length], encoding="utf-8")
        ours_or_nothing(lambda: load_config(path))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff\xfe", b"\xef\xbb\xbfoutput: x", b"output: a\noutput: b\n", b"a: &a [*a]", b"- 1", b"1",
        b"!!python/object:os.system x",
        b"[" * DEEP, b"{a: " * 2_000, b"\t- x", b"\x00", b"output: \xc3\x28", b"? [a]\n: 1\n",
        b"a: &a [l,l,l,l,l,l,l,l,l]\n"  # each line nine times the one before
        + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 106))
        + b"output: *i\n",
    ],
)  # fmt: skip
def test_text_that_is_no_configuration_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"c\.yaml|required"):
        load_config(path)


def test_a_field_that_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("penalty:\n  phi: 1\n  phi: 9\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"c\.yaml: .*duplicate key 'phi'.* line 3"):
        load_config(tmp_path / "c.yaml")


# Rows of the domain

ROW = {"question": "What is 1 plus one?", "choices": ["2", "3", "1"], "label": 0}


def read_rows(path: Path, task: str = "multiple_choice") -> DomainRows:
    return domain_rows(DomainConfig(task=task, train=str(path), test=str(path.with_name("test.jsonl"))), None, 0)


def test_every_wrong_cell_of_a_row_is_refused_with_its_file_and_row(tmp_path: Path, tally: Any) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps({**ROW, "question": "Another?"}) + "\n", encoding="utf-8")
    path, cases, refused = tmp_path / "rows.jsonl", 0, 0
    good = json.dumps({**ROW, "question": "And another?"})
    for cell in leaves(ROW):
        for value in [*WRONG, "missing"]:
            row = changed(ROW, cell, value)
            if value == "missing" and len(cell) == 1:
                del row[cell[0]]
            path.write_text(f"{good}\n{json.dumps(row)}\n", encoding="utf-8")
            cases += 1
            try:
                read_rows(path)
            except DataError as error:
                refused += 1
                assert "rows.jsonl" in str(error) and "2" in str(error), f"{cell} = {value!r}: {error}"
    assert refused >= cases // 3
    tally("rows: cells × values, parsed", cases=cases, good=cases, bad=0)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\n\n", b"{", b'{"question": "a"', b"[]\n", b"null\n", b'"x"\n', b"\xff\n", b'{"question": "\xc3("}\n',
        b"[" * DEEP + b"\n", b'{"question":' * 5_000, b'{"label": 1e999}\n', b'{"label": NaN}\n', b"{}\n", b"\x00\n",
        b"PAR1", b'{"question": 1' + b"0" * 5_000 + b"}\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_text_that_is_no_rows_is_refused_by_its_file(content: bytes, suffix: str, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps(ROW) + "\n", encoding="utf-8")
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.|train"):
        read_rows(path)


def test_a_byte_order_mark_and_a_long_line_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps(ROW) + "\n", encoding="utf-8")
    long = {**ROW, "question": "word " * 2_000_000}  # 10 MB
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(long).encode() + b"\r\n")
    assert len(read_rows(tmp_path / "rows.jsonl").train) == 1


# Importance

BINARY = ("importance.safetensors", "adapter_model.safetensors")


@pytest.fixture
def saved(peft_model: PeftModel, token_ids: Tensor, tmp_path: Path) -> Path:
    return record(peft_model, token_ids, "factored", steps=1).save(tmp_path / "importance")


def ours_or_nothing(read: Callable[[], Any]) -> bool:
    """Whether it was read; an error of ours is not."""
    try:
        read()
    except HloraError as error:
        assert str(error)
        return False
    return True


@pytest.mark.parametrize("name", [*BINARY, "importance.json"])
def test_an_importance_cut_at_any_of_64_lengths_is_refused(saved: Path, name: str) -> None:
    content = (saved / name).read_bytes()
    for step in range(64):
        (saved / name).write_bytes(content[: len(content) * step // 64])
        assert not ours_or_nothing(lambda: Importance.load(saved)), f"{name} of {len(content) * step // 64} bytes"


@pytest.mark.parametrize("name", [*BINARY, "importance.json"])
def test_an_importance_with_a_flipped_bit_is_refused_or_reads_as_it_was(saved: Path, name: str) -> None:
    content, whole = (saved / name).read_bytes(), Importance.load(saved)
    draw = random.Random(0)
    for place in draw.sample(range(len(content)), min(128, len(content))):
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        (saved / name).write_bytes(flipped)
        if ours_or_nothing(lambda: Importance.load(saved)):  # white space between two values
            assert Importance.load(saved).provenance == whole.provenance, place
            assert Importance.load(saved).norms() == whole.norms(), place


def header(document: Any, length: int | None = None, tail: bytes = b"") -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + tail


HOSTILE = [
    header({}, 2**63), header({}, 2**40), header(b"[" * DEEP), header(b"{" * 100), header({"a": 1}),
    header({"a": {"dtype": "F32"}}),
    header({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, tail=bytes(4)),
    header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, tail=bytes(4)),
    header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, tail=bytes(4)),
    header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**50]}}, tail=bytes(4)),
    header({"a": {"dtype": "PY", "shape": [1], "data_offsets": [0, 4]}}, tail=bytes(4)),
    header({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in ("a", "b")}, tail=bytes(4)),
    b"\x80\x04\x95cos\nsystem\n(S'touch /tmp/owned'\ntR.", b"PK\x03\x04", b"",
]  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("name", BINARY)
def test_a_hostile_header_is_refused(saved: Path, name: str, content: bytes) -> None:
    path = saved / "importance.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    del document["sha256"]  # as a stranger would
    path.write_text(json.dumps(document), encoding="utf-8")
    (saved / name).write_bytes(content)
    with pytest.raises(ArtifactError, match="not a readable importance"):
        Importance.load(saved)


def test_wrong_values_in_the_description_are_refused_or_harmless(saved: Path) -> None:
    path = saved / "importance.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    del document["sha256"]
    cases = 0
    for place in leaves({key: document[key] for key in ("format", "encoding", "matrices", "lora_config")}):
        for value in WRONG:
            cases += 1
            path.write_text(json.dumps(changed(document, place, value)), encoding="utf-8")
            ours_or_nothing(lambda: Importance.load(saved).describe())
    path.write_bytes(b"[" * DEEP)
    assert not ours_or_nothing(lambda: Importance.load(saved))
    assert cases >= 200


def test_names_in_an_importance_lead_nowhere_else(saved: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret.safetensors"
    shutil.copy(saved / "importance.safetensors", outside)
    path = saved / "importance.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["sha256"]["../secret.safetensors"] = document["sha256"]["importance.safetensors"]
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"secret\.safetensors"):
        Importance.load(saved)


# At random

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)
quickly = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@quickly
@given(st.dictionaries(st.sampled_from(["model", "lora", "general", "domain", "training", "penalty", "x"]), JSON))
def test_any_mapping_is_a_configuration_or_refused(fields: dict[str, Any]) -> None:
    ours_or_nothing(lambda: parse_config(fields))


@quickly
@given(st.binary(max_size=200))
def test_any_bytes_are_a_configuration_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    ours_or_nothing(lambda: load_config(path))


@quickly
@given(st.lists(JSON, max_size=3))
def test_any_rows_are_rows_or_refused(tmp_path: Path, rows: list[Any]) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps(ROW) + "\n", encoding="utf-8")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ours_or_nothing(lambda: read_rows(path))
