"""The phases of a run in order, and how long those that are left will take: for the progress line."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hlora.run.chain import BEFORE, EARLIER
from hlora.run.job import Job
from hlora.system import progress
from hlora.training.train import total_steps


@dataclass
class Plan:
    """The phases of a run, by the names that results.json times them by."""

    phases: list[str]
    seconds: Mapping[str, float]
    """Of finished phases; the run adds to it."""
    steps: dict[str, int] = field(default_factory=dict)
    """Of the training phases that are known."""

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

        An evaluation takes as long as the latest one. A training takes its steps times the latest time of a step. Steps
        of the general and of the domain phase differ in length, so this is rough until the domain phase has begun.

        Args:
            phase: The present phase.
            spent: Seconds since it began.
            here: Seconds that the present work will still take: the whole phase, if it is a training.
            parts: Steps or batches of the present work.
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
        speeds = [seconds[each] / steps for each, steps in self.steps.items() if each in seconds and steps]
        return speeds[-1] * self.steps[phase] if speeds and phase in self.steps else None


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
    return Plan(phases, results["seconds"], steps)


def _is_evaluation(phase: str) -> bool:
    return phase.startswith("evaluate ")
