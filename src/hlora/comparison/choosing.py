"""Chooses the strength of each arm on held-out rows and texts."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from hlora.config.comparison import CompareConfig

logger = logging.getLogger("hlora")


def choose(config: CompareConfig, results: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """The strength of each arm and task, chosen on the held-out rows and texts of the first seeds.

    A strength qualifies if it keeps `selection.kept_learning` of what unprotected LoRA learned, the fall of the
    answers' NLL below the base model's. Of those, the one with the lowest mean loss on the held-out general texts is
    chosen. If none qualifies, the one that learned most is chosen. An arm without results gets its first strength.

    Args:
        config: The comparison.
        results: Cells so far.

    Returns:
        Arm → task → strength.

    Warns of arms whose strength could not be chosen though there are results.
    """
    measured: dict[tuple[str, str, float | None], list[tuple[float, float]]] = {}
    for result in results:
        if result["status"] == "done" and result["validation"]:
            held_out = result["validation"]
            general = statistics.fmean(text["nll"] for text in held_out["texts"].values())
            place = (result["arm"], result["task"], result["strength"])
            measured.setdefault(place, []).append((held_out["domain"]["answer_nll"], general))
    means = {place: tuple(map(statistics.fmean, zip(*values, strict=True))) for place, values in measured.items()}
    base = next(name for name, arm in config.arms.items() if arm.method == "base")
    chosen: dict[str, dict[str, float | None]] = {}
    unchosen: list[str] = []
    for name, arm in config.arms.items():
        chosen[name] = {}
        for task in arm.tasks or config.tasks:
            tried = {s: means[name, task, s] for s in arm.strengths if (name, task, s) in means}
            before, learned = means.get((base, task, None)), means.get((config.unprotected or "", task, None))
            if not tried or before is None or learned is None:
                chosen[name][task] = arm.strengths[0] if arm.strengths else None
                if len(arm.strengths) > 1 and measured:
                    unchosen.append(f"{name} on {task}: {chosen[name][task]:g}")
                continue
            allowed = before[0] - config.selection.kept_learning * (before[0] - learned[0])
            enough = {s: general for s, (answers, general) in tried.items() if answers <= allowed}
            scores = enough or {s: answers for s, (answers, _) in tried.items()}
            chosen[name][task] = min(scores, key=scores.__getitem__)
    if unchosen:
        logger.warning(
            "no strength could be chosen, as %s, %s or the arm has no result there; the first one is taken: %s",
            base,
            config.unprotected,
            "; ".join(unchosen),
        )
    return chosen
