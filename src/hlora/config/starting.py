"""What `hlora config` prints: a commented YAML, or the JSON Schema that an editor checks such a YAML with."""

from __future__ import annotations

import json
from textwrap import wrap
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from hlora.config.comparison import CompareConfig
from hlora.config.run import RunConfig

SCHEMA_FILE = "hlora.schema.json"
_TRAINING = {
    "common": {"learning_rate": 8e-4, "lr_scheduler_type": "linear", "warmup_steps": 10},
    "record": {"max_steps": 100, "per_device_train_batch_size": 8, "max_length": 512},
    "tune": {"num_train_epochs": 1, "per_device_train_batch_size": 16, "max_length": 1024},
}
_ROWS = {"task": "rows", "train": "train.jsonl", "test": "test.jsonl"}
_SHARED = {"model": {"name": "smollm2-135m"}, "general": {"paths": ["general.txt"]}, "training": _TRAINING}


def json_schema(comparison: bool = False) -> str:
    """The JSON Schema of a run's configuration, or of a comparison's."""
    kind = CompareConfig if comparison else RunConfig
    return json.dumps(kind.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


def starting_yaml() -> str:
    """The configuration of a run to start from: every field with its meaning, at its default."""
    return _document("run", RunConfig, {**_SHARED, "output": "runs/mine", "domain": _ROWS})


def starting_comparison() -> str:
    """The configuration of a comparison to start from: every field with its meaning, at its default."""
    arms = {
        "LoRA(μ)": {"method": "lora"},
        "EWC-LoRA": {"method": "ewc", "strengths": [100, 10000]},
        "HLoRA": {"method": "hlora", "strengths": [1, 3]},
    }
    values = {**_SHARED, "output": "runs/comparison", "tasks": {"mine": _ROWS}, "arms": arms, "ablation": []}
    return _document("compare", CompareConfig, values)


def _document(command: str, kind: type[BaseModel], values: dict[str, Any]) -> str:
    schema = "--compare --schema" if kind is CompareConfig else "--schema"
    first = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# For completion in an editor: hlora config {schema} > {SCHEMA_FILE}, beside this file.",
        f"# hlora configuration. Run it with: hlora {command} THIS_FILE",
        "# Paths are relative to where you run it; ~ is the home directory.",
    ]
    return "\n".join([*first, *_commented(kind, values, 0)]) + "\n"


def _commented(section: type[BaseModel], values: dict[str, Any], depth: int) -> list[str]:
    lines: list[str] = []
    for name, field in section.model_fields.items():
        indent = "  " * depth
        if depth == 0:
            lines.append("")
        lines += [f"{indent}# {line}" for line in wrap(field.description or "", 110 - len(indent))]
        inner: Any = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            lines += [f"{indent}{name}:", *_commented(inner, values.get(name, {}), depth + 1)]
        elif get_origin(inner) is dict and _is_section(entry := get_args(inner)[1]):
            lines.append(f"{indent}{name}:")
            for number, (key, fields) in enumerate(values[name].items()):
                whole = _commented(entry, fields, depth + 2)  # the first entry has every field, with its comment
                lines += [f"{indent}  {key}:", *whole] if number == 0 else [f"{indent}  {key}: {_inline(fields)}"]
        else:
            value = values[name] if name in values else field.get_default(call_default_factory=True)
            lines.append(f"{indent}{name}: {json.dumps(value, ensure_ascii=False)}")  # JSON is YAML
    return lines


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _inline(fields: dict[str, Any]) -> str:
    return "{ " + ", ".join(f"{key}: {json.dumps(value)}" for key, value in fields.items()) + " }"
