"""Offline generation: the server's scheduler and engine, driven until every prompt has its answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.serving.engine import Engine
from cartridges_jax.serving.metadata import PAGE_SIZE, num_pages
from cartridges_jax.serving.scheduler import NOT_FINITE, Event, Finished, Prefix, Request, Scheduler, Token

if TYPE_CHECKING:
    from cartridges_jax.cartridge.arrays import Cartridge

MAX_NUM_SEQS = 16


def generate(
    model: LanguageModel,
    prompts: Sequence[str],
    cartridge: Cartridge | None = None,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Continues each prompt, taken as it is (no chat template), behind the cartridge's slots, or else behind a BOS.

    Returns:
      The continuations without stop tokens, in the order of the prompts.

    Raises:
      UserError: a prompt without tokens, one that does not fit the model's window with its answer, or a cartridge
        with which the model's numbers are not finite.
    """
    if cartridge is None:
        ids = [model.tokenizer.encode(prompt, add_special_tokens=True) for prompt in prompts]
    else:  # which holds the beginning of a text
        ids = [model.tokenizer.continued_ids(prompt) for prompt in prompts]
    answers = generate_ids(model, [tuple(one) for one in ids], cartridge, max_tokens, temperature, top_p, seed)
    return [model.tokenizer.decode(answer) for answer in answers]


def generate_ids(
    model: LanguageModel,
    prompts: Sequence[tuple[int, ...]],
    cartridge: Cartridge | None = None,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    engine: Engine | None = None,
) -> list[list[int]]:
    """`generate` on token ids, stop tokens left out.

    Args:
      engine: one of this model that nobody else uses; by default one is made, for which the weights are laid out anew.
    """
    if not prompts:
        return []
    if not all(prompts):
        raise UserError(f"prompt {[bool(p) for p in prompts].index(False)} has no tokens: expected at least one")
    prefix = None if cartridge is None else Prefix.of("cartridge", cartridge)
    longest = max(map(len, prompts)) + max_tokens
    if longest > model.config.max_position_embeddings:
        raise UserError(
            f"a prompt of {max(map(len, prompts))} tokens and an answer of {max_tokens} exceed {model.name}'s window "
            f"of {model.config.max_position_embeddings}: shorten one of them"
        )
    if engine is None:
        max_num_seqs = min(MAX_NUM_SEQS, len(prompts))
        engine = engine_for(model, [(prefix.length if prefix else 0, longest)], batch_sizes=[max_num_seqs])
    stop_ids = model.tokenizer.stop_ids
    requests = [
        Request(str(i), prompt, prefix, max_tokens, temperature, top_p, seed=seed + i, stop_ids=stop_ids)
        for i, prompt in enumerate(prompts)
    ]
    answers: list[list[int]] = [[] for _ in prompts]
    for event in run(Scheduler(engine, max_queue=len(requests)), requests):
        if isinstance(event, Token) and event.sampled.token not in stop_ids:
            answers[int(event.id)].append(event.sampled.token)
        elif isinstance(event, Finished) and event.reason == "not_finite":
            raise UserError(f"prompt {event.id}: {NOT_FINITE}")
    return answers


def engine_for(
    model: LanguageModel, sizes: Sequence[tuple[int, int]], batch_sizes: Sequence[int] = (1, MAX_NUM_SEQS)
) -> Engine:
    """Makes an engine that answers as many prompts together as the last of `batch_sizes`.

    Args:
      sizes: slots of a cartridge that all prompts share, and the most tokens of a prompt with its answer behind it.
      batch_sizes: few, since to compile another takes longer than its running saves.
    """
    max_num_seqs = batch_sizes[-1]
    max_length = -(-max(map(sum, sizes)) // 128) * 128  # few lengths, so few compilations
    # the last page of a cartridge may be its own
    pages = max(num_pages(slots) + 1 + max_num_seqs * num_pages(tokens) for slots, tokens in sizes)
    cache_tokens = max(pages, num_pages(max_length) + 1) * PAGE_SIZE
    return Engine(model, max_num_seqs, max_length, 1, cache_tokens=cache_tokens, batch_sizes=batch_sizes)


def run(scheduler: Scheduler, requests: Sequence[Request]) -> Iterator[Event]:
    """Submits every request and yields the events until none is left."""
    for request in requests:
        scheduler.submit(request)
    while scheduler.has_work:
        yield from scheduler.step()
