"""Programs that are compiled before the first request or between requests, and kept for the next start."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from cartridges_jax.command_line.progress import Progress

KEPT_BYTES = 1 << 30  # of compiled programs on disk; beyond, those used longest ago are deleted


class Warmup:
    """Calls that compile one program each. One thread runs them, any thread may look how far it is.

    Args:
      programs: what `run` calls.
      rare: what `run_rare` calls, one after another.
    """

    def __init__(self, programs: Sequence[Callable[[], object]] = (), rare: Sequence[Callable[[], object]] = ()):
        self._programs, self._rare = programs, iter(rare)
        self._begun = 0.0
        self.compiled = 0

    @property
    def total(self) -> int:
        return len(self._programs)

    @property
    def is_done(self) -> bool:
        return self.compiled == self.total

    @property
    def seconds_left(self) -> float | None:
        """The time that the rest will take at the pace so far; None before the first program is compiled."""
        if not self.compiled:
            return None
        return (time.monotonic() - self._begun) / self.compiled * (self.total - self.compiled)

    def run(self, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Compiles everything, or ends after the program at which it is stopped."""
        if self.is_done:
            return
        self._begun = time.monotonic()
        progress = Progress("compiling", self.total, "programs")
        for program in self._programs:
            if is_stopped():
                break
            program()
            self.compiled += 1
            progress.advance()
        progress.close()

    def run_rare(self) -> bool:
        """Compiles the next of the rare programs; False if there is none left."""
        program = next(self._rare, None)
        if program is not None:
            program()
        return program is not None


def keep_programs() -> None:
    """Has JAX keep what it compiles in the cache folder, unless it was told to keep it elsewhere."""
    import jax

    from cartridges_jax.models.hub import cache_folder

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))
        jax.config.update("jax_compilation_cache_max_size", KEPT_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
