"""Cartridges and datasets of Weights & Biases, by the public API of its package, which the extra `wandb` installs."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cartridges_jax.command_line.errors import MissingPackage, UserError
from cartridges_jax.interop.limits import check_size
from cartridges_jax.models.hub import cache_folder

TIMEOUT_SECONDS = 60  # of a request; the package repeats one that fails until then
FILES_AT_ONCE = 1000  # in one answer of the service; the package asks for the next ones
SOURCE = re.compile(r"[\w.-]+/[\w.-]+/[\w.-]+(:[\w.-]+)?")
FILE = re.compile(r"cartridge\.safetensors|cartridge\.pt|cache-[\w.-]*\.pt|config\.yaml")
PARQUET = re.compile(r"(dataset/|data/|artifact/)?[\w-][\w.-]*\.parquet")


def download(run: str, most: int) -> Path:
    """Fetches a run's newest cartridge file, and its config.yaml beside it; `run` is `entity/project/run`.

    The package finds the key in `$WANDB_API_KEY`, or where `wandb login` put it. Without one it asks on a terminal, but
    not in a server. `$WANDB_BASE_URL` names another service than the public one.

    Raises:
      UserError: no such form of a run's name, or its files have more than `most` bytes.
      MissingPackage: the package `wandb` is not installed.
      FileNotFoundError: no such run, or no cartridge among its files.
      PermissionError, ConnectionError: the key is missing or wrong, or the service cannot be reached.
    """
    files = [file for file in _files(run) if FILE.fullmatch(file.name)]
    cartridges = [file for file in files if file.name != "config.yaml"]
    if not cartridges:
        raise FileNotFoundError(f"run {run} has no cartridge.safetensors, cartridge.pt or cache-*.pt among its files")
    newest = max(cartridges, key=lambda file: (str(file.updatedAt), file.name))
    wanted = [*(file for file in files if file.name == "config.yaml"), newest]
    return _fetched(wanted, run, most) / newest.name


def download_dataset(source: str, most: int) -> Path:
    """Fetches the Parquet files of a run or of a dataset artifact, and returns their folder; errors as `download`.

    An artifact is named `entity/project/name:version`, which is how upstream publishes a dataset.
    """
    files = [file for file in _files(source) if PARQUET.fullmatch(file.name)]
    if not files:
        raise FileNotFoundError(f"wandb:{source} has no Parquet file: expected a run or artifact with a dataset")
    return _fetched(files, source, most) / Path(files[0].name).parent


def _files(source: str) -> Sequence[Any]:
    """The files of a run or of a dataset artifact, with names and sizes, not yet fetched."""
    if not SOURCE.fullmatch(source) or ".." in source:
        raise UserError(
            f"'wandb:{source}' is no source: expected wandb:entity/project/run, or for a dataset "
            "wandb:entity/project/artifact:version"
        )
    try:
        import wandb
        from wandb.errors import AuthenticationError, CommError, UsageError
    except ImportError as error:
        raise MissingPackage(f"wandb:{source} needs the package wandb: pip install 'cartridges-jax[wandb]'") from error
    try:
        api = wandb.Api(timeout=TIMEOUT_SECONDS)
    except (AuthenticationError, UsageError) as error:
        if error.__cause__ is not None and getattr(error.__cause__, "response", None) is None:
            words = f"wandb:{source} cannot be reached ({_said(error)}): bring its files by hand"
            raise ConnectionError(words) from error
        words = f"wandb:{source} needs a login ({_said(error)}): set WANDB_API_KEY, or run `wandb login`"
        raise PermissionError(words) from error
    base = api.settings["base_url"]
    try:
        holder = api.artifact(source, "dataset") if ":" in source else api.run(source)
    except (CommError, ValueError) as error:
        words = f"{base} gives no {source} ({_said(error)}): expected wandb:entity/project/run"
        raise FileNotFoundError(words) from error
    try:
        return list(holder.files(per_page=FILES_AT_ONCE))
    except Exception as error:  # the package lets errors of its libraries through
        raise ConnectionError(f"{base} does not list the files of {source} ({_said(error)}): try again") from error


def _said(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _fetched(files: Sequence[Any], source: str, most: int) -> Path:
    """The folder, one for each state of these files, that they lie in."""
    check_size(f"wandb:{source}", sum(file.size for file in files), most)
    state = max(str(file.updatedAt) for file in files).replace(":", "-").replace("/", "-")
    folder = cache_folder() / "wandb" / source.replace(":", "@") / state
    for file in files:
        target = folder / file.name
        if not target.is_file() or target.stat().st_size != file.size:
            _fetch(file, target)
    return folder


def _fetch(file: Any, target: Path) -> None:
    """Puts the file there, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        try:
            file.download(root=temporary).close()
        except Exception as error:
            raise ConnectionError(f"{file.name} cannot be fetched ({_said(error)}): try again") from error
        found = Path(temporary, file.name)
        if found.stat().st_size != file.size:
            raise ConnectionError(f"{file.name} has {found.stat().st_size} bytes, {file.size} were promised: try again")
        found.replace(target)
