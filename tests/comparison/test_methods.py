"""The arms of the paper: each starts where it should, and is held where it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hlora.comparison import shared
from hlora.comparison.paper import uniform_importance
from hlora.config.comparison import CellConfig
from hlora.config.reading import parse_config
from hlora.config.sections import ImportanceConfig
from hlora.methods import METHODS
from hlora.model.adapters import adapted_matrices
from hlora.model.base import load_base
from hlora.model.lora import attach_lora
from hlora.run.job import Job
from hlora.run.phases import record_phase


@pytest.fixture
def job(job_fields: dict[str, Any]) -> Job:
    job_fields["training"]["common"] |= {"learning_rate": 2e-2, "report_to": []}
    fields = {
        **job_fields,
        "method": "hlora",
        "fisher": {"examples": 4, "max_length": 16},
        "importance": {"method": "path_integral", "encoding": "float32"},
    }
    config = parse_config(fields, kind=CellConfig)
    return Job(config, *load_base(config.model), Path(config.output))


def weights(model: Any) -> torch.Tensor:
    """s·B·A of every matrix, in one vector."""
    return torch.cat([(m.scale * m.B @ m.A).detach().flatten() for m in adapted_matrices(model)])


def tuned(job: Job, name: str, strength: float | None = None) -> tuple[Any, list[Any]]:
    """The method's model and losses, from what it needs."""
    job.config.method = name
    importance, method = shared.shared_importance(job), METHODS[name]
    arguments = {} if importance is None else {"importance": importance}
    return method.function()(job, **arguments, **({} if method.strength is None else {"strength": strength}))


def distance(job: Job, method: str, strength: float | None, start: torch.Tensor) -> float:
    model, history = tuned(job, method, strength)
    assert len(history) == 4
    moved = float((weights(model) - start).norm())
    model.unload()
    return moved


def test_base_is_the_model_itself(job: Job) -> None:
    assert tuned(job, "base") == (job.base, [])


def test_lora_after_general_starts_where_the_general_phase_ended(job: Job) -> None:
    model, _ = tuned(job, "after_general")
    start = weights(model)
    assert float(start.norm()) > 0
    model.unload()
    job.config.training.tune["learning_rate"] = 0.0
    model, _ = tuned(job, "lora_after_general")
    assert torch.equal(weights(model), start)


def test_rslora_scales_by_the_root_of_the_rank(job: Job) -> None:
    model, _ = tuned(job, "rslora")
    assert {m.scale for m in adapted_matrices(model)} == {8 / 4**0.5}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hlora", "uniform"])
def test_a_strong_penalty_holds_the_adapter_to_the_general_one(job: Job, method: str) -> None:
    model, _ = tuned(job, "after_general")
    start = weights(model)
    model.unload()
    free = distance(job, "lora_after_general", None, start)
    assert distance(job, method, 0.0, start) == pytest.approx(free)
    assert distance(job, method, 300.0, start) < 0.9 * free


def test_ewc_holds_the_adapter_to_the_base(job: Job) -> None:
    nothing = torch.zeros(1)
    free = distance(job, "lora", None, nothing)
    assert distance(job, "ewc", 0.0, nothing) == pytest.approx(free)
    assert distance(job, "ewc", 1e6, nothing) < 0.9 * free


def test_uniform_importance_is_the_mean_everywhere_and_costs_the_squared_movement_to_undo(job: Job) -> None:
    recorded = shared.importance(job)
    mean = float(torch.cat([matrix.omega.flatten() for matrix in recorded.matrices.values()]).mean())
    uniform = uniform_importance(recorded)
    for name, matrix in uniform.matrices.items():
        expected = torch.full((matrix.B.shape[0], matrix.A.shape[1]), mean)
        torch.testing.assert_close(matrix.omega.dense(), expected)
        movement = matrix.scale * matrix.B @ matrix.A
        assert matrix.undo_cost == pytest.approx(mean * float(movement.square().sum()), rel=1e-5), name


@pytest.mark.slow
def test_at_the_base_hlora_and_plain_l2_start_from_a_fresh_adapter_and_are_held_to_it(job: Job) -> None:
    job.config.penalty.anchor = "base"
    for method in ("hlora", "uniform"):
        start = torch.zeros_like(weights(attach_lora(job.base, job.config.lora, 0)))
        free, held = (distance(job, method, phi, start) for phi in (0.0, 1e6))
        assert held < 0.2 * free


def test_squared_gradients_are_taken_once_a_seed_without_a_general_phase(job: Job) -> None:
    job.config.penalty.anchor = "base"
    job.config.importance = ImportanceConfig(method="squared_gradients", sequences=4, sequence_length=16)
    first, again = shared.importance(job), shared.importance(job)
    assert not (job.output / "general").exists()
    assert len([path for path in (job.output / "squares").iterdir() if path.is_dir()]) == 1
    assert first.without_move and again.provenance["examples"] == 4
    for name, matrix in first.matrices.items():
        assert torch.equal(again.matrices[name].omega.row, matrix.omega.row)


@pytest.mark.slow
def test_a_kept_general_phase_consolidates_as_a_fresh_one_at_any_xi(job: Job) -> None:
    for xi in (1e-3, 1e-6):
        job.config.importance.xi = xi
        kept = shared.importance(job)
        _, fresh, _ = record_phase(job)
        job.base = load_base(job.config.model)[0]
        for name, matrix in fresh.matrices.items():
            assert torch.equal(kept.matrices[name].omega, matrix.omega)
            assert torch.equal(kept.matrices[name].B, matrix.B)
    assert len([path for path in (job.output / "general").iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize("damaged", ["adapter.json", "adapter.safetensors", "float32.safetensors"])
def test_a_damaged_general_phase_is_recorded_again(job: Job, damaged: str) -> None:
    directory = shared.general_phase(job)
    first = (directory / damaged).read_bytes()
    (directory / damaged).write_bytes(first[:40])
    assert shared.general_phase(job) == directory
    assert (directory / damaged).read_bytes() == first
    (directory / damaged).unlink()
    shared.general_phase(job)
    assert (directory / damaged).read_bytes() == first


def test_one_general_phase_records_every_encoding_that_the_arms_ask_for(job: Job) -> None:
    factored = ImportanceConfig(method="path_integral", encoding="factored")
    job.recorded = (job.config.importance, factored)
    directory = shared.general_phase(job)
    assert {path.stem for path in directory.glob("*.safetensors")} == {"adapter", "factored", "float32"}
    job.config.importance = factored
    assert shared.general_phase(job) == directory
    assert shared.importance(job).encoding == "factored"
