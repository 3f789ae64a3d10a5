"""A Hugging Face Hub on loopback: as much of its HTTP API as its client needs to push files and to fetch them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loopback import QuietHandler, serving

TOKEN = "hf_test"
COMMIT = "c" * 40
REPO = r"/api/(models|datasets)/([^/]+/[^/]+)"


class Hub:
    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], dict[str, bytes]] = {}  # (models or datasets, id) -> files
        self.url = ""


@contextmanager
def run_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(QuietHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._error(401, "Unauthorized")
            if self.path == "/api/repos/create":
                return self._create(json.loads(body))
            if match := re.fullmatch(f"{REPO}/preupload/main", self.path):
                names = [file["path"] for file in json.loads(body)["files"]]
                plan = [{"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for n in names]
                return self._json({"files": plan})
            if match := re.fullmatch(f"{REPO}/commit/main", self.path):
                for line in map(json.loads, body.decode().splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        hub.repos[match[1], match[2]][line["value"]["path"]] = content
                url = f"{hub.url}/{match[2]}/commit/{COMMIT}"
                return self._json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
            if self.path == "/api/validate-yaml":
                return self._json({"errors": [], "warnings": []})
            self._error(404, "no such route")

        def do_GET(self) -> None:
            if match := re.fullmatch(rf"{REPO}/revision/(\w+)", self.path.partition("?")[0]):
                files = hub.repos.get((match[1], match[2]))
                if files is None:
                    return self._error(404, "RepoNotFound")
                siblings = [{"rfilename": name} for name in files]
                return self._json({"id": match[2], "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
            if match := re.fullmatch(rf"{REPO}/tree/(\w+)", self.path.partition("?")[0]):
                files = hub.repos.get((match[1], match[2]), {})
                entry = {"type": "file", "oid": COMMIT}
                return self._json([{**entry, "path": name, "size": len(content)} for name, content in files.items()])
            if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/(\w+)/(.+)", self.path):
                files = hub.repos.get(("datasets" if match[1] else "models", match[2]), {})
                if match[4] in files:
                    return self._send(200, files[match[4]], {"X-Repo-Commit": COMMIT})
                return self._error(404, "EntryNotFound")
            self._error(404, "no such route")

        do_HEAD = do_GET

        def _create(self, wanted: dict[str, Any]) -> None:
            kind = "datasets" if wanted.get("type") == "dataset" else "models"
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            taken = (kind, name) in hub.repos
            hub.repos.setdefault((kind, name), {})
            prefix = "datasets/" if kind == "datasets" else ""
            self._json({"url": f"{hub.url}/{prefix}{name}", "name": name}, 409 if taken else 200)

        def _json(self, value: Any, status: int = 200) -> None:
            self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _error(self, status: int, code: str) -> None:
            self._send(status, b"", {"X-Error-Code": code})

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send(status, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', **headers)

    with serving(Handler) as hub.url:
        yield hub
