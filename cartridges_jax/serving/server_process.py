"""Our server as a process of its own, for commands that need one for a while."""

from __future__ import annotations

import contextlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cartridges_jax.command_line.progress import stage

START_SECONDS = 300.0  # a server that has not started by then never will
STOP_SECONDS = 10.0  # after which it is killed


@contextlib.contextmanager
def server_process(flags: Sequence[str], log: Path) -> Iterator[str]:
    """Runs `python -m cartridges_jax.serve` with these flags, its standard error going to `log`; yields its URL.

    Raises:
      ChildProcessError: the server does not start; the sentence holds its last words.
    """
    command = [sys.executable, "-m", "cartridges_jax.serve", *flags]
    with log.open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        with stage("starting the server and compiling its programs"):
            url = _ready_url(process, log)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()


def _ready_url(process: subprocess.Popen[str], log: Path) -> str:
    """Waits for the line with which the server says that it is ready, and returns the URL in it."""
    lines: queue.Queue[str] = queue.Queue()

    def forward() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    threading.Thread(target=forward, daemon=True).start()
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            line = lines.get(timeout=1.0)
        except queue.Empty:
            continue
        if line.startswith("ready: "):
            return line.split()[1]
        if not line:
            break
    tail = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
    raise ChildProcessError(f"the server did not start: {' '.join(tail) or 'it said nothing'} (log: {log})")
