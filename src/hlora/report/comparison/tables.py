"""What the tables of a comparison say; table_formats.py writes them.

`comparison` is what comparison.json holds (see cells.py). Every number is from the test rows, of the cells at the
strength that validation chose, mean ± standard deviation over seeds; one seed has no deviation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hlora.report.comparison.cells import cells_of, measure, untuned
from hlora.report.comparison.columns import best_and_second, column_of, status_of, unfinished
from hlora.report.comparison.curve import fewer_seeds
from hlora.report.comparison.equal_domain import Quantity, equal_domain, equal_domain_ratio, equal_domain_target
from hlora.report.comparison.measures import digits_of, t_tests
from hlora.report.comparison.published import published_numbers
from hlora.report.comparison.rise_table import rise_table
from hlora.report.comparison.significance import Interval
from hlora.report.comparison.table_formats import Table, TableCell
from hlora.report.comparison.table_numbers import NONE, largest_of, mean_and_sd, mean_of, with_bounds
from hlora.report.format import decimals, p_value


def all_tables(comparison: Mapping[str, Any]) -> list[Table]:
    """Tables 1 and 2 on each text, forgetting, perplexity, drift and rise at equal domain NLL, and the t-tests.

    A table that needs an arm which is not configured (a rival, an unprotected one, an ablation) is left out.
    """
    configured = comparison["arms"]
    tables = [table_1(comparison, text) for text in comparison["texts"]]
    if comparison.get("ablation"):
        tables += [table_2(comparison, text) for text in comparison["texts"]]
    tables.append(forgetting_table(comparison))
    if comparison["unprotected"] in configured:
        tables += [equal_domain_table(comparison, quantity=each) for each in _SHOWN if _arms_with(comparison, each)]
        tables.append(rise_table(comparison))
    if comparison["rival"] in configured:
        tables.append(t_test_table(comparison))
    taken: dict[str, int] = {}
    for table in tables:  # two texts whose names make one file name
        taken[table.name] = taken.get(table.name, 0) + 1
        table.name += f"-{taken[table.name]}" if taken[table.name] > 1 else ""
    return tables


def table_1(comparison: Mapping[str, Any], text: str) -> Table:
    """The paper's Table 1: perplexity on `text` and accuracy in % of every arm on every task.

    Best and second are among the tuned methods. Base (and the adapter after the general phase, where it is an arm) is
    there for reference: it forgot nothing by learning nothing.
    Values equal as printed share their place. Where the model, task and arm are the paper's, its number is beside.
    """
    title = f"Table 1. Perplexity on {text} (lower is better) and domain accuracy (higher is better), {_of(comparison)}"
    return _perplexity_and_accuracy(comparison, text, comparison["arms"], f"table_1_{_file_name(text)}", title)


def table_2(comparison: Mapping[str, Any], text: str) -> Table:
    """The paper's Table 2, the ablation: as Table 1, of the arms in comparison["ablation"]."""
    title = f"Table 2. Ablation: perplexity on {text} and domain accuracy, {_of(comparison)}"
    return _perplexity_and_accuracy(comparison, text, comparison["ablation"], f"table_2_{_file_name(text)}", title)


def _perplexity_and_accuracy(
    comparison: Mapping[str, Any], text: str, arms: Sequence[str], name: str, title: str
) -> Table:
    paper = published_numbers(comparison["model"])
    groups: list[tuple[str, list[str]]] = [("", ["Method"])]
    rows = [[TableCell(arm)] for arm in arms]
    for task in comparison["tasks"]:
        known = any(task.lower() in paper.get(arm, {}) for arm in arms)
        beside = (lambda column: [column, f"{column}, paper"]) if known else (lambda column: [column])
        groups.append((task, beside("PPL") + beside("Acc %")))
        columns = (
            column_of(comparison, arms, task, "perplexity", text=text, why=True),
            column_of(comparison, arms, task, "acc", lower=False, scale=100, digits=1),
        )
        for place, column in enumerate(columns):
            for row, arm, cell in zip(rows, arms, column, strict=True):
                row.append(cell)
                if known:
                    published = paper.get(arm, {}).get(task.lower())
                    row.append(TableCell(f"{published[place]:.2f}" if published else NONE))
    notes = [_about_numbers(comparison)]
    if paper and len(rows[0]) > 1 + 2 * len(comparison["tasks"]):
        notes.append("Paper: its perplexity is on the Pile, its accuracy of PIQA and MedMCQA from generated answers.")
    return Table(name, title, groups, rows, notes + unfinished(comparison, arms))


def forgetting_table(comparison: Mapping[str, Any]) -> Table:
    """What each arm forgot, learned and cost on each task.

    Forgetting is the rise of the mean token loss over Base in nats/token, PEFT's yardstick, so negative is better than
    before. Drift is the mean KL(Base ‖ arm) a token, for comparisons that measured it. Best and second are among the
    tuned methods of a task. Peak memory is the largest over seeds, seconds are
    of the domain phase (mean), importance in bytes on disk.
    """
    arms, texts, rows = comparison["arms"], comparison["texts"], []
    drifts = [
        text for text in texts if any(measure(cell, "kl_from_base", text) is not None for cell in comparison["cells"])
    ]
    for task in comparison["tasks"]:
        columns = [
            *(
                column_of(comparison, arms, task, "forgetting", text=text, digits=3, why=text == texts[0])
                for text in texts
            ),
            *(column_of(comparison, arms, task, "kl_from_base", text=text, digits=4) for text in drifts),
            column_of(comparison, arms, task, "answer_nll"),
            column_of(comparison, arms, task, "acc", lower=False, scale=100, digits=1),
        ]
        for arm, cells in zip(arms, zip(*columns, strict=True), strict=True):
            done = [cell for cell in cells_of(comparison, arm, task) if cell["status"] == "done"]
            seconds = [(cell.get("seconds") or {}).get("train") for cell in done]
            memory = [cell.get("peak_memory_bytes") for cell in done]
            stored = [(cell.get("importance") or {}).get("bytes") for cell in done]
            strength = comparison["chosen"].get(arm, {}).get(task)
            rows.append(
                [
                    TableCell(task),
                    TableCell(arm),
                    TableCell(NONE if strength is None else f"{strength:g}"),
                    *cells,
                    TableCell(mean_of(seconds, 0)),
                    TableCell(largest_of(memory, 1e9, 2)),
                    TableCell(largest_of(stored, 1e6, 2)),
                ]
            )
    groups = [
        ("", ["Task", "Method", "Strength"]),
        ("Forgetting, nats/token", list(texts)),
        *([("Drift from the base model, nats/token", drifts)] if drifts else []),
        ("", ["Answer NLL, nats", "Acc %", "Train s", "Peak GB", "Importance MB"]),
    ]
    title = f"Forgetting (rise of the mean token loss over Base), domain and cost, {_of(comparison)}"
    notes = [_about_numbers(comparison), *unfinished(comparison, arms)]
    return Table("forgetting", title, groups, rows, notes, labels=2)


_SHOWN: dict[Quantity, tuple[str, str, int]] = {
    "nll": ("Perplexity", "PPL", 2),
    "kl_from_base": ("Drift from the base model, nats/token,", "drift", 4),
    "kl_from_general": ("Drift from the end of the general phase, nats/token,", "drift", 4),
}
"""What is compared at equal domain NLL: the words of the title and of the columns, and digits behind the point."""


def _arms_with(comparison: Mapping[str, Any], quantity: Quantity) -> list[str]:
    """The tuned arms of which a cell has this measure of a general text."""
    found = {
        cell["arm"]
        for cell in comparison["cells"]
        if any(measure(cell, quantity, text) is not None for text in comparison["texts"])
    }
    return [arm for arm in comparison["arms"] if arm in found and arm not in untuned(comparison)]


def equal_domain_table(
    comparison: Mapping[str, Any], share: float = 0.9, resamples: int = 2000, *, quantity: Quantity = "nll"
) -> Table:
    """Perplexity or drift of each arm at one domain NLL, a summary of its trade-off curve, with bootstrap intervals.

    The domain NLL is the one at which `share` of the unprotected arm's improvement over Base is kept. Beside each
    value stands how much higher it is than that of our method in %, with the interval of this paired difference,
    which is the one to read for "better": most of the value's own interval is the choice of the text.
    """
    ours, unprotected = comparison["ours"], comparison["unprotected"]
    what, short, digits = _SHOWN[quantity]
    arms = [arm for arm in comparison["arms"] if arm not in untuned(comparison)]
    if quantity != "nll":
        arms = _arms_with(comparison, quantity)
    targets = {task: equal_domain_target(comparison, task, share) for task in comparison["tasks"]}
    groups: list[tuple[str, list[str]]] = [("", ["Method"])]
    rows = [[TableCell(arm)] for arm in arms]
    for task, target in targets.items():
        for text in comparison["texts"]:
            groups.append((f"{task}, {text}", [f"{short} [95 %]", f"% above {ours} [95 %]"]))
            options: dict[str, Any] = {"quantity": quantity, "resamples": resamples}
            found = [equal_domain(comparison, arm, task, text, target, **options) for arm in arms]
            rounded = {arm: round(each.value, digits) for arm, each in zip(arms, found, strict=True)}
            looks = best_and_second(rounded, lower=True)
            for row, arm, interval in zip(rows, arms, found, strict=True):
                status = status_of(comparison, arm, task)
                without = NONE if math.isnan(target) else "not reached"
                row.append(TableCell(status or with_bounds(interval, without, digits), looks[arm]))
                ratio, missed = equal_domain_ratio(comparison, arm, ours, task, text, target, **options)
                row.append(TableCell(NONE if arm == ours else _excess(ratio, missed, ours)))
    at = "; ".join(
        f"{task} {target:.2f}" if math.isfinite(target) else f"{task} none: no improvement measured"
        for task, target in targets.items()
    )
    title = (
        f"{what} at equal domain NLL (answer NLL in nats: {at}), which keeps {100 * share:g} % of {unprotected}'s "
        f"improvement over Base, {_of(comparison)}"
    )
    about = (
        f"Between two strengths of an arm, {short} is interpolated linearly along its trade-off curve. Intervals are "
        "by bootstrap over seeds, blocks of text and domain rows; those of a difference use what both arms share. ∞: "
        "more than 2.5 % of the resamples do not reach the domain NLL. "
        f"{ours} misses in n %: in n % of the resamples {ours} itself does not reach it, so the difference has no "
        "interval. –: the two arms do not both reach it on the seeds that they share."
    )
    name = "equal_domain" if quantity == "nll" else f"equal_domain_{quantity}"
    return Table(name, title, groups, rows, [about, *fewer_seeds(comparison, arms)])


def t_test_table(comparison: Mapping[str, Any]) -> Table:
    """Welch's t-test of our arm against the rival: perplexity on each text and accuracy, each on every task.

    Holm corrects over all rows that have a p. Bold p: below 0.05 after correction.
    """
    ours, rival = comparison["ours"], comparison["rival"]
    rows = []
    for task, what, mine, theirs, test, p in t_tests(comparison):
        digits = digits_of(what)
        rows.append(
            [
                TableCell(task),
                TableCell(what.label),
                TableCell(mean_and_sd(mine, digits)),
                TableCell(mean_and_sd(theirs, digits)),
                TableCell(with_bounds(Interval(test.difference, test.low, test.high), NONE, digits, sign=True)),
                TableCell(decimals(test.t, 2)),
                TableCell(decimals(test.df, 1)),
                TableCell(p_value(test.p)),
                TableCell(p_value(p), "best" if p < 0.05 else ""),
                TableCell(decimals(test.hedges_g, 2)),
            ]
        )
    columns = ["Task", "Measure", ours, rival, "Difference [95 %]", "t", "df", "p", "p, Holm", "Hedges' g"]
    title = f"{ours} against {rival}: Welch's t-test over seeds and test questions, {_of(comparison)}"
    notes = [
        f"Difference: {ours} less {rival}. Its interval and p count the noise of the seeds and that of the questions, "
        "or of the text's blocks of 64 tokens, which both arms share. p, Holm: corrected over all rows of this table; "
        f"bold below 0.05. Hedges' g counts the seeds only. {_about_numbers(comparison)}",
        *unfinished(comparison, [ours, rival]),
    ]
    return Table("t_test", title, [("", columns)], rows, notes, labels=2)


def _of(comparison: Mapping[str, Any]) -> str:
    seeds = len(comparison["seeds"])
    return f"{comparison['model']}, {seeds} seed{'s' if seeds != 1 else ''}"


def _about_numbers(comparison: Mapping[str, Any]) -> str:
    spread = "Mean ± standard deviation over seeds" if len(comparison["seeds"]) > 1 else "One seed"
    return f"{spread}, on test, at the strength chosen on validation."


def _excess(ratio: Interval, missed: float, ours: str) -> str:
    """How far a ratio to ours is above 1 in %, with its interval, or why it has none: ours misses the target."""
    shown = with_bounds(Interval(*(100 * (bound - 1) for bound in ratio)), NONE, 1, sign=True)
    unbounded = math.isfinite(ratio.value) and math.isnan(ratio.low)
    return f"{shown}, {ours} misses in {100 * missed:.0f} %" if unbounded else shown


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "text"
