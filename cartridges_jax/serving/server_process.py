"""Our server as a process of its own, for commands that need one for a while."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from cartridges_jax.command_line.progress import printable, stage

START_SECONDS = 900.0  # a server that has not started by then never will
SECONDS_BETWEEN_LOOKS = 1.0  # at the server's log, while it starts
STOP_SECONDS = 10.0  # after which it is killed


@contextlib.contextmanager
def server_process(flags: Sequence[str], log: Path) -> Iterator[str]:
    """Runs `python -m cartridges_jax.serve` with these flags, its standard error going to `log`; yields its URL.

    Raises: ChildProcessError, with the server's last words, if it does not start.
    """
    command = [sys.executable, "-m", "cartridges_jax.serve", *flags]
    with log.open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    with process:  # which waits for its end
        try:
            with stage("starting the server and compiling its programs"), _progress_from(log):
                url = _ready_url(process, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


@contextlib.contextmanager
def _progress_from(log: Path) -> Iterator[None]:
    """Prints what the server says about the programs that it compiles, as it says it."""
    is_ready = threading.Event()

    def follow() -> None:
        with log.open(encoding="utf-8", errors="replace") as lines:
            ended = False
            while not ended:
                ended = is_ready.wait(SECONDS_BETWEEN_LOOKS)  # what was said until then is printed, too
                for line in lines:
                    if line.startswith("compiling: "):
                        print(printable(line.rstrip()), file=sys.stderr, flush=True)

    follower = threading.Thread(target=follow, name="progress", daemon=True)
    follower.start()
    try:
        yield
    finally:
        is_ready.set()
        follower.join()


def _ready_url(process: subprocess.Popen[str], log: Path) -> str:
    """Waits for the line with which the server says that it is ready, and returns the URL in it."""
    assert process.stdout is not None
    timer = threading.Timer(START_SECONDS, process.kill)  # which ends its output
    timer.start()
    try:
        for line in process.stdout:
            if line.startswith("ready: "):
                return line.split()[1]
    finally:
        timer.cancel()
    tail = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
    raise ChildProcessError(f"the server did not start: {' '.join(tail) or 'it said nothing'} (log: {log})")
