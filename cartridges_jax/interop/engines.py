"""Requests to servers that are not ours: how Tokasaurus and vLLM are asked behind a cartridge, and what they answer."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from cartridges_jax.command_line.addresses import basic_login, without_credentials
from cartridges_jax.command_line.errors import UserError

TIMEOUT_SECONDS = 600.0
LARGEST_REPLY = 2**26  # bytes


def tokasaurus_request(name: str, question: str, model: str, max_tokens: int) -> dict[str, Any]:
    """Returns the body of a chat completion behind a cartridge in Tokasaurus' own folder; it takes no other fields."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "cartridges": [{"id": name, "source": "local", "force_redownload": False}],
        "temperature": 0.0,
        "max_completion_tokens": max_tokens,
    }


def vllm_request(name: str, num_slots: int, prompt: Sequence[int], model: str, max_tokens: int) -> dict[str, Any]:
    """Returns the body of a completion by `interop.vllm`, whose prompt begins with a placeholder for every slot."""
    return {
        "model": model,
        "prompt": [0] * num_slots + list(prompt),
        "kv_transfer_params": {"cartridge": name},
        "cache_salt": name,
        "temperature": 0.0,
        "max_tokens": max_tokens,
        "return_token_ids": True,
    }


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Posts JSON to a server, and returns the JSON object that it answers.

    Raises:
      UserError: the server refuses the request; the sentence is its own.
      ConnectionError: it cannot be reached, or answers something else than a JSON object.
    """
    login, url = basic_login(url), without_credentials(url)
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    if login:
        request.add_header("Authorization", login)
    try:
        with _OPENER.open(request, timeout=TIMEOUT_SECONDS) as response:
            data = response.read(LARGEST_REPLY + 1)
        reply = json.loads(data) if len(data) <= LARGEST_REPLY else None
    except urllib.error.HTTPError as error:
        with error:
            words = error.read(2000).decode(errors="replace")
        if 300 <= error.code < 400:
            where = without_credentials(error.headers.get("Location", "nowhere"))[:200]
            raise UserError(f"{url} leads to {where}, where nothing was sent: give the server's own address") from error
        raise UserError(f"{url} answers {error.code}: {words}") from error
    except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
        raise ConnectionError(f"{url} cannot be asked ({error}): is the server running there?") from error
    if not isinstance(reply, dict):
        raise ConnectionError(f"{url} answers something else than a JSON object of at most {LARGEST_REPLY} bytes")
    return reply


def answer_text(reply: dict[str, Any], url: str) -> str:
    """Returns the text of a completion, or raises a ConnectionError if the reply of the server at `url` has none."""
    try:
        choice = reply["choices"][0]
        found = choice["message"]["content"] if "message" in choice else choice["text"]
    except (LookupError, TypeError) as error:
        raise ConnectionError(f"{url} answers without a text: is it the right kind of server?") from error
    if not isinstance(found, str):
        raise ConnectionError(f"{url} answers without a text: is it the right kind of server?")
    return found


class _Nowhere(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, since the request is meant for the server that was named alone."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # pyrefly: ignore
        return None


_OPENER = urllib.request.build_opener(_Nowhere)
