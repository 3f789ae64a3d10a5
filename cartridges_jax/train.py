"""Distils self-study conversations into a cartridge: `python -m cartridges_jax.train --config=configs/….py`."""

from __future__ import annotations

import logging

from cartridges_jax.command_line.config import build, load, run
from cartridges_jax.command_line.progress import log_to_terminal
from cartridges_jax.parallel import processes
from cartridges_jax.training.config import TrainConfig
from cartridges_jax.training.run import train


def main(argv: list[str]) -> int:
    log_to_terminal()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs tracebacks of what we say in one sentence
    config = build(TrainConfig, load(argv, TrainConfig))
    with processes.joined_job(config.distributed):
        path = train(config)
        if processes.is_first():
            print(f"cartridge: {path}", flush=True)
    return 0


if __name__ == "__main__":
    run(main)
