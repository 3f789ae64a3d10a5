"""Cartridges and datasets of Weights & Biases, by the service's HTTP API; its client is not needed."""

from __future__ import annotations

import base64
import http.client
import json
import netrc
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.interop.limits import check_size
from cartridges_jax.models.hub import cache_folder

DEFAULT_URL = "https://api.wandb.ai"
TIMEOUT_SECONDS = 60.0
SOURCE = re.compile(r"[\w.-]+/[\w.-]+/[\w.-]+(:[\w.-]+)?")
FILE = re.compile(r"cartridge\.safetensors|cartridge\.pt|cache-[\w.-]*\.pt|config\.yaml")
PARQUET = re.compile(r"(dataset/|data/|artifact/)?[\w-][\w.-]*\.parquet")
FILES = "files(first: 1000) { edges { node { name %s directUrl sizeBytes updatedAt } } }"
RUN_QUERY = """query Files($entity: String!, $project: String!, $name: String!) {
  project(name: $project, entityName: $entity) { holder: run(name: $name) { FILES } }
}""".replace("FILES", FILES % "")
ARTIFACT_QUERY = """query Files($entity: String!, $project: String!, $name: String!) {
  project(name: $project, entityName: $entity) {
    artifactType(name: "dataset") { holder: artifact(name: $name) { FILES } }
  }
}""".replace("FILES", FILES.replace("name %s", "name: displayName"))


def download(run: str, most: int) -> Path:
    """The folder with a run's newest cartridge file and its config.yaml; `run` is `entity/project/run`.

    The key is taken from `$WANDB_API_KEY` or `~/.netrc`, the service from `$WANDB_BASE_URL`.

    Raises:
      UserError: no such form of a run's name, or its files have more than `most` bytes.
      FileNotFoundError: no such run, or no cartridge among its files.
      PermissionError, ConnectionError: the key is missing or wrong, or the service cannot be reached.
    """
    base, found = _files(run)
    nodes = [node for node in found if FILE.fullmatch(node["name"])]
    cartridges = [node for node in nodes if node["name"] != "config.yaml"]
    if not cartridges:
        raise FileNotFoundError(f"run {run} has no cartridge.safetensors, cartridge.pt or cache-*.pt among its files")
    newest = max(cartridges, key=lambda node: (str(node.get("updatedAt")), node["name"]))
    wanted = [*(node for node in nodes if node["name"] == "config.yaml"), newest]
    return _fetched(base, wanted, run, most) / newest["name"]


def download_dataset(source: str, most: int) -> Path:
    """The folder with the Parquet files of a run, `entity/project/run`, or of a dataset artifact,
    `entity/project/name:version`, which is how upstream publishes one; errors as `download`."""
    base, found = _files(source)
    nodes = [node for node in found if PARQUET.fullmatch(node["name"])]
    if not nodes:
        raise FileNotFoundError(f"wandb:{source} has no Parquet file: expected a run or artifact with a dataset")
    folder = _fetched(base, nodes, source, most)
    return folder / Path(nodes[0]["name"]).parent


def _fetched(base: str, nodes: list[dict[str, Any]], source: str, most: int) -> Path:
    """The folder, one for each state of these files, that they lie in."""
    check_size(f"wandb:{source}", sum(int(node["sizeBytes"]) for node in nodes), most)
    state = max(str(node.get("updatedAt")) for node in nodes).replace(":", "-").replace("/", "-")
    folder = cache_folder() / "wandb" / source.replace(":", "@") / state
    for node in nodes:
        target = folder / node["name"]
        if not target.is_file() or target.stat().st_size != int(node["sizeBytes"]):
            _fetch(base, node, target)
    return folder


def _files(source: str) -> tuple[str, list[dict[str, Any]]]:
    """The service's address, and the files of a run or of a dataset artifact."""
    if not SOURCE.fullmatch(source) or ".." in source:
        raise UserError(
            f"'wandb:{source}' is no source: expected wandb:entity/project/run, or for a dataset "
            "wandb:entity/project/artifact:version"
        )
    base = os.environ.get("WANDB_BASE_URL", DEFAULT_URL).rstrip("/")
    entity, project, name = source.split("/")
    query = {
        "query": ARTIFACT_QUERY if ":" in name else RUN_QUERY,
        "variables": {"entity": entity, "project": project, "name": name},
    }
    request = urllib.request.Request(f"{base}/graphql", json.dumps(query).encode())
    request.add_header("Content-Type", "application/json")
    with _open(request, base, source) as response:
        try:
            found = json.loads(response.read())["data"]["project"]
            found = found["artifactType"] if ":" in name else found
            return base, [edge["node"] for edge in found["holder"]["files"]["edges"]]
        except (ValueError, KeyError, TypeError) as error:
            raise FileNotFoundError(
                f"{base} knows no {source} (or it is private: set WANDB_API_KEY): expected wandb:entity/project/run"
            ) from error


def _fetch(base: str, node: dict[str, Any], target: Path) -> None:
    url = urllib.parse.urljoin(f"{base}/", node["directUrl"])
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ConnectionError(f"{base} answers with the address {url[:80]!r}, expected http or https")
    size = int(node["sizeBytes"])
    with _open(urllib.request.Request(url), base, node["name"]) as response, files.atomic(target) as temporary:
        with open(temporary, "wb") as file:
            left = size + 1  # what is longer than promised is seen without being fetched
            while part := response.read(min(left, 1 << 20)):
                left -= file.write(part)
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
