"""The client for each kind of inference server that a config may name."""

from __future__ import annotations

from synth.clients.base import Client
from synth.clients.hosted import HostedClient
from synth.clients.openai import OpenAIClient
from synth.clients.sglang import SGLangClient
from synth.clients.tokasaurus import TokasaurusClient
from synth.config import ClientConfig


def connect(config: ClientConfig, url: str) -> Client:
    """A client of the server at `url`, one of `config.urls`; to be entered with `async with`."""
    if config.kind == "openai":
        return OpenAIClient(config, url)
    if config.kind == "sglang":
        return SGLangClient(config, url)
    if config.kind == "tokasaurus":
        return TokasaurusClient(config, url)
    return HostedClient(config, url)
