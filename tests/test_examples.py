"""The examples, run as a user runs them: what they write loads in plain PEFT, and the penalty in them protects."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import hlora
from hlora.model.adapters import adapted_matrices

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))
STEPS = 12


def run(script: Path, model_dir: str, output: Path, phi: float) -> str:
    command = [sys.executable, str(script), "--model", model_dir, "--steps", str(STEPS), "--output", str(output)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--phi", str(phi)], capture_output=True, text=True, env=environment, cwd=output.parent
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module", params=EXAMPLES, ids=[path.stem for path in EXAMPLES])
def example(request: pytest.FixtureRequest, model_dir: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One example that has run: its script, what it printed and its output directory."""
    output = tmp_path_factory.mktemp(request.param.stem) / "protected"
    return {"script": request.param, "printed": run(request.param, model_dir, output, phi=9.0), "output": output}


def weight_changes(model: PeftModel) -> torch.Tensor:
    """s·BA of every matrix, in one vector."""
    return torch.cat([(m.scale * m.B @ m.A).detach().flatten() for m in adapted_matrices(model)])


def loaded(model_dir: str, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), str(adapter))


def test_there_is_an_example_for_each_way_in_and_none_is_long() -> None:
    assert [path.stem for path in EXAMPLES] == ["plain_loop", "sft_trainer", "trainer"]
    for path in EXAMPLES:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 60, path.name


@pytest.mark.slow
def test_an_example_writes_an_adapter_that_plain_peft_loads_and_that_changes_what_the_model_says(
    example: dict[str, Any], model_dir: str
) -> None:
    config = (example["output"] / "adapter" / "adapter_config.json").read_text(encoding="utf-8")
    assert '"peft_type": "LORA"' in config and "hlora" not in config
    model = loaded(model_dir, example["output"] / "adapter").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        tuned = model(input_ids=ids).logits
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=ids).logits, tuned, atol=1e-3)


@pytest.mark.slow
def test_the_importance_of_an_example_tells_what_was_recorded(example: dict[str, Any]) -> None:
    importance = hlora.Importance.load(example["output"] / "importance")
    assert len(importance.matrices) == 4 and importance.encoding == "factored"
    assert importance.provenance["steps"] == STEPS
    assert importance.provenance["data"] == {"text": "pydoc_data.topics"}
    assert all(norm > 0 for norm in importance.norms().values())


@pytest.mark.slow
def test_an_example_shows_the_penalty_which_is_zero_at_the_general_adapter_only(example: dict[str, Any]) -> None:
    found = re.findall(r"(?:penalty |'weighted_regularisation_loss': '?)([0-9.e+-]+)", example["printed"])
    penalties = [float(value) for value in found]
    assert len(penalties) == STEPS
    assert penalties[0] == 0 and all(value > 0 for value in penalties[1:])


# A second run takes 8 s or more; in a trainer the penalty is the same callback as in tests/importance.
@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES[:1], ids=[EXAMPLES[0].stem], indirect=True)
def test_the_penalty_keeps_an_example_closer_to_the_general_adapter(
    example: dict[str, Any], model_dir: str, tmp_path: Path
) -> None:
    run(example["script"], model_dir, tmp_path / "unprotected", phi=0.0)
    start, other_start = (
        weight_changes(loaded(model_dir, output / "importance"))
        for output in (example["output"], tmp_path / "unprotected")
    )
    assert torch.equal(start, other_start)
    protected = weight_changes(loaded(model_dir, example["output"] / "adapter")) - start
    unprotected = weight_changes(loaded(model_dir, tmp_path / "unprotected" / "adapter")) - start
    assert 0 < protected.norm() < 0.5 * unprotected.norm()
