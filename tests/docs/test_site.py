"""The site, built strictly: no link or anchor leads nowhere, nothing is loaded from elsewhere, everything is on it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
from pages import REPOSITORY

import hlora
from hlora import cli
from hlora.config.run import RunConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(directory)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return directory


def text_of(page: Path) -> str:
    return unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    loads = re.compile(r"<(?:script|img|link|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//[^\s\"'>]*")
    styles = re.compile(r"url\([\"']?(?:https?:)?//|@import")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    assert not [f"{page}: {found}" for page in pages for found in loads.findall(page.read_text(encoding="utf-8"))]
    assert not [str(sheet) for sheet in site.rglob("*.css") if styles.search(sheet.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("words, found", [("protect", "reference/api.html"), ("anchor", "glossary.html")])
def test_a_page_that_is_opened_as_a_file_searches_the_whole_site(site: Path, words: str, found: str) -> None:
    if (browser := shutil.which("chromium")) is None:
        pytest.skip("needs Chromium")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", "--dump-dom"]
    address = f"{(site / 'security.html').as_uri()}?q={words}"
    shown = subprocess.run([*command, address], capture_output=True, text=True, timeout=120).stdout
    results = shown.partition('class="md-search-result__list"')[2].partition("</ol>")[0]
    assert found in results


def test_equations_are_drawn_and_none_is_left_as_latex(site: Path) -> None:
    how = (site / "how-it-works.html").read_text(encoding="utf-8")
    assert how.count('role="img" aria-label="') > 20
    for page in site.rglob("*.html"):
        assert "arithmatex" not in page.read_text(encoding="utf-8"), page


def test_the_reference_has_every_public_name_with_its_signature_every_command_and_every_field(site: Path) -> None:
    api = (site / "reference" / "api.html").read_text(encoding="utf-8")
    assert not [name for name in hlora.__all__ if f'id="hlora.{name}"' not in api]
    assert "trainer: Trainer" in " ".join(text_of(site / "reference" / "api.html").split())
    commands = text_of(site / "reference" / "commands.html")
    assert not [name for name in _commands() if f"hlora {name}" not in commands]
    fields = (site / "reference" / "configuration.html").read_text(encoding="utf-8")
    penalty = RunConfig.model_fields["penalty"].annotation
    assert penalty is not None
    assert not [name for name in penalty.model_fields if f'id="penalty.{name}"' not in fields]


def _commands() -> list[str]:
    import typer

    group = typer.main.get_command(cli.app)
    return list(group.commands)  # type: ignore[attr-defined]
