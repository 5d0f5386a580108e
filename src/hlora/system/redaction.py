"""Redacts secrets in all output: tokens, keys and passwords become <redacted>.

In what is shared with others, paths of this machine are shortened too (`without_paths`).

A secret is recognised by the name of its field or variable (hub_token, WANDB_API_KEY, PGPASSWORD), as the value of an
environment variable with such a name, by its shape (hf_…, sk-…, a JWT), or by its place in an address (user:password@).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

MARK = "<redacted>"

_NAME = re.compile(
    r"secret|passw(or)?d|passphrase|credential|(api|access|private|auth)[_-]?key|(?<!eos_)(?<!pad_)(?<!bos_)token$",
    re.I,
)
_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bsk-[\w-]{16,}"  # OpenAI, Anthropic and others with the same prefix
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
    r"|\bxox[abeprs]-[\w-]{10,}|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{30,}"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"  # a JSON web token
    r"|(?<=\bBearer )[\w.~+/=-]{8,}"
    r"|(?<=://)[^\s/@'\"]+(?=@)"  # https://user:password@host
)
# name=value, as on a command line or in an address; 'name': 'value', as Python and JSON show a mapping.
_ASSIGNED = re.compile(r"""([\w.-]+)(=)("[^"]*"|'[^']*'|[^\s'"&,;)]+)|(?<=['"])([\w.-]+)(['"]: )("[^"]*"|'[^']*')""")
# /home/ann/rows.jsonl, ~/x, ../x, name:/x and C:\x; neither https://host/x nor user/name, </b> nor <br/>.
_PATH = re.compile(
    r"(?<![\w/.~>-])(?!//|/>|(?<=<)/\w+>)(?:~|\.{1,2})?/(?:[^/\s'\"`|]+/)*([^/\s'\"`|]+)"
    r"|\b[A-Za-z]:\\(?:[^\\\s]+\\)*([^\\\s'\"`|]+)"
)
_LEAST = 8  # minimum length of a secret value in the environment, since `yes` is not a secret


def redacted(value: Any) -> Any:
    """A copy of nested mappings, lists and text without secrets. Other values stay as they are."""
    return _everywhere(without_secret_fields(value), _values_of_environment())


def redact_text(text: str) -> str:
    """The text without secrets."""
    return _everywhere(text, _values_of_environment())


def without_paths(value: Any) -> Any:
    """A copy of nested mappings, lists and text with paths of this machine shortened to their last part."""
    if isinstance(value, str):
        if value.startswith(("/", "~/")) and "\n" not in value:  # a path with spaces, too
            return value.rstrip("/").rpartition("/")[2]
        return _PATH.sub(lambda found: found[1] or found[2], value)
    if isinstance(value, Mapping):
        return {without_paths(key): without_paths(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(each) for each in value]
    return value


def redact_argument(argument: str) -> str:
    """One word of a command line without secrets; the whole value of a `field=value` whose name is a secret's."""
    name, separator, _ = argument.partition("=")
    return f"{name}={MARK}" if separator and is_secret_name(name) else redact_text(argument)


def without_secret_fields(value: Any) -> Any:
    """The same value with the text of each field that has a secret's name redacted."""
    if isinstance(value, Mapping):
        return {
            key: MARK if isinstance(each, str) and is_secret_name(str(key)) else without_secret_fields(each)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secret_fields(each) for each in value]
    return value


def is_secret_name(name: str) -> bool:
    """Whether a variable, or a field with that path, holds a secret. eos_token and the like do not."""
    return any(_NAME.search(part) for part in name.split("."))


class RedactingFormatter(logging.Formatter):
    """Formats a log line and its traceback without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact_text(super().format(record))


def _everywhere(value: Any, secrets: re.Pattern[str] | None) -> Any:
    if isinstance(value, str):
        text = value if secrets is None else secrets.sub(MARK, value)
        return _ASSIGNED.sub(_assignment, _SHAPES.sub(MARK, text))
    if isinstance(value, Mapping):
        return {_everywhere(key, secrets): _everywhere(each, secrets) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_everywhere(each, secrets) for each in value]
    return value


def _assignment(found: re.Match[str]) -> str:
    name, between = found[1] or found[4], found[2] or found[5]
    if not is_secret_name(name):
        return found[0]
    return f"{name}{between}{MARK}" if found[1] else f"{name}{between}'{MARK}'"


def _values_of_environment() -> re.Pattern[str] | None:
    values = {value for name, value in os.environ.items() if is_secret_name(name) and len(value) >= _LEAST}
    return re.compile("|".join(map(re.escape, sorted(values, key=len, reverse=True)))) if values else None
