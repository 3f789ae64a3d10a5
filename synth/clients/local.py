"""The model's tokenizer and chat template, run here for servers that take token ids or that cannot decode them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from cartridges_jax.command_line.errors import UserError
from synth.clients.base import ChatMessages, Rejected


class ChatTokenizer:
    """The tokenizer of a folder or a Hub id. The package `transformers` reads it, which works without torch."""

    def __init__(self, source: str):
        try:
            self._wrapped = _auto_tokenizer().from_pretrained(source)
        except Exception as error:  # whatever the libraries beneath raise for a missing file or a bad one
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"config.client.tokenizer {source!r} cannot be loaded: {reason}") from error

    def chat_ids(
        self, messages: ChatMessages, *, add_generation_prompt: bool, thinking: bool | None = None
    ) -> list[int]:
        switch = {} if thinking is None else {"enable_thinking": thinking}
        try:
            text = self._wrapped.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **switch
            )
        except Exception as error:  # a template may raise anything: jinja's errors, and those of Python inside it
            raise Rejected(f"the chat template of config.client.tokenizer refuses these messages: {error}") from error
        return self.encode(text)

    def encode(self, text: str) -> list[int]:
        return self._wrapped.encode(text, add_special_tokens=False)

    async def decode(self, token_ids: Sequence[int]) -> str:
        return self._wrapped.decode(list(token_ids), skip_special_tokens=False)


def _auto_tokenizer() -> Any:
    logger = logging.getLogger("transformers")
    logger.disabled = True  # it says at import that torch is absent, which is how we mean it to be
    try:
        from transformers import AutoTokenizer
    finally:
        logger.disabled = False
    return AutoTokenizer
