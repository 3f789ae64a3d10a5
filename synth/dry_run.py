"""Tells what a run would ask its servers and what that would cost, without a call to any of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from cartridges_jax.command_line.errors import UserError
from synth import chunkers
from synth.chunkers import LocalTokenizer, Tokenizer
from synth.config import SynthConfig
from synth.fleet import Fleet
from synth.resources import reading
from synth.self_study import PlannedConversation, plan_batch

SHOWN, LOOKED_AT = 3, 32  # sample prompts, and chunks to estimate from
CHARACTERS_PER_TOKEN = 4  # of English, and most tokenizers
_LONGEST_PROMPT = 1500  # characters shown


async def describe(config: SynthConfig) -> str:
    """A few of the prompts, and an estimate of calls and tokens.

    Raises:
      UserError: a text cannot be read, or only over a network.
    """
    for resource in config.resource.every():
        if resource.is_remote and not (Path(config.output_dir) / reading.SNAPSHOT).is_file():
            raise UserError(f"{resource.path} is on a network, and a dry run calls nobody: give it as a file")
    corpus = reading.read(config.resource, Path(config.output_dir))
    tokenizer, how = _tokenizer(config.chunker.tokenizer)
    chunker = await chunkers.create(config.chunker, tokenizer, corpus)
    nobody = Fleet(config.client).route()
    size, total = config.conversations_per_chunk, config.num_conversations
    chunks = -(-total // size)
    planned: list[PlannedConversation] = []
    for index in range(0, chunks, max(1, chunks // LOOKED_AT)):
        count = min(size, total - index * size)
        planned += await plan_batch(index, count, nobody, nobody, chunker, config)
    samples = [_sample(plan) for plan in planned[:: max(1, len(planned) // SHOWN)][:SHOWN]]
    return "\n\n".join([*samples, await _estimate(planned, chunks, tokenizer, how, config)])


def _tokenizer(source: str | None) -> tuple[Tokenizer, str]:
    if source and Path(source).exists():
        return LocalTokenizer(source), f"counted by {source}"
    return _Characters(), f"taken for {CHARACTERS_PER_TOKEN} characters each, so the run's chunks begin elsewhere"


class _Characters:
    """A tokenizer whose tokens are a few characters each. A token's id is made of its characters."""

    async def tokenize(self, text: str) -> list[int]:
        pieces = (text[i : i + CHARACTERS_PER_TOKEN] for i in range(0, len(text), CHARACTERS_PER_TOKEN))
        return [int.from_bytes(piece.encode("utf-32-le"), "little") for piece in pieces]

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        width = 4 * CHARACTERS_PER_TOKEN
        return "".join(i.to_bytes(width, "little").decode("utf-32-le").rstrip("\0") for i in token_ids)


def _sample(plan: PlannedConversation) -> str:
    cut = plan.system_prompt[_LONGEST_PROMPT:]
    system = plan.system_prompt[:_LONGEST_PROMPT] + (f" … ({len(cut)} characters more)" if cut else "")
    who = "the first question" if plan.prompt.is_question else "what side A is told"
    return f"--- conversation {plan.index}, {plan.prompt.kind}\n{system}\n--- {who}\n{plan.prompt.text}"


async def _estimate(
    planned: list[PlannedConversation], chunks: int, tokenizer: Tokenizer, how: str, config: SynthConfig
) -> str:
    system = statistics.fmean([len(await tokenizer.tokenize(plan.system_prompt)) for plan in planned])
    task = statistics.fmean([len(await tokenizer.tokenize(plan.prompt.text)) for plan in planned])
    given = statistics.fmean(plan.prompt.is_question for plan in planned)  # share of conversations that need no side A
    turn = config.question.max_tokens + config.answer.max_tokens
    calls = tokens_in = tokens_out = 0.0
    for number in range(config.rounds):
        asked = 1.0 if number else 1 - given
        calls += asked + 1
        tokens_in += asked * (system + task + number * turn) + system + number * turn + config.question.max_tokens
        tokens_out += asked * config.question.max_tokens + config.answer.max_tokens
    total = config.num_conversations
    return (
        f"{total} conversations about {chunks} chunks: about {_short(calls * total)} calls\n"
        f"tokens in: at most {_short(tokens_in * total)}, of them {_short(system * chunks)} in chunks that a server "
        f"reads once if it keeps their prefix\n"
        f"tokens out: at most {_short(tokens_out * total)}\n"
        f"(from {len(planned)} conversations; tokens are {how})"
    )


def _short(count: float) -> str:
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count:.0f}"
