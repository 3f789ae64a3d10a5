"""A cartridge among the files of a Weights & Biases run, by the service's HTTP API; its client is not needed."""

from __future__ import annotations

import base64
import http.client
import json
import netrc
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from cartridges_jax.models.hub import cache_folder
from command_line import files

DEFAULT_URL = "https://api.wandb.ai"
TIMEOUT_SECONDS = 60.0
RUN = re.compile(r"[\w.-]+/[\w.-]+/[\w.-]+")
FILE = re.compile(r"cartridge\.safetensors|cartridge\.pt|cache-[\w.-]*\.pt|config\.yaml")
QUERY = """query Files($entity: String!, $project: String!, $run: String!) {
  project(name: $project, entityName: $entity) {
    run(name: $run) { files(first: 1000) { edges { node { name directUrl sizeBytes updatedAt } } } }
  }
}"""


def download(run: str) -> Path:
    """The folder with a run's newest cartridge file and its config.yaml; `run` is `entity/project/run`.

    The key is taken from `$WANDB_API_KEY` or `~/.netrc`, the service from `$WANDB_BASE_URL`.

    Raises:
      ValueError: no such form of a run's name.
      FileNotFoundError: no such run, or no cartridge among its files.
      PermissionError, ConnectionError: the key is missing or wrong, or the service cannot be reached.
    """
    if not RUN.fullmatch(run) or ".." in run:
        raise ValueError(f"'wandb:{run}' is no run: expected wandb:entity/project/run")
    base = os.environ.get("WANDB_BASE_URL", DEFAULT_URL).rstrip("/")
    nodes = [node for node in _files(base, run) if FILE.fullmatch(node["name"])]
    cartridges = [node for node in nodes if node["name"] != "config.yaml"]
    if not cartridges:
        raise FileNotFoundError(f"run {run} has no cartridge.safetensors, cartridge.pt or cache-*.pt among its files")
    newest = max(cartridges, key=lambda node: (str(node.get("updatedAt")), node["name"]))
    folder = cache_folder() / "wandb" / run / str(newest.get("updatedAt")).replace(":", "-").replace("/", "-")
    for node in [node for node in nodes if node["name"] == "config.yaml"] + [newest]:
        target = folder / node["name"]
        if not target.is_file() or target.stat().st_size != int(node["sizeBytes"]):
            _fetch(base, node, target)
    return folder / newest["name"]


def _files(base: str, run: str) -> list[dict[str, Any]]:
    entity, project, name = run.split("/")
    query = {"query": QUERY, "variables": {"entity": entity, "project": project, "run": name}}
    request = urllib.request.Request(f"{base}/graphql", json.dumps(query).encode())
    request.add_header("Content-Type", "application/json")
    with _open(request, base, run) as response:
        try:
            found = json.loads(response.read())["data"]["project"]
            edges = found["run"]["files"]["edges"]
        except (ValueError, KeyError, TypeError) as error:
            raise FileNotFoundError(
                f"{base} knows no run {run} (or it is private: set WANDB_API_KEY): expected wandb:entity/project/run"
            ) from error
    return [edge["node"] for edge in edges]


def _fetch(base: str, node: dict[str, Any], target: Path) -> None:
    url = urllib.parse.urljoin(f"{base}/", node["directUrl"])
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ConnectionError(f"{base} answers with the address {url[:80]!r}, expected http or https")
    size = int(node["sizeBytes"])
    with _open(urllib.request.Request(url), base, node["name"]) as response, files.atomic(target) as temporary:
        with open(temporary, "wb") as file:
            shutil.copyfileobj(response, file, 1 << 20)
        if temporary.stat().st_size != size:
            raise ConnectionError(f"{node['name']} has {temporary.stat().st_size} bytes, {base} promised {size}: again")


def _open(request: urllib.request.Request, base: str, what: str) -> Any:
    key, host = _key(base), urllib.parse.urlsplit(base).netloc
    if key and urllib.parse.urlsplit(request.full_url).netloc == host:
        token = base64.b64encode(f"api:{key}".encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")  # not for the storage it may lead to
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        with error:
            if error.code in (401, 403):
                raise PermissionError(f"{base} refuses {what}: set WANDB_API_KEY, or run `wandb login`") from error
            raise ConnectionError(f"{base} answers {error.code} for {what}: try again") from error
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"{base} cannot be reached for {what} ({error}): bring the file by hand") from error


def _key(base: str) -> str | None:
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    try:
        found = netrc.netrc().authenticators(urllib.parse.urlsplit(base).hostname or "")
    except (OSError, netrc.NetrcParseError):
        return None
    return found[2] if found else None
