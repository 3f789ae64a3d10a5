"""A folder of cartridges, by name: read on first use, again when the file has changed, the least used dropped.

A name is never a path: it has no separators, and what it leads to lies inside the folder, symbolic links followed,
or is one of the paths that the store was given by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from cartridges_jax.serving.scheduler import Prefix

# A folder's file that says which format it is in, and that changes with it.
MARKS = ("cartridge.safetensors", "adapter_config.json", "cartridge.pt")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Loaded(Protocol):
    @property
    def num_slots(self) -> int: ...


class UnknownCartridge(LookupError):
    """No cartridge has this name."""


class CartridgeStore:
    """Cartridges of `directory`: `<id>.safetensors`, `<id>/cartridge.safetensors`, or `<id>/` in another format.

    `named` are cartridges that lie elsewhere; they come before those of the folder.

    `load` makes arrays, and only `get` calls it: `get` belongs to the engine's thread. `list` and `find` look at the
    folder only and may be called from anywhere.
    """

    def __init__(
        self,
        directory: Path,
        load: Callable[[Path], Loaded],
        capacity: int = 32,
        named: Mapping[str, Path] | None = None,
    ):
        self._directory, self._named = Path(directory), dict(named or {})
        self._load = load
        self._capacity = capacity
        self._loaded: dict[str, Prefix] = {}  # the one used longest ago comes first

    def list(self) -> list[str]:
        """The names that `get` knows, sorted."""
        entries = self._directory.iterdir() if self._directory.is_dir() else ()
        names = {entry.name.removesuffix(".safetensors") for entry in entries} | self._named.keys()
        return sorted(name for name in names if self._find(name))

    def find(self, id: str) -> Path:
        """The file of a cartridge.

        Raises:
          ValueError: it is not a name.
          UnknownCartridge: no file of that name lies in the folder.
        """
        if not NAME.fullmatch(id):
            raise ValueError(f"{id[:80]!r} is not a cartridge's name: use a name of /v1/models, never a path")
        path = self._find(id)
        if path is None:
            raise UnknownCartridge(f"cartridge {id!r} does not exist: /v1/models lists those that do")
        return path

    def get(self, id: str) -> Prefix:
        """The cartridge, loaded; its key changes with the file's content.

        Raises:
          ValueError, UnknownCartridge: as `find`.
          Exception: what `load` raises, when the file is broken or was made for another model.
        """
        path = self.find(id)
        # Read before loading: a file replaced meanwhile then looks changed at the next use, and is loaded again.
        stat = path.stat()
        key = f"{id}@{stat.st_mtime_ns}.{stat.st_size}.{stat.st_ino}"
        prefix = self._loaded.pop(id, None)
        if prefix is None or prefix.key != key:
            cartridge = self._load(path)
            prefix = Prefix(key, cartridge.num_slots, cartridge)
        self._loaded[id] = prefix
        if len(self._loaded) > self._capacity:
            del self._loaded[next(iter(self._loaded))]
        return prefix

    def _find(self, id: str) -> Path | None:
        if not NAME.fullmatch(id):
            return None
        if id in self._named:
            return self._named[id]
        root = self._directory.resolve()
        for path in (self._directory / f"{id}.safetensors", *(self._directory / id / name for name in MARKS)):
            real = path.resolve()
            if real.is_relative_to(root) and real.is_file():
                return real
        return None
