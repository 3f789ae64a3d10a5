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

import ablations
import jax
import jax.numpy as jnp
import numpy as np

from cartridges_jax import attention_matching as matching
from cartridges_jax.cartridge import Cartridge
from cartridges_jax.data import read_corpus, read_examples
from cartridges_jax.models.language_model import load_model

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
    document = ablations.Document(args.document, args.dataset, args.questions)
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


def _mass(q: jax.Array, k: jax.Array, is_query: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights_ms = jax.nn.softmax(q @ k.T * q.shape[-1] ** -0.5, axis=-1) * is_query[:, None]
    return weights_ms, jnp.sqrt((weights_ms**2).mean(0))


def _recording(fit: Callable, masses: list[np.ndarray]) -> Callable:
    def recorded(q: jax.Array, k: jax.Array, v: jax.Array, *, is_query: jax.Array, num_slots: int) -> tuple:
        jax.debug.callback(lambda mass: masses.append(np.asarray(mass)), _mass(q, k, is_query)[1])
        return fit(q, k, v, is_query=is_query, num_slots=num_slots)

    return recorded


def _above(threshold: float) -> Callable:
    """`_fit_head` with as many slots as receive more attention than that, and empty ones up to `num_slots`."""

    def fit(q: jax.Array, k: jax.Array, v: jax.Array, *, is_query: jax.Array, num_slots: int) -> tuple:
        weights_ms, mass_s = _mass(q, k, is_query)
        output_mh = weights_ms @ v
        mass_s = mass_s.at[0].set(jnp.inf)
        count = jnp.maximum((mass_s > threshold).sum(), FEWEST)
        kept_p = jax.lax.top_k(mass_s, num_slots)[1]
        used_p = jnp.arange(num_slots) < count
        shares_mp = weights_ms[:, kept_p] * used_p
        weight_p = matching._nnls(shares_mp, is_query.astype(q.dtype)) * used_p
        shares_mp = shares_mp * weight_p
        shares_mp = shares_mp / jnp.maximum(shares_mp.sum(-1, keepdims=True), 1e-9)
        gram_pp = shares_mp.T @ shares_mp
        ridge = matching.RIDGE * jnp.trace(gram_pp) / count
        gram_pp = gram_pp + ridge * jnp.eye(num_slots, dtype=q.dtype)
        residual_ph = shares_mp.T @ (output_mh - shares_mp @ v[kept_p])
        moved_ph = jax.scipy.linalg.solve(gram_pp, residual_ph, assume_a="pos")
        return k[kept_p], v[kept_p] + moved_ph, jnp.where(used_p, jnp.log(weight_p), EMPTY)

    return fit


if __name__ == "__main__":
    main()
