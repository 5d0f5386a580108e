"""Rows and documents of each format: what is read, what is refused by name, and which rows are left out and why."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from hlora.config.units import allowed
from hlora.data.rows import Rows, read_documents, read_rows
from hlora.data.tasks import read_example
from hlora.system.errors import DataError

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4096\n"


def write_jsonl(path: Path, rows: list[dict[str, Any]], **options: Any) -> str:
    path.write_text("".join(json.dumps(row, **options) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(path: str) -> list[dict[str, Any]]:
    found = read_rows(path)
    assert not found.unusable
    return list(found.kept.values())


def documents_of(path: str) -> list[str]:
    found = read_documents(path)
    assert not found.unusable
    return list(found.kept.values())


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_rows_are_the_same_from_every_format(suffix: str, tmp_path: Path) -> None:
    rows = [
        {"question": "Où, “when”?\nWhy?", "choices": ["a, b", 'c "d"'], "label": 1, "note": "None"},
        {"question": "12", "choices": ["3", "4"], "label": 0, "note": "NA"},
    ]
    file = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        write_jsonl(file, rows)
    elif suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        lines = ["question,choices,label,note"]
        lines += ['"Où, “when”?\nWhy?","[""a, b"", ""c \\""d\\""""]",1,None', '12,"[""3"", ""4""]",0,NA']
        file.write_text("\n".join(lines), encoding="utf-8")
    if suffix == "csv":  # cells are text; the task reads of them what it needs
        rows = [
            {**row, "choices": json.dumps(row["choices"], ensure_ascii=False), "label": str(row["label"])}
            for row in rows
        ]
    assert rows_of(str(file)) == rows


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "text.txt"])
def test_a_byte_order_mark_is_not_part_of_the_data(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    content = {"rows.jsonl": '{"text": "a"}\n', "rows.csv": "text\na\n", "text.txt": "a"}[name]
    file.write_text(content, encoding="utf-8-sig")
    assert [document.strip() for document in documents_of(str(file))] == ["a"]


@pytest.mark.parametrize("mark", ["\u2028", "\u0085", "\x0c"])
def test_a_row_may_hold_characters_that_python_counts_as_line_ends(mark: str, tmp_path: Path) -> None:
    rows = [{"text": f"one{mark}two"}, {"text": "three"}]
    as_csv = tmp_path / "rows.csv"
    as_csv.write_text("text\n" + "".join(f"{row['text']}\n" for row in rows), encoding="utf-8")
    assert rows_of(write_jsonl(tmp_path / "rows.jsonl", rows, ensure_ascii=False)) == rows
    assert rows_of(str(as_csv)) == rows


def test_blank_lines_and_windows_line_ends_of_jsonl_are_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\r\n\r\n{"a": 2}\r\n')
    assert rows_of(str(file)) == [{"a": 1}, {"a": 2}]


def test_documents_of_a_text_file_are_cut_at_paragraph_ends_near_ten_thousand_characters(tmp_path: Path) -> None:
    paragraphs = [f"paragraph {n} " + "word " * 300 for n in range(40)]
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(paragraphs), encoding="utf-8")
    documents = documents_of(str(file))
    assert [p.strip() for d in documents for p in d.split("\n\n") if p.strip()] == [p.strip() for p in paragraphs]
    assert all(10_000 <= len(document) < 12_000 for document in documents[:-1])


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", b"abc\xff", "not UTF-8 at byte 3"),
        ("a.jsonl", b'{"text": "\xe9"}', "Row 1: not UTF-8: at byte 10 of the line"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "Row 3: not JSON: "),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "Row 2: no object: the line holds list"),
        ("a.jsonl", b'{"other": "a", "more": 1}\n', "Row 1: missing column: 'text', it has other, more"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "Row 2: no text: 'text' holds int"),
        ("a.parquet", b"PAR1 is not enough", "not a readable Parquet file"),
        ("a.json", b'{"data": [\n{"text": "a"}\n]}', "one JSON object, with data. Expected an array of rows, or one"),
        ("a.json", b'{"text": "a",\n"text": "b"}\n{', "Row 1: not JSON: "),
        ("a.csv", b'text\n"never closed', "line 2: not CSV"),
        ("a.csv", b'text\na\n"b"c\n', "line 3: not CSV"),
        ("a.csv", b"prompt\na,b,c\n", "Row 1: too many cells: 2 more than there are columns"),
        *((f"a.{kind}", LFS_POINTER, "a Git LFS pointer, not the file") for kind in ("txt", "jsonl", "parquet", "csv")),
        ("a.pdf", b"x", "expected a .txt, .jsonl, .json, .parquet or .csv file, got .pdf"),
        ("a", b"x", "expected a .txt, .jsonl, .json, .parquet or .csv file, got no suffix"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_place_and_the_problem(
    name: str, content: bytes, problem: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_documents(str(file)).within(0, "the limit")
    assert str(caught.value).startswith(f"{file}") and problem in str(caught.value)


@pytest.mark.parametrize("read", [read_documents, read_rows])
def test_a_directory_in_place_of_a_file_is_named_as_one(read: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^{tmp_path}: a directory, expected a file"):
        read(str(tmp_path))


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet", "csv"])
def test_a_missing_file_is_named_with_the_directory_it_was_looked_for_in(suffix: str) -> None:
    with pytest.raises(DataError, match=rf"absent.{suffix}: no such file \(from {Path.cwd()}\)"):
        read_documents(f"absent.{suffix}")


def test_messages_in_a_csv_are_read_as_json_by_the_task(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    path = tmp_path / "chat.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["messages"], [json.dumps(messages)]])
    (row,) = rows_of(str(path))
    assert read_example("rows", row) == read_example("rows", {"messages": messages})


@pytest.mark.parametrize(
    ("limit", "rows", "count"),
    [
        ("1%", 99, 0),
        ("1%", 100, 1),
        ("1%", 299, 2),
        ("0.5 %", 1000, 5),
        ("100%", 7, 7),
        ("0%", 7, 0),
        (3, 1, 3),
        (0, 9, 0),
    ],
)
def test_a_limit_is_a_share_rounded_down_or_a_number_of_rows(limit: int | str, rows: int, count: int) -> None:
    assert allowed(limit, rows) == count


@pytest.mark.parametrize("limit", ["1", "101%", "-1%", "one", "", "%", "nan%", -1, True, 0.01, None, [], "1%%"])
def test_anything_else_is_no_limit(limit: Any) -> None:
    with pytest.raises(ValueError, match='expected a share of the rows such as "1%"'):
        allowed(limit, 100)


def test_one_line_that_cannot_be_read_does_not_cost_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = [
        b'\xef\xbb\xbf{"a": 1}', b"{", b"", b"\xff", b"null", b'{"a": 1, "a": 2}', b'{"a": {"b": 1, "b": 1}}',
        b'"text"', b'{"a": "\\ud800"}', b'{"a": "\\ud83d\\ude00"}', b"[" * 20_000, b'{"a": 1' + b"0" * 5_000 + b"}",
    ]  # fmt: skip
    file.write_bytes(b"\n".join(lines))
    found = read_rows(str(file))
    assert found.kept == {1: {"a": 1}, 10: {"a": "😀"}}
    assert {number: reason.split(":")[0] for number, reason in found.unusable.items()} == {
        2: "not JSON", 4: "not UTF-8", 5: "no object", 6: "duplicate key", 7: "duplicate key", 8: "no object",
        9: "not Unicode", 11: "not JSON", 12: "not JSON",
    }  # fmt: skip


def test_one_text_of_a_parquet_file_that_is_no_utf_8_does_not_cost_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"text": pyarrow.array([b"one", b"\xff", b"three"])})
    text = table["text"].combine_chunks()
    wrong = pyarrow.StringArray.from_buffers(3, text.buffers()[1], text.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"text": wrong}), file)
    found = read_rows(str(file))
    assert found.kept == {1: {"text": "one"}, 3: {"text": "three"}}
    assert list(found.unusable) == [2] and "not readable: UnicodeDecodeError" in found.unusable[2]


def test_a_row_of_a_csv_with_a_cell_too_many_or_too_few_is_one_row(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("question,label\na,1\nb,1,2\nc\nd,2\n", encoding="utf-8")
    found = read_rows(str(file))
    rows = {1: ("a", "1"), 3: ("c", None), 4: ("d", "2")}
    assert found.kept == {number: {"question": q, "label": label} for number, (q, label) in rows.items()}
    assert list(found.unusable) == [2]
    assert found.unusable[2] == "too many cells: 1 more than there are columns"


def test_a_column_that_stands_twice_in_a_csv_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label,text\na,1,b\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a.csv: the column 'text' is a duplicate"):
        read_rows(str(tmp_path / "a.csv"))


def test_a_directory_is_no_file_and_a_link_to_itself_none_either(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match=r"a.jsonl: a directory, expected a file"):
        read_rows(str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match=r"b.jsonl: no such file"):
        read_rows(str(tmp_path / "b.jsonl"))
    with pytest.raises(DataError, match=r"x.jsonl: cannot be read \(File name too long\)"):
        read_rows("x" * 300 + "x.jsonl")
    (tmp_path / "c.jsonl").symlink_to(write_jsonl(tmp_path / "real.jsonl", [{"a": 1}]))
    assert rows_of(str(tmp_path / "c.jsonl")) == [{"a": 1}]


def test_twenty_rows_are_listed_and_all_are_counted() -> None:
    def odd(number: int) -> int:
        if number % 2 == 0:
            raise DataError(f"even: {number}")
        return number

    found = Rows("numbers", {n: n for n in range(1, 101)}).read(odd)
    assert len(found.kept) == 50
    facts = found.facts()["numbers"]
    assert (facts["rows"], facts["of"], facts["reasons"]) == (50, 100, {"even": 50})
    assert list(facts["first"].items())[::19] == [("row 2", "even: 2"), ("row 40", "even: 40")]
    assert found.within("50%", "the limit") is found
    with pytest.raises(DataError, match=r"numbers: 50 of 100 rows .* allows 49 .* Row 2: even: 2; .*; and 45 more"):
        found.within(49, "the limit")


def test_a_long_cell_of_a_csv_is_a_cell(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f"prompt,completion\na,b\n{'x' * 140_000},c\n", encoding="utf-8")
    assert [len(row["prompt"]) for row in rows_of(str(tmp_path / "a.csv"))] == [1, 140_000]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_rows_may_be_one_json_array(name: str, tmp_path: Path) -> None:
    array = '[\n{"a": 1}, 2, {"a": "é"},\n{"a": 1, "a": 2}, {"a": [{"b": 1, "b": 1}]}, {"a": "\\ud800"}\n]'
    (tmp_path / name).write_text(array, encoding="utf-8")
    found = read_rows(str(tmp_path / name))
    assert found.kept == {1: {"a": 1}, 3: {"a": "é"}}
    assert found.unusable == {
        2: "no object: the row holds int, expected a JSON object",
        4: "duplicate key: 'a'",
        5: "duplicate key: 'b'",
        6: "not Unicode: half of a surrogate pair",
    }


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'[\n{"a": 1},\n{"a": 2},\n]', r"Illegal trailing comma|Expecting value: line 4 column 1"),
        (b'[\n{"a": 1},\n{"a": 2},\n{"a', r"Unterminated string starting at: line 4 column 2"),
        (b'[{"a": "\xff"},\n{"a": 2}]', r"can't decode byte 0xff in position 8"),
    ],
)
def test_an_array_that_cannot_be_read_is_refused_with_the_place(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"rows.json: not a JSON array \(.*({problem})"):
        read_rows(str(tmp_path / "rows.json"))


def test_a_line_that_begins_with_a_bracket_does_not_cost_a_jsonl_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('[1]\n{"a": 1}\n{"a": 2}\n', encoding="utf-8")
    found = read_rows(str(tmp_path / "rows.jsonl"))
    assert found.kept == {2: {"a": 1}, 3: {"a": 2}}
    assert list(found.unusable) == [1]


@pytest.mark.parametrize("packing", ["gz", "zst"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "text.txt"])
def test_packed_files_are_read_as_what_they_hold(name: str, packing: str, tmp_path: Path) -> None:
    content = {"rows.jsonl": b'{"text": "a"}\n', "rows.csv": b"text\na\n", "text.txt": b"a"}[name]
    path = tmp_path / f"{name}.{packing}"
    with pyarrow.output_stream(path, compression={"gz": "gzip", "zst": "zstd"}[packing]) as stream:
        stream.write(content)
    assert [document.strip() for document in documents_of(str(path))] == ["a"]
    path.write_bytes(b"not packed")
    with pytest.raises(DataError, match=rf"{path.name}: cannot be read"):
        read_documents(str(path))


def test_brackets_in_a_path_are_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "data[1]*"
    folder.mkdir()
    assert rows_of(write_jsonl(folder / "a?.jsonl", [{"a": 1}])) == [{"a": 1}]
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), folder / "[b].parquet")
    assert rows_of(str(folder / "[b].parquet")) == [{"a": 1}]


def test_a_text_of_one_sentence_a_line_is_cut_at_line_ends(tmp_path: Path) -> None:
    lines = [f"Sentence {n} of a text without blank lines.\n" for n in range(1000)]
    (tmp_path / "lines.txt").write_text("".join(lines), encoding="utf-8")
    documents = documents_of(str(tmp_path / "lines.txt"))
    assert all(10_000 <= len(document) < 10_100 for document in documents[:-1]) and len(documents) > 3
    assert "".join("".join(documents).split()) == "".join("".join(lines).split())
