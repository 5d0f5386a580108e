"""Rows of a file: those that can be read, and those that cannot with the reason, up to a limit that the user sets.

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
from hlora.data.arrow import rows_of_table
from hlora.system.errors import DataError, first_line
from hlora.system.files import PACKINGS, ROW_FILES, is_lfs_pointer, kind_of_file

logger = logging.getLogger("hlora")

_LISTED = 20  # skipped rows that are listed one by one
_DOCUMENT = 10_000  # characters in a document cut from a .txt file at paragraph ends

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Rows(Generic[T]):
    """Rows of one source by number, from 1. In a .jsonl file it is the number of the line."""

    source: str
    kept: dict[int, T]
    unusable: dict[int, str] = field(default_factory=dict)
    """Reason by number."""

    def read(self, reader: Callable[[T], U]) -> Rows[U]:
        """Apply `reader` to each row. If it raises DataError, the row is unusable and the message is the reason."""
        kept, unusable = {}, dict(self.unusable)
        for number, row in self.kept.items():
            try:
                kept[number] = reader(row)
            except DataError as error:
                unusable[number] = str(error)
        return Rows(self.source, kept, dict(sorted(unusable.items())))

    def within(self, limit: int | str, name: str, needed: str = "") -> Rows[T]:
        """Return these rows; warn if some are unusable.

        Args:
            limit: How many rows may be unusable, such as "1%" or 5.
            name: Field that sets the limit.
            needed: A sentence that says what a row needs.

        Raises:
            DataError: More rows are unusable. Lists the first ones.
        """
        count, total = len(self.unusable), len(self.unusable) + len(self.kept)
        if count > allowed(limit, total):
            raise DataError(
                f"{self.source}: {count} of {total} rows cannot be used, and {name} ({limit}) allows "
                f"{allowed(limit, total)} to be skipped. {self.first(5)}. {needed}Fix them, or raise {name}."
            )
        if count:
            logger.warning(
                "%s: skipped %d of %d rows that cannot be used. %s", self.source, count, total, self.first(5)
            )
        return self

    def facts(self) -> dict[str, Any]:
        """What was skipped, for provenance: counts by kind, and the first 20 rows with their reasons."""
        if not self.unusable:
            return {}
        listed = {f"row {number}": reason for number, reason in list(self.unusable.items())[:_LISTED]}
        kinds = Counter(reason.split(":")[0] for reason in self.unusable.values())
        total = len(self.unusable) + len(self.kept)
        return {self.source: {"rows": len(self.unusable), "of": total, "reasons": dict(kinds), "first": listed}}

    def first(self, count: int) -> str:
        """The first unusable rows with their reasons, in one line."""
        shown = "; ".join(f"Row {number}: {reason}" for number, reason in list(self.unusable.items())[:count])
        return shown + (f"; and {len(self.unusable) - count} more" if len(self.unusable) > count else "")


def read_documents(path: str, column: str = "text") -> Rows[str]:
    """Documents of a file: a .txt file cut at paragraph or line ends to about 10,000 characters, or a column of rows.

    Args:
        path: The file.
        column: Column that holds the text in a file of rows.

    Raises:
        DataError: The file cannot be read.
    """
    kind = kind_of_file(path)
    if kind == ".txt":
        return Rows(path, dict(enumerate(_paragraph_groups(_read_text(path)), 1)))
    if kind not in ROW_FILES:
        _existing(path)
        raise DataError(f"{path}: expected a .txt, .jsonl, .json, .parquet or .csv file, got {kind or 'no suffix'}")
    return read_rows(path).read(lambda row: text_of(row, column))


def text_of(row: dict[str, Any], column: str) -> str:
    """The text in a column of a row. Raises DataError if there is none."""
    if column not in row:
        raise DataError(f"missing column: {column!r}, it has {', '.join(map(str, row)) or 'nothing'}")
    if not isinstance(row[column], str):
        raise DataError(f"no text: {column!r} holds {type(row[column]).__name__}")
    return row[column]


def read_rows(path: str) -> Rows[dict[str, Any]]:
    """Rows of a .jsonl, .json, .parquet or .csv file, also packed as .gz or .zst. CSV cells are text.

    Raises:
        DataError: The file cannot be read.
    """
    kind = kind_of_file(path)
    if kind == ".parquet":
        return _parquet_rows(path)
    if kind == ".csv":
        return _csv_rows(path)
    if kind not in ROW_FILES:
        _existing(path)
        raise DataError(f"{path}: expected a .jsonl, .json, .parquet or .csv file of rows, got {kind or 'no suffix'}")
    content = _read_bytes(path).removeprefix(b"\xef\xbb\xbf")
    no_array = None
    if content[:100].lstrip()[:1] == b"[":
        try:
            array = json.loads(content.decode("utf-8"), object_pairs_hook=_object_or_error)
            return Rows(path, dict(enumerate(array, 1))).read(_object)
        except (ValueError, RecursionError) as error:
            no_array = first_line(error)
    # splitlines would also split at U+2028, inside a text
    lines = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    rows = Rows(path, {number: line for number, line in enumerate(lines, 1) if line.strip()}).read(_json_row)
    if len(rows.kept) >= len(rows.unusable):
        return rows
    if no_array:
        raise DataError(f"{path}: not a JSON array ({no_array}), nor one JSON object a line. Mend the array.")
    if len(rows.unusable) > 1 and content.lstrip()[:1] == b"{":
        with suppress(ValueError, RecursionError):
            keys = ", ".join(json.loads(content))
            raise DataError(f"{path}: one JSON object, with {keys}. Expected an array of rows, or one object a line.")
    return rows


def is_rows_file(source: str) -> bool:
    """Whether a source is a file, by its suffix or since it exists. Otherwise it names a hub data set or split."""
    if kind_of_file(source) in ROW_FILES:
        return True
    try:
        return Path(source).is_file()
    except OSError as error:  # the name is too long, or the directory may not be searched
        raise DataError(f"{source:.200}: cannot be read ({error.strerror})") from None


def _object(row: Any) -> dict[str, Any]:
    try:
        json.dumps(row, ensure_ascii=False, default=_raise).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("not Unicode: half of a surrogate pair") from None
    if not isinstance(row, dict):
        raise DataError(f"no object: the row holds {type(row).__name__}, expected a JSON object")
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
        raise DataError(f"duplicate key: {twice!r}")
    return row


def _object_or_error(pairs: list[tuple[str, Any]]) -> dict[str, Any] | DataError:
    """The object, or the error in its place, so that one row of an array does not cost the others."""
    try:
        return _each_key_once(pairs)
    except DataError as error:
        return error


def _raise(error: DataError) -> None:
    """`default` of json.dumps: an error that stands in the place of a row, or inside one, is the row's."""
    raise error


def _parquet_rows(path: str) -> Rows[dict[str, Any]]:
    problems = (pyarrow.ArrowException, OSError, ValueError, OverflowError)
    try:
        table = pyarrow.parquet.read_table(_existing(path))
    except problems as error:
        raise DataError(f"{path}: not a readable Parquet file ({first_line(error)})") from None
    try:
        return Rows(path, dict(enumerate(rows_of_table(table), 1)))
    except problems:  # text that is not UTF-8, or a date that Python cannot hold: find the row
        pass

    def one(number: int) -> dict[str, Any]:
        try:
            return rows_of_table(table.slice(number - 1, 1))[0]
        except problems as error:
            raise DataError(f"not readable: {first_line(error)}") from None

    return Rows(path, {number: number for number in range(1, table.num_rows + 1)}).read(one)


def _csv_rows(path: str) -> Rows[dict[str, Any]]:
    limit = csv.field_size_limit(sys.maxsize)  # the limit of 131,072 characters in a cell is not ours
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
    for paragraph in re.split(r"(?<=\n)[ \t]*\n", text):  # a blank line, empty or of spaces
        for part in _cut_at_lines(paragraph + "\n"):
            group += part
            if len(group) >= _DOCUMENT:
                groups.append(group)
                group = ""
    return groups + ([group] if group.strip() else [])


def _cut_at_lines(paragraph: str) -> list[str]:
    """A paragraph cut at line ends into parts of a document's length or more; some texts have one sentence per line."""
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
    packing = PACKINGS.get(file.suffix)
    try:
        if packing is None:
            return file.read_bytes()
        with pyarrow.input_stream(file, compression=packing) as stream:
            return stream.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from None


def _existing(path: str) -> Path:
    """The path of a file that exists. Raises DataError if it does not, or is a Git LFS pointer."""
    try:
        if Path(path).is_file():
            if not is_lfs_pointer(Path(path)):
                return Path(path)
            raise DataError(f"{path}: a Git LFS pointer, not the file itself. Fetch that with: git lfs pull")
        problem = "a directory, expected a file" if Path(path).is_dir() else f"no such file (from {Path.cwd()})"
    except OSError as error:  # the name is too long, or the directory may not be searched
        problem = f"cannot be read ({error.strerror})"
    raise DataError(f"{path}: {problem}")
