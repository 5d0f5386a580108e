"""The JSON Schema that `hlora config --schema` prints: it takes what hlora takes, and marks what it does not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from hlora.cli import app
from hlora.config.reading import read_yaml
from hlora.config.starting import SCHEMA_FILE, starting_yaml

RUNS = sorted(path for path in (REPOSITORY / "configs").glob("*.yaml") if not path.name.startswith("compare-"))


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    printed = CliRunner().invoke(app, ["config", "--schema"])
    Draft202012Validator.check_schema(made := json.loads(printed.output))
    return Draft202012Validator(made)


def test_the_printed_configuration_fits_the_schema_that_its_first_line_names(schema: Draft202012Validator) -> None:
    text = starting_yaml()
    assert text.startswith(f"# yaml-language-server: $schema={SCHEMA_FILE}\n")
    schema.validate(yaml.safe_load(text))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_each_configuration_of_a_run_in_the_repository_fits_the_schema(path: Any, schema: Draft202012Validator) -> None:
    schema.validate(read_yaml(path))


@pytest.mark.parametrize("field, value", [("rank", 0), ("rnk", 8), ("target_modules", 3), ("rslora", "maybe")])
def test_the_schema_refuses_what_hlora_refuses(field: str, value: Any, schema: Draft202012Validator) -> None:
    fields = yaml.safe_load(starting_yaml())
    fields["lora"][field] = value
    (error,) = schema.iter_errors(fields)
    assert "lora" in error.absolute_path


def test_every_field_of_the_schema_says_what_it_means(schema: Draft202012Validator) -> None:
    sections = [schema.schema, *schema.schema["$defs"].values()]
    unsaid = [name for each in sections for name, field in each["properties"].items() if "description" not in field]
    assert not unsaid
