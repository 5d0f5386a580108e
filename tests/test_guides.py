"""The guides' blocks, run: what a reader copies makes what the next step needs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import datasets
import pytest
import torch
from conftest import move_adapter, record

from hlora import Importance
from hlora.config.reading import load_config
from hlora.data.domain import domain_rows
from hlora.data.general import general_text
from hlora.model.adapters import adapted_matrices

REPOSITORY = Path(__file__).resolve().parents[1]
METAMATHQA = (REPOSITORY / "docs" / "guides" / "metamathqa.md").read_text(encoding="utf-8")
DISTRIBUTED = (REPOSITORY / "docs" / "guides" / "distributed.md").read_text(encoding="utf-8")
TRAIN, SIZING = re.findall(r"^```python\n(.*?)^```$", DISTRIBUTED, flags=re.MULTILINE | re.DOTALL)
CONFIG = load_config(REPOSITORY / "configs" / "metamathqa-llama-3.2-3b.yaml")


def block(guide: str, language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", guide, flags=re.MULTILINE | re.DOTALL)
    return found


def stand_in_for_the_hub(name: str, subset: str | None = None, *, split: str, streaming: bool = False) -> Any:
    """Rows with the fields that they have on the hub: 103 articles, 5 questions, the fourth too long, and 3 to test."""
    if name == "HuggingFaceFW/finewiki":
        assert (split, streaming) == ("train", True)
        texts = [
            f"Article {n} says that {n} is a number, and goes on until its line is a long one." for n in range(103)
        ]
        return datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset()
    if name == "meta-math/MetaMathQA":
        queries = [f"What is {n} + 1?" for n in range(5)]
        responses = ["word " * (300 if n == 3 else 1) + f"The answer is: {n + 1}" for n in range(5)]
        return datasets.Dataset.from_dict({"type": ["GSM_FOBAR"] * 5, "query": queries, "response": responses})
    assert (name, subset, split) == ("openai/gsm8k", "main", "test")
    questions = [f"How many are {n} and 2?" for n in range(3)]
    return datasets.Dataset.from_dict({"question": questions, "answer": [f"{n}+2\n#### {n + 2}" for n in range(3)]})


def test_the_metamathqa_data_of_the_guide_are_what_its_configuration_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", stand_in_for_the_hub)
    exec(block(METAMATHQA, "python"), {})
    domain = domain_rows(CONFIG.domain, None, seed=0)
    assert [example.answer for example in domain.train] == [f"word The answer is: {n}" for n in (1, 2, 3, 5)]
    assert domain.test[0].prompt == "Question: How many are 0 and 2? Think step by step.\nAnswer:"
    assert domain.test[0].answer == "0+2\n#### 2"
    unused: Any = None  # neither the model nor its tokenizer reads a file
    general = general_text(CONFIG.general, CONFIG.evaluation, unused, unused, 0, tmp_path / "cache")
    assert [document.split()[1] for document in general.train] == ["100", "101", "102"]
    assert re.findall(r"Article (\d+) says", general.evaluation["wikipedia"]) == [str(n) for n in range(100)]
    assert general.facts["characters_left_out_as_evaluation_text"] == 0


def test_the_metamathqa_patch_is_whole_and_touches_run_py_alone(tmp_path: Path) -> None:
    command = ["git", "apply", "--numstat", "-"]
    done = subprocess.run(command, input=block(METAMATHQA, "diff"), capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["5", "1", "method_comparison/MetaMathQA/run.py"], done.stderr


def test_the_metamathqa_patch_starts_at_the_general_adapter_and_adds_a_penalty_with_gradients(
    peft_model: Any, token_ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(peft_model, token_ids).save(tmp_path / "importance")
    (matrix, *_) = adapted_matrices(peft_model)
    general = matrix.B.detach().clone()
    move_adapter(peft_model)

    monkeypatch.setenv("HLORA_IMPORTANCE", str(tmp_path / "importance"))
    monkeypatch.setenv("HLORA_PHI", "9")
    added = [line[1:] for line in block(METAMATHQA, "diff").splitlines() if re.match(r"\+(?!\+)", line)]
    *before, step = (dedent(line) for line in added)
    names: dict[str, Any] = {"model": peft_model, "loss": torch.tensor(0.0), "grad_scaler": Unscaled()}
    exec("import os\n" + "\n".join(before), names)
    assert torch.equal(matrix.B, general)
    with torch.no_grad():
        matrix.B.add_(0.1)
    exec(step, names)
    assert matrix.B.grad is not None and matrix.B.grad.abs().max() > 0


class Unscaled:
    """As run.py has it without mixed precision."""

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss


def test_the_sizes_of_the_guide_are_what_its_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(SIZING, names)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 5 and all(row in DISTRIBUTED.splitlines() for row in rows)


@pytest.mark.slow
def test_the_script_of_the_guide_records_and_tunes_under_ddp_and_fsdp2(model_dir: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN, encoding="utf-8")
    said = []
    for way in ("ddp", "fsdp2"):
        (tmp_path / way).mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "../train.py"]
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        said.append(
            subprocess.Popen(
                [*command, way, model_dir], cwd=tmp_path / way, env=environment, stdout=subprocess.PIPE, text=True
            )
        )
    line = re.compile(r"process \d: loss [\d.]+, penalty [\d.]+")  # two may end up on one: torchrun sets python -u
    ddp, fsdp2 = (sorted(line.findall(each.communicate(timeout=200)[0])) for each in said)
    assert [each.returncode for each in said] == [0, 0]
    assert len(ddp) == 2 and ddp == fsdp2  # to the digits that it prints
    importances = [Importance.load(tmp_path / way / "importance") for way in ("ddp", "fsdp2")]
    assert importances[0].norms() == pytest.approx(importances[1].norms(), rel=1e-3)
