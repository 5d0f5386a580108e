"""The content of results.json: measures, provenance, a description of the importance."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hlora.config.run import RunConfig
from hlora.importance.artefact import Importance
from hlora.importance.layer_weights import layer_coefficients
from hlora.parallel.fsdp import device_for
from hlora.report.card import adapter_card, importance_card
from hlora.report.run.page import write_report
from hlora.run.drift import measure_with_drift
from hlora.run.job import Job
from hlora.system.errors import DataError
from hlora.system.files import write_json, write_text
from hlora.system.redaction import redacted


def measure(job: Job, model: Any, importance: Importance | None = None) -> dict[str, Any]:
    """Every measure of one model on the job's evaluation texts and test rows (see evaluation.evaluate).

    importance: where the general phase ended, for the drift from there. A run after another has no general phase.
    """
    start = importance if job.config.after is None else None
    return measure_with_drift(job, model, job.config.evaluation, start, base_changed=job.base_changed)


def describe(importance: Importance, config: RunConfig) -> dict[str, Any]:
    """The `importance` part of results.json: the importance's description and the coefficients c_l."""
    options = config.penalty
    weights = layer_coefficients(importance, options.layer_weights, options.group)
    return {**importance.describe(), "layer_weights": weights}


def finish(job: Job, results: dict[str, Any]) -> dict[str, Any]:
    """Write results.json, report.html, and the measurements into the cards of adapter and importance."""
    results["provenance"]["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    results = redacted(results)
    write_text(job.output / "adapter" / "README.md", adapter_card(results))
    if not job.config.is_given_importance and (job.output / "importance").is_dir():
        document = Importance.load(job.output / "importance").document()
        write_text(job.output / "importance" / "README.md", importance_card(document, results))
    results = write_json(job.output / "results.json", results, indent=1)
    write_report(results, job.output / "report.html")
    return results


def read_results(output: Path) -> dict[str, Any]:
    """Read results.json of a run. Raises DataError if it is missing or damaged."""
    try:
        found = redacted(json.loads((output / "results.json").read_text(encoding="utf-8")))
        if not isinstance(found, dict) or not isinstance(found.get("arms"), dict):
            raise ValueError("expected an object with arms")
        if not isinstance(found.get("config", {}), dict):
            raise ValueError("expected config to be an object")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{output}: no readable results.json ({error}). "
            f"{runs_inside(output) or 'Make it with `hlora run`, or anew with `hlora evaluate`.'}"
        ) from None


def runs_inside(output: Path) -> str:
    """A sentence that names the finished runs in a directory, as that of several domains has them; empty for none."""
    found = sorted(str(each.parent) for each in output.glob("*/results.json"))
    return f"Name one of the runs in it: {', '.join(found)}." if found else ""


def starting_results(job: Job, base: PreTrainedModel, command: str) -> dict[str, Any]:
    """The content of results.json before anything is measured.

    Args:
        job: The job.
        base: `job.base`.
        command: The command that repeats the run.
    """
    facts = {"general": job.general.facts, "domain": job.domain.facts}
    return {
        "arms": {},
        "seconds": {},
        "history": {},
        "importance": {},
        "provenance": {"seed": job.config.seed, **provenance(base, facts)},
        "config": job.config.for_a_file(),
        "command": command,
    }


def provenance(base: PreTrainedModel, data_facts: dict[str, Any]) -> dict[str, Any]:
    """Versions, hardware, model size and data, for a results file."""
    device = device_for(base)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    packages = ("hlora", "torch", "transformers", "peft", "trl", "datasets", "lm_eval")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "hardware": f"{hardware}, {os.cpu_count()} cores, {device.type}, {str(base.dtype).removeprefix('torch.')}",
        "parameters": base.num_parameters(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "data": data_facts,
    }


def _processor() -> str:
    """Name of the CPU; Linux keeps it in a file that `platform` does not read."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
