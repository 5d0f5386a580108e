"""A section, mapping or list whose lines are all commented out: YAML reads null there."""

from __future__ import annotations

from typing import Any, get_origin

from pydantic import BaseModel


def without_nulls(section: type[BaseModel], fields: dict[Any, Any]) -> dict[Any, Any]:
    """The fields with {} or [] in place of null, except where null is a value of its own."""
    return {name: _empty(section, name) if value is None else value for name, value in fields.items()}


def _empty(section: type[BaseModel], name: Any) -> Any:
    field = section.model_fields.get(name)
    if field is None or (field.default is None and not field.is_required()):
        return None
    kind: Any = get_origin(field.annotation) or field.annotation
    if kind is list:
        return []
    return {} if kind is dict or (isinstance(kind, type) and issubclass(kind, BaseModel)) else None
