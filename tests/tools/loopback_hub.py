"""A small hub on the loopback interface: enough of its protocol for the real client, and faults on request.

Two servers, as in life: the hub answers questions about repositories, and sends whoever wants a large file to
another host (here: another port), which must never see a token.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE_BYTES = 10_000
"""Files from this size on are kept on the other host, with a sha256."""


@dataclass
class Faults:
    """What goes wrong."""

    status: int = 0
    error_code: str = ""
    cut_after: int | None = None
    corrupt: bool = False
    hold: threading.Event | None = None
    hold_after: int = 0


@dataclass
class Request:
    """What was asked."""

    host: str
    method: str
    path: str
    authorization: str | None
    byte_range: str | None
    user_agent: str


@dataclass
class LoopbackHub:
    """A running hub; a context manager."""

    faults: Faults = field(default_factory=Faults)
    requests: list[Request] = field(default_factory=list)
    holding: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self._names: dict[str, dict[str, str]] = {}
        self._servers = [_Server(("127.0.0.1", 0), _handler(self, host)) for host in ("hub", "storage")]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def storage(self) -> str:
        return f"http://127.0.0.1:{self._servers[1].server_port}"

    def commit(self, repo: str, files: dict[str, bytes], *names: str) -> str:
        """Add a commit of a repository; ``main`` and the given names then mean it."""
        content = b"".join(name.encode() + data for name, data in sorted(files.items()))
        commits = self._repos.setdefault(repo, {})
        commit = _sha1(content + bytes([len(commits)]))
        commits[commit] = files
        for name in ("main", *names):
            self._names.setdefault(repo, {})[name] = commit
        return commit

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self._names.get(repo, {}).get(revision, revision)
        files = self._repos.get(repo, {}).get(commit)
        return None if files is None else (commit, files)

    def has(self, repo: str) -> bool:
        return repo in self._repos

    def of(self, host: str, method: str) -> list[Request]:
        return [request for request in self.requests if (request.host, request.method) == (host, method)]

    def __enter__(self) -> LoopbackHub:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.faults.hold is not None:
            self.faults.hold.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that go away are what is tested."""


def _handler(hub: LoopbackHub, host: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            hub.requests.append(
                Request(
                    host,
                    self.command,
                    self.path,
                    self.headers.get("Authorization"),
                    self.headers.get("Range"),
                    self.headers.get("User-Agent", ""),
                )
            )
            if hub.faults.status:
                self._fail(hub.faults.status, hub.faults.error_code)
                return
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            if host == "storage":
                _, organisation, name, commit, *file = parts
                found = hub.find(f"{organisation}/{name}", commit)
                assert found is not None
                self._send(found[1]["/".join(file)])
            elif parts[:2] == ["api", "models"]:
                self._describe("/".join(parts[2:4]), "/".join(parts[5:]) or "main")
            elif parts[2:3] == ["resolve"]:
                self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                self._fail(404, "")

        def _describe(self, repo: str, revision: str) -> None:
            found = hub.find(repo, revision)
            if found is None:
                self._fail(*((404, "RevisionNotFound") if hub.has(repo) else (401, "RepoNotFound")))
                return
            commit, files = found
            siblings: list[dict[str, Any]] = []
            for name, data in files.items():
                sibling = {"rfilename": name, "size": len(data), "blobId": _blob(data)}
                if len(data) >= LARGE_BYTES:
                    sibling["lfs"] = {"sha256": _sha256(data), "size": len(data), "pointerSize": 130}
                siblings.append(sibling)
            document = {"_id": "0", "id": repo, "modelId": repo, "sha": commit, "siblings": siblings}
            body = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _resolve(self, repo: str, revision: str, name: str) -> None:
            found = hub.find(repo, revision)
            if found is None or name not in found[1]:
                self._fail(404, "EntryNotFound")
                return
            commit, files = found
            data = files[name]
            if len(data) < LARGE_BYTES:
                self._send(data, {"X-Repo-Commit": commit, "ETag": f'"{_blob(data)}"'})
                return
            self.send_response(302)
            self.send_header("Location", f"{hub.storage}/blobs/{repo}/{commit}/{name}")
            self.send_header("X-Repo-Commit", commit)
            self.send_header("X-Linked-Etag", f'"{_sha256(data)}"')
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, data: bytes, headers: dict[str, str] | None = None) -> None:
            faults = hub.faults
            if faults.corrupt:
                data = data[:-1] + bytes([data[-1] ^ 1])
            start = 0
            if self.headers.get("Range"):
                start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            body = data[start:]
            self.send_response(206 if start else 200)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if faults.cut_after is not None:
                self.wfile.write(body[: max(0, faults.cut_after - start)])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            if faults.hold is not None:
                self.wfile.write(body[: faults.hold_after])
                self.wfile.flush()
                hub.holding.set()
                faults.hold.wait(30)
                body = body[faults.hold_after :]
            self.wfile.write(body)

        def _fail(self, status: int, code: str) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _blob(data: bytes) -> str:
    return _sha1(b"blob %d\0" % len(data) + data)


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
