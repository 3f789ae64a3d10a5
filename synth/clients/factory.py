"""The client for each kind of inference server that a config may name."""

from __future__ import annotations

from synth.clients.base import Client
from synth.clients.hosted import HostedClient
from synth.clients.openai import OpenAIClient
from synth.clients.sglang import SGLangClient
from synth.clients.tokasaurus import TokasaurusClient
from synth.config import ClientConfig

_WITH_TOKEN_IDS = {"openai": OpenAIClient, "sglang": SGLangClient, "tokasaurus": TokasaurusClient}


def connect(config: ClientConfig, url: str) -> Client:
    """A client of the server at `url`, one of `config.urls`; to be entered with `async with`."""
    return _WITH_TOKEN_IDS.get(config.kind, HostedClient)(config, url)
