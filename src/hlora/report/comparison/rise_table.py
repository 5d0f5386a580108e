"""What each arm has forgotten at equal learning: the rise of a text's loss over Base, and how far it is above ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hlora.report.comparison.cells import base_arm, untuned
from hlora.report.comparison.columns import status_of
from hlora.report.comparison.curve import fewer_seeds
from hlora.report.comparison.equal_domain import equal_domain_rise, equal_domain_target
from hlora.report.comparison.significance import Interval, holm
from hlora.report.comparison.table_formats import Table, TableCell
from hlora.report.comparison.table_numbers import NONE, with_bounds
from hlora.report.format import p_value

_DIGITS = 4


def rise_table(comparison: Mapping[str, Any], share: float = 0.9, resamples: int = 2000) -> Table:
    """One row for each arm, task and text: the rise over Base, the difference from ours, and p of both.

    All at the domain NLL of `equal_domain_target`. Holm corrects over all p of the table. Bold: below 0.05 after it.
    """
    ours, base = comparison["ours"], base_arm(comparison)
    none = Interval(*[math.nan] * 3), math.nan
    arms = [arm for arm in comparison["arms"] if arm not in untuned(comparison)]
    labels, found = [], []
    for task in comparison["tasks"]:
        target = equal_domain_target(comparison, task, share)
        for text in comparison["texts"]:
            for arm in arms:
                labels.append((task, text, arm))
                for other in (base, ours):
                    place = (comparison, arm, other, task, text, target)
                    found.append(none if arm == other else equal_domain_rise(*place, resamples=resamples))
    corrected = holm(p for _, p in found)
    shown = [_difference_and_p(*each) for each in zip((each for each, _ in found), corrected, strict=True)]
    rows = [
        [TableCell(label) for label in names] + over_base + above_ours
        for names, over_base, above_ours in zip(labels, shown[::2], shown[1::2], strict=True)
    ]
    for row, (task, _, arm) in zip(rows, labels, strict=True):
        if status := status_of(comparison, arm, task):
            row[3] = TableCell(status)
    columns = ["Task", "Text", "Method"]
    columns += [f"Over {base} [95 %]", f"p over {base}, Holm", f"Above {ours} [95 %]", f"p above {ours}, Holm"]
    title = (
        f"Rise of the loss, nats/token, at equal domain NLL, which keeps {100 * share:g} % of "
        f"{comparison['unprotected']}'s improvement over {base}, {comparison['model']}, "
        f"{len(comparison['seeds'])} seed{'s' if len(comparison['seeds']) != 1 else ''}"
    )
    about = (
        "Below zero the text has become easier to predict. Intervals are by bootstrap over seeds, blocks of text and "
        "domain rows, which both sides share. p: of the difference over its bootstrap standard error. Few seeds "
        "understate their own spread, and one seed adds none. p, Holm: corrected over all p of this table; bold below "
        f"0.05. {NONE}: the arm does not reach the domain NLL."
    )
    return Table("equal_domain_rise", title, [("", columns)], rows, [about, *fewer_seeds(comparison, arms)], labels=3)


def _difference_and_p(difference: Interval, p: float) -> list[TableCell]:
    shown = NONE if math.isnan(p) else p_value(p)
    return [
        TableCell(with_bounds(difference, NONE, _DIGITS, sign=True)),
        TableCell(shown, "best" if p < 0.05 else ""),
    ]
