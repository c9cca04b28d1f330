"""A Hugging Face Hub on this machine: enough of its protocol for huggingface_hub to download from it.

Repositories are folders given at start. The server logs each request, so a test can say which files were asked for.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote


@dataclass
class Repository:
    """A repository with one commit per revision name: each revision is a folder of files."""

    revisions: Mapping[str, Path]
    token: str | None = None  # what a request must bring along to see a private repository
    gated: bool = False  # exists, but its terms have not been accepted

    def commit(self, revision: str) -> tuple[str, Path] | None:
        """Return commit hash and folder of a branch, tag or commit; None if there is no such revision."""
        for name, folder in self.revisions.items():
            commit = hashlib.sha1(name.encode()).hexdigest()
            if revision in (name, commit):
                return commit, folder
        return None


@dataclass
class Request:
    """What the server was asked."""

    method: str
    path: str
    token: str | None


@dataclass
class HubServer:
    """``with HubServer({"some/repo": Repository({"main": folder})}) as hub:`` serves on ``hub.url``."""

    repositories: Mapping[str, Repository]
    requests: list[Request] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)  # end of a path -> the status of the answer

    def __enter__(self) -> "HubServer":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            def do_HEAD(self) -> None:
                hub._answer(self)

            def log_message(self, format: str, *args: object) -> None:
                """Keep the test output clean; the requests are in ``hub.requests``."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def downloaded(self) -> list[str]:
        """List the files whose content was sent, as ``repo/revision/path``, in order."""
        return [
            r.path.replace("/resolve/", "/").lstrip("/")
            for r in self.requests
            if r.method == "GET" and "/resolve/" in r.path
        ]

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(handler.path.split("?")[0])
        bearer = handler.headers.get("Authorization", "")
        token = bearer.removeprefix("Bearer ") or None
        self.requests.append(Request(handler.command, path, token))
        for end, status in self.faults.items():
            if path.endswith(end):
                return _send(handler, status)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
            revision, filename = (rest[1] if rest[:1] == ["revision"] else "main"), None
        elif "resolve" not in parts:
            return _send(handler, 404)
        else:
            name, revision, filename = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        repository = self.repositories.get(name)
        if repository is None or (repository.token is not None and token != repository.token):
            return _send(handler, 401, error="RepoNotFound")
        if repository.gated:
            return _send(handler, 403, error="GatedRepo")
        found = repository.commit(revision)
        if found is None:
            return _send(handler, 404, error="RevisionNotFound")
        commit, folder = found
        if filename is None:
            files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
            body = {
                "id": name,
                "sha": commit,
                "siblings": [{"rfilename": f} for f in files],
                "tags": [],
                "downloads": 0,
            }
            return _send(handler, 200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        headers = {"X-Repo-Commit": commit}
        if not (folder / filename).is_file():
            return _send(handler, 404, error="EntryNotFound", headers=headers)
        content = (folder / filename).read_bytes()
        headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
        return _send(handler, 200, content, headers)


def _send(
    handler: BaseHTTPRequestHandler,
    status: int,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    error: str | None = None,
) -> None:
    handler.send_response(status)
    for key, value in {**(headers or {}), **({"X-Error-Code": error} if error else {})}.items():
        handler.send_header(key, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(body)


def run_with(hub: HubServer, cache: Path, code: str, **environment: str) -> str:
    """Run code in a fresh process that knows ``hub`` as the Hub; return what it prints, or its error's last line.

    huggingface_hub reads its environment once, when it is imported: hence the process.
    """
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    hub.requests.clear()
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **settings}, capture_output=True, text=True, timeout=60
    )
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
