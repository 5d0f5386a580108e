"""Several processes end where one does on the same global batches; each has its share of the work."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from hlora import pipeline
from hlora.comparison import cost
from hlora.comparison.compare import compare
from hlora.config.reading import load_config, parse_config
from hlora.importance.shares import balanced, shard_height
from hlora.model.adapters import adapted_matrices
from hlora.model.optimizers import check_trained_by
from hlora.parallel.launch import join_launch
from hlora.run.job import check_sharding
from hlora.system.errors import AdapterError, ConfigError
from hlora.system.locks import lock_directory

pytestmark = pytest.mark.slow  # each starts processes

AT_TWO = [
    *(f"ddp: {name}" for name in (*ranks.SCENARIOS, "not finite", "changed meanwhile", "mixed precision")),
    *(f"fsdp2: {name}" for name in (*ranks.SCENARIOS, "not finite", "changed meanwhile", "mixed precision")),
]
AT_TWO += [f"trainer fsdp2: {name}" for name in ranks.BY_TRAINER] + [
    "trainer ddp: clipped",
    "trainer ddp: squares",
    "trainer ddp: squares resumed",
]
AT_FOUR = [f"{kind}: {name}" for kind in ("ddp", "fsdp2") for name in ("plain", "q only", "not finite")]
AT_FOUR += ["hsdp: plain", "trainer fsdp2: resumed"]
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
    command = [sys.executable, str(Path(ranks.__file__)), *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="session")
def alone(model_dir: str) -> Callable[[str], Found]:
    """The same in one process, without a group."""
    done: dict[str, Found] = {}

    def of(scenario: str) -> Found:
        kind, name = scenario.split(": ")
        mine = f"trainer alone: {name}" if kind.startswith("trainer") else f"alone: {name}"
        if mine not in done:
            done[mine] = ranks.run(*mine.split(": "), model_dir)
        return done[mine]

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
NOT_TRAINED = ("not finite", "meanwhile", "mixed", "bfloat16")
TRAINED = [each for each in ALL if not any(name in str(each) for name in NOT_TRAINED)]


@pytest.mark.parametrize(("processes", "scenario"), TRAINED)
def test_recording_and_tuning_equal_one_process(computed: Any, alone: Any, processes: int, scenario: str) -> None:
    mine, other = computed(processes, scenario), alone(scenario)
    for kind in ("general", "tuned"):  # in float64
        assert largest_difference(mine, other, kind) < 1e-9
    for kind in ("state", "importance", "undo", "move"):  # ω and Ω are float32
        assert largest_difference(mine, other, kind) < 1e-5
    for kind in ("losses", "tuning", "held out"):  # Transformers computes the loss in float32
        assert largest_difference(mine, other, kind) < 1e-6
    assert largest_difference(mine, other, "sample") == 0


@pytest.mark.parametrize(("processes", "scenario"), [each for each in ALL if "not finite" in str(each)])
def test_a_step_that_is_not_finite_counts_nowhere(computed: Any, alone: Any, processes: int, scenario: str) -> None:
    mine, other = computed(processes, scenario), alone(scenario)
    assert float(mine["skipped"]) == 1  # the mean over the processes
    assert largest_difference(mine, other, "importance") < 1e-5


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_what_began_before_a_factor_changed_is_not_used(computed: Any, alone: Any, kind: str) -> None:
    mine, other = computed(2, f"{kind}: changed meanwhile"), alone(f"{kind}: changed meanwhile")
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


def test_trainer_under_fsdp2_keeps_float32_master_weights_and_records_from_them(computed: Any, alone: Any) -> None:
    mine, other = computed(2, "trainer fsdp2: in bfloat16"), alone("trainer fsdp2: in bfloat16")
    for name, factor in mine.items():
        if name.startswith(("general.", "tuned.")):
            assert factor.dtype == torch.float32 and not torch.equal(factor, factor.bfloat16().float())
    assert largest_difference(mine, other, "losses") < 5e-3  # bfloat16's rounding is 4e-3
    assert largest_difference(mine, other, "undo") < 0.02


def test_trainer_under_fsdp2_has_factors_and_importance_sharded(computed: Any, alone: Any) -> None:
    mine, other = computed(2, "trainer fsdp2: clipped"), alone("trainer fsdp2: clipped")
    assert (float(mine["sharded"]), float(other["sharded"])) == (1, 0)
    assert float(mine["share"]) * 2 == float(other["share"])


@pytest.mark.parametrize(("processes", "parts"), [(2, 2), pytest.param(4, 3, marks=pytest.mark.slow)])
def test_each_process_holds_its_share_of_the_importance(computed: Any, alone: Any, processes: int, parts: int) -> None:
    # Two matrices of 32 × 32 and two of 16 × 32: at four processes the first has a larger one, a third of all elements.
    assert computed(processes, "fsdp2: plain")["share"] * parts == alone("fsdp2: plain")["share"]


def test_matrices_are_balanced_by_elements() -> None:
    sizes = [576 * 576, 192 * 576] * 30
    for processes in (1, 2, 3, 4, 8):
        loads = [0] * processes
        for size, owner in zip(sizes, balanced(sizes, processes), strict=True):
            loads[owner] += size
        assert max(loads) - min(loads) <= max(sizes)
    assert balanced([1, 1], 4) == [0, 1]


@pytest.mark.parametrize("rows", [1, 4, 7, 8])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_rows_are_counted_as_fully_shard_divides_them(rows: int, processes: int) -> None:
    chunks = [len(chunk) for chunk in torch.zeros(rows, 2).chunk(processes)]
    chunks += [0] * (processes - len(chunks))
    assert [shard_height(rows, process, processes) for process in range(processes)] == chunks


@pytest.fixture
def configured(tmp_path: Path, job_fields: dict[str, Any]) -> Callable[[int], Path]:
    """Configuration of a run on the tiny Llama with four rows a step in all, for so many processes."""

    def of(processes: int, **changes: Any) -> Path:
        training = job_fields["training"]
        common = {**training["common"], "per_device_train_batch_size": 4 // processes}
        fields = {
            **job_fields,
            "baselines": [],
            "evaluation": {"max_tokens": 200, "window": 64, "stride": 48, "generate": 0},
            "importance": {"method": "path_integral", "encoding": "float32"},
            "penalty": {"phi": 2.0},
            "training": {**training, "common": common},
            **changes,
        }
        path = tmp_path / f"run-{'-'.join([str(processes), *changes])}.yaml"
        path.write_text(yaml.safe_dump(fields), encoding="utf-8")
        return path

    return of


def environment() -> dict[str, str]:
    paths = os.pathsep.join(path for path in sys.path if path)
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": paths}


@pytest.fixture(scope="session")
def launch() -> Iterator[Callable[[str], dict[str, Any]]]:
    """Status of each process of a launch, and all that they said (see ranks.py). One process imports for all."""
    command = [sys.executable, str(Path(ranks.__file__)), "launch"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment(), stdin=pipe, stdout=pipe, text=True) as launcher:

        def ended(line: str) -> dict[str, Any]:
            assert launcher.stdin is not None and launcher.stdout is not None
            patience = Timer(240, launcher.kill)
            patience.start()
            launcher.stdin.write(f"{line}\n")
            launcher.stdin.flush()
            found = next((said for said in launcher.stdout if said.startswith('{"statuses"')), None)
            patience.cancel()
            assert found is not None, "the launcher has ended; its errors are above"
            return json.loads(found)

        yield ended


def results_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def assert_same_run(mine: Path, other: Path) -> None:
    """Losses, measures, importance and adapter of two runs."""
    one, two = results_of(mine), results_of(other)
    for phase in ("record", "tune"):
        for kind in ("loss", "total_loss", "probe_rise"):
            a, b = ([entry[kind] for entry in each["history"][phase] if kind in entry] for each in (one, two))
            assert a == pytest.approx(b, abs=1e-4)
    for arm in two["arms"]:
        a, b = (next(iter(each["arms"][arm]["texts"].values()))["nll"] for each in (one, two))
        assert a == pytest.approx(b, abs=1e-4)
    for file in ("importance/importance", "importance/adapter_model", "adapter/adapter_model"):
        a, b = (load_file(output / f"{file}.safetensors") for output in (mine, other))
        assert set(a) == set(b)
        for name in b:
            bound = 1e-3 * float(b[name].abs().max())
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=bound)


@pytest.fixture
def run_alone(tmp_path: Path, configured: Any) -> Path:
    """Output of the same run in one process."""
    pipeline.run(load_config(configured(1, output=str(tmp_path / "alone"))))
    return tmp_path / "alone"


@pytest.mark.slow
def test_a_run_in_two_processes_equals_one_and_speaks_once(
    launch: Any, configured: Any, run_alone: Path, tmp_path: Path
) -> None:
    done = launch(f"2 -- run {configured(2)}")
    assert done["statuses"] == [0, 0], done["said"]
    assert_same_run(tmp_path / "out", run_alone)
    for once in ("evaluating: base", "evaluating: hlora", "report: ", "tune: 4 steps in "):
        assert done["said"].count(once) == 1
    assert not list((tmp_path / "out").glob("unfinished.json"))


@pytest.mark.slow
def test_a_launch_that_lost_a_process_stops_and_goes_on_with_another_number(
    launch: Any, configured: Any, run_alone: Path, tmp_path: Path
) -> None:
    cut = launch(f"2 record 3 -- run {configured(2)}")
    cut_again = launch(f"4 tune 3 -- run {configured(4)}")
    done = launch(f"1 -- run {configured(1)}")
    for each in (cut, cut_again):
        assert each["statuses"][1] == -9 and set(each["statuses"]) <= {2, -9, -15}
        assert each["said"].count("another process of this launch has ended") == 1
    assert f"resuming from {tmp_path}/out/logs/record/checkpoint-2" in cut_again["said"]
    assert f"resuming from {tmp_path}/out/logs/tune/checkpoint-2" in done["said"]
    assert done["statuses"] == [0], done["said"]
    assert_same_run(tmp_path / "out", run_alone)


@pytest.mark.slow
def test_a_sharded_run_that_lost_a_process_goes_on_and_equals_one_process(
    launch: Any, configured: Any, tmp_path: Path
) -> None:
    """FSDP2 by Accelerate: recording, tuning under a budget, the tuned baseline, answers written, all sharded."""
    probe = tmp_path / "probe.txt"
    probe.write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 20, encoding="utf-8")
    more = {
        "baselines": ["lora_after_general"],
        "evaluation": {"max_tokens": 200, "window": 64, "stride": 48, "generate": 2, "max_new_tokens": 4},
        "penalty": {"phi": 2.0, "budget": "1%", "probe_texts": {"other": str(probe)}, "probe_every": 2},
    }
    pipeline.run(load_config(configured(1, **more, output=str(tmp_path / "alone"))))
    cut = launch(f"4 sharded record 3 -- run {configured(4, **more)}")
    done = launch(f"2 sharded -- run {configured(2, **more)}")
    assert cut["statuses"][1] == -9, cut["said"]
    assert f"resuming from {tmp_path}/out/logs/record/checkpoint-2" in done["said"]
    assert done["statuses"] == [0, 0], done["said"]
    assert_same_run(tmp_path / "out", tmp_path / "alone")
    assert done["said"].count("evaluating: hlora") == 1 and "Traceback" not in done["said"]
    written, expected = (results_of(tmp_path / of)["arms"]["hlora"]["samples"] for of in ("out", "alone"))
    assert written == expected
    assert sum("probe_rise" in entry for entry in results_of(tmp_path / "out")["history"]["tune"]) > 1


@pytest.mark.slow
def test_a_sharded_run_of_a_bfloat16_base_trains_float32_factors(launch: Any, configured: Any, tmp_path: Path) -> None:
    """What `model.dtype: auto` is on a GPU, and `bf16: true` with it."""
    paths = []
    for processes, output in ((1, "alone"), (2, "out")):
        fields = yaml.safe_load(configured(processes).read_text(encoding="utf-8"))
        fields["training"]["common"]["bf16"] = True
        fields |= {"model": {**fields["model"], "dtype": "bfloat16"}, "output": str(tmp_path / output)}
        paths.append(configured(processes, **fields))
    pipeline.run(load_config(paths[0]))
    done = launch(f"2 sharded -- run {paths[1]}")
    assert done["statuses"] == [0, 0], done["said"]
    adapter = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    for factor in adapter.values():
        assert factor.dtype == torch.float32 and not torch.equal(factor, factor.bfloat16().float())
    one, two = (results_of(tmp_path / of) for of in ("out", "alone"))
    for arm in ("base", "after_general", "hlora"):
        a, b = (next(iter(each["arms"][arm]["texts"].values()))["nll"] for each in (one, two))
        assert a == pytest.approx(b, abs=2e-2)  # of 5.9, bfloat16's rounding is 2e-2


def test_what_cannot_be_sharded_is_refused_by_field(configured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    changes = {
        "model.quantization": {"model": {"name": "any", "quantization": "8bit"}},
        "general.source": {"general": {"source": "model", "samples": 4}},
        "importance.method": {"importance": {"method": "squared_gradients"}, "penalty": {"anchor": "base"}},
        "penalty.budget": {"penalty": {"phi": 2.0, "budget": "1%"}},
    }
    for field, change in changes.items():
        with pytest.raises(ConfigError, match=f"^{field}.*sharded"):
            check_sharding(load_config(configured(2, **change)))


@pytest.mark.slow
def test_sharding_on_a_cpu_is_refused_as_accelerate_would_not_shard(
    launch: Any, configured: Any, tmp_path: Path
) -> None:
    done = launch(f"2 sharded unaided -- run {configured(2)}")
    assert done["statuses"] in ([2, 2], [2, -15], [-15, 2]), done["said"]
    assert done["said"].count("hlora: this launch asks for FSDP2, but Accelerate shards on accelerators only") == 1
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.slow
def test_an_error_in_a_launch_is_one_message_and_status_2(launch: Any, configured: Any, tmp_path: Path) -> None:
    wrong = configured(2, domain={"task": "multiple_choice", "train": "no.jsonl", "test": "no.jsonl"})
    with lock_directory(tmp_path / "out"):
        missing = launch(f"2 -- run {wrong} --set output={tmp_path / 'other'}")
        busy = launch(f"2 -- run {configured(2)}")
    for each, message in ((missing, "no.jsonl"), (busy, "is in use by process")):
        # Before the processes have met, the launcher may end the second (SIGTERM) as the first has failed.
        assert each["statuses"] in ([2, 2], [2, -15], [-15, 2]), each["said"]
        (line,) = [line for line in each["said"].splitlines() if line.startswith("hlora: ")]
        assert message in line and "Traceback" not in each["said"]


@pytest.mark.slow
def test_accelerates_launcher_on_two_nodes_records_what_one_process_does(configured: Any, tmp_path: Path) -> None:
    """As the guide says; the two nodes are two invocations that meet on this machine. Accelerate calls torchrun's."""
    port = free_port()
    nodes = []
    for number in range(2):
        command = ["accelerate.commands.launch", "--multi_gpu", "--num_machines=2", "--num_processes=2"]
        command += [f"--machine_rank={number}", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
        command += ["-m", "hlora", "record", str(configured(2))]
        with (tmp_path / f"said-{number}").open("w") as said:
            nodes.append(subprocess.Popen([sys.executable, "-m", *command], env=environment(), stderr=said))
    statuses = [node.wait(timeout=220) for node in nodes]
    assert statuses == [0, 0], "".join((tmp_path / f"said-{number}").read_text() for number in range(2))
    pipeline.record(load_config(configured(1, output=str(tmp_path / "alone"))))
    for file in ("importance", "adapter_model"):
        a, b = (load_file(tmp_path / of / f"importance/{file}.safetensors") for of in ("out", "alone"))
        for name in b:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-3 * float(b[name].abs().max()))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_deepspeed_is_refused_by_name(peft_model: Any) -> None:
    matrices = adapted_matrices(peft_model)
    matrices[0].A.ds_id = 0  # as ZeRO-3 marks a parameter that it has taken apart
    with pytest.raises(AdapterError, match=r"DeepSpeed .* DDP, or under FSDP2"):
        adapted_matrices(peft_model)
    del matrices[0].A.ds_id
    Wrapper = type("DeepSpeedOptimizerWrapper", (SimpleNamespace,), {})
    with pytest.raises(AdapterError, match=r"DeepSpeed .* DDP, or under FSDP2"):
        check_trained_by(Wrapper(param_groups=[{"params": list(peft_model.parameters())}]), matrices)


def test_fsdp1_is_refused_by_name(peft_model: Any, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        wrapped = FullyShardedDataParallel(peft_model, use_orig_params=True, device_id=torch.device("cpu"))
        with pytest.raises(AdapterError, match=r"FSDP1 .* DDP, or under FSDP2"):
            adapted_matrices(wrapped)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("engine", "named"), [("FSDP", "FSDP1"), ("DEEPSPEED", "DeepSpeed")])
def test_a_launch_by_fsdp1_or_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch, engine: str, named: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ConfigError, match=f"asks for {named}.*torchrun.*--fsdp_version 2"):
        join_launch("cpu")


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_sharding_is_asked_of_the_launcher_not_of_the_configuration(job_fields: dict[str, Any], engine: str) -> None:
    job_fields["training"]["common"][engine] = "full_shard"
    with pytest.raises(ConfigError, match=f"{engine} cannot be set here.*accelerate launch --use_fsdp --fsdp_version"):
        parse_config(job_fields)


def test_what_does_not_divide_its_work_is_refused_in_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for work in (compare, cost.measure_cost):
        with pytest.raises(ConfigError, match="works in one process, and this is one of 2"):
            work(None)
