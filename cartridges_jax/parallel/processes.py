"""One job of many processes: how it starts, who decides and who writes, and how it ends when a process is lost.

Every process runs the same program. What decides its way (whether a file is there, say) is seen by the first process
for all; files are written by the first alone. Arrays of the job lie on the devices of all (`sharding.py`).
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
    """Within it, this process is one of a job's, if `several`; the job's other processes have to be within it too.

    Who they are, JAX finds on TPU pods, on Slurm and in Kubernetes; elsewhere JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID say it. An error ends this process without waiting for the others, which end
    when they miss it.

    Raises:
      UserError: nothing says who the others are.
      ConnectionError: they cannot be reached.
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
    return jax.process_index() == 0


def agreed(value: int) -> int:
    """The first process's value, on every process."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def any_of(value: bool) -> bool:
    """Whether it holds on any process."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.int32(value)).any())


def wait_for_all(where: str) -> None:
    """Returns when every process has come here: behind it, all see the files that the first has written."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(where)


def _join() -> None:
    count, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    # a coordinator that is only meant for this machine listens to this machine only
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
    """Ends the process at once: leaving the job in order would wait minutes for those that are lost."""
    print(f"error: {printable(sentence)}", file=sys.stderr, flush=True)
    os._exit(2)
