"""What an install command brings is what the code needs, and each one that is named works in a clone."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest
from conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [
    *PROJECT["dependencies"],
    *(each for extra in PROJECT["optional-dependencies"].values() for each in extra),
]
OPTIONAL = ("bitsandbytes", "mlflow", "periodictable", "ray", "trackio", "triton", "wandb")


def tracked(*folders: str) -> dict[str, str]:
    """Text of each file of ours that a person may read an install command in."""
    files = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.*")] + [REPOSITORY / "README.md"]
    return {str(path): path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".md", ".yaml")}


def test_every_install_command_names_a_clone_and_an_extra_that_there_is() -> None:
    named = set()
    for file, text in tracked("src", "docs", "examples", "configs", "benchmarks").items():
        assert "'hlora[" not in text, f"{file}: hlora is on no package index; pip install '.[...]' works in a clone"
        named |= set(re.findall(r"pip install '\.\[(\w+)\]'", text)) | set(
            re.findall(r"how_to_install\('(\w+)'\)", text)
        )
    assert named >= {"demo", "quantised", "ray", "run"}
    assert named <= set(PROJECT["optional-dependencies"])


def test_no_version_of_triton_is_ours() -> None:
    """It comes with torch, which pins it, or not at all."""
    pins = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    assert not [line for line in [*REQUIREMENTS, *pins.splitlines()] if re.match(r"(triton|nvidia|cuda)\b", line)]


def test_every_requirement_is_pinned_in_constraints() -> None:
    def names(lines: list[str]) -> set[str]:
        found = [re.match(r"[\w.-]+", line) for line in lines if not line.startswith("#")]
        return {re.sub(r"[-_.]+", "-", match[0]).lower() for match in found if match} - {"hlora"}

    pinned = names((REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines())
    assert names(REQUIREMENTS) <= pinned


def test_the_core_alone_imports_and_its_command_is_one_sentence_with_the_install_line() -> None:
    core, of_run = (
        {re.split(r"[>=]", each)[0].replace("-", "_") for each in each_set}
        for each_set in (PROJECT["dependencies"], PROJECT["optional-dependencies"]["run"])
    )
    names = sorted(of_run - core)  # of what both name, the command line asks for a later version
    code = f"""
import sys
for name in {names!r}:
    sys.modules[name] = None  # Python's way to say that it is not installed
import hlora
for name in hlora.__all__:
    getattr(hlora, name)
from hlora import __main__
assert {{*__main__.RUN, "tensorboard"}} == {{*{names!r}}}
__main__.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    *_, said = done.stderr.splitlines()  # libraries speak before it
    assert said.startswith("hlora: the command line needs trl, datasets"), done.stderr
    assert "pip install '.[run]'" in said and "Traceback" not in done.stderr


@pytest.mark.slow
def test_no_extra_but_run_is_needed_to_import_every_module_or_to_read_the_printed_configuration() -> None:
    code = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None
import importlib, pkgutil, hlora
for module in pkgutil.walk_packages(hlora.__path__, "hlora."):
    if module.name.startswith("hlora.integrations."):
        continue  # imported by the framework that each is for
    importlib.import_module(module.name)
from hlora.config.reading import parse_config
from hlora.config.starting import starting_yaml
from hlora.model.embedded import MODEL_NAME
import gguf, yaml
assert parse_config(yaml.safe_load(starting_yaml())).model.name == MODEL_NAME
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
