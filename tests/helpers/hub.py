"""The parts of the Hugging Face Hub's HTTP interface that uploads and downloads of models use, on localhost."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

LICENCES = {"mit", "bsd-3-clause", "apache-2.0", "other", "unknown"}


@dataclass
class Repo:
    """A model repository: the files of each commit, oldest first."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def files(self, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """The commit `revision`, or the newest one for `main`; None if there is none."""
        if revision in (None, "main"):
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


@dataclass
class Hub:
    """`tokens`: token → user, who may write to repositories of this name. `status`: answers of requests that fail,
    by "METHOD path". `requests`: what was asked for, in order.
    """

    address: str
    tokens: dict[str, str] = field(default_factory=lambda: {"secret": "someone"})
    repos: dict[str, Repo] = field(default_factory=dict)
    datasets: set[str] = field(default_factory=set)
    uploaded: dict[str, bytes] = field(default_factory=dict)  # by sha256
    status: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)  # path → bytes of the answer

    def add(self, name: str, files: dict[str, bytes]) -> str:
        """A new commit with these files; returns its name."""
        repo = self.repos.setdefault(name, Repo())
        before = repo.commits[-1][1] if repo.commits else {}
        commit = hashlib.sha1(repr((name, len(repo.commits))).encode()).hexdigest()
        repo.commits.append((commit, {**before, **files}))
        return commit


class _Error(Exception):
    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code, self.reason = code, reason


def use_hub(monkeypatch: pytest.MonkeyPatch, address: str, folder: Path) -> None:
    """huggingface_hub in this process asks the Hub at `address`, with its cache in `folder` and without a token."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(folder / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)


@contextlib.contextmanager
def hub_serving() -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._handle()

        def do_GET(self) -> None:
            self._handle()

        def do_POST(self) -> None:
            self._handle()

        def do_PUT(self) -> None:
            self._handle()

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _handle(self) -> None:
            path = self.path.split("?")[0]
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append(f"{self.command} {path}")
            headers: dict[str, str] = {}
            code = 200
            try:
                if refused := hub.status.get(f"{self.command} {path}"):
                    raise _Error(refused)
                if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
                    content, headers, code = self._file(*found.groups())
                else:
                    answer = self._answer(path, body)
                    content = json.dumps(answer).encode()
                    headers["Content-Type"] = "application/json"
            except _Error as error:
                code, content = error.code, json.dumps({"error": error.reason or "refused"}).encode()
                headers["X-Error-Code"] = error.reason
            self.send_response(code)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
                hub.sent[path] = hub.sent.get(path, 0) + len(content)

        def _user(self) -> str:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token not in hub.tokens:
                raise _Error(401)
            return hub.tokens[token]

        def _repo(self, name: str, *, write: bool = False) -> Repo:
            if write and name.split("/")[0] != self._user():
                raise _Error(403)
            if name not in hub.repos:
                raise _Error(404, "RepoNotFound")
            return hub.repos[name]

        def _file(self, name: str, revision: str, file: str) -> tuple[bytes, dict[str, str], int]:
            commit = self._repo(name).files(revision)
            if commit is None:
                raise _Error(404, "RevisionNotFound")
            if file not in commit[1]:
                raise _Error(404, "EntryNotFound")
            content = commit[1][file]
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit[0]}
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(content))}
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(asked[1]), int(asked[2] or len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
                return content[first : last + 1], headers, 206
            return content, headers, 200

        def _answer(self, path: str, body: bytes) -> Any:
            if path == "/api/whoami-v2":
                return {"name": self._user(), "type": "user", "orgs": []}
            if path == "/api/validate-yaml":
                return self._validate(json.loads(body)["content"])
            if path == "/api/repos/create":
                return self._create(json.loads(body))
            if found := re.fullmatch(r"/api/datasets/([\w.-]+/[\w.-]+)", path):
                if found[1] in hub.datasets:
                    return {"id": found[1], "sha": "0" * 40, "siblings": [], "tags": [], "private": False}
                raise _Error(404, "RepoNotFound")
            if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/refs", path):
                branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": "0" * 40}
                self._repo(found[1])
                return {"branches": [branch], "converts": [], "tags": []}
            if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/main", path):
                self._repo(found[1], write=True)
                modes = [
                    {"path": file["path"], "uploadMode": "regular" if file["path"].endswith(".md") else "lfs",
                     "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]  # fmt: skip
                return {"files": modes}
            if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
                self._repo(found[1], write=True)
                objects = [
                    {**one, "actions": {"upload": {"href": f"{hub.address}/lfs/{one['oid']}", "header": {}}}}
                    for one in json.loads(body)["objects"]
                ]
                return {"transfer": "basic", "objects": objects}
            if self.command == "PUT" and (found := re.fullmatch(r"/lfs/(\w+)", path)):
                if hub.status.get("PUT /lfs"):
                    raise _Error(hub.status["PUT /lfs"])
                assert hashlib.sha256(body).hexdigest() == found[1]
                hub.uploaded[found[1]] = body
                return {}
            if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main", path):
                return self._commit(found[1], body)
            if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/(.+))?", path):
                return self._info(*found.groups())
            raise _Error(404, "EntryNotFound")

        def _validate(self, text: str) -> dict[str, Any]:
            header = yaml.safe_load(text.split("---")[1])
            assert header["license"] in LICENCES, header
            return {"errors": [], "warnings": []}

        def _create(self, asked: dict[str, Any]) -> dict[str, Any]:
            user = self._user()
            if asked["organization"] not in (None, user):
                raise _Error(403)
            name = f"{asked['organization'] or user}/{asked['name']}"
            if name in hub.repos:
                raise _Error(409)
            hub.add(name, {".gitattributes": b""})
            hub.repos[name].private = asked.get("visibility") == "private" or bool(asked.get("private"))
            return {"url": f"{hub.address}/{name}"}

        def _commit(self, name: str, body: bytes) -> dict[str, Any]:
            self._repo(name, write=True)
            files = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.uploaded[value["oid"]]
            commit = hub.add(name, files)
            return {"commitUrl": f"{hub.address}/{name}/commit/{commit}", "commitOid": commit, "commitMessage": ""}

        def _info(self, name: str, revision: str | None) -> dict[str, Any]:
            commit = self._repo(name).files(revision)
            if commit is None:
                raise _Error(404, "RevisionNotFound")
            siblings = []
            for file, content in commit[1].items():
                lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
                siblings.append({"rfilename": file, "size": len(content), "blobId": "0" * 40, "lfs": lfs})
            text = commit[1].get("README.md", b"").decode()
            labels = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
            return {
                "id": name, "sha": commit[0], "siblings": siblings, "tags": [], "private": hub.repos[name].private,
                "cardData": labels,
            }  # fmt: skip

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=lambda: server.serve_forever(0.02), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
