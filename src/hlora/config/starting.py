"""What `hlora config` prints: a commented YAML, or the JSON Schema that an editor checks such a YAML with."""

from __future__ import annotations

import json
from textwrap import wrap
from typing import Any

from pydantic import BaseModel

from hlora.config.run import RunConfig

SCHEMA_FILE = "hlora.schema.json"


def json_schema() -> str:
    """The JSON Schema of a run's configuration."""
    return json.dumps(RunConfig.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


def starting_yaml() -> str:
    """A commented configuration to start from: every field with its meaning, at its default."""
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# For completion in an editor: hlora config --schema > {SCHEMA_FILE}, beside this file.",
        "# hlora configuration. Run it with: hlora run THIS_FILE",
        "# Paths are relative to where you run it.",
    ]
    lines += _commented(RunConfig, {"output": "runs/mine", **_STARTING}, 0)
    return "\n".join(lines) + "\n"


_STARTING: dict[str, Any] = {
    "model": {"name": "smollm2-135m"},
    "general": {"paths": ["general.txt"]},
    "domain": {"task": "rows", "train": "train.jsonl", "test": "test.jsonl"},
    "training": {
        "common": {"learning_rate": 8e-4, "lr_scheduler_type": "linear", "warmup_steps": 10},
        "record": {"max_steps": 100, "per_device_train_batch_size": 8, "max_length": 512},
        "tune": {"num_train_epochs": 1, "per_device_train_batch_size": 16, "max_length": 1024},
    },
}


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
        else:
            value = values[name] if name in values else field.get_default(call_default_factory=True)
            lines.append(f"{indent}{name}: {json.dumps(value)}")  # JSON is YAML
    return lines
