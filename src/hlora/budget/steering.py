"""Sets φ from what the probes measured, by dual ascent on log φ."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hlora.budget.probes import Rise

# SmolLM2-135M on QASC (benchmarks/budget_control.py), 50 steps at a constant φ of 30, 300 and 3000: the
# rise was 0.057, 0.051 and 0.028 nats at step 10, 0.072, 0.043 and 0.014 at 20, and 0.047, 0.019 and 0.010 at the end.
# So the rise may exceed the budget while the learning rate is high, and a factor of 10 in φ is one of 2 to 2.5 in R.
_EXCESS = 3.0  # budgets allowed on top of the first at the start; shrinks with the square of the steps left
_INTEGRAL = 1.2  # change of log φ for a rise that is off by a factor of e, for each tenth of the run
_PROPORTIONAL = 1.2  # change of log φ for a rise that has changed by a factor of e
_LARGEST_STEP = 2.5  # largest change of log φ at one probe
_SPAN = 1e4  # φ stays within this factor of its start
_WARMING = 0.2  # share of the run in which φ does not fall: the rise starts at 0, whatever φ is


@dataclass
class Steering:
    """Computes φ from the rise that a probe measured: plain numbers in, plain numbers out.

        log φ += K_i·e + K_p·Δe,      e = log((R − R₀) / allowed),      allowed = (target − R₀)·(1 + excess·(1 − t)²)

    t is the share of the run that is done, and Δe the change of e since the previous probe. A rise below its standard
    error is replaced by the standard error, so that noise does not drive the logarithm. log φ is bounded and is its own
    integral, so there is no wind-up.
    """

    target: float
    """The rise to aim at, in nats a token."""
    log_phi: float
    start: float | None = None
    """log φ at the start, the middle of its bounds."""
    at_anchor: float = 0.0
    """R₀, nats a token."""
    error: float | None = None
    """e at the previous probe."""
    progress: float = 0.0
    """t at the previous probe."""

    def __post_init__(self) -> None:
        if self.start is None:
            self.start = self.log_phi

    def next_phi(self, rise: Rise, progress: float) -> float:
        """φ for the next steps.

        Args:
            rise: What the probe measured.
            progress: Share of the steps done, 0 to 1.
        """
        assert self.start is not None
        seen = max(rise.nats - self.at_anchor, rise.stderr)
        if math.isfinite(seen) and seen > 0:
            allowed = max(self.target - self.at_anchor, 0.05 * self.target) * (1 + _EXCESS * (1 - progress) ** 2)
            error = math.log(seen / allowed)
            moved = 0.0 if self.error is None else error - self.error
            share = min(1.0, 10 * (progress - self.progress))
            change = _clip(share * _INTEGRAL * error + _PROPORTIONAL * moved, _LARGEST_STEP)
            if progress < _WARMING:
                change = max(change, 0.0)
            self.error, self.progress = error, progress
            self.log_phi = self.start + _clip(self.log_phi + change - self.start, math.log(_SPAN))
        return math.exp(self.log_phi)


def _clip(number: float, limit: float) -> float:
    return max(-limit, min(limit, number))
