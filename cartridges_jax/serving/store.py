"""Cartridges by name: read on first use, again when the file has changed, the least used dropped, a pinned one kept.

A local name is never a path: it has no separators, and what it leads to lies inside the folder, symbolic links
followed, or is one of the paths that the store was given by name. A remote one is fetched only if the store may fetch.
Whoever holds a `Prefix` keeps its version, whatever happens to the name meanwhile.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.serving.scheduler import Prefix

# A folder's file that says which format it is in, and that changes with it.
MARKS = ("cartridge.safetensors", "adapter_config.json", "cartridge.pt")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
SOURCES = {"local": "", "huggingface": "hf:", "wandb": "wandb:"}  # and how their names begin


class Loaded(Protocol):
    @property
    def num_slots(self) -> int: ...


class UnknownCartridge(LookupError):
    """No cartridge has this name."""


class TooMany(UserError):
    """No other cartridge may be pinned."""


@dataclass(frozen=True)
class Reference:
    """A cartridge as a request names it; `reload` asks for its newest version, from its source."""

    id: str
    source: Literal["local", "huggingface", "wandb"] = "local"
    reload: bool = False

    @property
    def name(self) -> str:
        return SOURCES[self.source] + self.id


@dataclass
class _Held:
    prefix: Prefix
    pinned: bool = False


class CartridgeStore:
    """Cartridges of `directory`: `<id>.safetensors`, `<id>/cartridge.safetensors`, or `<id>/` in another format.

    `load`, `compose` and `fetch` take their time, and only `get`, `prefix` and `fetch` call them: on one thread at a
    time, which is neither the event loop's nor the engine's. Everything else returns at once, on any thread.

    Args:
      load: the cartridge in a file.
      capacity: cartridges, compositions included, that are held at the same time.
      named: cartridges that lie elsewhere; they come before those of the folder.
      fetch: the local file of a remote name like `hf:org/name`; without it remote sources are refused.
      compose: several cartridges as one; without it a request has at most one.
    """

    def __init__(
        self,
        directory: Path,
        load: Callable[[Path], Loaded],
        capacity: int = 32,
        named: Mapping[str, Path] | None = None,
        fetch: Callable[[str], Path] | None = None,
        compose: Callable[[Sequence[Any]], Loaded] | None = None,
    ):
        self._directory, self._named = Path(directory), dict(named or {})
        self._load, self._fetch, self._compose = load, fetch, compose
        self._capacity = capacity
        self._fetched: dict[str, Path] = {}
        self._reloads: dict[str, int] = {}
        self._held: dict[tuple[str, ...], _Held] = {}  # by their parts' names; the one used longest ago first
        self._lock = threading.Lock()  # for moments, never while a file is read

    def list(self) -> list[str]:
        """The local names that `get` knows, sorted."""
        entries = self._directory.iterdir() if self._directory.is_dir() else ()
        names = {entry.name.removesuffix(".safetensors") for entry in entries} | self._named.keys()
        return sorted(name for name in names if self._find(name))

    def find(self, id: str) -> Path:
        """The file of a local cartridge. Raises: UserError, if `id` is no name; UnknownCartridge, if there is none."""
        if not NAME.fullmatch(id):
            raise UserError(f"{id[:80]!r} is not a cartridge's name: use a name of /v1/cartridges, never a path")
        path = self._find(id)
        if path is None:
            raise UnknownCartridge(f"cartridge {id!r} does not exist: /v1/cartridges lists those that do")
        return path

    def check(self, references: Sequence[Reference]) -> None:
        """Refuses what cannot be loaded, as far as that is known without reading or fetching. Raises: as `find`."""
        for reference in references:
            if reference.source == "local":
                self.find(reference.id)
            elif self._fetch is None:
                raise UserError(
                    f"the source {reference.source!r} is switched off on this server: its operator switches it on "
                    "with --remote-sources, or puts the cartridge into the folder"
                )
        names = [reference.name for reference in references]
        if len(names) > 1 and self._compose is None:
            raise UserError("this server takes one cartridge at a time: compose them into one file first")
        if len(set(names)) < len(names):
            raise UserError(f"the cartridges {', '.join(names)} are not all different: name each once")

    def missing(self, reference: Reference) -> bool:
        """Whether it has to be fetched before it can be loaded."""
        return reference.source != "local" and (reference.reload or reference.name not in self._fetched)

    def fetch(self, reference: Reference) -> None:
        """Brings a remote cartridge's newest files here. Raises: as `interop.sources.fetch`."""
        assert self._fetch is not None
        path = self._fetch(reference.name)
        with self._lock:
            self._fetched[reference.name] = path

    def get(self, id: str) -> Prefix:
        """The local cartridge `id`. Raises: as `prefix`."""
        return self.prefix([Reference(id)])

    def ready(self, references: Sequence[Reference]) -> Prefix | None:
        """What `prefix` gives, if it can be given at once."""
        if any(reference.reload for reference in references):
            return None
        parts = [self._current(reference) for reference in references]
        if len(parts) == 1:
            return parts[0]
        return self._take(_names(references), "+".join(part.key for part in parts if part)) if all(parts) else None

    def prefix(self, references: Sequence[Reference]) -> Prefix:
        """The cartridges, loaded, as one; its key changes with their contents and their order.

        Raises: as `check`, and as `load`, when a file is broken or was made for another model.
        """
        self.check(references)
        parts = [self._one(reference) for reference in references]
        if len(parts) == 1:
            return parts[0]
        key = "+".join(part.key for part in parts)
        composed = self._take(_names(references), key)
        if composed is None:
            assert self._compose is not None
            cartridge = self._compose([part.cartridge for part in parts])
            composed = self._insert(_names(references), Prefix.of(key, cartridge))
        return composed

    def pin(self, reference: Reference, pinned: bool) -> None:
        """Keeps a loaded cartridge, or lets it be dropped again. Raises: UnknownCartridge, TooMany."""
        with self._lock:
            held = self._held_one(reference)
            others = sum(other.pinned for other in self._held.values() if other is not held)
            if pinned and others + 1 >= self._capacity:
                raise TooMany(f"{others} cartridges are pinned and {self._capacity} may be loaded: unpin one first")
            held.pinned = pinned

    def unload(self, reference: Reference) -> None:
        """Drops a cartridge, and compositions with it; requests that run keep theirs.

        Raises: UnknownCartridge, if it is not loaded; UserError, if it is pinned.
        """
        with self._lock:
            if self._held_one(reference).pinned:
                raise UserError(f"cartridge {reference.name!r} is pinned: unpin it first")
            for names in [names for names in self._held if reference.name in names]:
                del self._held[names]

    def state(self, reference: Reference) -> tuple[Prefix | None, bool]:
        """The cartridge that is loaded under a name, if any, and whether it is pinned."""
        with self._lock:
            held = self._held.get((reference.name,))
            return (held.prefix, held.pinned) if held else (None, False)

    def remote(self) -> list[Reference]:
        """The remote cartridges that are loaded."""
        with self._lock:
            names = [names[0] for names in self._held if len(names) == 1]
        return [
            Reference(name.removeprefix(start), source)  # pyrefly: ignore[bad-argument-type]
            for name in names
            for source, start in SOURCES.items()
            if start and name.startswith(start)
        ]

    @property
    def num_held(self) -> int:
        return len(self._held)

    def path(self, reference: Reference) -> Path:
        """The file of a cartridge, which has been fetched if it is remote. Raises: as `find`."""
        return self.find(reference.id) if reference.source == "local" else self._fetched[reference.name]

    def _one(self, reference: Reference) -> Prefix:
        if reference.reload:
            self._reloads[reference.name] = self._reloads.get(reference.name, 0) + 1
        elif (current := self._current(reference)) is not None:
            return current
        # Read before loading: a file replaced meanwhile then looks changed at the next use, and is loaded again.
        key = self._key(reference)
        cartridge = self._load(self.path(reference))
        return self._insert((reference.name,), Prefix.of(key, cartridge))

    def _current(self, reference: Reference) -> Prefix | None:
        try:
            return self._take((reference.name,), self._key(reference))
        except (OSError, LookupError):
            return None

    def _key(self, reference: Reference) -> str:
        stat = self.path(reference).stat()
        reloads = self._reloads.get(reference.name, 0)
        return f"{reference.name}@{stat.st_mtime_ns}.{stat.st_size}.{stat.st_ino}.{reloads}"

    def _take(self, names: tuple[str, ...], key: str) -> Prefix | None:
        with self._lock:
            held = self._held.get(names)
            if held is None or held.prefix.key != key:
                return None
            self._held[names] = self._held.pop(names)
            return held.prefix

    def _insert(self, names: tuple[str, ...], prefix: Prefix) -> Prefix:
        with self._lock:
            before = self._held.pop(names, None)
            self._held[names] = _Held(prefix, before is not None and before.pinned)
            droppable = [other for other, held in self._held.items() if not held.pinned and other != names]
            for other in droppable[: max(0, len(self._held) - self._capacity)]:
                del self._held[other]
        return prefix

    def _held_one(self, reference: Reference) -> _Held:
        held = self._held.get((reference.name,))
        if held is None:
            raise UnknownCartridge(f"cartridge {reference.name!r} is not loaded: load it first")
        return held

    def _find(self, id: str) -> Path | None:
        if not NAME.fullmatch(id):
            return None
        if id in self._named:
            return self._named[id]
        root = self._directory.resolve()
        for path in (self._directory / f"{id}.safetensors", *(self._directory / id / name for name in MARKS)):
            try:
                real = path.resolve()
                if real.is_relative_to(root) and real.is_file():
                    return real
            except (OSError, RuntimeError):  # links that lead in a circle, folders that may not be looked into
                continue
        return None


def version(prefix: Prefix) -> str:
    """A short name of a cartridge's content, for people to compare."""
    return hashlib.sha256(prefix.key.encode()).hexdigest()[:12]


def _names(references: Sequence[Reference]) -> tuple[str, ...]:
    return tuple(reference.name for reference in references)
