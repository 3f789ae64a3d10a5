"""A job of several processes: how it starts, who decides and who writes, and how it ends when a process is lost.

Every process runs the same program. Where the program depends on something outside (whether a file is there, say), the
first process looks, and the others do as it says. Only the first writes files. The arrays of a job lie on the devices
of all processes (`sharding.py`).
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.command_line.progress import printable


@contextmanager
def joined_job(several: bool) -> Iterator[None]:
    """Makes this process one of a job's while the context lasts, if the job has `several`.

    JAX finds the other processes on TPU pods, on Slurm and in Kubernetes; elsewhere JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID name them. They have to enter the context too. An error ends this process
    without waiting for the others, which end when they miss it.

    Raises:
      UserError: nothing says which processes belong to the job.
      ConnectionError: the others cannot be reached.
    """
    if not several:
        yield
        return
    _join()
    try:
        yield
    except (jax.errors.JaxRuntimeError, UserError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        _leave(
            f"{reason} (process {jax.process_index()} of {jax.process_count()}; if another was lost, run the same "
            "command again on every host: it goes on from the last checkpoint)"
        )
    except BaseException:
        traceback.print_exc()
        _leave("the job ends")
    jax.distributed.shutdown()


def is_first() -> bool:
    """Says whether this is the first process of the job, which writes its files."""
    return jax.process_index() == 0


def agreed(value: int) -> int:
    """Returns the first process's value on every process."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def any_of(value: bool) -> bool:
    """Says on every process whether the value is true on any of them."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.int32(value)).any())


def wait_for_all(where: str) -> None:
    """Waits until every process has come here. Afterwards all of them see the files that the first has written."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(where)


def _join() -> None:
    count, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    # a coordinator whose address is this machine's own shall listen to this machine only
    bind: dict[str, Any] = {}
    if address and address.rsplit(":", 1)[0] in ("127.0.0.1", "localhost"):
        bind["coordinator_bind_address"] = address
    try:
        jax.distributed.initialize(
            num_processes=int(count) if count else None,
            process_id=int(index) if index else None,
            **bind,
        )
    except (ValueError, TypeError) as error:
        raise UserError(
            f"config.distributed is True, but who the other processes are is unknown ({error}): start it on a TPU pod, "
            "with Slurm or in Kubernetes, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ConnectionError(f"the job's processes cannot reach each other ({reason}): start all of them") from error


def _leave(sentence: str) -> None:
    """Ends the process at once, since leaving the job in order would wait minutes for processes that are lost."""
    print(f"error: {printable(sentence)}", file=sys.stderr, flush=True)
    os._exit(2)
