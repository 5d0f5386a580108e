"""What a command prints while it runs: progress on a terminal and in a log, Ctrl-C, nothing of other programs."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console
from transformers import TrainerState

from hlora import __version__
from hlora.evaluation.harness import harness_accuracy
from hlora.report.run.verdict import verdict
from hlora.system import progress
from hlora.system.files import sha256
from hlora.training.progress import ProgressLine


@pytest.fixture
def file(job_fields: dict[str, Any], tmp_path: Path) -> Path:
    """A run of 6 steps a phase, with little to measure."""
    job_fields["training"]["common"]["report_to"] = []
    for phase in ("record", "tune"):
        job_fields["training"][phase]["max_steps"] = 6
    job_fields["evaluation"] = {"max_tokens": 64, "accuracy": False, "generate": 0}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job_fields), encoding="utf-8")
    return path


def test_without_a_terminal_the_log_says_step_phase_loss_and_time_left_of_the_run(
    hlora: Any,
    file: Path,
    job_fields: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "_FIRST", 0.0)
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    caplog.set_level("INFO", "hlora")
    status, out, _ = hlora("run", file, "--set", "evaluation.generate=3")
    lines = [record.getMessage() for record in caplog.records]
    assert status == 0
    (third,) = (line for line in lines if line.startswith("phase 4 of 5, tune: step 3 of 6, loss "))
    assert " + penalty " in third and " left, run 0:" in third
    scored = [line.split("perplexity, token ")[1] for line in lines if "evaluate hlora: perplexity, token " in line]
    assert [line.split(",")[0] for line in scored] == ["21 of 63", "42 of 63", "63 of 63"]  # one batch, three models
    for counted in ("answer likelihood, row 8 of 8", "sample answers 3 of 3"):  # one batch each
        assert any(line.startswith(f"phase 5 of 5, evaluate hlora: {counted}") for line in lines)
    (ended,) = (line for line in lines if line.startswith("tune: 6 steps in "))
    assert "loss " in ended
    headline = verdict(json.loads((Path(job_fields["output"]) / "results.json").read_text())).headline
    assert " ".join(out.split()).count(headline) == 1


def test_outside_a_git_repository_the_harness_prints_nothing_of_git_and_no_bars(
    open_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    job = open_job()
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    assert "acc" in harness_accuracy(job.base, job.tokenizer, job.domain, 8)
    printed = "".join(capfd.readouterr())
    assert not any(text in printed for text in ("fatal", "it/s", "100%")), printed


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C as in a terminal: a job in the background of a shell ignores it, and Python then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_ctrl_c_writes_a_checkpoint_says_so_and_the_same_command_resumes_there_to_the_same_bytes(
    hlora: Any, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert hlora("run", file, "--set", f"output={whole}")[0] == 0
    shown = ProgressLine.on_step_end

    ahead, clock = [0.0], time.monotonic
    monkeypatch.setattr("hlora.training.checkpoint.time", SimpleNamespace(monotonic=lambda: clock() + ahead[0]))

    def press(self: ProgressLine, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        shown(self, args, state, control, **kwargs)
        if self.phase == "tune" and state.global_step == 3:
            ahead[0] = 1000.0  # seconds that the first steps took
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ProgressLine, "on_step_end", press)
    status, _, error = hlora("run", file, "--set", f"output={stopped}")
    assert status == 130
    assert error.splitlines()[-1] == (
        "hlora: stopped in tune, after step 3 of 6, with a checkpoint. "
        "The same command, given again, resumes from there."
    )
    monkeypatch.setattr(ProgressLine, "on_step_end", shown)
    assert hlora("run", file, "--set", f"output={stopped}")[0] == 0
    assert "tune: 3 more steps in 0:" in caplog.text
    assert 1000 < json.loads((stopped / "results.json").read_text())["seconds"]["tune"] < 2000
    steps = [entry["step"] for entry in json.loads((stopped / "results.json").read_text())["history"]["tune"]]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert sha256(stopped / "adapter/adapter_model.safetensors") == sha256(whole / "adapter/adapter_model.safetensors")

    def press_in_evaluation(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)  # the signal ends it

    kept = [sha256(stopped / name) for name in ("results.json", "config.yaml")]
    monkeypatch.setattr("hlora.evaluation.evaluate.text_likelihood", press_in_evaluation)
    status, _, error = hlora("evaluate", file, "--set", f"output={stopped}", "--set", "evaluation.max_tokens=32")
    assert status == 130
    assert [sha256(stopped / name) for name in ("results.json", "config.yaml")] == kept
    assert error.splitlines()[-1] == (
        "hlora: stopped. Adapter and earlier results are kept; the same command, given again, measures from the start."
    )


def test_ctrl_c_in_an_evaluation_names_the_phase(hlora: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("hlora.evaluation.evaluate.text_likelihood", press)
    status, _, error = hlora("run", file)
    assert status == 130
    assert "hlora: stopped in phase 1 of 5, evaluate base. The same command" in error


def test_a_command_says_that_it_has_begun_before_it_loads_pytorch_also_into_a_pipe(file: Path) -> None:
    program = """
import sys
from hlora.parallel.messages import set_up_logs
from hlora.config.command_line import load_named
set_up_logs()
load_named(sys.argv[1], None)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True)
    assert done.stderr == f"hlora {__version__}, {file}: loading PyTorch and Transformers\n"


def test_a_first_token_that_only_the_tokenizer_names_is_no_message_of_transformers(
    file: Path, model_dir: str, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(model_dir, tmp_path / "without bos"))
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((model / name).read_text(encoding="utf-8"))
        (model / name).write_text(json.dumps(fields | {"bos_token_id": None}), encoding="utf-8")
    command = [sys.executable, "-m", "hlora", "record", file, "--set", f"model.name={model}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "record: 6 steps" in done.stderr and "transformers" not in done.stderr.lower().replace(
        " and transformers", ""
    )


def test_on_a_terminal_no_line_stands_before_something_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    with progress.line("step", 4) as shown:
        shown._console = Console(file=screen, force_terminal=True, width=80)
        assert screen.getvalue() == ""
        shown.update(1, "loss 3.000")
        with progress.line("perplexity", 2) as inner:
            inner._console = shown._console
            inner.update(1)
    assert "step 1 of 4, loss 3.000, 0:00 left" in screen.getvalue()
    assert "perplexity" not in screen.getvalue()


def test_a_line_aside_takes_the_place_of_one_that_waits_and_leaves_the_time_of_the_run_alone() -> None:
    screen, asked = io.StringIO(), []

    def whole(left: float | None, parts: int) -> float:
        asked.append(parts)
        return 100.0

    with progress.phase("phase 4 of 5, tune", whole), progress.line("step", 4) as outer:
        outer._console = Console(file=screen, force_terminal=True, width=80)
        outer.update(1)
        with progress.line("the budget's probe, token", 64, aside=True) as inner:
            inner._console = outer._console
            assert outer._live is None
            inner.add(32)
        outer.update(2)
    said = screen.getvalue()
    assert said.index("step 1 of 4") < said.index("probe, token 32 of 64, 0:00 left") < said.index("step 2 of 4")
    assert "32 of 64, 0:00 left, run" not in said
    assert set(asked) == {4}


def test_times_are_minutes_and_seconds() -> None:
    assert [progress.clock(seconds) for seconds in (0.4, 80, 3599.6, 11_100)] == ["0:00", "1:20", "1:00:00", "3:05:00"]


def test_the_shell_completes_commands(tmp_path: Path) -> None:
    asked = {"_HLORA_COMPLETE": "complete_bash", "COMP_WORDS": "hlora re", "COMP_CWORD": "1"}
    program = "import sys; sys.argv[0] = 'hlora'; from hlora.cli import app; app(prog_name='hlora')"
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True)
    assert found.stdout.split() == ["record", "report"]
