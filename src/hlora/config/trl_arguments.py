"""Names and types of the arguments of trl.SFTConfig, read from its source: importing TRL takes 5 to 8 seconds."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_origin

_CLASSES = (  # SFTConfig and what it inherits from, base class first
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)
_CHOICES = (("transformers", "training_args.py"), ("transformers", "trainer_utils.py"))  # with the enumerations


@cache
def sft_types() -> dict[str, Any]:
    """Type of each argument by its name. Any stands for a class that only an import could give."""
    types: dict[str, Any] = {}
    for package, file, wanted in _CLASSES:
        for found in _statements(package, file):
            if isinstance(found, ast.ClassDef) and found.name == wanted:
                for field in found.body:
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                        types[field.target.id] = _type_of(field.annotation)
    return types


@cache
def trackers() -> list[str]:
    """What `report_to` may name."""
    for found in _statements("transformers", "integrations/integration_utils.py"):
        if not isinstance(found, ast.Assign) or not isinstance(found.value, ast.Dict):
            continue
        if ast.unparse(found.targets[0]) == "INTEGRATION_TO_CALLBACK":
            return sorted(["all", "none", *(ast.literal_eval(key) for key in found.value.keys if key)])
    raise ImportError("transformers.integrations.integration_utils has no INTEGRATION_TO_CALLBACK")


def _type_of(annotation: ast.expr) -> Any:
    """The type that an annotation means. An enumeration or text is one of the enumeration's values."""
    if isinstance(annotation, ast.BinOp):
        left, right = _type_of(annotation.left), _type_of(annotation.right)
        return left if get_origin(left) is Literal and right is str else left | right
    if isinstance(annotation, ast.Subscript):
        kind, inner = _type_of(annotation.value), annotation.slice
        if kind not in (dict, list):
            return Any
        return kind[tuple(map(_type_of, inner.elts)) if isinstance(inner, ast.Tuple) else _type_of(inner)]
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return None
    return _types_by_name().get(ast.unparse(annotation), Any)


@cache
def _types_by_name() -> dict[str, Any]:
    """Built-in types, and each enumeration as the Literal of its values."""
    found: dict[str, Any] = {kind.__name__: kind for kind in (str, int, float, bool, dict, list)}
    for package, file in _CHOICES:
        for each in _statements(package, file):
            if isinstance(each, ast.ClassDef) and [ast.unparse(base) for base in each.bases] == ["ExplicitEnum"]:
                lines = (line.value for line in each.body if isinstance(line, ast.Assign))
                found[each.name] = Literal[tuple(line.value for line in lines if isinstance(line, ast.Constant))]
    return found


@cache
def _statements(package: str, file: str) -> list[ast.stmt]:
    """The statements of a file of an installed package; none where this version does not have the file."""
    spec = find_spec(package)  # does not import the package
    for place in (spec and spec.submodule_search_locations) or ():
        source = Path(place) / file
        if source.is_file():
            return ast.parse(source.read_text(encoding="utf-8")).body
    return []
