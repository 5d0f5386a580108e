"""The one script that Material takes from another host, for the search in pages opened as files, from our assets."""

from __future__ import annotations

from typing import Any

from mkdocs.utils import get_relative_url

ELSEWHERE = "https://unpkg.com/iframe-worker/shim"


def on_post_page(output: str, page: Any, **_: Any) -> str:
    return output.replace(ELSEWHERE, get_relative_url("assets/iframe-worker.js", page.file.url))


def on_post_template(output_content: str, template_name: str, **_: Any) -> str:
    return output_content.replace(ELSEWHERE, "assets/iframe-worker.js")  # 404.html
