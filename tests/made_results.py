"""Results of a run made by hand, and a reader of the page that is made from them."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from hlora.evaluation.evaluate import add_forgetting

HOSTILE = "<script>alert(1)</script>"


def evaluation(nll: float, answer_nll: float = 5.0, acc: float | None = 0.2, stderr: float = 0.01) -> dict[str, Any]:
    domain: dict[str, Any] = {"rows": 250, "answer_nll": answer_nll, "answer_nll_stderr": 0.1}
    if acc is not None:
        domain |= {"acc": acc, "acc_stderr": 0.02, "acc_norm": acc, "acc_norm_stderr": 0.02}
    text = {
        "perplexity": math.exp(min(nll, 700)),
        "bits_per_byte": nll / 3,
        "nll": nll,
        "nll_stderr": stderr,
        "tokens": 8191,
        "bytes": 35000,
    }
    samples = [{"prompt": "2 + 2 =", "expected": "4", "answer": HOSTILE}]
    return {"texts": {"wiki": text}, "domain": domain, "samples": samples}


def results(**arms: Any) -> dict[str, Any]:
    arms = {"base": evaluation(3.0), **arms}
    for arm in arms.values():
        add_forgetting(arm, arms["base"])
    return {"arms": arms}


class Page(HTMLParser):
    """Tags, attributes and texts of a page; fails on an element that is closed in the wrong place."""

    VOID = ("meta", "link", "br", "img", "hr", "input")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())
