"""What else could choose a head's tokens, or fit its slots, than attention matching does: measured before any training.

    make quickstart                                              # leaves a document and questions behind
    python benchmarks/slot_choices.py --run=runs/document-… [--shares=10,20,40] [--only="attention mass"]

All have the profile's budgets, the same queries (the document being repeated) and the same document; what differs is
one step of `cartridges_jax/initial/attention_matching.py`. Printed is the gap closed, a line for each way, and what is
measured is kept in OUTPUT/choices.json, so that the command, given again, goes on. Another document needs another
OUTPUT.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from ablations import MODEL, Bench, Document
from jaxtyping import Array, Float

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line import files
from cartridges_jax.initial import attention_matching
from cartridges_jax.initial.budgets import BudgetConfig, head_lengths
from cartridges_jax.initial.chunks import Chunk, MatchingConfig, chunks_of
from cartridges_jax.initial.heads import attention_received
from cartridges_jax.models.language_model import LanguageModel, load_model
from cartridges_jax.training.batch import Batch
from cartridges_jax.training.data import read_corpus
from cartridges_jax.training.losses import loss_sum

# What a head's tokens are ranked by: the queries' probabilities [m, s], what each token receives of them [s], and its
# squared gradient [s].
Choice = Callable[[Array, Array, Array], Float[Array, " s"]]
CHOICES: dict[str, Choice] = {
    "attention mass": lambda probs, received, gradient: received,  # as in the package
    "largest attention, as KVzip": lambda probs, received, gradient: probs.max(0),
    "mean attention": lambda probs, received, gradient: probs.mean(0),
    "the loss's gradient, as KVgrad": lambda probs, received, gradient: gradient,
    "attention mass times gradient": lambda probs, received, gradient: received * jnp.sqrt(gradient),
}
KEYS_TOO = "keys fitted too"  # as in the package, where slots are few
REFINEMENTS = ("dropped tokens merged into kept ones", "chosen anew by what was missed", KEYS_TOO)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run directory of a quickstart")
    parser.add_argument("--output", type=Path, default=Path("runs/slot-choices"), help="default: %(default)s")
    parser.add_argument("--shares", default="10,20,40", help="the document's tokens over these; default: %(default)s")
    parser.add_argument("--only", choices=(*CHOICES, *REFINEMENTS), help="one of the ways; default: all")
    args = parser.parse_args()
    model, document = load_model(MODEL, "auto"), Document.of_run(args.run, None)
    bench = Bench(model, args.output, None)
    corpus, kept = read_corpus(document.text), args.output / "choices.json"
    measured: dict[str, float] = files.read_json(kept) if kept.is_file() else {}
    (chunk,) = chunks_of(model, corpus, [], MatchingConfig())
    gradient_lsk = squared_gradient(model, chunk)
    shares = [int(share) for share in args.shares.split(",")]
    print(f"| a head's tokens | {' | '.join(f'1/{share}' for share in shares)} |")
    for way in [args.only] if args.only else [*CHOICES, *REFINEMENTS]:
        for share in shares:
            if f"{way}, 1/{share}" not in measured:
                num_slots = len(model.tokenizer.encode(corpus)) // share
                (lengths_lk,) = head_lengths(BudgetConfig("profile"), model, [chunk], num_slots)
                gap = bench.gap(document, matched(model, chunk, lengths_lk, gradient_lsk, way))
                measured[f"{way}, 1/{share}"] = gap
                files.write_text(kept, json.dumps(measured, indent=1) + "\n")
        gaps = " | ".join(f"{measured[f'{way}, 1/{share}']:.3f}" for share in shares)
        print(f"| {way} | {gaps} |", flush=True)


def squared_gradient(model: LanguageModel, chunk: Chunk) -> Float[Array, "l s k"]:
    """Returns how strongly the loss of the repeated document asks for each token: d loss / d log-weight, squared."""
    document = Cartridge.from_tokens(model, chunk.tokens)
    loss = functools.partial(loss_sum, config=model.config, tail="drop", reduction="token")

    @jax.jit
    def squared(params: Any, batch: Batch) -> Array:
        def of_bias(bias: Array) -> Array:
            return loss(document.replace(bias=bias), params, batch)[0]  # type: ignore[attr-defined]

        return jax.grad(of_bias)(jnp.zeros(document.keys.shape[:3])) ** 2

    rows = [{name: jnp.asarray(array)[None] for name, array in row.items()} for row in chunk.rows]
    return sum((squared(model.params, Batch(**row)) for row in rows), start=jnp.zeros(document.keys.shape[:3]))


def matched(
    model: LanguageModel, chunk: Chunk, lengths_lk: np.ndarray, gradient_lsk: Float[Array, "l s k"], way: str
) -> Cartridge:
    """Attention matching of a chunk, of which one step is done in another way."""
    if way == KEYS_TOO:
        return attention_matching._match(model, chunk, lengths_lk, fits_keys=True)
    document = Cartridge.from_tokens(model, chunk.tokens)
    # a token's gradient reaches its head as one more channel of its value
    scale = gradient_lsk.mean()
    values = jnp.concatenate([document.values, (gradient_lsk / scale)[..., None]], -1)
    lengths_lk = lengths_lk.astype(np.int32)
    jax.clear_caches()  # of programs that fit heads in another way
    with mock.patch.object(attention_matching, "_fit_head", functools.partial(fit_head, way=way)):
        keys, values, bias = attention_matching._fit(
            model.params,
            document.keys,
            values,
            lengths_lk,
            *chunk.queries,
            config=model.config,
            sizes=attention_matching.array_sizes(lengths_lk),
            fits_keys=False,
            implementation=None,
        )
    jax.clear_caches()
    return Cartridge(keys, values, bias, 1, lengths=lengths_lk, offset=0)


def fit_head(
    q: Float[Array, "m h"],
    k: Float[Array, "s h"],
    v: Float[Array, "s h+1"],
    length: Array,
    *,
    is_query: Array,
    sizes: tuple[int, ...],
    fits_keys: bool,
    scale: float | Array,
    way: str,
) -> tuple[Float[Array, "p h"], Float[Array, "p h"], Float[Array, " p"]]:
    """Fits the slots of one kv head; see `attention_matching._fit_head`."""
    v, gradient_s = v[:, :-1], v[:, -1]
    probs_ms, received_s = attention_received(q, k, is_query, scale)
    total_m = jax.nn.logsumexp(q @ k.T * scale, axis=-1)
    output_mh = probs_ms @ v
    wanted_s = CHOICES.get(way, CHOICES["attention mass"])(probs_ms, received_s, gradient_s)

    def fit(size: int) -> tuple[Array, Array, Array]:
        is_slot_p = jnp.arange(size) < length

        def kept(wanted_s: Array) -> tuple[Array, Array]:
            kept_p = attention_matching._kept(wanted_s, length)[:size]
            return tuple(jnp.where(is_slot_p[:, None], jnp.take(a, kept_p, 0, mode="clip"), 0) for a in (k, v))

        def weights(keys_ph: Array, bias_p: Array) -> Array:
            scores_mp = q @ keys_ph.T * scale + bias_p - total_m[:, None]
            return jnp.where(is_slot_p, jnp.exp(scores_mp), 0) * is_query[:, None]

        def fitted(keys_ph: Array, values_ph: Array) -> tuple[Array, Array, Array]:
            values_ph, bias_p = attention_matching._fit_slots(
                weights(keys_ph, jnp.zeros(size)), values_ph, output_mh, is_query, length
            )
            return keys_ph, values_ph, jnp.where(is_slot_p, bias_p, 0)

        keys_ph, values_ph = kept(wanted_s)
        if way == "dropped tokens merged into kept ones":
            keys_ph, values_ph = merged(keys_ph, is_slot_p, k, v, wanted_s)
        keys_ph, values_ph, bias_p = fitted(keys_ph, values_ph)
        if way == "chosen anew by what was missed":
            weights_mp = weights(keys_ph, bias_p)
            given_mh = weights_mp @ values_ph / jnp.maximum(weights_mp.sum(-1, keepdims=True), 1e-9)
            missed_m = ((given_mh - output_mh) ** 2).sum(-1) * is_query
            missed_m = missed_m / jnp.maximum(missed_m.mean(), 1e-9)
            keys_ph, values_ph, bias_p = fitted(*kept(jnp.sqrt((probs_ms**2 * (1 + missed_m)[:, None]).mean(0))))
        return tuple(
            jnp.pad(a, [(0, sizes[-1] - size)] + [(0, 0)] * (a.ndim - 1)) for a in (keys_ph, values_ph, bias_p)
        )

    return jax.lax.switch(jnp.searchsorted(jnp.asarray(sizes), length), [functools.partial(fit, s) for s in sizes])


def merged(
    keys_ph: Array, is_slot_p: Array, k: Float[Array, "s h"], v: Float[Array, "s h"], mass_s: Array
) -> tuple[Array, Array]:
    """Gives each slot the mean, by attention mass, of the tokens whose keys lie nearest to its own."""
    nearest_s = jnp.where(is_slot_p, k @ keys_ph.T - (keys_ph**2).sum(-1) / 2, -jnp.inf).argmax(-1)

    def mean(of_tokens: Array) -> Array:
        summed = jnp.zeros((len(keys_ph), of_tokens.shape[-1])).at[nearest_s].add(mass_s[:, None] * of_tokens)
        return summed / jnp.maximum(jnp.zeros(len(keys_ph)).at[nearest_s].add(mass_s), 1e-9)[:, None]

    return mean(k), mean(v)


if __name__ == "__main__":
    main()
