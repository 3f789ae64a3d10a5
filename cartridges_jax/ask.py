"""Asks a cartridge on an engine that is not ours: `python -m cartridges_jax.ask --engine=tokasaurus --name=… QUESTION`.

Tokasaurus and vLLM look for cartridges in a folder of theirs: with `--folder` the cartridge is put there first, in the
engine's format.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cartridges_jax.command_line import config
from cartridges_jax.command_line.addresses import basic_login, without_credentials
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.command_line.progress import printable

TIMEOUT_SECONDS = 600.0
LARGEST_REPLY = 2**26  # bytes
# Tokasaurus rewrites an id that holds anything else, and then looks for a folder of another name.
NAME = re.compile(r"[A-Za-z0-9]+([_-][A-Za-z0-9]+)*")
DEFAULT_URLS = {"tokasaurus": "http://127.0.0.1:10210", "vllm": "http://127.0.0.1:8000"}


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    if args.cartridge is not None:
        _register(args)
    url = (args.url or DEFAULT_URLS[args.engine]).rstrip("/")
    if args.engine == "tokasaurus":
        body = tokasaurus_request(args.name, args.question, args.model, args.max_tokens)
        reply = post(f"{url}/custom/cartridge/chat/completions", body)
    else:
        num_slots, thinking = _slots_and_thinking(args)
        prompt = _prompt(args.model, args.question, thinking)
        body = vllm_request(args.name, num_slots, prompt, args.served_model or args.model, args.max_tokens)
        reply = post(f"{url}/v1/completions", body)
    print(printable(_answer(reply, without_credentials(url)).strip()))
    return 0


def _answer(reply: dict[str, Any], url: str) -> str:
    try:
        choice = reply["choices"][0]
        found = choice["message"]["content"] if "message" in choice else choice["text"]
    except (LookupError, TypeError) as error:
        raise ConnectionError(f"{url} answers without a text: is it the right kind of server?") from error
    if not isinstance(found, str):
        raise ConnectionError(f"{url} answers without a text: is it the right kind of server?")
    return found


def tokasaurus_request(name: str, question: str, model: str, max_tokens: int) -> dict[str, Any]:
    """The body of a chat completion behind a cartridge of the server's own folder; it knows no other fields."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "cartridges": [{"id": name, "source": "local", "force_redownload": False}],
        "temperature": 0.0,
        "max_completion_tokens": max_tokens,
    }


def vllm_request(name: str, num_slots: int, prompt: Sequence[int], model: str, max_tokens: int) -> dict[str, Any]:
    """The body of a completion behind a cartridge of `interop.vllm`: a placeholder for every slot, then the prompt."""
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
    """The JSON answer of a server.

    Raises:
      UserError: it refuses the request; the sentence is its own.
      ConnectionError: it cannot be reached, or answers something else than JSON.
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


class _Nowhere(urllib.request.HTTPRedirectHandler):
    """What is sent is for the server that was named alone."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # pyrefly: ignore
        return None


_OPENER = urllib.request.build_opener(_Nowhere)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cartridges_jax.ask", description=__doc__)
    parser.add_argument("question")
    parser.add_argument("--engine", required=True, choices=sorted(DEFAULT_URLS))
    parser.add_argument("--name", required=True, help="of the cartridge, on the server")
    parser.add_argument("--url", help=f"of the server (default: {DEFAULT_URLS})")
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer and name are used")
    parser.add_argument("--served-model", help="the model's name on the server, if another")
    parser.add_argument("--folder", type=Path, help="of the server's cartridges: where --cartridge is put")
    parser.add_argument("--cartridge", help="a file or folder in any format, hf:… or wandb:…")
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args(argv)
    if not NAME.fullmatch(args.name):
        raise UserError(f"--name is {args.name!r}, expected letters and digits with single dashes or underscores")
    if args.cartridge is not None and args.folder is None:
        raise UserError("--cartridge is put into the server's folder of cartridges: say which with --folder")
    if args.engine == "vllm" and args.folder is None:
        raise UserError(
            "vLLM wants a placeholder for every slot: give --folder, where the cartridge tells their number"
        )
    return args


def _register(args: argparse.Namespace) -> None:
    from cartridges_jax.cartridge.arrays import Cartridge
    from cartridges_jax.interop import formats

    place, format = (args.folder / args.name, "tokasaurus")
    if args.engine == "vllm":
        place, format = args.folder / f"{args.name}.safetensors", "safetensors"
    formats.write(Cartridge.load(args.cartridge), place, format)


def _slots_and_thinking(args: argparse.Namespace) -> tuple[int, bool | None]:
    from cartridges_jax.cartridge.arrays import Cartridge

    cartridge = Cartridge.load(args.folder / f"{args.name}.safetensors")
    return cartridge.num_slots, cartridge.thinking


def _prompt(model: str, question: str, thinking: bool | None) -> list[int]:
    from cartridges_jax.models.hub import resolve
    from cartridges_jax.models.tokenizer import load_tokenizer

    messages = [{"role": "user", "content": question}]
    return load_tokenizer(resolve(model)).turn_ids(messages, add_generation_prompt=True, thinking=thinking)


if __name__ == "__main__":
    config.run(main)
