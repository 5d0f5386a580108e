"""Runs one cell of a comparison: its importance, its method, and the measurements of the tuned model."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from hlora.comparison.shared import shared_importance
from hlora.config.comparison import CellConfig
from hlora.data.domain import DomainRows
from hlora.data.example import Example
from hlora.evaluation.evaluate import evaluate
from hlora.methods import METHODS
from hlora.run.drift import measure_with_drift
from hlora.run.job import Job
from hlora.run.results import describe

_LOSSES = ("step", "loss", "regularisation_loss", "weighted_regularisation_loss", "total_loss")
_BUDGET = ("phi", "probe_rise", "probe_stderr", "budget", "alpha")

HeldOut = tuple[dict[str, str], list[Example]]
"""Texts by name and domain rows, which are in no test set and no training."""


def run_cell(job: Job, strength: float | None, held_out: HeldOut | None) -> dict[str, Any]:
    """Tune and measure the model of one cell.

    Args:
        job: The cell's settings, model and data.
        strength: Of the method's penalty; None for the method's own.
        held_out: What to measure the validation on; None for no validation.

    Returns:
        What the cell's file holds besides its names.

    Raises:
        Busy: Another process is making the importance that the cell needs.
        CannotRun: The method cannot run on this model.
    """
    config = job.config
    assert isinstance(config, CellConfig)
    method = METHODS[config.method]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    importance, arguments = shared_importance(job), dict[str, Any]()
    described = None
    if importance is not None:
        arguments["importance"] = importance
        if method.needs == "importance":
            described = describe(importance, config)
        elif method.needs == "fisher":
            described = importance.describe()
    if method.strength is not None:
        arguments["strength"] = strength
    shared = time.perf_counter() - started
    started = time.perf_counter()
    model, history = method.function()(job, **arguments)
    train = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    started = time.perf_counter()
    start = importance if method.needs in ("importance", "general") and not method.reference else None
    test = measure_with_drift(job, model, config.evaluation, start, base_changed=method.alters_base)
    test.pop("samples")
    validation = None if held_out is None else _validation(job, model, held_out)
    if model is not job.base:
        model.unload()
    del model
    gc.collect()
    return {
        "status": "done",
        "test": test,
        "validation": validation,
        "history": [{key: entry[key] for key in (*_LOSSES, *_BUDGET) if key in entry} for entry in history],
        "importance": described,
        "seconds": {"importance": shared, "train": train, "evaluate": time.perf_counter() - started},
        "peak_memory_bytes": peak,
    }


def _validation(job: Job, model: Any, held_out: HeldOut) -> dict[str, Any]:
    texts, rows = held_out
    settings = job.config.evaluation.model_copy(update={"accuracy": False, "generate": 0})
    found = evaluate(model, job.tokenizer, texts, DomainRows([], rows, []), settings)
    return {"texts": found["texts"], "domain": found["domain"]}
