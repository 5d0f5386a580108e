"""Several processes end where one does on the same global batches; each has its share of the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from hlora import distributed
from hlora.adapters import adapted_matrices, check_trained_by
from hlora.errors import AdapterError

AT_TWO = [
    *(f"ddp: {name}" for name in (*ranks.SCENARIOS, "not finite", "changed meanwhile", "mixed precision")),
    *(f"fsdp2: {name}" for name in (*ranks.SCENARIOS, "not finite", "changed meanwhile", "mixed precision")),
]
AT_FOUR = [f"{kind}: {name}" for kind in ("ddp", "fsdp2") for name in ("plain", "q only", "not finite")] + [
    "hsdp: plain"
]
Found = dict[str, Tensor]


@pytest.fixture(scope="session")
def computed(tmp_path_factory: pytest.TempPathFactory, model_dir: str) -> Callable[[int, str], Found]:
    """What so many processes computed in a scenario; all scenarios of one number run in one go."""
    done: dict[int, Path] = {}

    def of(processes: int, scenario: str) -> Found:
        if processes not in done:
            done[processes] = tmp_path_factory.mktemp("ranks")
            scenarios = AT_TWO if processes == 2 else AT_FOUR
            started(processes, model_dir, str(done[processes]), *scenarios)
        return load_file(done[processes] / f"{scenario}.safetensors")

    return of


def started(*arguments: Any) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(Path(ranks.__file__)), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="session")
def alone(model_dir: str) -> Callable[[str], Found]:
    """The same in one process."""
    done: dict[str, Found] = {}

    def of(scenario: str) -> Found:
        if scenario not in done:
            done[scenario] = ranks.run("alone", scenario, model_dir)
        return done[scenario]

    return of


def largest_difference(mine: Found, other: Found, kind: str) -> float:
    """Of the tensors whose name begins so, as a share of the largest element of each."""
    names = [name for name in other if name.split(".")[0] == kind]
    assert names
    assert set(names) == {name for name in mine if name.split(".")[0] == kind}
    pairs = [(mine[name].double(), other[name].double()) for name in names]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


ALL = [(2, scenario) for scenario in AT_TWO] + [
    pytest.param(4, scenario, marks=pytest.mark.slow) for scenario in AT_FOUR
]
TRAINED = [
    each for each in ALL if "not finite" not in str(each) and "meanwhile" not in str(each) and "mixed" not in str(each)
]


@pytest.mark.parametrize(("processes", "scenario"), TRAINED)
def test_recording_and_tuning_equal_one_process(computed: Any, alone: Any, processes: int, scenario: str) -> None:
    mine, other = computed(processes, scenario), alone(scenario.split(": ")[1])
    for kind in ("general", "tuned"):  # in float64
        assert largest_difference(mine, other, kind) < 1e-9
    for kind in ("state", "importance", "undo", "move"):  # ω and Ω are float32
        assert largest_difference(mine, other, kind) < 1e-5
    for kind in ("losses", "tuning", "held out"):  # Transformers computes the loss in float32
        assert largest_difference(mine, other, kind) < 1e-6
    assert largest_difference(mine, other, "sample") == 0


@pytest.mark.parametrize(("processes", "scenario"), [each for each in ALL if "not finite" in str(each)])
def test_a_step_that_is_not_finite_counts_nowhere(computed: Any, alone: Any, processes: int, scenario: str) -> None:
    mine, other = computed(processes, scenario), alone("not finite")
    assert float(mine["skipped"]) == 1  # the mean over the processes
    assert largest_difference(mine, other, "importance") < 1e-5


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_what_began_before_a_factor_changed_is_not_used(computed: Any, alone: Any, kind: str) -> None:
    mine, other = computed(2, f"{kind}: changed meanwhile"), alone("changed meanwhile")
    assert other["value"] > 0
    for part in ("value", "model", "at"):
        assert largest_difference(mine, other, part) < 1e-5
    assert mine["at anchor"] == 0


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_mixed_precision_records_from_float32_master_weights(computed: Any, kind: str) -> None:
    found = computed(2, f"{kind}: mixed precision")
    expected = {f"importance.{n.removeprefix('expected.')}": t for n, t in found.items() if n.startswith("expected.")}
    assert all(found[name].dtype == torch.float32 for name in expected)
    assert largest_difference(found, expected, "importance") < 1e-4
    assert all(t.dtype == torch.float32 for name, t in found.items() if name.startswith("general."))


@pytest.mark.parametrize(("processes", "parts"), [(2, 2), pytest.param(4, 3, marks=pytest.mark.slow)])
def test_each_process_holds_its_share_of_the_importance(computed: Any, alone: Any, processes: int, parts: int) -> None:
    # Two matrices of 32 × 32 and two of 16 × 32: at four processes the first has a larger one, a third of all elements.
    assert computed(processes, "fsdp2: plain")["share"] * parts == alone("plain")["share"]


def test_matrices_are_balanced_by_elements() -> None:
    sizes = [576 * 576, 192 * 576] * 30
    for processes in (1, 2, 3, 4, 8):
        loads = [0] * processes
        for size, owner in zip(sizes, distributed.balanced(sizes, processes), strict=True):
            loads[owner] += size
        assert max(loads) - min(loads) <= max(sizes)
    assert distributed.balanced([1, 1], 4) == [0, 1]


@pytest.mark.parametrize("rows", [1, 4, 7, 8])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_rows_are_counted_as_fully_shard_divides_them(rows: int, processes: int) -> None:
    chunks = [len(chunk) for chunk in torch.zeros(rows, 2).chunk(processes)]
    chunks += [0] * (processes - len(chunks))
    assert [distributed.rows_of(rows, process, processes) for process in range(processes)] == chunks


@pytest.fixture
def launched(tmp_path: Path, job_fields: dict[str, Any]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `hlora run` in so many processes, on the tiny Llama, four rows a step in all; `at` kills one of them."""
    fields = {
        **job_fields,
        "baselines": [],
        "evaluation": {"max_tokens": 200, "window": 64, "stride": 48, "generate": 0},
        "importance": {"encoding": "float32"},
        "penalty": {"phi": 2.0},
    }

    def run(
        processes: int, at: tuple[str, int] | None = None, launcher: tuple[str, ...] = (), **changes: Any
    ) -> subprocess.CompletedProcess[str]:
        common = {**fields["training"]["common"], "per_device_train_batch_size": 4 // processes}
        mine = {**fields, "training": {**fields["training"], "common": common}, **changes}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(mine), encoding="utf-8")
        what = ["-m", "hlora"] if at is None else [str(Path(ranks.__file__)), "hlora", *map(str, at)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        usual = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
        command = [sys.executable, *(launcher or usual), *what, "run", str(path)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)

    return run


def results_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def assert_same_run(mine: Path, other: Path) -> None:
    """Losses, measures, importance and adapter of two runs."""
    one, two = results_of(mine), results_of(other)
    for phase in ("record", "tune"):
        a, b = ([entry["loss"] for entry in each["history"][phase]] for each in (one, two))
        assert a == pytest.approx(b, abs=1e-4)
    totals = [[entry["total_loss"] for entry in each["history"]["tune"]] for each in (one, two)]
    assert totals[0] == pytest.approx(totals[1], abs=1e-4)
    for arm in two["arms"]:
        a, b = (next(iter(each["arms"][arm]["texts"].values()))["nll"] for each in (one, two))
        assert a == pytest.approx(b, abs=1e-4)
    for file in ("importance/importance", "importance/adapter_model", "adapter/adapter_model"):
        a, b = (load_file(output / f"{file}.safetensors") for output in (mine, other))
        assert set(a) == set(b)
        for name in b:
            bound = 1e-3 * float(b[name].abs().max())
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=bound)


@pytest.mark.slow
def test_a_run_under_torchrun_equals_one_process_and_speaks_once(launched: Any, tmp_path: Path) -> None:
    alone = launched(1, output=str(tmp_path / "alone"))
    assert alone.returncode == 0, alone.stderr
    done = launched(2)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "out", tmp_path / "alone")
    for once in ("evaluating: base", "evaluating: hlora", "report: ", "tune ━"):
        assert (done.stdout + done.stderr).count(once) == 1
    assert not list((tmp_path / "out").glob("unfinished.json"))


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "processes"), [("record", 2), ("tune", 1), ("tune", 4)])
def test_a_launch_that_lost_a_process_stops_and_goes_on_with_another_number(
    launched: Any, tmp_path: Path, phase: str, processes: int
) -> None:
    cut = launched(2, at=(phase, 3))
    assert cut.returncode != 0
    assert "another process of this launch has ended" in cut.stderr or "Signal 9 (SIGKILL)" in cut.stderr
    assert cut.stderr.count("hlora: ") <= 1
    done = launched(processes)
    assert done.returncode == 0, done.stderr
    assert f"going on from {tmp_path}/out/logs/{phase}/checkpoint-2" in done.stderr
    assert launched(1, output=str(tmp_path / "alone")).returncode == 0
    assert_same_run(tmp_path / "out", tmp_path / "alone")


def test_deepspeed_is_refused_by_name(peft_model: Any) -> None:
    matrices = adapted_matrices(peft_model)
    matrices[0].A.ds_id = 0  # as ZeRO-3 marks a parameter that it has taken apart
    with pytest.raises(AdapterError, match=r"DeepSpeed .* DDP, or under FSDP2"):
        adapted_matrices(peft_model)
    del matrices[0].A.ds_id
    Wrapper = type("DeepSpeedOptimizerWrapper", (SimpleNamespace,), {})
    with pytest.raises(AdapterError, match=r"DeepSpeed .* DDP, or under FSDP2"):
        check_trained_by(Wrapper(param_groups=[{"params": list(peft_model.parameters())}]), matrices)
