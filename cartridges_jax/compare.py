"""Compares methods that stand in for a document: `python -m cartridges_jax.compare --config=configs/compare/….py`.

Each method has the same memory, and is asked the questions of one suite. The same command goes on where a run was
stopped, and a table of what is there is written whenever it ends.
"""

from __future__ import annotations

import argparse
import logging

from cartridges_jax.command_line import config as command_config
from cartridges_jax.command_line.config import build
from cartridges_jax.command_line.progress import log_to_terminal
from cartridges_jax.comparison.config import CompareConfig
from cartridges_jax.comparison.run import compare
from cartridges_jax.serving.self_study import ServerConfig
from cartridges_jax.training.config import TrainConfig

STAGES = {"compare": CompareConfig, "server": ServerConfig, "train": TrainConfig}


def main(argv: list[str]) -> int:
    log_to_terminal()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs tracebacks of what we say in one sentence
    parser = argparse.ArgumentParser(prog="python -m cartridges_jax.compare", description=__doc__)
    parser.add_argument("--config", required=True, help="such as configs/compare/embedded.py")
    args, overrides = parser.parse_known_args(argv)
    config = command_config.load([f"--config={args.config}", *overrides], STAGES)
    built = {name: build(kind, config[name], f"config.{name}") for name, kind in STAGES.items()}
    path = compare(built["compare"], built["train"], built["server"], args.config, overrides)
    print(f"table: {path}")
    return 0


if __name__ == "__main__":
    command_config.run(main)
