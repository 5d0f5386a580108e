"""The pages as GitHub shows them: links lead somewhere, no page is lost, no public name and no method is left out.

The links of the site are tested where it is built (test_site.py).
"""

from __future__ import annotations

import posixpath

import pytest
from pages import PAGES, REPOSITORY, anchors, links, prose, source

import hlora
from hlora.methods import METHODS


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_points_to_a_file_and_a_heading_that_are_there(page: str) -> None:
    for target in links(prose(page)):
        path, _, anchor = target.partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
        assert (REPOSITORY / file).exists(), f"{page}: {target}: no such file"
        # The fields of the configuration reference get their anchors when the site is built.
        if anchor and file != "docs/reference/configuration.md":
            assert anchor in anchors(file), f"{page}: {target}: no such heading"


def test_every_page_stands_in_the_navigation_of_the_site() -> None:
    navigation = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [page for page in PAGES if page.startswith("docs/") and f": {page[5:]}\n" not in navigation]
    assert not missing, "add these to `nav` in mkdocs.yml"


def test_the_api_reference_has_every_public_name_once() -> None:
    named = [line.removeprefix("::: hlora.") for line in source("docs/reference/api.md").splitlines() if ":::" in line]
    assert sorted(named) == sorted(hlora.__all__)


def test_the_guide_to_comparisons_has_a_row_for_every_method() -> None:
    rows = source("docs/guides/compare.md").splitlines()
    assert not [name for name in METHODS if not any(row.startswith(f"| `{name}` |") for row in rows)]


FIRST_SCREEN = source("README.md").partition("## Two commands")[0]
ANSWERS = {
    "how to use my own data": "## Domain rows",
    "what an anchor is": "### Anchor\n\nThe weights that the penalty holds the model to.",
    "the signature of protect": "\ndef protect(\n    trainer: ",
    "whether a GPU was tested": "No GPU has run hlora yet",
}


@pytest.mark.parametrize("question", ANSWERS)
def test_the_readmes_first_screen_is_two_clicks_away_from(question: str) -> None:
    files = {""}  # where a reader has got to, by path; "" is the first screen
    for _ in range(2):
        files |= {
            posixpath.normpath(posixpath.join(posixpath.dirname(file), target.partition("#")[0] or "README.md"))
            for file in files
            if not file or file.endswith(".md")
            for target in links(prose(file) if file else FIRST_SCREEN)
        }
    texts = [source(file) for file in files if file.endswith((".md", ".py"))]
    assert any(ANSWERS[question] in text for text in texts)
