"""A hub on this machine: what huggingface_hub's client asks of one to create a repository, upload, list and download.

Small files come in the commit, safetensors by Git LFS, as on the real hub. Files are kept in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Repositories by name, each of files by path; `seen` lists the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.lfs: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.seen: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        path = self._path()
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            repo = found[1]
            if repo not in self.server.repos:
                return self._not_found()
            files = [{"rfilename": name} for name in self.server.repos[repo]]
            return self._json({"id": repo, "modelId": repo, "sha": self._sha(repo), "siblings": files, "tags": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            files = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.server.repos[found[1]].items()
            ]
            return self._json(files)
        return self._file(path)

    def do_HEAD(self) -> None:
        self._file(self._path())

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        self.server.tokens.add(self.headers.get("Authorization", ""))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.repos.setdefault(repo, {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.server.private.add(repo)
            return self._json({"url": f"{self.server.address}/{repo}", "name": repo, "id": "1"})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.address}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            repo = self.server.repos[found[1]]
            for line in body.splitlines():
                operation = json.loads(line)
                value = operation["value"]
                if operation["key"] == "file":
                    repo[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    repo[value["path"]] = self.server.lfs[value["oid"]]
            sha = self._sha(found[1])
            return self._json({"commitUrl": f"{self.server.address}/{found[1]}/commit/{sha}", "commitOid": sha})
        return self._not_found()

    def do_PUT(self) -> None:
        body = self._body()
        assert self._path() == f"/lfs/{hashlib.sha256(body).hexdigest()}"
        self.server.lfs[hashlib.sha256(body).hexdigest()] = body
        self._json({})

    def _file(self, path: str) -> None:
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        content = self.server.repos.get(found[1], {}).get(found[2]) if found else None
        if found is None or content is None:
            return self._not_found()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self._sha(found[1])}
        return self._send(content, headers)

    def _sha(self, repo: str) -> str:
        facts = json.dumps({n: hashlib.sha1(c).hexdigest() for n, c in sorted(self.server.repos[repo].items())})
        return hashlib.sha1(facts.encode()).hexdigest()

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.server.seen.append(f"{self.command} {path}")
        return path

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _not_found(self) -> None:
        self._send(b"{}", {"X-Error-Code": "RepoNotFound"}, 404)

    def _send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
