"""The command reference, made of the Typer application, and the configuration reference, made of the JSON Schema."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from typing import Any

from hlora.config.chains import ChainComparison
from hlora.config.comparison import CompareConfig
from hlora.config.run import RunConfig


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    made = {"reference/commands.md": ("commands", commands), "reference/configuration.md": ("configuration", fields)}
    if page.file.src_uri not in made:
        return markdown
    name, make = made[page.file.src_uri]
    before, mark, after = markdown.partition(f"<!-- made of the code: {name} -->")
    if not mark:
        raise ValueError(f"{page.file.src_uri}: the mark where the {name} go is gone")
    return before + make() + after


def commands() -> str:
    """Every command and option in Markdown, by Typer's own generator."""
    command = [sys.executable, "-m", "typer", "hlora.cli", "utils", "docs", "--name", "hlora"]
    made = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    about, each = made[made.index("\n") :].split("**Commands**:")[0], made[made.index("\n## ") :]
    # Typer's list of commands, between the two, cuts each summary; the table of contents beside the page has them all.
    return re.sub("`[^`\n]+`", lambda code: unescape(code[0]), (about + each).replace("```console", "```text"))


def fields() -> str:
    """Every field in Markdown: of a run, and what a comparison of methods or of chains has besides."""
    run = RunConfig.model_json_schema()
    page = "\n".join(_section(run, run["$defs"], "", 2))
    left_out = "`after`, `baselines`, `domain` and `seed`"
    for heading, lead, prefix, model in (
        ("methods", f"The fields above without `domains`, {left_out}; and these:", "", CompareConfig),
        (
            "chains",
            f"The fields above, `domains` among them, without {left_out}; and these:",
            "chains.",
            ChainComparison,
        ),
    ):
        schema = model.model_json_schema()
        more = {name: field for name, field in schema["properties"].items() if name not in run["properties"]}
        made = "\n".join(_section({"properties": more}, schema["$defs"], "", 3))
        page += f"\n\n## In a comparison of {heading}\n\n{lead}\n\n" + made.replace("{ #", f"{{ #{prefix}")
    return page + "\n"


def _section(schema: dict[str, Any], definitions: dict[str, Any], prefix: str, level: int) -> Iterator[str]:
    """Plain fields of a section first, then the sections in it, each under a heading of its own."""
    sections = []
    for name, field in schema["properties"].items():
        inner = _definition(field, definitions)
        if inner is not None:
            sections.append((name, field, inner))
            continue
        required = name in schema.get("required", ["tasks", "arms"])
        yield f"**`{prefix}{name}`** · {_type(field)}{_default(field, required)} {{ #{prefix}{name} }}"
        yield f":   {_prose(field)}\n"
    for name, field, inner in sections:
        path = f"{prefix}{name}" + (".NAME" if "additionalProperties" in field else "")
        yield f"{'#' * level} {path}\n\n{_prose(field)}\n"
        yield from _section(inner, definitions, f"{path}.", level)


def _definition(field: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any] | None:
    """The section that a field holds, or a mapping of names to such sections; none for a plain value."""
    held = field.get("additionalProperties", field) if isinstance(field.get("additionalProperties"), dict) else field
    reference = held.get("$ref")
    return definitions[reference.rpartition("/")[2]] if reference else None


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(each) for each in field["anyOf"]))
    if "enum" in field or "const" in field:
        return " or ".join(f"`{each}`" for each in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return "list of sections" if "$ref" in field["items"] else f"list (each {_type(field['items'])})"
    if field.get("type") == "object":
        held = field.get("additionalProperties")
        return f"mapping, each {_type(held)}" if isinstance(held, dict) else "mapping"
    word = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "null": "null"}
    marks = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{mark} {field[name]:,}" for name, mark in marks.items() if name in field]
    return " ".join([word.get(field.get("type", ""), "value"), *bounds[:1], *(f"and {bound}" for bound in bounds[1:])])


def _default(field: dict[str, Any], required: bool) -> str:
    return " · required" if required else f" · default `{json.dumps(field.get('default'), ensure_ascii=False)}`"


def _prose(field: dict[str, Any]) -> str:
    text = " ".join(field.get("description", "").split())
    return text.replace("<", "&lt;").replace("*", r"\*")
