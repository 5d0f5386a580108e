"""The reports, wide and as on a phone, light and dark: axe-core finds no serious accessibility fault.

One browser shows each page in four frames. A page with two known faults is shown too: else a check that finds nothing
says nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, visit, without_policy
from made_comparison import COST, SMALL, make_comparison
from made_results import evaluation, results

from hlora.report.comparison.figures import all_figures
from hlora.report.comparison.page import write_comparison_report
from hlora.report.comparison.tables import all_tables
from hlora.report.drawing import draw
from hlora.report.run.page import write_report

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on the PATH: apt install chromium"),
    pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm, which fetches axe-core: apt install npm"),
]

AXE, SHA256 = "axe-core@4.14.1", "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745"
VIEWS = [(width, scheme) for width in (1280, 400) for scheme in ("light", "dark")]
LOOK = """axe.run().then(found => console.log(JSON.stringify({
    page: location.pathname.split("/").pop(),
    view: [innerWidth, matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"],
    passed: found.passes.map(rule => rule.id),
    faults: found.violations.map(rule => [rule.impact, rule.id, ...rule.nodes.map(node => node.target.join(" "))]),
})));"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    """Serious and critical faults by the name of the page, each as impact, rule and places in the page."""
    directory = tmp_path_factory.mktemp("accessibility")
    axe, frames = fetched_axe(directory), []
    for page in (control_page(directory), run_page(directory), comparison_page(directory)):
        text = page.read_text(encoding="utf-8")
        text = re.sub(r"(<svg\b[^>]*>).*?</svg>(?=\s*</div>)", r"\1</svg>", text, flags=re.DOTALL)  # a labelled picture
        page.write_text(text.replace("</body>", f"<script>{axe}\n{LOOK}</script></body>"), encoding="utf-8")
        for width, scheme in VIEWS:
            style = f"border: 0; color-scheme: {scheme}"
            frames.append(f'<iframe src="{page.name}" width="{width}" height="900" style="{style}"></iframe>')
    shown = directory / "frames.html"
    shown.write_text(f"<!DOCTYPE html><title>views</title><body>{''.join(frames)}</body>", encoding="utf-8")
    console = visit(shown, directory / "profile", "--timeout=200000").console
    said = [json.loads(line[1 : line.rindex('", source: ')]) for line in console]
    assert Counter(tuple(each["view"]) for each in said) == dict.fromkeys(VIEWS, 3)
    found: dict[str, list[list[str]]] = {}
    for each in said:
        assert {"document-title", "html-has-lang"} <= {*each["passed"]}  # axe-core has looked
        serious = [fault for fault in each["faults"] if fault[0] in ("serious", "critical")]
        found.setdefault(each["page"], []).extend(serious)
    return found


def fetched_axe(directory: Path) -> str:
    """The script of the pinned axe-core, checked against its digest."""
    subprocess.run(["npm", "pack", "--silent", AXE], cwd=directory, check=True, timeout=200, stdout=subprocess.DEVNULL)
    (archive,) = directory.glob("*.tgz")
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == SHA256
    with tarfile.open(archive) as packed:
        script = packed.extractfile("package/axe.min.js")
        assert script is not None
        return script.read().decode()


def test_a_picture_without_words_and_grey_on_white_are_found(faults: dict[str, list[list[str]]]) -> None:
    assert Counter(rule for _, rule, *_ in faults["control.html"]) == {"image-alt": 4, "color-contrast": 4}


def test_the_report_of_a_run_has_no_serious_fault(faults: dict[str, list[list[str]]]) -> None:
    assert faults["bare-run.html"] == []


def test_the_report_of_a_comparison_has_no_serious_fault(faults: dict[str, list[list[str]]]) -> None:
    assert faults["bare-comparison.html"] == []


def control_page(directory: Path) -> Path:
    page = directory / "control.html"
    body = '<main><h1>A page</h1><img src="data:,"><p style="color: #bbb; background: #fff">pale</p></main>'
    page.write_text(f"<!DOCTYPE html><html lang=en><title>control</title><body>{body}</body></html>", encoding="utf-8")
    return page


def run_page(directory: Path) -> Path:
    write_report(every_part(), directory / "run.html")
    return without_policy(directory / "run.html")


def comparison_page(directory: Path) -> Path:
    content = make_comparison(SMALL, ["piqa", "qasc"])
    figures = all_figures(content, COST)
    drawings = dict.fromkeys(figures, draw(figures["figure_5_cost"]))  # to draw all of them takes 11 s
    write_comparison_report(content, all_tables(content), drawings, directory / "comparison.html", COST)
    return without_policy(directory / "comparison.html")


def every_part() -> dict[str, Any]:
    """results.json of a chain under a budget, with everything that a report can show."""
    losses = [{"step": step, "loss": 3.0, "total_loss": 3.1, "weighted_regularisation_loss": 0.1} for step in (1, 2, 3)]
    watched = {"step": 3, "eval_loss": 2.0, "probe_rise": 0.01, "probe_stderr": 0.001, "budget": 0.02, "phi": 1.0}
    norms = {f"model.layers.{number}.self_attn.q_proj": 0.5 + number for number in range(3)}
    measured = {"elements": evaluation(3.0)["domain"], "law": evaluation(3.0)["domain"]}
    arms = {"hlora": evaluation(2.9, answer_nll=4.0, acc=0.3), "lora": evaluation(3.4, answer_nll=3.9)}
    return {
        **results(**arms),
        "history": {"record": losses, "tune": [*losses, watched]},
        "seconds": {"record": 60.0, "tune": 30.0},
        "importance": {"layer_norms": norms, "layer_weights": norms, "bytes": 1000, "encoding": "factored"},
        "chain": {
            "domains": list(measured), "base": measured, "before": measured,
            "after": dict.fromkeys(measured, measured),
            "forgetting": {domain: {"mean": 0.01, "worst": 0.02, "text": "wiki"} for domain in measured},
        },
        "provenance": {"versions": {"torch": "2.13.0"}, "finished": "2026-11-29T03:27:36+0000"},
        "config": {"model": {"name": "smollm2-135m"}, "domain": {"task": "multiple_choice"}},
        "command": "hlora run my.yaml --set output=runs/a-name-that-is-long-enough-to-scroll-on-a-phone",
    }  # fmt: skip
