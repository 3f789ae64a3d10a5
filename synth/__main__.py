"""`python -m synth --config=configs/NAME.py`: makes a dataset of conversations about a text."""

from __future__ import annotations

import asyncio

from cartridges_jax.command_line import config, progress
from synth.config import SynthConfig
from synth.dry_run import describe
from synth.pipeline import synthesize


def main(argv: list[str]) -> int:
    progress.log_to_terminal("%(levelname)s: %(message)s")
    settings = config.build(SynthConfig, config.load(argv, SynthConfig))
    if settings.dry_run:
        print(progress.printable(asyncio.run(describe(settings))))
    else:
        asyncio.run(synthesize(settings))
    return 0


if __name__ == "__main__":
    config.run(main)
