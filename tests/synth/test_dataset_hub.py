"""Datasets to the Hub and back, against a stand-in of its HTTP API on the loopback, large files and all."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from aiohttp import web
from web_stub import WebStub

import synth
from cartridges_jax.command_line.errors import UserError
from synth import conversation, hub
from synth.conversation import Conversation, Message, flatten

# the library's own way of sending a large file
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_test"
COMMIT = "a" * 40


class HubStub:
    """Repositories as the Hub keeps them: small files in commits, large ones by their SHA-256."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.visibility = ""
        self.url = ""

    def routes(self) -> dict:
        repo = "/api/datasets/{user}/{name}"
        return {
            "POST /api/repos/create": self.create,
            "POST /api/validate-yaml": self.validate,
            f"POST {repo}/preupload/main": self.preupload,
            "POST /datasets/{user}/{name}.git/info/lfs/objects/batch": self.batch,
            "PUT /lfs/{oid}": self.put,
            f"POST {repo}/commit/main": self.commit,
            f"GET {repo}": self.info,
            f"GET {repo}/revision/main": self.info,
            f"GET {repo}/tree/{{revision}}": self.tree,
            "GET /datasets/{user}/{name}/resolve/{revision}/{path:.+}": self.resolve,
            "HEAD /datasets/{user}/{name}/resolve/{revision}/{path:.+}": self.resolve,
        }

    async def create(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.json_response({"error": "Invalid credentials"}, status=401)
        asked = await request.json()  # older clients say "private"
        self.visibility = asked.get("visibility") or ("private" if asked.get("private") else "public")
        return web.json_response({"url": f"{self.url}/datasets/me/data"})

    async def validate(self, request: web.Request) -> web.Response:
        front_matter = (await request.json())["content"].split("---\n")[1]
        (split,) = yaml.safe_load(front_matter)["configs"][0]["data_files"]
        assert split == {"split": "train", "path": "data/*.parquet"}
        return web.json_response({"errors": [], "warnings": []})

    async def preupload(self, request: web.Request) -> web.Response:
        asked = (await request.json())["files"]
        return web.json_response(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".parquet") else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for file in asked
                ]
            }
        )

    async def batch(self, request: web.Request) -> web.Response:
        asked = await request.json()
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}", "header": {}}}} for o in asked["objects"]
        ]
        answer = {"transfer": "basic", "objects": objects}
        return web.json_response(answer, content_type="application/vnd.git-lfs+json")

    async def put(self, request: web.Request) -> web.Response:
        data = await request.read()
        assert hashlib.sha256(data).hexdigest() == request.match_info["oid"]
        self.large[request.match_info["oid"]] = data
        return web.Response()

    async def commit(self, request: web.Request) -> web.Response:
        for line in (await request.text()).splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.files[value["path"]] = self.large[value["oid"]]
        return web.json_response({"commitOid": COMMIT, "commitUrl": f"{self.url}/datasets/me/data/commit/{COMMIT}"})

    async def info(self, request: web.Request) -> web.Response:
        if request.match_info["name"] != "data" or request.headers.get("Authorization") != f"Bearer {TOKEN}":
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            return web.json_response({"error": "Repository not found"}, status=404, headers=headers)
        return web.json_response(
            {"id": "me/data", "sha": COMMIT, "siblings": [{"rfilename": path} for path in self.files]}
        )

    async def tree(self, request: web.Request) -> web.Response:
        return web.json_response(
            [{"type": "file", "path": path, "size": len(data), "oid": COMMIT} for path, data in self.files.items()]
        )

    async def resolve(self, request: web.Request) -> web.Response:
        data = self.files[request.match_info["path"]]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return web.Response(body=data, headers=headers)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # a protocol of its own, beside plain HTTP; its setting is read when the library is first imported
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    made = HubStub()
    with WebStub(made.routes()) as server:
        made.url = server.url
        yield made


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    top = flatten([[(5, -0.1), (9, -2.5)]])
    made = [
        Conversation(
            (Message("Who?", "user"), Message("Ada.", "assistant", (5,), top)),
            "Context",
            {
                "seed_prompt_type": kind,
                "resource": "a.pdf",
                "model": "m",
                "completion_tokens": [3, 1],
            },
        )
        for kind in ("question", "cloze", "question", "cloze", "question")
    ]
    conversation.write(folder / "dataset.parquet", made)
    client = {"base_url": "http://inside.example/v1", "model": "m"}
    recipe = {
        "seed": 0,
        "client": client,
        "output_dir": "/home/me/run",
        "resource": {"path": "/home/me/a.pdf", "weight": 1.0},
    }
    (folder / "config.json").write_text(json.dumps(recipe))
    return folder


def test_there_and_back(stub: HubStub, run: Path, tmp_path: Path):
    assert hub.push(run, "me/data", endpoint=stub.url) == f"{stub.url}/datasets/me/data"
    assert (
        sorted(stub.files) == ["README.md", "config.json", "data/train-00000-of-00001.parquet"]
        and stub.visibility == "private"
    )
    (pulled,) = hub.pull("me/data", tmp_path / "back", endpoint=stub.url)
    assert conversation.read(pulled) == conversation.read(run / "dataset.parquet")
    assert len(synth.load(tmp_path / "back")) == 5


def test_the_card_says_what_it_is_and_nothing_of_its_makers_machines(stub: HubStub, run: Path):
    hub.push(run, "me/data", private=False, endpoint=stub.url)
    assert stub.visibility == "public"
    card = stub.files["README.md"].decode()
    assert card.startswith("---\n") and 'size_categories: ["n<1K"]' in card and "data/*.parquet" in card
    assert "| question | 3 |" in card and "| cloze | 2 |" in card and "question 3.0, answer 1.0" in card
    assert "| resources | a.pdf |" in card and '"seed": 0' in card
    for name in ("README.md", "config.json"):
        assert b"/home/me" not in stub.files[name] and b"inside.example" not in stub.files[name]


def test_refusals_are_one_sentence(stub: HubStub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(OSError, match=r"me/none cannot be pulled: .*; log in with `hf auth login`"):
        hub.pull("me/none", tmp_path / "back", endpoint=stub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(OSError, match=r"cannot be pushed to me/data: .*; log in with `hf auth login`"):
        hub.push(run, "me/data", endpoint=stub.url)
    assert not stub.files
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    stub.files["README.md"] = b"nothing"
    with pytest.raises(UserError, match=r"me/data holds no data/\*\.parquet"):
        hub.pull("me/data", tmp_path / "back", endpoint=stub.url)
    stub.files["data/a.parquet"] = b"noise"
    with pytest.raises(UserError, match=r"a\.parquet is not a whole Parquet file"):
        hub.pull("me/data", tmp_path / "other", endpoint=stub.url)
