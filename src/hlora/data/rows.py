"""Rows of a file: what can be read of them, and what cannot with its reason, up to a limit that the user sets.

A reason is its kind, a colon and the particulars, such as "wrong label: 7, expected 0 to 1". Rows are counted by kind.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow.parquet

from hlora.config.units import allowed
from hlora.system.errors import DataError, first_line

logger = logging.getLogger("hlora")

_LISTED = 20  # rows left out of a file that are listed one by one
_DOCUMENT = 10_000  # characters of one document cut from a .txt file, at paragraph ends
_ROWS = (".jsonl", ".json", ".parquet", ".csv")
_PACKED = {".gz": "gzip", ".zst": "zstd"}

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Rows(Generic[T]):
    """Rows of one source by their number, from 1; that of the line in a .jsonl file."""

    source: str
    kept: dict[int, T]
    unusable: dict[int, str] = field(default_factory=dict)
    """Why, by number."""

    def read(self, reader: Callable[[T], U]) -> Rows[U]:
        """What `reader` makes of each row. One that it refuses by a DataError is unusable, for the reason it says."""
        kept, unusable = {}, dict(self.unusable)
        for number, row in self.kept.items():
            try:
                kept[number] = reader(row)
            except DataError as error:
                unusable[number] = str(error)
        return Rows(self.source, kept, dict(sorted(unusable.items())))

    def within(self, limit: int | str, name: str, needed: str = "") -> Rows[T]:
        """These rows, after a warning where some are unusable.

        limit: how many may be, "1%" or a number of rows; name: of the field that says so; needed: what a row needs.
        Raises DataError that lists the first unusable rows when they are more.
        """
        count, total = len(self.unusable), len(self.unusable) + len(self.kept)
        if count > allowed(limit, total):
            raise DataError(
                f"{self.source}: {count} of {total} rows cannot be used, and {name} ({limit}) lets "
                f"{allowed(limit, total)} be left out. {self.first(5)}. {needed}Mend them, or raise {name}."
            )
        if count:
            logger.warning(
                "%s: left out %d of %d rows that cannot be used. %s", self.source, count, total, self.first(5)
            )
        return self

    def facts(self) -> dict[str, Any]:
        """What was left out, by source, for provenance: counted by kind, and the first 20 with their reasons."""
        if not self.unusable:
            return {}
        listed = {f"row {number}": reason for number, reason in list(self.unusable.items())[:_LISTED]}
        kinds = Counter(reason.split(":")[0] for reason in self.unusable.values())
        total = len(self.unusable) + len(self.kept)
        return {self.source: {"rows": len(self.unusable), "of": total, "reasons": dict(kinds), "first": listed}}

    def first(self, count: int) -> str:
        """The first unusable rows with their reasons, in a line."""
        shown = "; ".join(f"Row {number}: {reason}" for number, reason in list(self.unusable.items())[:count])
        return shown + (f"; and {len(self.unusable) - count} more" if len(self.unusable) > count else "")


def read_documents(path: str, column: str = "text") -> Rows[str]:
    """Documents of a .txt file, cut at paragraph or line ends to about 10,000 characters, or of a column of rows.

    Raises DataError for a file that cannot be read.
    """
    if _kind(path) == ".txt":
        return Rows(path, dict(enumerate(_paragraph_groups(_read_text(path)), 1)))
    return read_rows(path).read(lambda row: text_of(row, column))


def text_of(row: dict[str, Any], column: str) -> str:
    """The text in a row's column. Raises DataError when there is none."""
    if column not in row:
        raise DataError(f"missing column: {column!r}, it has {', '.join(map(str, row)) or 'nothing'}")
    if not isinstance(row[column], str):
        raise DataError(f"no text: {column!r} holds {type(row[column]).__name__}")
    return row[column]


def read_rows(path: str) -> Rows[dict[str, Any]]:
    """Rows of a .jsonl, .json, .parquet or .csv file, also packed as .gz or .zst. CSV cells are text.

    Raises DataError for a file that cannot be read.
    """
    kind = _kind(path)
    if kind == ".parquet":
        return _parquet_rows(path)
    if kind == ".csv":
        return _csv_rows(path)
    if kind not in _ROWS:
        raise DataError(f"{path}: expected a .jsonl, .parquet or .csv file of rows, got {kind or 'no suffix'}")
    content = _read_bytes(path).removeprefix(b"\xef\xbb\xbf")
    if content[:100].lstrip()[:1] == b"[":
        with suppress(ValueError, RecursionError):
            return Rows(path, dict(enumerate(json.loads(content.decode("utf-8")), 1))).read(_object)
    lines = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")  # U+2028 may stand inside a text
    return Rows(path, {number: line for number, line in enumerate(lines, 1) if line.strip()}).read(_json_row)


def is_rows_file(source: str) -> bool:
    """Whether a source is a file, by its suffix or because it is there; else it names a hub data set or a split."""
    return _kind(source) in _ROWS or Path(source).is_file()


def _kind(path: str) -> str:
    """The file's suffix, that before .gz or .zst."""
    name = Path(path)
    return name.with_suffix("").suffix if name.suffix in _PACKED else name.suffix


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"no object: the row holds {type(row).__name__}, expected a JSON object")
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("not Unicode: half of a surrogate pair") from None
    return row


def _json_row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_each_key_once)
        if b"\\ud" in line or b"\\uD" in line:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: at byte {error.start} of the line") from None
    except UnicodeEncodeError:
        raise DataError("not Unicode: half of a surrogate pair") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, brackets 10,000 deep
        reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
        raise DataError(f"not JSON: {reason}, expected one object a line") from None
    if not isinstance(row, dict):
        raise DataError(f"no object: the line holds {type(row).__name__}, expected one JSON object")
    return row


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise DataError(f"key twice: {twice!r}")
    return row


def _parquet_rows(path: str) -> Rows[dict[str, Any]]:
    problems = (pyarrow.ArrowException, OSError, ValueError, OverflowError)
    try:
        table = pyarrow.parquet.read_table(_existing(path))
    except problems as error:
        raise DataError(f"{path}: not a readable Parquet file ({first_line(error)})") from None
    try:
        return Rows(path, dict(enumerate(table.to_pylist(), 1)))
    except problems:  # a text that is not UTF-8, a date that Python does not know: which row has it?
        pass

    def one(number: int) -> dict[str, Any]:
        try:
            return table.slice(number - 1, 1).to_pylist()[0]
        except problems as error:
            raise DataError(f"not readable: {first_line(error)}") from None

    return Rows(path, {number: number for number in range(1, table.num_rows + 1)}).read(one)


def _csv_rows(path: str) -> Rows[dict[str, Any]]:
    limit = csv.field_size_limit(sys.maxsize)  # a cell of more than 131,072 characters is for its row to judge
    table = csv.DictReader(io.StringIO(_read_text(path)), restkey="(no name)", strict=True)
    try:
        columns = table.fieldnames or []
        twice = [name for name, count in Counter(columns).items() if count > 1]
        if twice:
            raise DataError(f"{path}: the column {twice[0]!r} is a duplicate. Name each column once.")
        return Rows(path, dict(enumerate(table, 1))).read(_csv_row)
    except csv.Error as error:
        raise DataError(f"{path} line {table.reader.line_num}: not CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _csv_row(row: dict[str, Any]) -> dict[str, Any]:
    if "(no name)" in row:
        raise DataError(f"too many cells: {len(row['(no name)'])} more than there are columns")
    return row


def _paragraph_groups(text: str) -> list[str]:
    groups, group = [], ""
    for paragraph in re.split(r"(?<=\n)[ \t]*\n", text):  # a blank line, be it empty or of spaces
        for part in _cut_at_lines(paragraph + "\n"):
            group += part
            if len(group) >= _DOCUMENT:
                groups.append(group)
                group = ""
    return groups + ([group] if group.strip() else [])


def _cut_at_lines(paragraph: str) -> list[str]:
    """A paragraph in parts of at least a document's length, cut at line ends: a text may have one sentence a line."""
    parts, part = [], ""
    for line in paragraph.splitlines(keepends=True):
        part += line
        if len(part) >= _DOCUMENT:
            parts.append(part)
            part = ""
    return [*parts, part] if part else parts


def _read_text(path: str) -> str:
    try:
        return _read_bytes(path).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}. Save it as UTF-8.") from None


def _read_bytes(path: str) -> bytes:
    file = _existing(path)
    packing = _PACKED.get(file.suffix)
    try:
        if packing is None:
            return file.read_bytes()
        with pyarrow.input_stream(file, compression=packing) as stream:
            return stream.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from None


def _existing(path: str) -> Path:
    """The path of a file that is there. Raises DataError."""
    try:
        if Path(path).is_file():
            return Path(path)
        problem = "a directory, expected a file" if Path(path).is_dir() else f"no such file (from {Path.cwd()})"
    except OSError as error:  # a name too long, a directory that may not be searched
        problem = f"cannot be read ({error.strerror})"
    raise DataError(f"{path}: {problem}")
