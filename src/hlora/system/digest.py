"""Digests of settings and texts, by which hlora recognises them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any


def digest(made_from: Mapping[str, Any]) -> str:
    """A name for anything that `made_from` determines: 16 hexadecimal digits of its SHA-256."""
    text = json.dumps(made_from, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def without_empty(value: Any) -> Any:
    """`value` without the fields that are None or empty, at any depth.

    A digest of the rest stays as it is when a later version adds a field that is empty by default.
    """
    if not isinstance(value, Mapping):
        return value
    kept = {name: without_empty(each) for name, each in value.items()}
    return {name: each for name, each in kept.items() if each not in (None, "", [], {})}


def sha256_of_texts(parts: Iterable[str]) -> str:
    """One digest of several texts, in their order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
