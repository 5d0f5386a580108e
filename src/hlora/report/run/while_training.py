"""Learning and forgetting while a model trains, over the same optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from hlora.report.format import number
from hlora.report.style import BLUE, STYLE, VERMILION, nothing


def evaluations(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Trainer's log entries that hold a finite validation loss."""
    return [entry for entry in entries if math.isfinite(number(entry.get("eval_loss")))]


def learning_and_forgetting(entries: Sequence[Mapping[str, Any]]) -> Figure:
    """Validation loss on the left axis, rise of the general loss against the base on the right; both nats/token.

    entries: Trainer's log entries of the domain phase, with eval_loss, and probe_rise and probe_stderr where forgetting
    was measured. A ring marks the lowest validation loss.
    """
    found = evaluations(entries)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8, 2.8), layout="constrained", facecolor="white")
        if not found:
            return nothing(figure, "no evaluation logged")
        learned = figure.subplots()
        steps = [number(entry.get("step")) for entry in found]
        losses = [number(entry["eval_loss"]) for entry in found]
        learned.plot(steps, losses, "o-", color=BLUE, markersize=4)
        best = losses.index(min(losses))
        learned.plot(steps[best], losses[best], "o", color=BLUE, markersize=11, fillstyle="none")
        learned.set(xlabel="optimizer step")
        learned.set_ylabel("validation loss, nats/token\n↓ learned", color=BLUE)
        learned.grid(alpha=0.25)
        rises = [number(entry.get("probe_rise")) for entry in found]
        if any(map(math.isfinite, rises)):
            forgotten = learned.twinx()
            errors = [number(entry.get("probe_stderr")) for entry in found]
            forgotten.errorbar(steps, rises, errors, fmt="s--", color=VERMILION, markersize=4)
            forgotten.axhline(0, color=VERMILION, linewidth=0.8, linestyle=":")
            forgotten.set_ylabel("rise of the general loss, nats/token\n↑ forgotten", color=VERMILION)
            forgotten.spines["right"].set_visible(True)
        return figure
