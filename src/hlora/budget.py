"""A forgetting budget in place of φ: the domain phase may cost so many nats a token of general text, and no more.

    minimise L_task(θ)  subject to  R(θ) ≤ b,        R: rise of the general loss against the base model, nats/token

Three parts, each simple:

1. A probe measures R every few steps, on held-out general text or as KL(base ‖ model) on the model's own samples.
2. log φ is the dual variable of the constraint: it rises while R is above what is allowed and falls while it is below.
   That is dual ascent (Bertsekas 1982, *Constrained Optimization and Lagrange Multiplier Methods*), on log φ as in GECO
   (Rezende & Viola 2018, *Taming VAEs*), with a proportional term against its overshoot (Stooke, Achiam & Abbeel 2020,
   *Responsive Safety in Reinforcement Learning by PID Lagrangian Methods*).
3. After the last step the learning rate is 0 and φ has no say. So the adapter is landed: moved on the line through its
   anchor until a larger probe says that the budget is used and holds. The steering has aimed above it (_ABOVE).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hlora.distributed import first_does, is_sharded, reshard
from hlora.dtensor import laid_out_like, whole
from hlora.errors import ConfigError, DataError
from hlora.evaluation import _BLOCK, _first_tokens
from hlora.penalty import ImportancePenalty

logger = logging.getLogger("hlora")

# Cut off mid-sentence, SmolLM2-135M is lost (up to 16 nats a token) until it has seen some text, and any tuning helps
# there: of 8 windows of 512 tokens the rise was 0.011 ± 0.0041, and 0.017 ± 0.0026 without their first quarters.
_UNSCORED = 4  # a window's part that is not scored is one in this many
_TOKENS_AT_ONCE = 1024  # of one forward pass: their logits take 200 MB in float32 at a vocabulary of 49,152

# The steering. SmolLM2-135M on QASC (benchmarks/budget_control.py), 50 steps at a constant φ of 30, 300 and 3000: the
# rise was 0.057, 0.051 and 0.028 nats at step 10, 0.072, 0.043 and 0.014 at 20, and 0.047, 0.019 and 0.010 at the end.
# So more than the budget is right while the learning rate is high, and a factor of 10 in φ is one of 2 to 2.5 in R.
_EXCESS = 3.0  # budgets allowed beyond the first at the start; they shrink with the square of what is left to do
_INTEGRAL = 1.2  # of log φ for a rise that is off by a factor of e, at each tenth of the run
_PROPORTIONAL = 1.2  # of log φ for a rise that has changed by a factor of e
_LARGEST_STEP = 2.5  # of log φ
_SPAN = 1e4  # φ stays within this factor of its start
_EARLY = (2, 4, 6, 8)  # steps with a probe, since the rise grows fastest there: from 0.005 to 0.036 nats in 4 steps
_WARMING = 0.2  # share of the run in which φ does not fall: the rise starts at 0 and says nothing of φ yet
_ABOVE = 1.6  # what is aimed at, in budgets, where the adapter is landed afterwards
_LANDED = 0.93  # share of the budget from which on a landing is good enough
_LANDINGS = 10  # probes of a landing, at most; two or three do, where the rise is nearly a parabola in α
_FURTHEST = 1.5  # α, where a landing moves the adapter away from its anchor
_HELD_BACK = 5.0  # φ·L_reg in rises from which on that pays
_PRECISE = 0.1  # of the budget: the standard error that a landing reads text for


@dataclass(frozen=True)
class Rise:
    """How much general ability a model has lost against its base, in nats a token."""

    nats: float
    stderr: float
    """Of the mean, from blocks of 64 paired differences on the same tokens."""
    text: str
    """The text that it was measured on: of several the one that lost most."""
    tokens: int


class TextProbe:
    """Rise of the loss on texts, by the same tokens with the adapter on and off; of several, the worst text's.

    texts: name → text; other text than what the result is evaluated on. most_tokens: how much of each text's start is
    used, or all there is, in windows of `window` tokens. The first quarter of a window is context alone and scored in
    the window before, as text_likelihood does with a stride of three quarters. tokens: how much a probe on the way
    reads, each other windows, in turn: their noise is then not the same in all of them.
    The base's losses are measured once, when first needed.

    Raises DataError for no text, or one of fewer than 2 tokens.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Mapping[str, str],
        tokens: int = 2048,
        most_tokens: int = 65536,
        window: int = 512,
    ) -> None:
        if not texts:
            raise DataError("budget: no probe text. Name one, or let the model's own samples be the probe.")
        self.model, self.tokens, self.most_tokens = model, tokens, max(tokens, most_tokens)
        self._rows: dict[str, Tensor] = {}  # (windows, window)
        self._base: dict[str, Tensor] = {}  # (windows, window − 1), NaN where not measured yet
        for name, text in texts.items():
            ids = _first_tokens(tokenizer, text, self.most_tokens)
            if len(ids) < 2:
                raise DataError(f"budget: probe text {name!r} has {len(ids)} tokens, too few to score; give at least 2")
            if len(ids) < window:
                self._rows[name], scored = ids[None], len(ids) - 1
            else:
                scored = max(1, window - window // _UNSCORED)
                self._rows[name] = ids.unfold(0, window, scored)
            self._base[name] = torch.full((len(self._rows[name]), scored), math.nan, dtype=torch.float64)

    def measure(self, tokens: int, turn: int = 0) -> Rise:
        """The rise on `tokens` tokens of each text, those of the given turn. Reads the adapter as it is now."""
        rises = []
        with _undisturbed(self.model):
            for name, rows in self._rows.items():
                base = self._base[name]
                chosen = _part(tokens, turn, *base.shape)
                new = chosen[base[chosen].isnan().any(1)]
                if len(new):
                    with self.model.disable_adapter():
                        base[new] = _losses(self.model, rows[new], base.shape[1])
                rises.append(_rise((_losses(self.model, rows[chosen], base.shape[1]) - base[chosen]).flatten(), name))
        return max(rises, key=lambda rise: rise.nats)


class SampleProbe:
    """KL(base ‖ model) a token on the model's own samples, over the whole vocabulary at each position.

    On text that the base wrote this is the expectation of the rise of the loss, without the noise of which token came.
    It is never negative, and another quantity than the rise on a text that the base did not write.

    sequences: (n, length) token ids, such as `fisher.pack` of samples gives, of which `most_tokens` are used. A probe
    reads `tokens` of them in turn. The base's logits are computed anew: two forward passes each.

    Raises DataError for sequences of fewer than 2 tokens.
    """

    def __init__(self, model: PeftModel, sequences: Tensor, tokens: int = 2048, most_tokens: int = 16384) -> None:
        if sequences.dim() != 2 or not len(sequences) or sequences.shape[1] < 2:
            raise DataError(f"budget: expected samples of shape (n ≥ 1, length ≥ 2), got {tuple(sequences.shape)}")
        self.model = model
        self.tokens, self.most_tokens = tokens, max(tokens, most_tokens)
        self.sequences = sequences[: math.ceil(self.most_tokens / sequences.shape[1])]

    def measure(self, tokens: int, turn: int = 0) -> Rise:
        """The mean divergence on `tokens` tokens, those of the given turn. Reads the adapter as it is now."""
        rows = self.sequences[_part(tokens, turn, *self.sequences.shape)]
        found = []
        with _undisturbed(self.model):
            for batch in _batches(rows):
                ids = batch.to(self.model.device)
                new = self.model(input_ids=ids, use_cache=False).logits
                with self.model.disable_adapter():
                    old = self.model(input_ids=ids, use_cache=False).logits
                for mine, base in zip(new, old, strict=True):  # one row in float32 at a time
                    log_p, log_q = (log_softmax(row[:-1].float(), dim=-1) for row in (base, mine))
                    found.append((log_p.exp() * (log_p - log_q)).sum(-1).cpu().double())
        return _rise(torch.cat(found), "own samples")


class ForgettingBudget:
    """Steers `penalty.phi` during training so that the rise on `probe` ends at `budget`, or stays below it.

    penalty: its phi is where φ starts; it stays within a factor of 10⁴ of that. budget: nats a token, see parse_budget.
    every: optimizer steps between probes, by default a tenth of the run and at least 2, and steps 2, 4, 6 and 8.
    landing: after the last step, bring the adapter to the budget (see `land`); without it the steering aims at the
    budget itself, and ends above it at times.

    history: one entry a probe (step, rise, stderr, text, phi, budget); the last one, of `finish`, also has alpha.
    seconds: spent on probes.

    Raises ConfigError when the penalty's phi is 0 or a number is out of range.
    """

    def __init__(
        self,
        penalty: ImportancePenalty,
        probe: TextProbe | SampleProbe,
        budget: float,
        every: int | None = None,
        landing: bool = True,
    ) -> None:
        if not 0 < budget < math.inf:
            raise ConfigError(f"budget: expected more than 0 nats a token, got {budget}")
        if not penalty.phi > 0:
            raise ConfigError(f"penalty.phi: a budget steers φ from where it starts, more than 0; got {penalty.phi}")
        if every is not None and every < 1:
            raise ConfigError(f"budget: expected at least 1 step between probes, got {every}")
        self.penalty, self.probe, self.budget, self.every, self.landing = penalty, probe, budget, every, landing
        self.steering = Steering(budget * (_ABOVE if landing else 1.0), math.log(penalty.phi))
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0

    def callback(self) -> TrainerCallback:
        """For Trainer and SFTTrainer, beside the penalty's own callback."""
        return BudgetCallback(self)

    def begin(self) -> None:
        """Before the first step: measure R₀, the rise at the anchor. It is 0, unmeasured, where the anchor is W₀."""
        if all(anchor is None for anchor in self.penalty._anchor.values()):
            return
        rise, _ = self._precisely()
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
        """After optimizer step number `step` of `steps`: probe if it is time, and set φ for the next steps.

        Returns the probe's entry in `history`, if any.
        """
        if not self._is_due(step, steps):
            return None
        rise = self._measure(self.probe.tokens, len(self.history))
        entry = self._note(step, rise)
        self.penalty.phi = self.steering.next_phi(rise, step / steps)
        return entry

    def finish(self, step: int) -> dict[str, Any]:
        """After the last step: the rise by the larger probe and, with `landing`, the adapter brought to the budget.

        Returns the last entry of `history`.
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
        """Move the adapter on the line through its anchor until a precise probe is on the budget; (rise, α).

        α = 1 is where it was, α = 0 the anchor. From the base θ = W₀ + α·sBA, by scaling B. From a general adapter A
        and B are interpolated, a curve in θ. A few probes of one text; the largest α that kept the budget is taken.

        Above the budget α < 1. Below it α goes up to 1.5, where that pays: where training has balanced the task's
        gradient and the penalty's, dL_task/dα = −2φ·L_reg, against dR/dα ≈ 2R; so if φ·L_reg is several times R.
        """
        ends = [(whole(m.A.detach()).clone(), whole(m.B.detach()).clone()) for m in self.penalty.matrices]
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
            bisect = attempt % 2 == 1 and attempt > 1  # where the rise is no parabola
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
        """What a resumed run needs, as plain values. The base's losses are measured again: they come out the same."""
        return {
            "budget": self.budget,
            "phi": self.penalty.phi,
            "steering": asdict(self.steering),
            "history": self.history,
            "seconds": self.seconds,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`. Raises ConfigError when it is of another budget."""
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
        rise = Rise(**first_does(lambda: asdict(self.probe.measure(tokens, turn)), sharded))  # or φ would differ
        reshard(self.probe.model)
        self.seconds += time.perf_counter() - started
        return rise

    def _precisely(self) -> tuple[Rise, int]:
        """The rise on as many tokens as bring its standard error to a tenth of the budget, or all; and how many."""
        tokens = self.probe.tokens
        while True:
            rise = self._measure(tokens)
            excess = (rise.stderr / (_PRECISE * self.budget)) ** 2
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
                matrix.B.copy_(laid_out_like(matrix.B, alpha * B))
            else:
                matrix.A.copy_(laid_out_like(matrix.A, torch.lerp(anchor[0].to(A), A, alpha)))
                matrix.B.copy_(laid_out_like(matrix.B, torch.lerp(anchor[1].to(B), B, alpha)))


@dataclass
class Steering:
    """φ from the rise that a probe measured: plain numbers in, plain numbers out.

        log φ += K_i·e + K_p·Δe,      e = log((R − R₀) / allowed),      allowed = (target − R₀)·(1 + excess·(1 − t)²)

    with t the share of the run that is done and Δe the change of e since the probe before. A rise below its standard
    error is taken for that, so that noise has no logarithm. log φ is its own integral and is bounded, so it cannot wind
    up.
    """

    target: float
    """Nats a token that are aimed at."""
    log_phi: float
    start: float | None = None
    """log φ at the start, the middle of its bounds."""
    at_anchor: float = 0.0
    """R₀, nats a token."""
    error: float | None = None
    """e at the probe before."""
    progress: float = 0.0
    """t at the probe before."""

    def __post_init__(self) -> None:
        if self.start is None:
            self.start = self.log_phi

    def next_phi(self, rise: Rise, progress: float) -> float:
        """φ for the steps to come. progress: share of the steps done, 0 to 1."""
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


class BudgetCallback(TrainerCallback, ExportableState):
    """A ForgettingBudget inside Trainer. Made by `budget.callback()`.

    The log entry that follows a probe has probe_step, probe_rise, probe_stderr and budget. The end is measured, and the
    adapter landed, when training ends: checkpoints hold the adapter before that.

    It is saved in a checkpoint's trainer_state.json, and read from there when training resumes.
    `restore_callback_states_from_checkpoint` must stay off (Trainer's default): it would replace the callback.
    """

    def __init__(self, budget: ForgettingBudget | None = None) -> None:
        if budget is None:  # Trainer's from_state
            raise ConfigError(
                "training: a forgetting budget resumes by itself; leave restore_callback_states_from_checkpoint off"
            )
        self.budget = budget
        self._probed: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"kept": self.budget.state()}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        saved: Any = state.stateful_callbacks  # by class name; Transformers' annotation is that of its constructor
        kept = saved.get(type(self).__name__)
        if state.global_step > 0 and kept is not None:
            self.budget.load_state(kept["attributes"]["kept"])
        else:
            saved.setdefault(type(self).__name__, self.state())  # a checkpoint without a budget
            self.budget.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._probed = self.budget.after_step(state.global_step, state.max_steps) or self._probed

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or self._probed is None:
            return
        said, self._probed = _for_log(self._probed), None
        logs.update(said)
        state.log_history[-1].update(said)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        entry = self.budget.finish(state.global_step)
        said = {"step": state.global_step, "phi": entry["phi"], "alpha": entry["alpha"], **_for_log(entry)}
        state.log_history.append(said)


def _for_log(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "probe_step": entry["step"],
        "probe_rise": entry["rise"],
        "probe_stderr": entry["stderr"],
        "budget": entry["budget"],
    }


def _between(low: float, at_low: float, high: float, at_high: float, wanted: float) -> float:
    """Where the rise is `wanted` if it is that of a parabola, flat at the anchor: linear in α². Off both ends."""
    share = (wanted - at_low) / (at_high - at_low) if at_high > at_low else 0.5
    alpha = math.sqrt(low**2 + share * (high**2 - low**2))
    margin = 0.02 * (high - low)
    return min(max(alpha, low + margin), high - margin)


def _rise(differences: Tensor, text: str) -> Rise:  # (tokens,) float64
    blocks = torch.stack([block.mean() for block in differences.split(_BLOCK)])
    if len(blocks) > 1:
        stderr = float(blocks.std()) / math.sqrt(len(blocks))
    else:
        stderr = float(differences.std()) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return Rise(float(differences.mean()), stderr, text, len(differences))


def _losses(model: Any, rows: Tensor, count: int) -> Tensor:  # (n, window) → (n, count), float64 on the CPU
    """−log p of the last `count` tokens of each row."""
    losses = []
    for batch in _batches(rows):
        ids = batch.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits
        for row, target in zip(logits, ids, strict=True):  # one row in float32 at a time
            losses.append(cross_entropy(row[-count - 1 : -1].float(), target[-count:], reduction="none").cpu().double())
    return torch.stack(losses)


def _batches(rows: Tensor) -> Iterator[Tensor]:
    yield from rows.split(max(1, _TOKENS_AT_ONCE // rows.shape[1]))


def _part(tokens: int, turn: int, rows: int, length: int) -> Tensor:  # row numbers
    """As many rows as hold `tokens` tokens, spread over all of the text; those of the next turn are beside them.

    Spread, so that no probe is of one chapter alone.
    """
    count = min(rows, math.ceil(tokens / length))
    return (torch.arange(count) * rows // count + turn) % rows


def _clip(number: float, limit: float) -> float:
    return max(-limit, min(limit, number))


@contextmanager
def _undisturbed(model: PeftModel) -> Iterator[None]:
    """Evaluation mode and no gradients; modes, what is trained, and random numbers as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with torch.random.fork_rng(), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, requires_grad in trained.items():  # leaving disable_adapter makes a frozen adapter trained
            parameter.requires_grad_(requires_grad)
