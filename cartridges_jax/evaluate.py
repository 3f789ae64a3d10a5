"""Compares a cartridge with the text that it stands in for: `python -m cartridges_jax.evaluate --config=configs/….py`.

The same questions are asked with the cartridge, with nothing, with a part of the text and with all of it; see
`cartridges_jax.training.evals.conditions`.
"""

from __future__ import annotations

from pathlib import Path

from cartridges_jax.command_line.config import build, load, run
from cartridges_jax.command_line.progress import printable
from cartridges_jax.training.evals.conditions import EvalConfig, evaluate
from cartridges_jax.training.report import table


def main(argv: list[str]) -> int:
    config = build(EvalConfig, load(argv, EvalConfig))
    report = evaluate(config)
    print(printable(table(report)))
    print(f"report: {Path(config.output_dir) / 'report.md'}")
    return 0


if __name__ == "__main__":
    run(main)
