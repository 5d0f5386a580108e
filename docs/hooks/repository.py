"""README, SECURITY, CONTRIBUTING and CHANGELOG as pages, and links that hold on GitHub turned into the site's.

A link to a file of the repository that is no page, such as src/hlora/cli.py, becomes plain text: a site that is read
offline has nothing to open.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

PAGES = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
REPOSITORY = Path(__file__).resolve().parents[2]
log = logging.getLogger("mkdocs.hooks.repository")  # a warning here fails a strict build

_FENCED = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(REPOSITORY / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = page.file.src_uri
    source = {made: source for source, made in PAGES.items()}.get(here, f"docs/{here}")
    parts = _FENCED.split(markdown)
    return "".join(
        part if index % 2 else _LINK.sub(lambda found: _link(found, source, here), part)
        for index, part in enumerate(parts)
    )


def _link(found: re.Match[str], source: str, here: str) -> str:
    image, text, target = found.groups()
    path, hash_, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return found[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if not (REPOSITORY / path).exists():
        log.warning("%s links to %s, which is not there", source, target)
    if (REPOSITORY / path).is_dir():  # the site has pages, and no listing of a folder
        return text
    if path in PAGES:
        path = PAGES[path]
    elif path.startswith("docs/"):
        path = path.removeprefix("docs/")
    else:
        return text
    return f"{image}[{text}]({posixpath.relpath(path, posixpath.dirname(here) or '.')}{hash_}{anchor})"
