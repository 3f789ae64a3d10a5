"""What an initial state costs, counted in steps of training.

    python benchmarks/start_cost.py --dataset=… [--document=…] [--shares=4,10,20]

Seconds of a busy machine say little, so seconds of its cores stand beside them. An initial state is made once, and what
is compiled for it counts; of the steps, the median of those behind the first.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from cartridges_jax.data import PackedRows, batches, read_corpus, read_examples
from cartridges_jax.initializers import InitConfig, Kind, initial_cartridge
from cartridges_jax.models.language_model import load_model
from cartridges_jax.optim import OptimConfig, optimizer
from cartridges_jax.step import TrainState, train_step

STEPS, SEQ_LEN, ROWS = 5, 256, 4  # as in configs/quickstart.py
STARTS: tuple[Kind, ...] = ("attention_matching", "text")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--document", default="examples/document.txt")
    parser.add_argument("--dataset", required=True, help="conversations about it")
    parser.add_argument("--shares", type=lambda text: [int(part) for part in text.split(",")], default=[4, 10, 20])
    args = parser.parse_args()
    model = load_model(args.model, "auto")
    corpus, examples = read_corpus(args.document), read_examples(args.dataset, model.tokenizer)
    rows = PackedRows(examples, SEQ_LEN, ROWS, num_epochs=1, seed=0)
    print("| slots | | seconds | CPU-seconds | steps' worth |\n| --- | --- | --- | --- | --- |")
    for share in args.shares:
        num_slots = len(model.tokenizer.encode(corpus)) // share
        taken: dict[str, tuple[float, float]] = {}
        for kind in STARTS:
            clock = _Clock()
            start = initial_cartridge(InitConfig(kind, num_slots), model, corpus, examples, 0)
            jax.block_until_ready(start)
            taken[kind] = clock.read()
        steps = list(_steps(model, start, rows))[1:]
        taken["step"] = statistics.median(s for s, _ in steps), statistics.median(s for _, s in steps)
        for name, (wall, cpu) in taken.items():
            print(f"| {num_slots} | {name} | {wall:.1f} | {cpu:.1f} | {cpu / taken['step'][1]:.1f} |", flush=True)
    print(f"\npeak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


class _Clock:
    def __init__(self) -> None:
        self._begun = time.monotonic(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.monotonic() - self._begun[0], time.process_time() - self._begun[1]


def _steps(model: Any, start: Any, rows: PackedRows) -> Iterator[tuple[float, float]]:
    tx = optimizer(OptimConfig(), STEPS, start.num_frozen)
    state = TrainState(start, tx.init(start), jnp.zeros((), jnp.int32))
    options: dict[str, Any] = {"tail": "drop", "reduction": "token", "remat": "layers"}
    for _, batch in zip(range(STEPS), batches(rows, ROWS, 0), strict=False):
        clock = _Clock()
        stacked = jax.tree.map(lambda a: a[None], batch)
        state, _ = jax.block_until_ready(
            train_step(state, model.params, stacked, config=model.config, tx=tx, **options)
        )
        yield clock.read()


if __name__ == "__main__":
    main()
