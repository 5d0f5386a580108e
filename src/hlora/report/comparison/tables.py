"""What the tables of a comparison say; table_formats.py writes them.

`comparison` is what comparison.json holds (see cells.py). Every number is from the test rows, of the cells at the
strength that validation chose, mean ± standard deviation over seeds; one seed has no deviation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from textwrap import shorten
from typing import Any

from hlora.report.comparison.cells import cells_of, measure, untuned, values_of
from hlora.report.comparison.equal_domain import equal_domain, equal_domain_ratio, equal_domain_target
from hlora.report.comparison.significance import Interval, holm, interval_of_paired, mean_sd, welch
from hlora.report.comparison.table_formats import Cell, Look, Table, one_line

PAPER: dict[str, dict[str, dict[str, tuple[float, float]]]] = {
    "llama-3.2-3b": {
        "Base": {"sciq": (4.94, 95.10), "piqa": (4.94, 48.53), "medmcqa": (4.94, 18.50)},
        "LoRA(μ)": {"sciq": (5.05, 96.20), "piqa": (5.43, 48.75), "medmcqa": (5.04, 53.69)},
        "LoRA(ν+μ)": {"sciq": (5.31, 96.10), "piqa": (5.58, 46.91), "medmcqa": (5.15, 53.12)},
        "rsLoRA": {"sciq": (5.28, 96.50), "piqa": (5.71, 47.50), "medmcqa": (5.24, 51.92)},
        "EWC-LoRA": {"sciq": (4.88, 96.30), "piqa": (4.98, 48.45), "medmcqa": (4.79, 56.39)},
        "HLoRA": {"sciq": (4.64, 97.10), "piqa": (4.90, 51.14), "medmcqa": (4.64, 55.80)},
        "HLoRA w/o layer weights": {"sciq": (4.75, 96.80), "piqa": (4.96, 49.70), "medmcqa": (4.74, 54.41)},
    },
    "gpt-j-6b": {
        "Base": {"sciq": (3.28, 91.60), "piqa": (3.28, 49.13), "medmcqa": (3.28, 21.30)},
        "LoRA(μ)": {"sciq": (3.43, 96.50), "piqa": (3.54, 50.16), "medmcqa": (3.49, 38.35)},
        "LoRA(ν+μ)": {"sciq": (3.39, 96.20), "piqa": (3.52, 49.51), "medmcqa": (3.37, 33.66)},
        "rsLoRA": {"sciq": (3.50, 96.20), "piqa": (3.65, 49.62), "medmcqa": (3.35, 35.69)},
        "EWC-LoRA": {"sciq": (3.38, 96.10), "piqa": (3.47, 49.40), "medmcqa": (3.38, 36.48)},
        "HLoRA": {"sciq": (3.35, 96.80), "piqa": (3.40, 50.49), "medmcqa": (3.34, 36.10)},
        "HLoRA w/o layer weights": {"sciq": (3.36, 96.30), "piqa": (3.41, 49.95), "medmcqa": (3.35, 35.62)},
    },
}
"""The paper's Tables 1 and 2: model → arm → task → (perplexity on the Pile, accuracy in %)."""

_NONE = "–"
_SHORT = 36  # characters of a reason in a cell; the whole one is in the notes


def all_tables(comparison: Mapping[str, Any]) -> list[Table]:
    """Tables 1 and 2 on each general text, forgetting, perplexity at equal domain NLL, and the t-tests."""
    tables = [table_1(comparison, text) for text in comparison["texts"]]
    if comparison.get("ablation"):
        tables += [table_2(comparison, text) for text in comparison["texts"]]
    tables += [forgetting_table(comparison), equal_domain_table(comparison), t_test_table(comparison)]
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
    paper = _paper_numbers(comparison["model"])
    groups: list[tuple[str, list[str]]] = [("", ["Method"])]
    rows = [[Cell(arm)] for arm in arms]
    for task in comparison["tasks"]:
        known = any(task.lower() in paper.get(arm, {}) for arm in arms)
        beside = (lambda column: [column, f"{column}, paper"]) if known else (lambda column: [column])
        groups.append((task, beside("PPL") + beside("Acc %")))
        columns = (
            _column(comparison, arms, task, "perplexity", text=text, why=True),
            _column(comparison, arms, task, "acc", lower=False, scale=100),
        )
        for place, column in enumerate(columns):
            for row, arm, cell in zip(rows, arms, column, strict=True):
                row.append(cell)
                if known:
                    published = paper.get(arm, {}).get(task.lower())
                    row.append(Cell(f"{published[place]:.2f}" if published else _NONE))
    notes = [_about_numbers(comparison)]
    if paper and len(rows[0]) > 1 + 2 * len(comparison["tasks"]):
        notes.append("Paper: its perplexity is on the Pile, its accuracy of PIQA and MedMCQA from generated answers.")
    return Table(name, title, groups, rows, notes + _unfinished(comparison, arms))


def forgetting_table(comparison: Mapping[str, Any]) -> Table:
    """What each arm forgot, learned and cost on each task.

    Forgetting is the rise of the mean token loss over Base in nats/token, PEFT's yardstick, so negative is better than
    before. Best and second are among the tuned methods of a task. Peak memory is the largest over seeds, seconds are
    of the domain phase (mean), importance in bytes on disk.
    """
    arms, texts, rows = comparison["arms"], comparison["texts"], []
    for task in comparison["tasks"]:
        columns = [
            *(
                _column(comparison, arms, task, "forgetting", text=text, decimals=3, why=text == texts[0])
                for text in texts
            ),
            _column(comparison, arms, task, "answer_nll"),
            _column(comparison, arms, task, "acc", lower=False, scale=100),
        ]
        for arm, cells in zip(arms, zip(*columns, strict=True), strict=True):
            done = [cell for cell in cells_of(comparison, arm, task) if cell["status"] == "done"]
            seconds = [(cell.get("seconds") or {}).get("train") for cell in done]
            memory = [cell.get("peak_memory_bytes") for cell in done]
            stored = [(cell.get("importance") or {}).get("bytes") for cell in done]
            strength = comparison["chosen"].get(arm, {}).get(task)
            rows.append(
                [
                    Cell(task),
                    Cell(arm),
                    Cell(_NONE if strength is None else f"{strength:g}"),
                    *cells,
                    Cell(_mean(seconds, "{:.0f}")),
                    Cell(_largest(memory, 2**30, "{:.2f}")),
                    Cell(_largest(stored, 1e6, "{:.2f}")),
                ]
            )
    groups = [
        ("", ["Task", "Method", "Strength"]),
        ("Forgetting, nats/token", list(texts)),
        ("", ["Answer NLL, nats", "Acc %", "Train s", "Peak GiB", "Importance MB"]),
    ]
    title = f"Forgetting (rise of the mean token loss over Base), domain and cost, {_of(comparison)}"
    notes = [_about_numbers(comparison), *_unfinished(comparison, arms)]
    return Table("forgetting", title, groups, rows, notes, labels=2)


def equal_domain_table(comparison: Mapping[str, Any], share: float = 0.9, resamples: int = 2000) -> Table:
    """Perplexity of each arm at one domain NLL, the summary of its trade-off curve, with bootstrap intervals.

    The domain NLL is the one at which `share` of the unprotected arm's improvement over Base is kept. Beside each
    perplexity stands how much higher it is than that of our method in %, with the interval of this paired difference,
    which is the one to read for "better": most of the perplexity's own interval is the choice of the text.
    """
    ours, unprotected = comparison["ours"], comparison["unprotected"]
    arms = [arm for arm in comparison["arms"] if arm not in untuned(comparison)]
    targets = {task: equal_domain_target(comparison, task, share) for task in comparison["tasks"]}
    groups: list[tuple[str, list[str]]] = [("", ["Method"])]
    rows = [[Cell(arm)] for arm in arms]
    for task, target in targets.items():
        for text in comparison["texts"]:
            groups.append((f"{task}, {text}", ["PPL [95 %]", f"% above {ours} [95 %]"]))
            found = [equal_domain(comparison, arm, task, text, target, resamples=resamples) for arm in arms]
            looks = _looks({arm: round(each.value, 2) for arm, each in zip(arms, found, strict=True)}, lower=True)
            for row, arm, interval in zip(rows, arms, found, strict=True):
                status = _status(comparison, arm, task)
                without = _NONE if math.isnan(target) else "not reached"
                row.append(Cell(status or _bounds(interval, without), looks[arm]))
                ratio, missed = equal_domain_ratio(comparison, arm, ours, task, text, target, resamples=resamples)
                row.append(Cell(_NONE if arm == ours else _excess(ratio, missed, ours)))
    at = "; ".join(
        f"{task} {target:.2f}" if math.isfinite(target) else f"{task} none: no improvement measured"
        for task, target in targets.items()
    )
    title = (
        f"Perplexity at equal domain NLL (answer NLL in nats: {at}), which keeps {100 * share:g} % of {unprotected}'s "
        f"improvement over Base, {_of(comparison)}"
    )
    about = (
        "Straight between neighbouring strengths of each trade-off curve; intervals by bootstrap over seeds, blocks of "
        "text and domain rows, the difference on those that both arms share. ∞: more than 2.5 % of the resamples do "
        f"not reach the domain NLL. {ours} misses in n %: in n % of the resamples {ours} itself does not reach it, and "
        "the difference has no interval. –: not both reach it on the seeds that they share."
    )
    return Table("equal_domain", title, groups, rows, [about, *_curve_seeds(comparison, arms)])


def t_test_table(comparison: Mapping[str, Any]) -> Table:
    """Welch's t-test of our arm against the rival: perplexity on each text and accuracy, each on every task.

    Holm corrects over all rows that have a p. Bold p: below 0.05 after correction. The paired interval is of the same
    difference over the seeds that both have, which share data order and start.
    """
    ours, rival = comparison["ours"], comparison["rival"]
    panels = [
        (task, label, name, text, scale)
        for task in comparison["tasks"]
        for label, name, text, scale in (
            *((f"PPL {text}", "perplexity", text, 1) for text in comparison["texts"]),
            ("Acc %", "acc", None, 100),
        )
    ]
    sides = [
        [
            {s: scale * v for s, v in values_of(comparison, arm, task, name, text).items()}
            for task, _, name, text, scale in panels
        ]
        for arm in (ours, rival)
    ]
    tests = [welch(list(mine.values()), list(theirs.values())) for mine, theirs in zip(*sides, strict=True)]
    corrected = holm(test.p for test in tests)
    rows = []
    for (task, label, *_), mine, theirs, test, p in zip(panels, *sides, tests, corrected, strict=True):
        both = sorted((seed for seed in mine if seed in theirs), key=str)
        paired = interval_of_paired([mine[seed] for seed in both], [theirs[seed] for seed in both])
        rows.append(
            [
                Cell(task),
                Cell(label),
                Cell(_mean_sd(mine.values())),
                Cell(_mean_sd(theirs.values())),
                Cell(_bounds(Interval(test.difference, test.low, test.high), _NONE, sign=True)),
                Cell(_bounds(paired, _NONE, sign=True)),
                Cell(_number(test.t, "{:.2f}")),
                Cell(_number(test.df, "{:.1f}")),
                Cell(_p(test.p)),
                Cell(_p(p), "best" if p < 0.05 else ""),
                Cell(_number(test.hedges_g, "{:.2f}")),
            ]
        )
    columns = [
        "Task", "Measure", ours, rival, "Difference [95 %]", "Paired difference [95 %]", "t", "df", "p", "p, Holm",
        "Hedges' g",
    ]  # fmt: skip
    title = f"{ours} against {rival}: Welch's t-test over seeds, {_of(comparison)}"
    notes = [
        f"Difference: {ours} less {rival}. p, Holm: corrected over all rows of this table; bold below 0.05. "
        f"{_about_numbers(comparison)}",
        *_unfinished(comparison, [ours, rival]),
    ]
    return Table("t_test", title, [("", columns)], rows, notes, labels=2)


def _column(
    comparison: Mapping[str, Any],
    arms: Sequence[str],
    task: str,
    name: str,
    *,
    text: str | None = None,
    lower: bool = True,
    scale: float = 1.0,
    decimals: int = 2,
    why: bool = False,
) -> list[Cell]:
    """A measure of each arm on a task, mean ± standard deviation, best and second marked; `why`: or why there is none.

    Arms that never see the domain take no part in the ranking.
    """
    values = {arm: [scale * v for v in values_of(comparison, arm, task, name, text).values()] for arm in arms}
    tuned = [arm for arm in arms if arm not in untuned(comparison)]
    rounded = {arm: round(mean_sd(values[arm])[0], decimals) for arm in tuned}
    looks = _looks(rounded, lower)
    status = {arm: _status(comparison, arm, task) if why else "" for arm in arms}
    return [Cell(status[arm] or _mean_sd(values[arm], decimals), looks.get(arm, "")) for arm in arms]


def _looks(values: Mapping[str, float], lower: bool) -> dict[str, Look]:
    ranked = sorted({value for value in values.values() if math.isfinite(value)}, reverse=not lower)
    places: dict[float, Look] = dict(zip(ranked, ("best", "second"), strict=False))
    return {arm: places.get(value, "") for arm, value in values.items()}


def _status(comparison: Mapping[str, Any], arm: str, task: str) -> str:
    """Why an arm has no number on a task, briefly; empty where it has one."""
    cells = _chosen_or_all(comparison, arm, task)
    states = {cell["status"]: cell.get("error") for cell in cells}
    if "done" in states:
        return ""
    if "cannot" in states:
        reason = one_line(states["cannot"])
        return f"cannot run: {shorten(reason, _SHORT, placeholder='…')}" if reason else "cannot run"
    return "failed" if "failed" in states else _NONE


def _chosen_or_all(comparison: Mapping[str, Any], arm: str, task: str) -> list[dict[str, Any]]:
    """The cells that a table shows; where no strength could be chosen, those that say why."""
    chosen = cells_of(comparison, arm, task)
    return chosen or [cell for cell in cells_of(comparison, arm, task, "all") if cell["status"] != "done"]


def _unfinished(comparison: Mapping[str, Any], arms: Iterable[str]) -> list[str]:
    """A note for each arm and reason: which tasks, or seeds of a task, have no result, and the reason in full."""
    places: dict[tuple[str, str, str], list[str]] = {}
    for arm in arms:
        for task in comparison["tasks"]:
            cells = _chosen_or_all(comparison, arm, task)
            partly = any(cell["status"] == "done" for cell in cells)
            for cell in cells:
                if cell["status"] != "done":
                    where = f"{task} seed {cell['seed']}" if partly and cell["seed"] is not None else task
                    found = places.setdefault((arm, cell["status"], one_line(cell.get("error"))), [])
                    found += [where] if where not in found else []
    words = {"cannot": "cannot run", "failed": "failed", "missing": "not run yet"}
    return [
        f"{arm}, {', '.join(where)}: {words.get(status, status)}{f': {reason}' if reason else ''}"
        for (arm, status, reason), where in places.items()
    ]


def _curve_seeds(comparison: Mapping[str, Any], arms: Sequence[str]) -> list[str]:
    """Which arms have their whole curve for fewer seeds than the comparison: their intervals hold less."""
    all_seeds, short = len(comparison["seeds"]), []
    for arm in arms:
        for task in comparison["tasks"]:
            strengths: dict[Any, set[Any]] = {}
            for cell in cells_of(comparison, arm, task, "all"):
                if measure(cell, "answer_nll") is not None:
                    strengths.setdefault(cell["seed"], set()).add(cell["strength"])
            fullest = max(strengths.values(), key=len, default=set())
            count = sum(fullest <= found for found in strengths.values())
            if 0 < count < all_seeds:
                short.append(f"{arm} on {task} ({count})")
    return [f"Curves of fewer than {all_seeds} seeds: {', '.join(short)}."] if short else []


def _paper_numbers(model: str) -> dict[str, dict[str, tuple[float, float]]]:
    """The paper's numbers for a model, by its name anywhere in a path; a model made from it is another."""
    for name, numbers in PAPER.items():
        if re.search(rf"(?<![\w.]){re.escape(name)}(?![-\w.])", model.lower().replace("--", "/")):
            return numbers
    return {}


def _of(comparison: Mapping[str, Any]) -> str:
    seeds = len(comparison["seeds"])
    return f"{comparison['model']}, {seeds} seed{'s' if seeds != 1 else ''}"


def _about_numbers(comparison: Mapping[str, Any]) -> str:
    spread = "Mean ± standard deviation over seeds" if len(comparison["seeds"]) > 1 else "One seed"
    return f"{spread}, on test, at the strength chosen on validation."


def _mean_sd(values: Iterable[float], decimals: int = 2) -> str:
    sample = list(values)
    mean, sd = mean_sd(sample)
    if not sample:
        return _NONE
    form = f"{{:.{decimals}f}}"
    return _number(mean, form) + ("" if math.isnan(sd) else f" ± {_number(sd, form)}")


def _number(value: float, form: str) -> str:
    """A number with a real minus sign and without a negative zero; huge ones by three digits."""
    if math.isnan(value):
        return _NONE
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = form.format(value) if abs(value) < 1e5 else f"{value:.3g}"
    if not text.strip("+-0."):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def _bounds(interval: Interval, missing: str, sign: bool = False) -> str:
    """value [low, high], or the value alone where it has no interval."""
    if math.isnan(interval.value):
        return missing
    value, low, high = (_number(bound, "{:+.2f}" if sign else "{:.2f}") for bound in interval)
    return value if math.isnan(interval.low) else f"{value} [{low}, {high}]"


def _excess(ratio: Interval, missed: float, ours: str) -> str:
    """How far a ratio to ours is above 1 in %, with its interval, or why it has none: ours misses the target."""
    shown = _bounds(Interval(*(100 * (bound - 1) for bound in ratio)), _NONE, sign=True)
    unbounded = math.isfinite(ratio.value) and math.isnan(ratio.low)
    return f"{shown}, {ours} misses in {100 * missed:.0f} %" if unbounded else shown


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else _number(p, "{:.3f}")


def _mean(values: Iterable[float | None], form: str) -> str:
    return _number(mean_sd(value for value in values if value is not None)[0], form)


def _largest(values: Iterable[float | None], unit: float, form: str) -> str:
    found = [value for value in values if value is not None]
    return _number(max(found) / unit, form) if found else _NONE


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "text"
