"""The training state on disk, written by Orbax while training goes on. A write that is killed leaves no trace.

A checkpoint holds a checksum of its arrays, since Orbax does not notice a byte that changed on the disk. The checksum
is a sum over all elements, and so the same whichever devices hold them.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.parallel import processes

KEEP = 2  # checkpoints at a time
OVERHEAD_BYTES = 1 << 20  # that a checkpoint takes beside its arrays

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in a run's folder. The frozen model is in none of them."""

    def __init__(self, directory: Path):
        self._directory = directory.absolute()
        self._manager = self._opened()

    def _opened(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEEP, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        return ocp.CheckpointManager(self._directory, options=options)

    def save(self, step: int, state: Any) -> None:
        """Begins to write the state, and returns before it is written.

        Raises:
          OSError: there is no room for it, or the write before this one failed.
        """
        if step in self._manager.all_steps():
            return
        # Orbax answers a full disk with pages of tracebacks from its threads, so the room is checked before
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
            self._manager.save(step, args=ocp.args.StandardSave({"state": state, "checksum": checksum(state)}))

    def restore(self, like: Any) -> Any | None:
        """Returns the newest state that is whole, or None if there is no checkpoint yet.

        Newer checkpoints that are damaged are logged and removed, since the run will write them again.

        Args:
          like: a state whose shapes, dtypes and placement the restored one gets; the mesh may be another than before.

        Raises:
          UserError: there are checkpoints, and none is whole.
        """
        damaged: list[int] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            state, problem = self._restored(step, like)
            if problem is None:
                for other in damaged:
                    self._manager.delete(other)
                if damaged:  # the manager has learned the format of checkpoints from one that is gone now
                    self._manager.close()
                    self._manager = self._opened()
                return state
            log.warning("checkpoint %s is damaged (%s): going back to the one before it", self._folder(step), problem)
            damaged.append(step)
        if damaged:
            raise UserError(
                f"{', '.join(str(self._folder(step)) for step in damaged)}: no checkpoint can be read: bring one back, "
                f"or remove {self._directory} to begin again from the initial state"
            )
        return None

    def _restored(self, step: int, like: Any) -> tuple[Any, str | None]:
        """Returns the state of a checkpoint, or else what is wrong with it; one of the two is None."""
        wanted = {"state": like, "checksum": checksum(like)}
        state, problem = None, None
        try:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
            with ocp.StandardCheckpointer() as checkpointer:
                found = checkpointer.restore(self._folder(step) / "default", abstract)
            state = found["state"]
            if int(checksum(state)) != int(found["checksum"]):
                problem = "its checksum is another"
        except Exception as error:  # Orbax and TensorStore raise whatever they trip over
            if isinstance(error, MemoryError | PermissionError):
                raise
            problem = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if processes.any_of(problem is not None):
            return None, problem or "another process cannot read it"
        return state, None

    def _folder(self, step: int) -> Path:
        return self._directory / str(step)

    def close(self) -> None:
        """Waits until the last checkpoint is written.

        Raises:
          OSError: it could not be written.
        """
        with self._one_sentence():
            self._manager.wait_until_finished()
            self._manager.close()

    @contextmanager
    def _one_sentence(self) -> Iterator[None]:
        """Turns whatever Orbax and TensorStore raise (a full disk as a ValueError) into an OSError of one sentence."""
        try:
            yield
        except Exception as error:
            self._remove_unfinished()
            if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
                raise  # another process was lost, which is not the disk's fault
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise OSError(f"cannot write a checkpoint in {self._directory}: {reason}") from error

    def _remove_unfinished(self) -> None:
        """Removes unfinished checkpoints, several times: TensorStore's threads may still make their folders anew."""
        for _ in range(10):
            for unfinished in self._directory.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(unfinished, ignore_errors=True)
            time.sleep(0.1)


@jax.jit
def checksum(state: Any) -> jax.Array:
    """Sums the bits of all elements, each times an odd number by its place: one bit that changes always shows."""
    total = jnp.zeros((), jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(state)):
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        total = total * np.uint32(31) + (bits * (2 * place + np.uint32(2 * number + 1))).sum(dtype=jnp.uint32)
    return total
