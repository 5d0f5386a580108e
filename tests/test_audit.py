"""The dependency audit of CI: a known hole fails it, and advisories out of reach are not taken for none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

AUDIT = Path(__file__).parents[1] / ".ci" / "audit.py"
HOLE = {
    "id": "PYSEC-0000-1",
    "summary": "made for this test",
    "affected": [
        {
            "package": {"name": "jinja2", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.5"}]}],
        }
    ],
}


@contextmanager
def advisories(status: int = 200) -> Iterator[str]:
    """Address of a service that speaks OSV and knows one hole, of every Jinja2 before 2.5."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known = asked["package"]["name"] == "jinja2" and asked["version"] == "2.4"
            body = json.dumps({"vulns": [HOLE]} if known else {}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def audit(requirements: Path, address: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(AUDIT), "--requirement", str(requirements), "--cache-dir"]
    command += [str(requirements.parent / "cache"), "--vulnerability-service", "osv", "--osv-url", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_known_hole_fails_the_audit_by_package_and_mended_version(tmp_path: Path) -> None:
    pinned = tmp_path / "pinned.txt"
    pinned.write_text("jinja2==2.4\nrich==14.0.0\n", encoding="utf-8")
    with advisories() as address:
        done = audit(pinned, address)
    assert (done.returncode, done.stdout) == (1, "audited: 2 of 2 packages, 1 known holes\n"), done.stderr
    assert "jinja2 2.4: PYSEC-0000-1, mended in 2.5" in done.stderr


def test_without_a_known_hole_the_audit_passes(tmp_path: Path) -> None:
    pinned = tmp_path / "pinned.txt"
    pinned.write_text("jinja2==2.5\n", encoding="utf-8")
    with advisories() as address:
        done = audit(pinned, address)
    assert (done.returncode, done.stdout) == (0, "audited: 1 of 1 packages, 0 known holes\n"), done.stderr


def test_advisories_out_of_reach_are_not_taken_for_none(tmp_path: Path) -> None:
    pinned = tmp_path / "pinned.txt"
    pinned.write_text("jinja2==2.4\n", encoding="utf-8")
    with advisories(status=503) as address:
        done = audit(pinned, address)
    assert done.returncode == 0 and "AUDIT NOT DONE" in done.stderr
    assert "1 of 1" not in done.stdout
