"""The document as its own self-study: the model repeats it, and is taught by what it says itself behind all of it.

Conversations ask about some of a document, in the words of whoever asked. Repeating it asks for every token, needs no
server, and keeps what attention matching has fitted, which asks in the same way. The document is cut into pieces, each
an answer to a request to repeat; every pass cuts it at other places. A document in chunks is taught by each of them
alone, as it is compacted (`initial.chunks`).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.initial.chunks import MatchingConfig, bodies, repetitions
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.parallel import sharding
from cartridges_jax.training.data import Example

TOP = 20  # of the teacher's log-probabilities at each position, as self-study asks for


def taught_repetitions(
    model: LanguageModel, corpus: str, passes: int, length: int, config: MatchingConfig
) -> list[Example]:
    """Makes examples in which the model repeats a document so many times, with its own log-probabilities as targets.

    Args:
      length: the most tokens of an example.

    Raises:
      UserError: there is no text, or `length` or `config.chunk_tokens` leaves no room for one.
    """
    texts, (before, after) = bodies(model, corpus, config)
    examples = []
    for body in texts:
        chunk = Cartridge.from_tokens(model, [*before, *body, *after])
        for i in range(passes):
            examples += taught(model, chunk, repetitions(model, body, length, i / passes), length)
    return examples


def taught(model: LanguageModel, prefix: Cartridge, examples: Sequence[Example], length: int) -> list[Example]:
    """Gives examples of at most `length` tokens the targets that the model itself has behind a prefix."""
    made = []
    for example in examples:
        tokens_t = np.pad(example.tokens, (0, length - len(example.tokens)))
        logprobs_tj, ids_tj = sharding.gathered(_best(model.logits(tokens_t[None], cartridge=prefix)[0]))
        where = np.unique(example.target_index)
        targets = np.repeat(where, TOP), ids_tj[where].reshape(-1), logprobs_tj[where].reshape(-1)
        made.append(Example(example.tokens, *targets))
    return made


@jax.jit
def _best(logits_tv: Float[Array, "t v"]) -> tuple[Float[Array, "t j"], Int[Array, "t j"]]:
    return jax.lax.top_k(jax.nn.log_softmax(logits_tv.astype(jnp.float32)), TOP)
