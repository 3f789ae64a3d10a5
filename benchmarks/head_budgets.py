"""Would attention matching gain if heads had budgets of their own, at the same number of slots in all?

    python benchmarks/head_budgets.py [--document=… --dataset=… --questions=…] [--share=4]

First every head keeps p slots, and what attention each document token receives is written down. One threshold for all
layers and heads then keeps as many tokens in all, more of them in heads whose attention is spread out, at most
`--longest` times p; slots that a head leaves empty are there, with a bias that gives them no weight.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ablations
import jax
import jax.numpy as jnp
import numpy as np

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.initial import attention_matching as matching
from cartridges_jax.models.language_model import load_model
from cartridges_jax.training.data import read_corpus, read_examples

EMPTY = -1e9  # of a bias
FEWEST = 8  # slots of a head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", type=Path, default=Path("examples/document.txt"))
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--questions", type=Path, default=Path("examples/questions.jsonl"))
    parser.add_argument("--share", type=int, default=4, help="p is the document's tokens over this")
    parser.add_argument("--longest", type=float, default=2.0, help="times p, of a head's own slots")
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    args = parser.parse_args()
    model = load_model(ablations.MODEL, "auto")
    bench = ablations.Bench(model, args.output, None)
    document = ablations.Document(args.document.stem, args.document, args.dataset, args.questions)
    corpus, examples = read_corpus(args.document), read_examples(str(args.dataset), model.tokenizer)
    num_slots = len(model.tokenizer.encode(corpus)) // args.share

    def show(label: str, cartridge: Cartridge) -> None:
        assert cartridge.bias is not None
        used = (np.asarray(cartridge.bias) > EMPTY / 2).sum(1)
        print(f"{label}: {used.mean():.0f} slots a head, {used.min()} to {used.max()}; ", end="")
        print(f"gap closed {bench.gap(document, cartridge):.3f}", flush=True)

    masses: list[np.ndarray] = []
    fit = matching._fit_head
    try:
        matching._fit_head = _recording(fit, masses)
        show("alike", matching.attention_matching(model, corpus, examples, num_slots))
        jax.effects_barrier()
        threshold = float(np.sort(np.concatenate(masses))[-num_slots * len(masses)])
        jax.clear_caches()
        matching._fit_head = _above(threshold)
        show("by attention", matching.attention_matching(model, corpus, examples, int(args.longest * num_slots)))
    finally:
        matching._fit_head = fit


def _recording(fit: Callable, masses: list[np.ndarray]) -> Callable:
    def recorded(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> tuple:
        mass_s = _attention(q, k, options["is_query"], options["scale"])[1]
        jax.debug.callback(lambda mass: masses.append(np.asarray(mass)), mass_s)
        return fit(q, k, v, **options)

    return recorded


def _above(threshold: float) -> Callable:
    """`_fit_head` with as many slots as receive more attention than that, and empty ones up to `num_slots`."""

    def fit(
        q: jax.Array, k: jax.Array, v: jax.Array, *, is_query: jax.Array, num_slots: int, scale: float | jax.Array
    ) -> tuple:
        probs_ms, mass_s = _attention(q, k, is_query, scale)
        mass_p, kept_p = jax.lax.top_k(mass_s.at[0].set(jnp.inf), num_slots)
        used_p = (mass_p > threshold) | (jnp.arange(num_slots) < FEWEST)
        probs_mp = probs_ms[:, kept_p] * used_p
        values_ph, bias_p = matching._fit_slots(probs_mp, v[kept_p], probs_ms @ v, is_query)
        return k[kept_p], values_ph, jnp.where(used_p, bias_p, EMPTY)

    return fit


def _attention(
    q: jax.Array, k: jax.Array, is_query: jax.Array, scale: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The queries' probabilities, and of each token the root of their mean square, as `_fit_head` has them."""
    probs_ms = jax.nn.softmax(q @ k.T * scale, axis=-1) * is_query[:, None]
    return probs_ms, jnp.sqrt((probs_ms**2).mean(0))


if __name__ == "__main__":
    main()
