"""The table of a comparison of chains: what each method has learned, kept and lost at the end."""

from __future__ import annotations

import math
import statistics
from typing import Any

from hlora.methods import CHAINS
from hlora.report.format import Change
from hlora.report.run.chain import transfer


def chains_table(cells: list[dict[str, Any]]) -> str:
    """A row for each order and method, as Markdown: means over seeds ± two standard errors.

    The errors count the noise of the test questions and of the seeds. Backward transfer above zero is forgetting.
    """
    heads = ["order", "method", "seeds", "average answer NLL", "backward transfer", "forward transfer"]
    lines = ["| " + " | ".join([*heads, "general forgetting"]) + " |", "|---|---|---:|---:|---:|---:|---:|"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((" → ".join(cell["chain"]["domains"]), cell["method"]), []).append(cell["chain"])
    for order, method in sorted(groups, key=lambda group: (group[0], list(CHAINS).index(group[1]))):
        found = groups[order, method]
        row = [order, CHAINS[method].label, str(len(found)), *_columns(found, method)]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _columns(chains: list[dict[str, Any]], method: str) -> list[str]:
    if method == "one_each":
        return [_shown([_own(chain) for chain in chains], 2), "0", "–", "–"]
    means = [transfer(chain, "answer_nll") for chain in chains]
    shown = [_shown([getattr(each, part) for each in means], 2) for part in ("average", "backward", "forward")]
    rises = [Change(chain["forgetting"][chain["domains"][-1]]["mean"], math.nan) for chain in chains]
    return [*shown, _shown(rises, 3)]


def _own(chain: dict[str, Any]) -> Change:
    """The average over domains, each after its own step."""
    own = [chain["after"][name][name] for name in chain["domains"]]
    stderr = math.hypot(*(each["answer_nll_stderr"] for each in own)) / len(own)
    return Change(statistics.fmean(each["answer_nll"] for each in own), stderr)


def _shown(seeds: list[Change], digits: int) -> str:
    """Mean ± two standard errors. All seeds share the questions, so their noise does not fall with more seeds."""
    value = statistics.fmean(each.value for each in seeds)
    questions = math.sqrt(statistics.fmean(each.stderr**2 for each in seeds))
    between = statistics.stdev(each.value for each in seeds) / math.sqrt(len(seeds)) if len(seeds) > 1 else 0.0
    stderr = math.hypot(0.0 if math.isnan(questions) else questions, between)
    return f"{value:.{digits}f} ± {2 * stderr:.{digits}f}".replace("-", "−")
