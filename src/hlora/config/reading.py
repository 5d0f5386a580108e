"""From YAML and `--set` overrides to a configuration, or to an error with one line per wrong field."""

from __future__ import annotations

import re
import reprlib
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from hlora.config.chains import ChainComparison
from hlora.config.comparison import CompareConfig
from hlora.config.run import RunConfig
from hlora.config.sections import Section
from hlora.config.spelling import did_you_mean, nearest
from hlora.system.errors import ConfigError
from hlora.system.redaction import redact_argument


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read the YAML of a run, apply `section.field=value` overrides, validate.

    Raises:
        ConfigError: One line per wrong field: its path, what was expected, what came, the nearest valid name.
    """
    return parse_config(read_yaml(path), str(path), overrides)


def load_comparison(path: str | Path, overrides: list[str] | None = None) -> CompareConfig:
    """Read the YAML of a comparison. Raises ConfigError (see load_config)."""
    return parse_config(read_yaml(path), str(path), overrides, CompareConfig)


def load_chains(path: str | Path, overrides: list[str] | None = None) -> ChainComparison:
    """Read the YAML of a comparison of chains. Raises ConfigError (see load_config)."""
    return parse_config(read_yaml(path), str(path), overrides, ChainComparison)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError."""
    try:
        data = yaml.load(Path(path).read_bytes(), _Loader)  # UTF-16, too, which PowerShell's > writes
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. `hlora config > {path}` writes a starting one.") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {_without_excerpt(error)}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of fields, got {type(data).__name__}. See `hlora config`.")
    return data


Config = TypeVar("Config", bound=Section)


def parse_config(
    data: dict[str, Any],
    origin: str = "config",
    overrides: list[str] | None = None,
    kind: type[Config] = RunConfig,  # type: ignore[assignment]
) -> Config:
    """Apply `section.field=value` overrides to a mapping and validate it. Raises ConfigError (see load_config)."""
    for override in overrides or []:
        _set(data, override)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(item, kind) for item in error.errors())
        raise ConfigError("\n".join(f"{origin}: {line}" for line in lines)) from None


def _set(data: dict[str, Any], override: str) -> None:
    shown = redact_argument(override)
    path, separator, value = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"--set {shown!r}: expected field=value, such as penalty.phi=9")
    *sections, name = path.split(".")
    for section in sections:
        if data.get(section) is None:
            data[section] = {}
        data = data[section]
        if not isinstance(data, dict):
            raise ConfigError(f"--set {shown!r}: {section} is not a section")
    try:
        data[name] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {shown!r}: not a YAML value: {_without_excerpt(error)}") from None


def _without_excerpt(error: Exception) -> str:
    """PyYAML's message on one line, without its excerpt of the file, which may contain a token."""
    for mark in (getattr(error, name, None) for name in ("context_mark", "problem_mark")):
        if mark is not None:
            mark.buffer = None
    return " ".join(str(error).split())


_EXPONENT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text because it has no dot; we read a number. Duplicate keys are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"duplicate key {key.value!r}", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    **yaml.SafeLoader.yaml_implicit_resolvers,
    **{
        first: [*yaml.SafeLoader.yaml_implicit_resolvers.get(first, []), ("tag:yaml.org,2002:float", _EXPONENT)]
        for first in "-+0123456789."
    },
}


_SHORT = reprlib.Repr()  # a few lines of YAML with anchors can mean a list of 10⁸ entries
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 200, 200


def _explain(item: Any, kind: type[BaseModel]) -> str:
    """One of Pydantic's errors in one line: path of the field, what was expected, what came, the nearest name."""
    if item["type"] == "extra_forbidden":
        *sections, name = item["loc"]
        model: Any = kind
        for section in sections:
            # tasks and arms map names of the user's choice to sections; domains and mixture list sections
            held = get_args(model) if get_origin(model) in (dict, list) else ()
            model = held[-1] if held else model.model_fields[section].annotation
        return f"{'.'.join(map(str, item['loc']))}: unknown field{nearest(name, set(model.model_fields))}"
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "missing":
        return f"{path}: required, but missing"
    if item["type"] == "literal_error":
        expected = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        near = did_you_mean(item["input"], expected) if isinstance(item["input"], str) else ""
        return f"{path}: expected one of {', '.join(expected)}; got {_SHORT.repr(item['input'])}{near}"
    if item["type"] == "model_type":
        return f"{path}: expected a section of fields; got {_SHORT.repr(item['input'])}"
    place = f"{path}: " if path else ""  # a rule on several sections names its field itself
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "expected", 1)
    return f"{place}{message}" + ("" if isinstance(item["input"], dict) else f"; got {_SHORT.repr(item['input'])}")
