"""The domain's accuracy, by lm-evaluation-harness."""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hlora.data.domain import DomainRows
from hlora.data.rendering import render_text
from hlora.data.tasks import write_harness_task
from hlora.evaluation.answers import mean_with_stderr, scoring_passes
from hlora.system.progress import line
from hlora.system.quiet import quiet, without_bars

_NO_LIMIT = 2**31  # tokens


def harness_accuracy(
    model: Any, tokenizer: PreTrainedTokenizerBase, domain: DomainRows, batch_size: int
) -> dict[str, Any]:
    """acc and acc_norm, shares of 1 with standard errors, by lm-evaluation-harness on the test rows.

    And answer_nll, which the harness scores on its way: that of the right choice, as in `answer_nll`.
    """
    scored, choices = 0, sum(len(example.choices) for example in domain.test)
    passes = scoring_passes(tokenizer, domain.test, accuracy=True)
    with _harness_unnoticed(), line("choice", choices) as shown, tempfile.TemporaryDirectory() as scratch:
        from lm_eval import evaluate  # simple_evaluate also runs git and `pip list`: 1.7 s of CPU for each model
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager, get_task_dict

        class AsTrained(HFLM):
            """Scores the tokens that are trained."""

            def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
                row = render_text(tokenizer, context, continuation)
                return row.prompt_ids, row.ids[row.start : row.end]

            def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
                found = super()._model_call(inps, *args, **kwargs)
                nonlocal scored
                scored = min(scored + len(inps), passes)
                shown.update(choices * scored // passes)
                return found

        join = domain.test[0].join
        task = write_harness_task(domain.facts["task"], domain.test_rows, Path(scratch), join)
        # float32, as bfloat16 rounds a log-likelihood of −80 nats to half a nat, so that choices tie. Rows beyond the
        # model's context were left out; the harness would cut others where the configuration names no context.
        exact: Any = {"softmax_dtype": "float32", "max_length": _NO_LIMIT}
        outcome = evaluate(
            lm=AsTrained(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **exact),
            task_dict=get_task_dict([task], TaskManager(include_path=scratch, include_defaults=False)),
            bootstrap_iters=0,
        )
    samples = sorted(outcome["samples"][task], key=lambda sample: sample["doc_id"])
    pairs = zip(samples, domain.test, strict=True)
    answers = [-float(sample["filtered_resps"][e.choices.index(e.answer)][0]) for sample, e in pairs]
    found: dict[str, Any] = {**mean_with_stderr("answer_nll", answers), "answer_nll_each": answers}
    for metric in ("acc", "acc_norm"):
        right = [float(sample[metric]) for sample in samples]
        found |= {**mean_with_stderr(metric, right), f"{metric}_each": right}
    return found


@contextmanager
def _harness_unnoticed() -> Iterator[None]:
    """Hide the progress reports of lm-evaluation-harness and datasets; restore the random state, which it uses."""
    import datasets

    state = random.getstate()
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with quiet(), without_bars():
            yield
    finally:
        random.setstate(state)
        if bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
