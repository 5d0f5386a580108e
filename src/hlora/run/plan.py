"""The phases of a run in order, and how long those that are left will take: for the progress line."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from hlora.data.rendering import render
from hlora.methods import BEFORE
from hlora.run.chain import EARLIER
from hlora.run.job import Job
from hlora.system import progress
from hlora.training.train import total_steps

_SAMPLE = 64  # rows: a few milliseconds


@dataclass
class Plan:
    """The phases of a run, by the names that results.json times them by."""

    phases: list[str]
    seconds: Mapping[str, float]
    """Of finished phases; the run adds to it."""
    steps: dict[str, int] = field(default_factory=dict)
    """Of the training phases that are known."""
    tokens: dict[str, float] = field(default_factory=dict)
    """Of a step of each training phase, its padding too; empty where they are not known."""

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Name the phase in the progress lines of the block."""
        if phase not in self.phases:
            yield
            return
        started = time.monotonic()
        name = f"phase {self.phases.index(phase) + 1} of {len(self.phases)}, {phase}"
        with progress.phase(name, lambda left, parts: self.left(phase, time.monotonic() - started, left, parts)):
            yield

    def left(self, phase: str, spent: float, here: float | None, parts: int) -> float | None:
        """Seconds that the run will still take, or None while a later phase cannot be estimated.

        An evaluation takes as long as the latest one. A training takes its steps times the latest time of a step, by
        the tokens of a step where both are known.

        Args:
            phase: The present phase.
            spent: Seconds since it began.
            here: Seconds that the present work will still take: the whole phase, if it is a training.
            parts: Steps or batches of the present work, without those that an interrupted run had done.
        """
        seconds = dict(self.seconds)
        if _is_evaluation(phase):
            known = self._expected(phase, seconds)
            now = None if known is None else max(known - spent, here or 0.0)
        else:
            now = here
            if here is not None:
                self.steps[phase], seconds[phase] = parts, spent + here
        later = [self._expected(each, seconds) for each in self.phases[self.phases.index(phase) + 1 :]]
        known_later = [each for each in later if each is not None]
        return None if now is None or len(known_later) < len(later) else now + sum(known_later)

    def _expected(self, phase: str, seconds: Mapping[str, float]) -> float | None:
        if _is_evaluation(phase):
            evaluations = [value for each, value in seconds.items() if _is_evaluation(each)]
            return evaluations[-1] if evaluations else None
        measured = [each for each, steps in self.steps.items() if each in seconds and steps]
        if not measured or phase not in self.steps:
            return None
        latest = measured[-1]
        longer = self.tokens[phase] / self.tokens[latest] if {phase, latest} <= self.tokens.keys() else 1.0
        return seconds[latest] / self.steps[latest] * self.steps[phase] * longer


def plan_of(job: Job, results: Mapping[str, Any], *, recorded: bool) -> Plan:
    """The phases of `hlora run` for a job.

    Args:
        job: The run.
        results: Its results so far, with the seconds and losses of finished phases.
        recorded: Whether the importance exists already.
    """
    config = job.config
    steps = {phase: int(losses[-1]["step"]) for phase, losses in results["history"].items() if losses}
    tune = total_steps(job.output, config.training.tune_arguments(), rows=len(job.domain.train))
    steps |= dict.fromkeys(("tune", *config.baselines), tune)
    start = BEFORE if config.after is not None else None if config.in_one_pass else "after_general"
    phases = [
        "evaluate base",
        *([] if recorded else ["record"]),
        *([] if start is None else [f"evaluate {start}"]),
        *("tune", "evaluate hlora"),
        *([EARLIER] if config.after is not None else []),
        *(phase for arm in config.baselines for phase in (arm, f"evaluate {arm}")),
    ]
    return Plan(phases, results["seconds"], steps, _tokens_of_steps(job))


def _tokens_of_steps(job: Job) -> dict[str, float]:
    """By phase, from a sample of the domain's rows; the general phase trains on rows of full length."""
    general, domain = job.config.training.record_arguments(), job.config.training.tune_arguments()
    if job.config.in_one_pass or not general.get("packing"):
        return {}

    def rows(arguments: dict[str, Any]) -> int:
        return int(arguments.get("per_device_train_batch_size", 8) * arguments.get("gradient_accumulation_steps", 1))

    usual = SFTConfig.max_length or 1024
    full, longest = general.get("max_length") or usual, domain.get("max_length") or usual
    lengths = [len(render(job.tokenizer, row).ids) for row in job.domain.train[: 4 * rows(domain)][:_SAMPLE]]
    batches = [lengths[start : start + rows(domain)] for start in range(0, len(lengths), rows(domain))]
    padded = sum(len(batch) * max(batch) for batch in batches) / len(lengths)
    tokens = rows(domain) * (longest if domain.get("packing") else min(padded, longest))
    return {"record": rows(general) * full} | dict.fromkeys(("tune", *job.config.baselines), tokens)


def _is_evaluation(phase: str) -> bool:
    return phase.startswith("evaluate ")
