"""Time and memory of a run, from one step of each phase and one batch of each measure."""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hlora.data.packing import first_tokens
from hlora.data.rendering import render
from hlora.evaluation.answers import answer_limit, answer_nll, generate_answers, scoring_passes
from hlora.evaluation.likelihood import text_likelihood
from hlora.run.job import Job
from hlora.training.their_errors import their_errors
from hlora.training.trackers import add_callback_first
from hlora.training.train import build_trainer, sft_arguments

_ON_CPU = 256  # tokens of a measured step there: a second for 135 million parameters on one core
_NEW_TOKENS = 4  # that are generated to time generation; the time grows with their number

# What a measured step leaves out of a phase's arguments: it writes, reports and evaluates nothing.
_ONE_STEP: dict[str, Any] = {
    "max_steps": 2,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "constant",  # a warm-up's first rate is 0, so that nothing would move
    "lr_scheduler_kwargs": None,
    "warmup_steps": 0,
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "report_to": [],
    "dataloader_drop_last": False,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": None,
    "dataloader_persistent_workers": False,
}


@dataclass(frozen=True)
class PhaseCost:
    """What a phase takes."""

    name: str
    count: int
    """Steps; passes over the model's weights for squared gradients; models of an evaluation."""
    each: float
    """Seconds of one of them; NaN where the step does not fit into the accelerator's memory."""
    memory: int | None = None
    """Peak bytes: of the accelerator, or of this process where the model is on the CPU. None: not known."""
    whole_batch: bool = True
    """False: the step had fewer rows than the phase's, so that the phase takes more memory."""

    @property
    def seconds(self) -> float:
        return self.count * self.each


class _Stopwatch(TrainerCallback):
    """Seconds of the last step."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds = now() - self._started


def measured_phase(
    job: Job,
    model: PeftModel,
    name: str,
    *,
    rows: Dataset,
    total_rows: float,
    arguments: dict[str, Any],
    callbacks: Sequence[TrainerCallback],
) -> PhaseCost:
    """Train two steps on the longest rows, and scale the second one's time to the phase by padded tokens and steps.

    The first step warms up. On a CPU the step has fewer rows than the phase's. The adapter moves.

    Args:
        job: The opened job.
        model: The base model with its adapter, as the phase trains it.
        name: Of the phase.
        rows: A sample of the phase's rows, as `build_trainer` reads them.
        total_rows: How many rows the phase has.
        arguments: Those of trl.SFTConfig.
        callbacks: Recorder and penalty, as in the phase.
    """
    on_cpu = model.device.type == "cpu"
    args = sft_arguments(job.output, {"use_cpu": on_cpu, **arguments, "report_to": []}, job.config.seed)
    lengths = [min(len(ids), args.max_length or len(ids)) for ids in rows["input_ids"]]
    batch = args.per_device_train_batch_size
    longest = sorted(range(len(rows)), key=lambda i: -lengths[i])
    if args.packing and name != "record":  # TRL joins these rows; those of the general text are packed already
        length = args.max_length or max(lengths)
        total_rows = max(1, total_rows * sum(lengths) / len(rows) / length)
        chosen, scale = longest, min(batch, total_rows) * length / min(sum(lengths), batch * length)
    else:
        chosen = longest[: min(batch, max(1, _ON_CPU // lengths[longest[0]])) if on_cpu else batch]
        padded = sum(len(part) * max(part) for part in (lengths[i : i + batch] for i in range(0, len(rows), batch)))
        usual = min(batch, total_rows) * padded / len(rows)  # tokens of a batch, its padding too
        scale = usual / (len(chosen) * lengths[chosen[0]])
    per_epoch = math.ceil(math.ceil(total_rows / batch) / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    given = {key: value for key, value in arguments.items() if key != "warmup_ratio"} | _ONE_STEP
    watch = _Stopwatch()
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    with tempfile.TemporaryDirectory(prefix="hlora-check-") as scratch:
        output = Path(scratch) / "logs" / name
        few = rows.select(chosen)
        trainer = build_trainer(model, job.tokenizer, few, output=output, arguments=given, seed=job.config.seed)
        for callback in callbacks:
            add_callback_first(trainer, callback)
        trainer.add_callback(watch)
        try:
            with their_errors(model):
                trainer.train()
        except torch.OutOfMemoryError:
            return PhaseCost(name, steps, math.nan, peak_memory(model))
    each = watch.seconds * scale * args.gradient_accumulation_steps
    return PhaseCost(name, steps, each, peak_memory(model), len(chosen) >= min(batch, len(rows)))


@torch.no_grad()
def measured_evaluation(job: Job, model: PeftModel, models: int) -> PhaseCost:
    """Time one window of text, one batch of test rows and a few generated tokens, and scale each by its number."""
    settings, tokenizer, test = job.config.evaluation, job.tokenizer, job.domain.test
    model.eval()
    window, stride = settings.window, settings.scored_by_window
    texts = list(job.general.evaluation.values())
    tokens = [len(first_tokens(tokenizer, text, settings.max_tokens)[0]) for text in texts]
    windows = sum(1 + math.ceil(max(0, count - window) / stride) for count in tokens)
    one = settings.model_copy(update={"max_tokens": min(window, max(tokens))})
    started = now()
    text_likelihood(model, tokenizer, texts[tokens.index(max(tokens))], one)
    seconds = windows * (now() - started)

    rows = test[:: max(1, len(test) // settings.batch_size)][: settings.batch_size]
    scored = len(test) * scoring_passes(tokenizer, rows, accuracy=settings.accuracy) / len(rows)
    started = now()
    answer_nll(model, tokenizer, rows, settings.batch_size)
    seconds += (now() - started) * scored / len(rows)

    if settings.generate:
        asked = [render(tokenizer, row) for row in test[: settings.generate]]
        limit, batch = answer_limit(asked, settings), asked[: settings.batch_size]
        few = settings.model_copy(update={"max_new_tokens": min(limit, _NEW_TOKENS)})
        started = now()
        generate_answers(model, tokenizer, batch, few)
        seconds += (now() - started) * limit / min(limit, _NEW_TOKENS) * len(asked) / len(batch)
    return PhaseCost("evaluate", models, seconds, peak_memory(model))


def peak_memory(model: PeftModel) -> int | None:
    """Peak bytes of the accelerator since the phase began, or of this process since it began."""
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device)
    if model.device.type != "cpu" or sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def now() -> float:
    """The clock, read once the accelerator has finished its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
