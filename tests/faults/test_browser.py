"""The reports in a real browser, with hostile text wherever a model, a data set or a stranger can put text.

Each payload is shown to be live first, on a page that does not escape it: else a check that finds nothing says nothing.
"""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Visit, visit, without_policy
from made_comparison import COST, SMALL, make_comparison, undone
from made_results import evaluation, results

from hlora.report.comparison.figures import all_figures
from hlora.report.comparison.page import write_comparison_report
from hlora.report.comparison.tables import all_tables
from hlora.report.drawing import draw
from hlora.report.heatmap import importance_heatmap
from hlora.report.run.page import write_report
from hlora.report.style import save

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on the PATH: apt install chromium")

SITE = "http://outside.test"
RAN = "document.title='ran';document.body.dataset.ran='1';console.log('ran')"
PAYLOADS = {  # by the address that each asks for
    "script": f"<script>{RAN};new Image().src='{SITE}/script'</script>",
    "closed": f"</pre></td></title></style></script></svg>--><script>{RAN};new Image().src='{SITE}/closed'</script>",
    "error": f"<img src=x: onerror=\"{RAN};new Image().src='{SITE}/error'\">",
    "attribute": f"\"'><svg onload=\"{RAN};new Image().src='{SITE}/attribute'\"></svg>",
    "image": f"<img src={SITE}/image>",
    "frame": f'<iframe src="{SITE}/frame"></iframe>',
    "link": f'<link rel=stylesheet href="{SITE}/link">',
    "style": f"<style>body{{background:url({SITE}/style)}}</style>",
    "inline": f'<p style="background-image:url({SITE}/inline)">x</p>',
    "svg": f'<svg><image href="{SITE}/svg" width=9 height=9 /></svg>',
    "object": f'<object data="{SITE}/object"></object>',
    "javascript": f"<iframe src=\"javascript:void(new Image().src='{SITE}/javascript')\"></iframe>",
    "base": f"<base href={SITE}/><a href='javascript:alert(1)' onclick='alert(1)' ping={SITE}/>x</a>",
    "braces": "{{ 7919 * 104729 }} {% raw %} {# x #} ${alert(1)} $\\frac{1}$ &lt;script&gt; \u202e \x00",
}
REFRESH = f'<meta http-equiv=refresh content="0;url={SITE}/refresh">'
HOSTILE = " ".join([*PAYLOADS.values(), REFRESH])
ASKED = {f"{SITE}/{name}" for name in PAYLOADS if name not in ("base", "braces")}

TAGS = """html head meta title style body main div section h1 h2 p b strong small ul li dl dt dd table caption colgroup
thead tbody tfoot tr th td u figure figcaption details summary pre code span br svg g path defs clippath rect use image
pattern"""
ATTRIBUTES = """lang charset http-equiv content name class id style role scope colspan rowspan dir aria-label tabindex
open width height viewbox version preserveaspectratio transform d x y href clip-path type fill patternunits"""


class Elements(HTMLParser):
    """What a page consists of that it should not, as the browser has read it."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.foreign: set[str] = set()
        self.texts: list[str] = []
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.foreign |= {tag} - set(TAGS.split())
        for name, value in attrs:
            local = name not in ("href", "src") or value.startswith(("#", "data:image/png;base64,"))
            known = name in ATTRIBUTES.split() or name.startswith("xmlns")
            if not (known and local):
                self.foreign.add(f"{tag} {name}")
            if name == "http-equiv" and value != "Content-Security-Policy":
                self.foreign.add(value)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def hostile(value: Any) -> Any:
    """The same with each text replaced, and beside the names of each mapping a hostile one."""
    if isinstance(value, dict):
        return {**{key: hostile(each) for key, each in value.items()}, HOSTILE: HOSTILE}
    if isinstance(value, list):
        return [hostile(each) for each in value]
    return HOSTILE if isinstance(value, str) else value


def hostile_run() -> dict[str, Any]:
    """results.json of a run with hostile text wherever it has text."""
    arms = {"after_general": 2.8, "hlora": 2.9, "lora": 3.4, HOSTILE: 3.1}
    content = results(**{arm: evaluation(nll, answer_nll=4.0, acc=0.3) for arm, nll in arms.items()})
    for arm in content["arms"].values():
        arm["texts"] = {"wiki": arm["texts"]["wiki"], HOSTILE: arm["texts"]["wiki"]}
        arm["samples"] = [dict.fromkeys(("prompt", "expected", "answer"), HOSTILE)]
        arm["forgetting"]["text"] = HOSTILE
    entries = [{"step": i, "loss": 3.0, "total_loss": 3.9, "weighted_regularisation_loss": 0.9} for i in range(1, 5)]
    probes = [{"step": i, "probe_rise": 0.01, "probe_stderr": 0.001, "budget": 0.02, "phi": 1.0} for i in range(1, 5)]
    norms = {"model.layers.0.self_attn.q_proj": 0.5, HOSTILE: 1.0}
    return {
        **content,
        "seconds": {"record": 1.0, HOSTILE: 2.0},
        "history": {"record": entries, "tune": [*entries, *probes], HOSTILE: entries},
        "importance": {
            "encoding": HOSTILE, "bytes": 1, "steps": HOSTILE, "skipped_steps": HOSTILE, "layer_norms": norms,
            "layer_weights": norms, "xi": HOSTILE, "undo_cost": HOSTILE,
        },
        "provenance": hostile({"versions": {"torch": ""}, "data": {"skipped": [{"row": 17, "reason": ""}]}}),
        "config": hostile({"output": "", "model": {"name": "", "dtype": None}}),
        "command": HOSTILE,
    }  # fmt: skip


def hostile_comparison() -> tuple[dict[str, Any], dict[str, Any]]:
    """comparison.json and cost.json with hostile text wherever they have text, other than in words of our own."""
    content = json.loads(json.dumps(make_comparison(SMALL, ["piqa"])))
    names = {"EWC-LoRA": HOSTILE, "piqa": HOSTILE, "wikitext": HOSTILE}
    content["arms"] = [names.get(arm, arm) for arm in content["arms"]]
    content |= {"rival": HOSTILE, "tasks": [HOSTILE], "texts": [HOSTILE, "shakespeare"], "model": HOSTILE}
    content["chosen"] = {names.get(arm, arm): {HOSTILE: by["piqa"]} for arm, by in content["chosen"].items()}
    for cell in content["cells"]:
        cell |= {"arm": names.get(cell["arm"], cell["arm"]), "task": HOSTILE, "key": HOSTILE}
        cell["config"] = hostile(cell["config"])
        cell["test"]["texts"] = {names.get(name, name): text for name, text in cell["test"]["texts"].items()}
        if cell["importance"]:
            cell["importance"] |= {"encoding": HOSTILE, "layer_norms": {"model.layers.0.q_proj": 0.5, HOSTILE: 1.0}}
    last = content["cells"][-1]
    content["cells"] += [
        undone({**last, "seed": seed}, status, HOSTILE) | {"traceback": HOSTILE}
        for seed, status in ((7, "failed"), (8, "cannot"), (9, HOSTILE))
    ]
    content |= {name: hostile(content[name]) for name in ("config", "provenance", "command")}
    cost = copy.deepcopy(COST) | {"model": HOSTILE, "command": HOSTILE, "notes": [HOSTILE]}
    cost["provenance"] = hostile(cost["provenance"])
    for row in cost["rows"]:
        row["encoding"] = HOSTILE if row["method"] == "EWC-LoRA" else row["encoding"]
    return content, cost


def check(page: Path, found: Visit) -> None:
    """Nothing ran, nothing was asked for, and the text stands there as text."""
    assert found.console == []
    assert found.asked_for == []
    read = Elements(found.dom)
    assert read.foreign == set()
    assert "data-ran" not in found.dom and "<title>hlora" in found.dom and "\u202e" not in found.dom
    assert "7919 * 104729" in found.dom and "829348951" not in found.dom


def test_the_payloads_are_live_where_nothing_escapes_them(tmp_path: Path) -> None:
    page = tmp_path / "control.html"
    body = " ".join(PAYLOADS.values())
    page.write_text(f"<title>hlora</title><body>{body}", encoding="utf-8")
    found = visit(page, tmp_path / "profile")
    assert set(found.asked_for) >= ASKED
    assert "<title>ran" in found.dom and "data-ran" in found.dom and any("ran" in line for line in found.console)
    assert Elements(found.dom).foreign >= {"script", "img", "iframe", "link", "object", "base", "a onclick", "a href"}
    page.write_text(f"<title>hlora</title><body>{REFRESH}", encoding="utf-8")
    assert f"{SITE}/refresh" in visit(page, tmp_path / "profile").asked_for


def test_the_policy_alone_stops_every_payload_but_the_navigation(tmp_path: Path) -> None:
    write_report(results(), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    broken = page.replace("</body>", f"{' '.join(PAYLOADS.values())}</body>")
    (tmp_path / "broken.html").write_text(broken, encoding="utf-8")
    found = visit(tmp_path / "broken.html", tmp_path / "profile")
    assert found.asked_for == []
    assert "<title>hlora" in found.dom and "data-ran" not in found.dom
    assert sum("Content Security Policy" in line for line in found.console) >= 10


@pytest.mark.slow
def test_a_runs_report_runs_no_script_and_asks_for_no_address(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_report(hostile_run(), page)
    for each in (page, without_policy(page)):
        check(each, visit(each, tmp_path / "profile"))


@pytest.mark.slow
def test_a_comparisons_report_runs_no_script_and_asks_for_no_address(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    content, cost = hostile_comparison()
    drawings = {name: draw(figure) for name, figure in all_figures(content, cost).items()}
    write_comparison_report(content, all_tables(content), drawings, page, cost)
    for each in (page, without_policy(page)):
        check(each, visit(each, tmp_path / "profile"))


def test_a_saved_figure_runs_no_script_and_asks_for_no_address(tmp_path: Path) -> None:
    _, svg = save(importance_heatmap({"model.layers.0.q_proj": 0.5, HOSTILE: 1.0}), tmp_path / "map")
    found = visit(svg, tmp_path / "profile")
    assert (found.console, found.asked_for) == ([], [])
    assert "data-ran" not in found.dom and "<path" in found.dom
