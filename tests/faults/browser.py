"""Chromium without a window, and what a page does in it: the page's own view, console messages, addresses asked for."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-sync", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-dev-shm-usage",
    "--enable-logging=stderr", "--proxy-bypass-list=<-loopback>", "--virtual-time-budget=3000", "--timeout=20000",
)  # fmt: skip
# What Chromium itself asks for at its start, page or no page, in spite of the options above.
_OWN = re.compile(r"^(https?://)?[\w.-]+\.(google|googleapis|gvt1|gstatic)\.com(:443)?(/|$)")
_CONSOLE = re.compile(r":CONSOLE:\d+\] (.*)")


class Visit(NamedTuple):
    """What a page did."""

    dom: str
    """The page as it stands at the end, scripts or no scripts, in HTML again."""
    console: list[str]
    """Messages of scripts, errors and what a Content-Security-Policy has kept back."""
    asked_for: list[str]
    """Addresses outside of the page, https ones by host and port."""


def visit(page: Path, scratch: Path, *options: str) -> Visit:
    """Open a file, let it run for three seconds of its own time, and report."""
    with _proxy() as (port, seen):
        ended = _chromium(scratch, f"--proxy-server=127.0.0.1:{port}", *options, "--dump-dom", page.as_uri())
    return Visit(ended.stdout, _CONSOLE.findall(ended.stderr), [each for each in seen if not _OWN.match(each)])


def without_policy(page: Path) -> Path:
    """The same page without its Content-Security-Policy, under which no script runs."""
    text = page.read_text(encoding="utf-8")
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert len(bare) < len(text)
    path = page.with_name(f"bare-{page.name}")
    path.write_text(bare, encoding="utf-8")
    return path


def screenshot(page: Path, picture: Path, scratch: Path, size: str = "1280,6000") -> None:
    """A PNG of the page."""
    _chromium(scratch, f"--screenshot={picture}", f"--window-size={size}", "--hide-scrollbars", page.as_uri())


def _chromium(scratch: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(CHROMIUM), *_OPTIONS, f"--user-data-dir={scratch}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=240, check=True)


@contextmanager
def _proxy() -> Iterator[tuple[int, list[str]]]:
    """A proxy on this machine that answers nothing and keeps every address it is asked for."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(204)
            self.end_headers()

        do_POST = do_HEAD = do_OPTIONS = do_CONNECT = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port, seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
