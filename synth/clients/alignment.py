"""Checks that the token ids of an answer spell its text.

If they did not, the teacher's log-probabilities would be learnt at the wrong tokens. It happens when a server decodes
with another tokenizer, filters its text, or loses tokens on the way. A tokenizer of our own checks every answer. Asking
the server costs a request, so after the first answers only some are checked: what makes texts and ids disagree is
seldom an accident of one answer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Sequence

from synth.clients.base import Completion, Refused, Unavailable

ALWAYS, THEN_ONE_IN = 8, 16

# Texts leave special tokens out, ids do not: <|im_end|>, </s>, <end_of_turn>, [INST].
_MARKS = re.compile(r"<\|?[\w/ ]{1,32}\|?>|\[/?[A-Z_]{1,32}\]")

log = logging.getLogger(__name__)


class Alignment:
    """Checks the first answers and then one in `one_in`, by a function that decodes ids."""

    def __init__(self, decode: Callable[[Sequence[int]], Awaitable[str]], one_in: int = 1):
        self._decode, self._one_in = decode, one_in
        self._seen = 0
        self._possible = True

    async def check(self, completion: Completion, stops: Sequence[str] = ()) -> None:
        """Raises: Unavailable, if the ids spell another text."""
        self._seen += 1
        is_asked = self._seen <= ALWAYS or self._seen % self._one_in == 0
        if not completion.token_ids or not is_asked or not self._possible:
            return
        try:
            spelt = await self._decode(completion.token_ids)
        except Refused as refusal:
            log.warning("texts cannot be compared with their token ids: %s", refusal)
            self._possible = False
            return
        if not is_spelt(completion.text, spelt, stopped=bool(stops)):
            raise Unavailable(
                f"the server's token ids spell {spelt[:60]!r}..., but its text is {completion.text[:60]!r}...",
                "wrong tokens",
            )


def is_spelt(text: str, spelt: str, *, stopped: bool) -> bool:
    """Whether ids that spell `spelt` may have the text `text`. If `stopped`, a stop string may have cut that short."""
    text, spelt = _plain(text), _plain(spelt)
    return spelt == text or (stopped and spelt.startswith(text))


def _plain(text: str) -> str:
    # a cut may leave a part of a character, and some tokenizers give a text's first word a space
    return _MARKS.sub("", text).rstrip("\N{REPLACEMENT CHARACTER}").strip()
