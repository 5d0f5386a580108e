"""One line for each method is all that a configuration, a comparison and a report need to know of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import hlora
from hlora.config.reading import parse_config
from hlora.config.run import RunConfig
from hlora.methods import METHODS, label_of
from hlora.report.style import style_of


@pytest.mark.parametrize("name", METHODS)
def test_every_method_names_a_function_and_has_a_label_of_its_own(name: str) -> None:
    assert isinstance(METHODS[name].function(), Callable)
    assert [label_of(other) for other in METHODS].count(label_of(name)) == 1


def test_no_two_methods_look_alike() -> None:
    styles = [str(style) for name in METHODS if (style := style_of(name))]
    assert len(set(styles)) == len(styles)


def test_the_baselines_of_a_run_are_methods_of_a_comparison() -> None:
    (names,) = [field.annotation for name, field in RunConfig.model_fields.items() if name == "baselines"]
    assert all(name in METHODS for name in names.__args__[0].__args__)


DUMMY = """
from hlora.model.lora import attach_lora


def dummy(job, *, importance, strength):
    assert importance.matrices and strength in (2.0, 3.0)
    return attach_lora(job.base, job.config.lora, job.config.seed), [{"step": 1, "loss": strength}]
"""
LINE = '    "dummy": Method("Dummy", f"{_RIVALS}.dummy:dummy", "importance", "d"),\n'


@pytest.mark.slow
def test_a_new_rival_is_one_file_and_one_line(tmp_path: Path, comparison_file: Path) -> None:
    """A copy of the package with a file and a line more compares the rival, with importance, strengths and report."""
    package = shutil.copytree(Path(hlora.__file__).parent, tmp_path / "src" / "hlora")
    (package / "comparison" / "rivals" / "dummy.py").write_text(DUMMY, encoding="utf-8")
    table = package / "methods.py"
    source = table.read_text(encoding="utf-8")
    table.write_text(source.replace('    "mlp": Method', LINE + '    "mlp": Method'), encoding="utf-8")

    fields = yaml.safe_load(comparison_file.read_text(encoding="utf-8"))
    fields["arms"] = {"LoRA(μ)": {"method": "lora"}, "Mine": {"method": "dummy", "strengths": [2, 3]}}
    fields |= {"seeds": [0], "ours": "Mine", "rival": "LoRA(μ)", "ablation": []}
    comparison_file.write_text(yaml.safe_dump(fields, allow_unicode=True), encoding="utf-8")
    command = [sys.executable, "-m", "hlora", "compare", str(comparison_file)]
    paths = {"PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = (Path(fields["output"]) / "report.html").read_text(encoding="utf-8")
    assert "Mine" in report and "failed" not in report


def test_strengths_for_a_method_without_one_are_refused(comparison_file: Path) -> None:
    from hlora.config.comparison import CompareConfig
    from hlora.system.errors import ConfigError

    fields = yaml.safe_load(comparison_file.read_text(encoding="utf-8"))
    fields["arms"]["LoRA(μ)"]["strengths"] = [1]
    with pytest.raises(ConfigError, match=r"arms: 'LoRA\(μ\)' has strengths, but its method, lora, takes none"):
        parse_config(fields, kind=CompareConfig)
