"""A run's files, by the package `wandb` from a service on loopback: the newest, whole; the key goes nowhere else."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from loopback import QuietHandler, serving

from cartridges_jax import serve
from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line.errors import MissingPackage, UserError
from cartridges_jax.interop import formats, sources, wandb
from cartridges_jax.interop.sources import dataset_files
from cartridges_jax.training.data import read_examples

KEY = "secret" * 7


class Service:
    def __init__(self) -> None:
        self.files: dict[str, tuple[str, bytes]] = {}  # name -> time, content
        self.storage = ""  # another host, to which downloads are redirected
        self.asked: list[tuple[str, str | None]] = []  # path and Authorization
        self.url = ""
        self.promised: int | None = None  # bytes of every file, if not the truth


def answer(service: Service, query: str, variables: dict[str, Any]) -> dict[str, Any]:
    """What the service answers to the package's queries, as far as the package reads it."""
    if "serverInfo" in query:
        return {"serverInfo": {"features": []}}
    if "project(" not in query:
        return {"viewer": {"id": "1", "username": "me", "entity": "me", "flags": "{}", "teams": {"edges": []}}}
    nodes = [
        {
            "__typename": "File",
            "id": name,
            "name": name,
            "url": f"{service.url}/files/{name}",
            "directUrl": f"{service.url}/files/{name}",
            "sizeBytes": service.promised or len(content),
            "updatedAt": time,
        }
        | dict.fromkeys(("storagePath", "mimetype", "digest", "md5"))
        for name, (time, content) in service.files.items()
    ]
    page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
    files = {"edges": [{"node": node, "cursor": ""} for node in nodes], "pageInfo": page, "totalCount": len(nodes)}
    if "run(" in query:
        if variables["name"] != "abc123":
            return {"project": {"run": None}}
        run = dict.fromkeys(("config", "systemMetrics", "summaryMetrics"), "{}") | {"state": "finished", "user": {}}
        run |= {"id": "r", "name": "abc123", "displayName": "r", "projectId": "1", "fileCount": len(nodes)}
        return {"project": {"internalId": "1", "run": run | {"files": files}}}
    if "artifactMembership(" in query:
        membership = {"files": files}
        return {"project": {"artifactCollection": {"__typename": "ArtifactSequence", "artifactMembership": membership}}}
    project = {"__typename": "Project", "id": "1", "internalId": "1", "name": "project", "entity": {"name": "me"}}
    collection = {"__typename": "ArtifactSequence", "name": "talks", "project": project}
    artifact = dict.fromkeys(("description", "metadata", "historyStep", "commitHash", "updatedAt")) | {
        "__typename": "Artifact",
        "id": "a",
        "artifactSequence": collection,
        "versionIndex": 2,
        "tags": [],
    }
    artifact |= {"ttlDurationSeconds": 0, "ttlIsInherited": False}
    artifact |= {"artifactType": {"name": "dataset"}, "state": "COMMITTED", "size": 1, "digest": "d", "fileCount": 1}
    artifact |= {"createdAt": "2026-01-01T00:00:00", "aliases": []}
    membership = {"__typename": "ArtifactCollectionMembership", "id": "m", "versionIndex": 2, "aliases": []}
    membership |= {"createdAt": "2026-01-01T00:00:00", "artifactCollection": collection, "artifact": artifact}
    return {"project": {"artifactCollectionMembership": membership if variables["name"] == "talks:v2" else None}}


@contextmanager
def run_service(service: Service) -> Iterator[str]:
    class Handler(QuietHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path != "/graphql":  # what the package counts of itself
                return self.send(200, b"")
            asked = json.loads(content)
            self._send(
                200, json.dumps({"data": answer(service, asked["query"], asked.get("variables") or {})}).encode()
            )

        def do_GET(self) -> None:
            if service.storage and self.headers["Host"] in service.url:
                return self._send(302, b"", service.storage.replace("127.0.0.1", "localhost") + self.path)
            _, content = service.files[self.path.removeprefix("/files/")]
            self._send(200, content)

        def _send(self, status: int, content: bytes, location: str = "") -> None:
            service.asked.append((self.path, self.headers.get("Authorization")))
            expected = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()
            if self.headers["Host"] in service.url and self.headers.get("Authorization") != expected:
                status, content = 401, b""
            self.send(status, content, **({"Location": location} if location else {}))

    with serving(Handler) as url:
        yield url


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    service = Service()
    with run_service(service) as service.url, run_service(service) as service.storage:
        for name, value in (("BASE_URL", service.url), ("API_KEY", KEY)):
            monkeypatch.setenv(f"WANDB_{name}", value)
        monkeypatch.setenv("CARTRIDGES_JAX_CACHE", str(tmp_path / "cache"))
        yield service


def add(service: Service, cartridge: Cartridge, tmp_path: Path, name: str, time: str) -> None:
    formats.write(cartridge, tmp_path / name, "upstream")
    service.files[name] = time, (tmp_path / name).read_bytes()


def test_the_newest_cartridge_of_a_run_is_fetched_once(cartridge: Cartridge, service: Service, tmp_path: Path):
    add(service, cartridge.replace(num_frozen=0), tmp_path, "cache-step9.pt", "2026-01-01T00:00:00")
    add(service, cartridge, tmp_path, "cache-step20.pt", "2026-01-02T00:00:00")
    service.files["config.yaml"] = "2026-01-01T00:00:00", b"model: {value: {pretrained_model_name_or_path: a/b}}"
    service.files["../../evil.pt"] = "2026-01-03T00:00:00", b"PK"
    found = Cartridge.load("wandb:me/project/abc123", model=tiny.model())
    assert (found.num_frozen, found.provenance) == (3, cartridge.provenance)
    assert {path for path, _ in service.asked} == {"/graphql", "/files/cache-step20.pt", "/files/config.yaml"}
    # the storage gets the request without the key
    assert sum(sent is None for path, sent in service.asked if path != "/graphql") == 2
    service.asked.clear()
    Cartridge.load("wandb:me/project/abc123")
    assert {path for path, _ in service.asked} == {"/graphql"}


def test_what_is_too_large_is_not_fetched(
    cartridge: Cartridge, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    add(service, cartridge, tmp_path, "cartridge.pt", "2026-01-02T00:00:00")
    monkeypatch.setattr(sources, "CARTRIDGE_BYTES", 10)
    with pytest.raises(
        ValueError, match=r"files of wandb:me/project/abc123 have 0\.0 GB, and at most 0\.0 GB are fetched"
    ):
        Cartridge.load("wandb:me/project/abc123")
    monkeypatch.undo()
    service.promised = 100  # and more comes
    for name, value in (("WANDB_BASE_URL", service.url), ("WANDB_API_KEY", KEY), ("CARTRIDGES_JAX_CACHE", tmp_path)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConnectionError, match=r"cartridge\.pt has [0-9]+ bytes, 100 were promised"):
        Cartridge.load("wandb:me/project/abc123")
    assert not list((tmp_path / "cache").rglob("*.pt"))


@pytest.mark.parametrize("source", ["wandb:me/project/abc123", "wandb:me/project/talks:v2"])
@pytest.mark.parametrize("folder", ["", "data/", "dataset/"])
def test_the_dataset_of_a_run_or_artifact_is_fetched_once(service: Service, tmp_path: Path, source: str, folder: str):
    tiny.write_dataset(tmp_path / "dataset.parquet", tiny.model(), count=3)
    content = (tmp_path / "dataset.parquet").read_bytes()
    for name in ("a.parquet", "b.parquet"):
        service.files[folder + name] = "2026-01-01T00:00:00", content
    service.files["../evil.parquet"] = service.files["cartridge.pt"] = "2026-01-01T00:00:00", b""
    assert len(read_examples(source, tiny.model().tokenizer)) == 6
    assert [file.read_bytes() for file in dataset_files(source)] == [content] * 2
    assert sorted(path for path, sent in service.asked if sent is None) == [f"/files/{folder}{n}.parquet" for n in "ab"]
    service.files.clear()
    with pytest.raises(FileNotFoundError, match="has no Parquet file"):
        dataset_files(source)


def test_each_failure_is_a_sentence(
    cartridge: Cartridge, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for source in ("wandb:abc123", "wandb:a/b/../c", "wandb:a/../abc123", "wandb:a/b/c/d", "wandb:"):
        with pytest.raises(UserError, match="is no source: expected wandb:entity/project/run"):
            Cartridge.load(source)
    with pytest.raises(FileNotFoundError, match="gives no me/project/other"):
        Cartridge.load("wandb:me/project/other")
    with pytest.raises(FileNotFoundError, match="gives no me/project/other:v1"):
        dataset_files("wandb:me/project/other:v1")
    with pytest.raises(FileNotFoundError, match=r"has no cartridge\.safetensors"):
        Cartridge.load("wandb:me/project/abc123")
    add(service, cartridge, tmp_path, "cartridge.pt", "2026-01-02T00:00:00")
    for wrong in ("wrong", "wrong" * 8):
        monkeypatch.setenv("WANDB_API_KEY", wrong)
        with pytest.raises(PermissionError, match=r"needs a login \(.*\): set WANDB_API_KEY"):
            Cartridge.load("wandb:me/project/abc123")
    monkeypatch.setattr(wandb, "TIMEOUT_SECONDS", 2)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="cannot be reached"):
        Cartridge.load("wandb:me/project/abc123")
    assert not list((tmp_path / "cache").rglob("*.pt"))


def test_no_login_and_no_package_are_sentences(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(PermissionError, match=r"needs a login \(.*\): set WANDB_API_KEY"):
        Cartridge.load("wandb:me/project/abc123")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackage, match=r"pip install 'cartridges-jax\[wandb\]'"):
        Cartridge.load("wandb:me/project/abc123")


def test_a_server_on_a_terminal_asks_nobody_for_a_key(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    async def run(*_: Any) -> int:
        with pytest.raises(PermissionError, match=r"needs a login \(.*\): set WANDB_API_KEY"):
            Cartridge.load("wandb:me/project/abc123")
        return 0

    monkeypatch.delenv("WANDB_API_KEY")
    for name, value in (("HOME", str(tmp_path)), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    for name in ("stdin", "stderr"):
        monkeypatch.setattr(sys, name, Terminal())
    monkeypatch.setattr(serve, "run", run)
    monkeypatch.setattr(serve, "_load", lambda *_: (None, "tiny"))
    assert serve.main(["--port=0", "--no-warmup", "--remote-sources"]) == 0
