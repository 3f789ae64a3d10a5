"""The training state on disk, through Orbax: written beside the run, asynchronously; a killed write leaves no trace."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from cartridges_jax import processes

KEEP = 2
OVERHEAD_BYTES = 1 << 20  # of a checkpoint beside its arrays


class Checkpoints:
    """`checkpoints/` of a run. The frozen base is never in them."""

    def __init__(self, directory: Path):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEEP, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._directory = directory.absolute()
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Begins to write the state.

        Raises:
          OSError: there is no room for it, or the write before this one failed.
        """
        if step in self._manager.all_steps():
            return
        # Orbax answers a full disk with pages of tracebacks from its threads, so it is better asked before
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + OVERHEAD_BYTES
        with self._one_sentence():
            self._manager.wait_until_finished()
        free = shutil.disk_usage(self._directory).free
        if processes.agreed(free < needed):
            raise OSError(
                f"{self._directory} has {free} bytes free and a checkpoint needs {needed}: free some space and run the "
                "same command again"
            )
        with self._one_sentence():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, step: int, like: Any) -> Any:
        """The state of `step`, with the shapes, dtypes and placement of `like`: the mesh may be another."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def close(self) -> None:
        """Waits for the last write.

        Raises:
          OSError: it failed.
        """
        with self._one_sentence():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextmanager
    def _one_sentence(self) -> Iterator[None]:
        """Orbax and TensorStore raise whatever their threads met, a full disk as a ValueError."""
        try:
            yield
        except Exception as error:
            self._remove_unfinished()
            if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
                raise  # another process was lost, which is not the disk's fault
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise OSError(f"cannot write a checkpoint in {self._directory}: {reason}") from error

    def _remove_unfinished(self) -> None:
        """When one file of a checkpoint cannot be written, TensorStore's threads may still be at others, and make
        their folders anew."""
        for _ in range(10):
            for unfinished in self._directory.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(unfinished, ignore_errors=True)
            time.sleep(0.1)
