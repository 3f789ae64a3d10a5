"""Inference servers, seen as one coroutine: messages in, a completion out."""

from __future__ import annotations

from synth.clients.base import Client
from synth.clients.openai import OpenAIClient
from synth.config import ClientConfig


def connect(config: ClientConfig, url: str) -> Client:
    """A client of the server at `url`, one of `config.urls`; to be entered with `async with`."""
    return OpenAIClient(config, url)
