"""A wrong answer among right ones is found: at once by our own tokenizer, within some answers by asking a server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from synth.clients.alignment import ALWAYS, THEN_ONE_IN, Alignment
from synth.clients.base import Completion, Unavailable


async def decode(token_ids: Sequence[int]) -> str:
    return "".join(map(chr, token_ids))


def answer(text: str, spelt: str) -> Completion:
    return Completion(text, tuple(map(ord, spelt)), None, "stop", 1, len(spelt), 0)


@pytest.mark.parametrize("number", [1, ALWAYS, ALWAYS + 1, 3 * THEN_ONE_IN + 5])
def test_our_own_tokenizer_checks_every_answer(number: int):
    async def check() -> None:
        alignment = Alignment(decode)
        for _ in range(number - 1):
            await alignment.check(answer("yes", "yes"))
        with pytest.raises(Unavailable, match="spell 'no'"):
            await alignment.check(answer("yes", "no"))

    asyncio.run(check())


def test_a_server_is_asked_about_the_first_answers_and_some_of_the_others():
    asked: list[Sequence[int]] = []

    async def ask(token_ids: Sequence[int]) -> str:
        asked.append(token_ids)
        return await decode(token_ids)

    async def check() -> None:
        alignment = Alignment(ask, THEN_ONE_IN)
        for _ in range(4 * THEN_ONE_IN):
            await alignment.check(answer("yes", "yes"))

    asyncio.run(check())
    assert len(asked) == ALWAYS + 4
