"""A small Hugging Face hub of this machine, to which the hub's own client talks: folders behind HTTP."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_the_right_token"


class HubServer:
    """Serves `folder/models/owner/name` and `folder/datasets/owner/name`; whoever has the token may write.

    Each repository has one commit at a time, whose hash is that of its files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.private: set[str] = set()
        """Repositories that only the token opens."""
        self.gated: set[str] = set()
        """Repositories that nobody was let into."""
        self.owner = "me"
        """Whose repositories the token may write."""
        self.asked: list[str] = []
        """Method and path of every request."""
        self.uploads: dict[str, bytes] = {}
        """Large files by their digest, which a commit refers to."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def repository(self, kind: str, name: str) -> Path:
        """The folder of a repository."""
        return self.folder / kind / name

    def files(self, kind: str, name: str) -> dict[str, bytes]:
        """What it holds, by path."""
        root = self.repository(kind, name)
        found = sorted(path for path in root.rglob("*") if path.is_file())
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}

    def vanish(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No more answers; the client, which waits for half a minute in all, tries again at once."""
        hasty = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
        monkeypatch.setattr("huggingface_hub.utils._http.time", hasty)
        self.close()

    def close(self) -> None:
        """No more answers."""
        self._server.shutdown()
        self._server.server_close()


def commit_of(files: dict[str, bytes]) -> str:
    """A hash of the kind that git gives."""
    return hashlib.sha1(b"".join(name.encode() + data for name, data in files.items())).hexdigest()


def environment(home: Path, url: str, token: str | None = None, *, offline: bool = False) -> dict[str, str]:
    """Variables by which a process finds the server, and a home of its own."""
    known = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    flags = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if offline else {}
    return {**known, **flags, **({"HF_TOKEN": token} if token is not None else {})}


def talk_to(url: str, home: Path, monkeypatch: pytest.MonkeyPatch, token: str | None = None) -> None:
    """Make this process's clients, which have read their environment long ago, talk to a server and keep to a home."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment(home, url, token).items():
        monkeypatch.setenv(name, value)
    models = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }
    data_sets = {
        "HF_ENDPOINT": url,
        "HUB_DATASETS_URL": url + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HF_DATASETS_CACHE": home / "datasets",
        "HF_MODULES_CACHE": home / "modules",
        "DOWNLOADED_DATASETS_PATH": home / "datasets" / "downloads",
        "HF_HUB_OFFLINE": False,
    }
    _set("huggingface_hub.constants", models, monkeypatch)
    _set("datasets.config", data_sets, monkeypatch)


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_HUB_OFFLINE=1 does when a process starts."""
    for module in ("huggingface_hub.constants", "datasets.config"):
        _set(module, {"HF_HUB_OFFLINE": True}, monkeypatch)


def _set(module: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.import_module(module)
    for name, value in values.items():
        monkeypatch.setattr(found, name, value, raising=False)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"  # no connection outlives the server
    hub: HubServer

    def do_HEAD(self) -> None:
        self._read()

    def do_GET(self) -> None:
        self._read()

    def do_PUT(self) -> None:
        data = self._body()
        self.hub.uploads[hashlib.sha256(data).hexdigest()] = data
        self._send(200, b"")

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif not self._known():
            self._refuse(401, "Invalid username or password.")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path):
            self._preupload(json.loads(body)) if found[2] == "preupload" else self._commit(found[1], body)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        else:
            self._refuse(404, "Not found")

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _path(self) -> str:
        self.hub.asked.append(f"{self.command} {self.path}")
        return unquote(urlsplit(self.path).path)

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        folder = self.hub.repository("models", name)
        if wanted["organization"] != self.hub.owner:
            self._refuse(403, "You don't have the rights to create a model under this namespace")
        elif folder.exists():
            self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        else:
            folder.mkdir(parents=True)
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.hub.private.add(name)
            self._json({"url": f"{self.hub.url}/{name}"})

    def _preupload(self, asked: dict[str, Any]) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in asked["files"]
        ]
        self._json({"files": modes})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}
            for wanted in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, body: bytes) -> None:
        root = self.hub.repository("models", name)
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                (root / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                (root / value["path"]).write_bytes(self.hub.uploads[value["oid"]])
            elif operation["key"] == "deletedFile":
                (root / value["path"]).unlink()
        commit = commit_of(self.hub.files("models", name))
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit, "success": True})

    def _read(self) -> None:
        path = self._path()
        about = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+)(/.*)?)?", path)
        content = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if about is not None:
            if (files := self._open(about[1], about[2], about[4])) is not None:
                if about[3] == "tree":
                    self._tree(files, (about[5] or "/").strip("/"))
                else:
                    self._about(about[2], files)
        elif content is not None:
            files = self._open("datasets" if content[1] else "models", content[2], content[3])
            if files is not None:
                self._content(files, content[4])
        else:
            self._refuse(404, "Not found")

    def _open(self, kind: str, name: str, revision: str | None) -> dict[str, bytes] | None:
        """The files of a repository, unless this request may not see them; then it is answered."""
        files = self.hub.files(kind, name)
        if name in self.hub.gated:
            self._refuse(401, "Access to this repository is restricted", "GatedRepo")
        elif not self.hub.repository(kind, name).exists() or (name in self.hub.private and not self._known()):
            self._refuse(404 if self._known() else 401, "Repository not found", "RepoNotFound")
        elif revision not in (None, "main", commit_of(files)):
            self._refuse(404, "Invalid rev id", "RevisionNotFound")
        else:
            return files
        return None

    def _about(self, name: str, files: dict[str, bytes]) -> None:
        siblings = [{"rfilename": path} for path in files]
        private = name in self.hub.private
        self._json({"id": name, "sha": commit_of(files), "private": private, "siblings": siblings, "tags": []})

    def _tree(self, files: dict[str, bytes], below: str) -> None:
        """What lies right in a folder, or all below it."""
        prefix = f"{below}/" if below else ""
        inside = {path: data for path, data in files.items() if path.startswith(prefix)}
        if "recursive=true" not in self.path.lower():
            folders = {prefix + path.removeprefix(prefix).partition("/")[0] for path in inside} - inside.keys()
            inside = {path: data for path, data in inside.items() if "/" not in path.removeprefix(prefix)}
        else:
            folders = {parent.as_posix() for path in inside for parent in Path(path).parents} - {".", below}
        if below and not inside and not folders:
            self._refuse(404, "Entry not found", "EntryNotFound")
            return
        oids = {path: hashlib.sha1(data).hexdigest() for path, data in inside.items()}
        entries = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        entries += [{"type": "file", "path": path, "size": len(inside[path]), "oid": oids[path]} for path in inside]
        self._json(entries)

    def _content(self, files: dict[str, bytes], path: str) -> None:
        headers = {"X-Repo-Commit": commit_of(files)}
        if path not in files:
            self._refuse(404, "Entry not found", "EntryNotFound", headers)
            return
        digest = hashlib.sha1(files[path]).hexdigest()
        self._send(200, files[path], {**headers, "ETag": f'"{digest}"', "Accept-Ranges": "none"})

    def _refuse(self, status: int, why: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        named = {"X-Error-Code": code} if code else {}
        self._json({"error": why}, status, {**(headers or {}), **named, "X-Error-Message": why})

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))
