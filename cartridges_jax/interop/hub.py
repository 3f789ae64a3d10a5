"""Files of the Hugging Face Hub: a repository's cartridge or dataset, fetched into the Hub's own cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.interop.limits import check_size
from cartridges_jax.models.hub import HUB_ID, hub_errors


def download(name: str, patterns: Sequence[str], kind: Literal["model", "dataset"], most: int) -> Path:
    """Fetches the files of the repository `org/name[@revision]` that match, and returns the folder that holds them.

    Raises:
      UserError: the name has another form, or the files have more than `most` bytes.
      FileNotFoundError, PermissionError, ConnectionError: see `hub_errors`.
    """
    repo, _, revision = name.partition("@")
    if not HUB_ID.fullmatch(repo):
        raise UserError(f"'hf:{name}' is no Hub source: expected hf:org/name or hf:org/name@revision")
    from huggingface_hub import snapshot_download

    wanted: Any = {"repo_id": repo, "repo_type": kind, "revision": revision or None}
    with hub_errors(repo, "cartridge" if kind == "model" else "dataset"):
        size = _size(wanted, patterns)
    if size is not None:
        check_size(f"hf:{name}", size, most)
    with hub_errors(repo, "cartridge" if kind == "model" else "dataset"):
        return Path(snapshot_download(**wanted, allow_patterns=list(patterns), local_files_only=size is None))


def _size(wanted: Any, patterns: Sequence[str]) -> int | None:
    """Returns the bytes of the files that match, or None if the Hub cannot be asked and only its cache is left."""
    from huggingface_hub import HfApi, RepoFile, errors
    from huggingface_hub.utils import filter_repo_objects

    try:
        found = [entry for entry in HfApi().list_repo_tree(**wanted, recursive=True) if isinstance(entry, RepoFile)]
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except Exception:  # which classes mean "no network" depends on the version of the client
        return None
    return sum(file.size for file in filter_repo_objects(found, allow_patterns=list(patterns), key=lambda f: f.path))
