"""A forgetting budget in place of φ: the domain phase may raise the general loss by so many nats a token, no more.

    minimise L_task(θ)  subject to  R(θ) ≤ b,        R: rise of the general loss against the base model, nats/token

Three parts, each simple:

1. A probe (probes.py) measures R every few steps, on held-out general text or as KL(base ‖ model) on the model's own
   samples.
2. log φ is the dual variable of the constraint (steering.py): it rises while R is above what is allowed and falls while
   it is below. That is dual ascent (Bertsekas 1982, *Constrained Optimization and Lagrange Multiplier Methods*), on log
   φ as in GECO (Rezende & Viola 2018, *Taming VAEs*), with a proportional term against its overshoot (Stooke, Achiam &
   Abbeel 2020, *Responsive Safety in Reinforcement Learning by PID Lagrangian Methods*).
3. After the last step the learning rate is 0 and φ no longer has an effect. So the adapter is landed: moved on the line
   through its anchor until a larger probe shows a rise just below the budget. The steering aims above it (_ABOVE).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hlora.budget.callback import BudgetCallback
from hlora.budget.probes import Rise, SampleProbe, TextProbe
from hlora.budget.steering import Steering
from hlora.importance.penalty import ImportancePenalty
from hlora.model.initialisation import check_base_without_adapter
from hlora.parallel.dtensor import distribute_like, full_tensor
from hlora.parallel.fsdp import is_sharded, reshard
from hlora.parallel.group import on_main
from hlora.system.errors import ConfigError

logger = logging.getLogger("hlora")

_EARLY = (2, 4, 6, 8)  # steps with a probe, since the rise grows fastest there: from 0.005 to 0.036 nats in 4 steps
_ABOVE = 1.6  # target of the steering, in budgets, if the adapter is landed afterwards
_LANDED = 0.93  # a landing ends at this share of the budget or above
_LANDINGS = 10  # maximum number of probes of a landing; two or three suffice if the rise is nearly a parabola in α
_FURTHEST = 1.5  # maximum α when a landing moves the adapter away from its anchor
_HELD_BACK = 5.0  # moving it away pays if φ·L_reg is at least this many times the rise
_PRECISE = 0.1  # standard error that a landing's probes must reach, as a share of the budget


class ForgettingBudget:
    """Steers `penalty.phi` during training so that the rise on `probe` ends at `budget`, or stays below it.

    Args:
        penalty: The penalty to steer. φ starts at its phi and stays within a factor of 10⁴ of that.
        probe: What measures the rise: TextProbe on held-out text, or SampleProbe on the model's own samples.
        budget: The rise allowed, in nats a token.
        every: Optimizer steps between probes. By default a tenth of the run and at least 2, and steps 2, 4, 6 and 8.
        landing: After the last step, bring the adapter to the budget (see `land`). Without a landing the steering aims
            at the budget itself, and sometimes ends above it.

    Attributes:
        history: One entry for each probe: step, rise, stderr, text, phi, budget. The last entry also has alpha.
        seconds: Time spent on probes.

    In several processes every one calls every method. The first measures, and all take its result; a sharded model is
    measured by all of them.

    Raises:
        ConfigError: The penalty's phi is 0, or a number is out of range.
        AdapterError: The model without its adapter is not the base model (PiSSA, OLoRA).
    """

    def __init__(
        self,
        penalty: ImportancePenalty,
        probe: TextProbe | SampleProbe,
        budget: float,
        *,
        every: int | None = None,
        landing: bool = True,
    ) -> None:
        if not 0 < budget < math.inf:
            raise ConfigError(f"budget: expected more than 0 nats a token, got {budget}")
        if not penalty.phi > 0:
            raise ConfigError(f"penalty.phi: a budget steers φ from where it starts, more than 0; got {penalty.phi}")
        if every is not None and every < 1:
            raise ConfigError(f"budget: expected at least 1 step between probes, got {every}")
        check_base_without_adapter(penalty.matrices)
        self.penalty, self.probe, self.budget, self.every, self.landing = penalty, probe, budget, every, landing
        self.steering = Steering(budget * (_ABOVE if landing else 1.0), math.log(penalty.phi))
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0

    def callback(self) -> TrainerCallback:
        """A callback for Trainer and SFTTrainer; add it to the penalty's own callback, not in its place."""
        return BudgetCallback(self)

    def begin(self) -> None:
        """Measure R₀, the rise at the anchor; call before the first step. R₀ is 0 if the anchor is the base model."""
        if all(anchor is None for anchor in self.penalty._anchor.values()):
            return
        rise, _ = self._precisely(room=True)
        self.steering.at_anchor = rise.nats
        self._note(0, rise)
        if rise.nats > self.budget:
            logger.warning(
                "budget: the general adapter itself is %.4f nats a token above the base, more than the budget of %.4f; "
                "φ will hold it there. Anchor at the base, or give a larger budget.",
                rise.nats,
                self.budget,
            )

    def after_step(self, step: int, steps: int) -> dict[str, Any] | None:
        """Probe if a probe is due, and set φ for the next steps; call after each optimizer step.

        Args:
            step: Number of the step, from 1.
            steps: Steps of the whole training.

        Returns:
            The probe's entry in `history`; None if no probe was due.
        """
        if not self._is_due(step, steps):
            return None
        rise = self._measure(self.probe.tokens, len(self.history))
        entry = self._note(step, rise)
        self.penalty.phi = self.steering.next_phi(rise, step / steps)
        return entry

    def finish(self, step: int) -> dict[str, Any]:
        """Measure the rise by the larger probe, with `landing` after bringing the adapter to the budget.

        Args:
            step: Number of the last step.

        Returns:
            The last entry of `history`.
        """
        rise, alpha = self.land() if self.landing else (self._precisely()[0], 1.0)
        entry = self._note(step, rise)
        entry["alpha"] = alpha
        logger.info(
            "budget: the general loss rose by %.4f ± %.4f nats a token on %s (%d tokens), of %.4f allowed%s",
            rise.nats,
            rise.stderr,
            rise.text,
            rise.tokens,
            self.budget,
            f"; the adapter was moved to {alpha:.3f} of its way from the anchor" if alpha != 1 else "",
        )
        return entry

    def land(self) -> tuple[Rise, float]:
        """Move the adapter on the line through its anchor until a precise probe shows a rise just below the budget.

        α = 0 is the anchor, and α = 1 is where training ended. With the anchor "base", θ = W₀ + α·sBA: B is scaled.
        With the anchor "general", A and B are interpolated, a curve in θ. A few probes read the same text, and the
        largest α that kept the budget is taken.

        Above the budget α < 1. Below the budget α goes up to 1.5, if φ·L_reg is several times the rise R. The reason:
        training has balanced the gradients of task and penalty, so dL_task/dα = −2φ·L_reg, against dR/dα ≈ 2R.

        Returns:
            The rise at the end, and α.
        """
        ends = [(full_tensor(m.A.detach()).clone(), full_tensor(m.B.detach()).clone()) for m in self.penalty.matrices]
        at_end, tokens = self._precisely()
        within, low, high, outside = Rise(0.0, 0.0, at_end.text, at_end.tokens), 0.0, 1.0, at_end.nats
        if at_end.nats <= self.budget:
            pays = self.penalty.phi * float(self.penalty.regularisation_loss()) > _HELD_BACK * at_end.nats
            if not pays or at_end.nats <= 0:
                return at_end, 1.0
            within, low, high, outside = at_end, 1.0, _FURTHEST, at_end.nats * _FURTHEST**2
        elif any(anchor is not None for anchor in self.penalty._anchor.values()):
            self._place(0.0, ends)
            within = self._measure(tokens)
            if within.nats >= self.budget:
                self._place(1.0, ends)
                logger.warning(
                    "budget: %.4f nats a token at the general adapter, more than the budget of %.4f: "
                    "no way back to it. The adapter stays where training left it.",
                    within.nats,
                    self.budget,
                )
                return at_end, 1.0
        for attempt in range(_LANDINGS):
            if within.nats >= _LANDED * self.budget or high - low < 0.005:
                break
            bisect = attempt % 2 == 1 and attempt > 1  # if the rise is not a parabola
            wanted = (1 + _LANDED) / 2 * self.budget
            alpha = (low + high) / 2 if bisect else _between(low, within.nats, high, outside, wanted)
            self._place(alpha, ends)
            rise = self._measure(tokens)
            if rise.nats <= self.budget:
                within, low = rise, alpha
            else:
                outside, high = rise.nats, alpha
        self._place(low, ends)
        return within, low

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values. The base's losses are measured again, the same."""
        return {
            "budget": self.budget,
            "phi": self.penalty.phi,
            "steering": asdict(self.steering),
            "history": self.history,
            "seconds": self.seconds,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Resume from `state()`.

        Raises:
            ConfigError: The state was made with another budget.
        """
        if state["budget"] != self.budget:
            raise ConfigError(
                f"budget: the checkpoint was made with a budget of {state['budget']:.6g} nats a token and this run has "
                f"{self.budget:.6g}. Resume with the same budget, or start anew."
            )
        self.penalty.phi = state["phi"]
        self.steering = Steering(**state["steering"])
        self.history = [dict(entry) for entry in state["history"]]
        self.seconds = state["seconds"]

    def _is_due(self, step: int, steps: int) -> bool:
        if step >= steps:
            return False  # `finish` measures there
        every = self.every or max(2, steps // 10)
        return step % every == 0 or (self.every is None and step in _EARLY)

    def _measure(self, tokens: int, turn: int = 0) -> Rise:
        started = time.perf_counter()
        sharded = is_sharded(self.probe.model)
        rise = Rise(**on_main(lambda: asdict(self.probe.measure(tokens, turn)), sharded))  # one φ for all
        reshard(self.probe.model)
        self.seconds += time.perf_counter() - started
        return rise

    def _precisely(self, *, room: bool = False) -> tuple[Rise, int]:
        """The rise, with a standard error of a tenth of the budget or on all tokens; and how many tokens it took.

        room: below zero, the rise adds to the budget, and a tenth of both is precise enough. For R₀, where the general
        phase made the probe easier to predict.
        """
        tokens = self.probe.tokens
        while True:
            rise = self._measure(tokens)
            left = self.budget - min(rise.nats, 0.0) if room else self.budget
            excess = (rise.stderr / (_PRECISE * left)) ** 2
            if excess <= 1 or tokens >= self.probe.most_tokens:
                return rise, tokens
            tokens = min(math.ceil(tokens * max(excess, 1.5)), self.probe.most_tokens)

    def _note(self, step: int, rise: Rise) -> dict[str, Any]:
        measured = {"step": step, "rise": rise.nats, "stderr": rise.stderr, "text": rise.text}
        entry = {**measured, "phi": self.penalty.phi, "budget": self.budget}
        self.history.append(entry)
        return entry

    @torch.no_grad()
    def _place(self, alpha: float, ends: list[tuple[Tensor, Tensor]]) -> None:
        for matrix, (A, B) in zip(self.penalty.matrices, ends, strict=True):
            anchor = self.penalty._anchor[matrix.name]
            if anchor is None:
                matrix.B.copy_(distribute_like(matrix.B, alpha * B))
            else:
                matrix.A.copy_(distribute_like(matrix.A, torch.lerp(anchor[0].to(A), A, alpha)))
                matrix.B.copy_(distribute_like(matrix.B, torch.lerp(anchor[1].to(B), B, alpha)))


def _between(low: float, at_low: float, high: float, at_high: float, wanted: float) -> float:
    """α where the rise is `wanted`, if the rise is linear in α² (a parabola, flat at the anchor); never at an end."""
    share = (wanted - at_low) / (at_high - at_low) if at_high > at_low else 0.5
    alpha = math.sqrt(low**2 + share * (high**2 - low**2))
    margin = 0.02 * (high - low)
    return min(max(alpha, low + margin), high - margin)
