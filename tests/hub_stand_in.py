"""A Hugging Face hub on loopback: the few endpoints that huggingface-hub asks for one file.

Answers as the real hub does for large files: HEAD gives size, hash and commit in X- headers,
GET redirects to another host (the same server by another name), which honours Range.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
_TREE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/[^/]+")


@dataclass
class HubStandIn:
    """What the hub holds, how it misbehaves, and what it was asked."""

    repos: dict[str, dict[str, bytes]]
    port: int = 0
    gated: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    announced_sizes: dict[str, int] = field(default_factory=dict)
    served: dict[str, bytes] = field(default_factory=dict)
    """Bytes to send instead of the right ones, by file name."""
    cut_after: dict[str, int] = field(default_factory=dict)
    """File name -> body bytes after which the next GET loses its connection, once."""
    stall_after: dict[str, int] = field(default_factory=dict)
    """File name -> body bytes after which the next GET sends no more, until released."""
    requests: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)
    """(method, path, Range, Authorization), in order of arrival."""
    stalled: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ranges(self) -> list[str | None]:
        return [wanted for method, path, wanted, _ in self.requests if path.startswith("/cdn/")]

    @contextmanager
    def running(self) -> Iterator[HubStandIn]:
        hub = self

        class Handler(_Handler):
            stand_in = hub

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            self.port = server.server_address[1]
            thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
            thread.start()
            try:
                yield self
            finally:
                self.release.set()
                server.shutdown()
                thread.join()


class _Handler(BaseHTTPRequestHandler):
    stand_in: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.stand_in
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(
            (self.command, path, self.headers["Range"], self.headers["Authorization"])
        )
        if path.startswith("/cdn/"):
            self._send_file(*path.removeprefix("/cdn/").split("|"))
        elif match := _RESOLVE.fullmatch(path):
            self._resolve(match["repo"], match["name"])
        elif (match := _TREE.fullmatch(path)) and match["repo"] in hub.repos:
            self._tree(match["repo"])
        else:
            self._fail(404, "RepoNotFound")

    def _resolve(self, repo: str, name: str) -> None:
        hub = self.stand_in
        if repo in hub.refused:
            return self._fail(403, None)
        if repo not in hub.repos:
            return self._fail(401 if self.command == "HEAD" else 404, "RepoNotFound")
        if repo in hub.gated:
            return self._fail(403, "GatedRepo")
        if name not in hub.repos[repo]:
            return self._fail(404, "EntryNotFound")
        content = hub.repos[repo][name]
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{hub.port}/cdn/{repo}|{name}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Size", str(hub.announced_sizes.get(name, len(content))))
        self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_file(self, repo: str, name: str) -> None:
        hub = self.stand_in
        content = hub.served.get(name, hub.repos[repo][name])
        first = 0
        if wanted := self.headers["Range"]:
            first = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = content[first:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if name in hub.cut_after:
            self.wfile.write(body[: hub.cut_after.pop(name)])
            self.close_connection = True
        elif name in hub.stall_after:
            self.wfile.write(body[: hub.stall_after.pop(name)])
            self.wfile.flush()
            hub.stalled.set()
            hub.release.wait(60)
            self.close_connection = True
        else:
            self.wfile.write(body)

    def _tree(self, repo: str) -> None:
        files = self.stand_in.repos[repo].items()
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
            for name, content in files
        ]
        body = json.dumps(entries).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _fail(self, status: int, code: str | None) -> None:
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
