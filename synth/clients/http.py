"""Makes one attempt at a request, and raises `Refused`, `Unavailable` or `Busy` for every way in which it can fail."""

from __future__ import annotations

import email.utils
import json
import time
from typing import Any, Self

import aiohttp

from cartridges_jax.command_line import files
from cartridges_jax.command_line.addresses import basic_login, without_credentials
from cartridges_jax.command_line.errors import UserError
from synth.clients.base import Busy, Refused, Rejected, Unavailable, check_same_model, reading
from synth.config import ClientConfig

LARGEST_REPLY = 2**28  # bytes, unpacked: the logprobs of a long conversation, or the tokens of a long document
LONGEST_PAUSE_SECONDS = 600.0  # that a server's Retry-After is believed


class HttpClient:
    """What all clients share: a session with the server at `url`, which ends in /v1, and the check of its model."""

    def __init__(self, config: ClientConfig, url: str):
        self._config = config
        self._url = without_credentials(url).rstrip("/")
        self._root = self._url.removesuffix("/v1")  # where routes live that are not OpenAI's
        self._login = f"Bearer {config.api_key}" if config.api_key else basic_login(url)
        self._aliases: set[str] = set()  # other names under which the server serves the model

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # whoever calls bounds the requests in flight
            timeout=aiohttp.ClientTimeout(total=self._config.timeout_seconds),
            headers={"Authorization": self._login} if self._login else {},
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def check(self) -> None:
        # of MODEL:CARTRIDGE our server may list MODEL alone
        model, served = self._config.model, [entry["id"] for entry in await self._listed(self._url)]
        if model not in served and model.rpartition(":")[0] not in served:
            raise Refused(
                f"{self._url} does not serve {model!r}, it serves {', '.join(served)[:300] or 'nothing'}: "
                "change config.client.model"
            )

    async def _check_named(self, reply: dict[str, Any]) -> None:
        """Raises: Refused, if another model answered."""
        named, model = reply.get("model"), self._config.model
        try:
            check_same_model(named, model, self._aliases)
        except Refused:
            with reading(self._url):
                listed = await self._listed(f"{self._root}/v1")
            # vLLM answers with the first of a model's names
            roots = [entry["root"] for entry in listed if entry["id"] == model and isinstance(entry.get("root"), str)]
            self._aliases |= {*roots, *(entry["id"] for entry in listed if entry.get("root") in roots)}
            check_same_model(named, model, self._aliases)

    async def _listed(self, url: str) -> list[dict[str, Any]]:
        """The models that the server at `url` serves, from OpenAI's list of them or Together's bare one."""
        try:
            reply = parse(await self._request("GET", f"{url}/models"), f"{url}/models")
        except Unavailable as error:
            if error.kind not in ("connection", "timeout"):
                raise
            raise Unavailable(
                f"no inference server answers at {url}: start one with python -m cartridges_jax.serve "
                "or change config.client.base_url",
                error.kind,
            ) from error
        models = reply.get("data") if isinstance(reply, dict) else reply
        if not isinstance(models, list):
            raise Refused(f"GET {url}/models gave no list of models: config.client.base_url should end in /v1")
        return [model for model in models if isinstance(model, dict) and isinstance(model.get("id"), str)]

    async def _post(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        """Sends a JSON object and returns the one that comes back."""
        reply = parse(await self._request("POST", url, body), url)
        if not isinstance(reply, dict):
            raise Unavailable(f"{url} gave a {type(reply).__name__}, expected a JSON object", "broken reply")
        return reply

    async def _request(self, method: str, url: str, body: dict[str, Any] | None = None) -> bytes:
        try:
            # a request is meant for the configured server and for no other
            async with self._session.request(method, url, json=body, allow_redirects=False) as response:
                data = await _read(response, url)
        except TimeoutError as error:
            raise Unavailable(f"{url} gave no answer in {self._config.timeout_seconds:g} s", "timeout") from error
        except aiohttp.ClientPayloadError as error:
            raise Unavailable(f"{url} gave a reply that ends early: {error}", "broken reply") from error
        except aiohttp.InvalidURL as error:
            raise Refused(f"{url} is not a URL") from error
        except aiohttp.ClientError as error:
            raise Unavailable(f"{url} cannot be reached: {error or type(error).__name__}", "connection") from error
        status, retry_after = response.status, response.headers.get("Retry-After")
        if 300 <= status < 400:
            where = without_credentials(response.headers.get("Location", "nowhere"))[:200]
            raise Rejected(
                f"{url} leads to {where}, where nothing was sent: set config.client.base_url to where the server is"
            )
        if status < 400:
            return data
        problem = f"{method} {url} gave HTTP {status}: {_server_words(data)}"
        if status in (429, 503):
            raise Busy(problem, f"http {status}", _seconds(retry_after))
        if status == 408:
            raise Unavailable(problem, "timeout")
        if status >= 500:
            raise Unavailable(problem, f"http {status}")
        raise Rejected(problem)


async def _read(response: aiohttp.ClientResponse, url: str) -> bytes:
    data = bytearray()
    async for piece in response.content.iter_any():  # unpacked already
        data += piece
        if len(data) > LARGEST_REPLY:
            raise Unavailable(f"{url} gave a reply of more than {LARGEST_REPLY} bytes", "broken reply")
    return bytes(data)


def parse(data: bytes, url: str) -> Any:
    try:
        return files.parse_json(data, url)
    except UserError as error:
        raise Unavailable(f"{url} gave a reply that is not JSON: {data[:100]!r}", "broken reply") from error


def _server_words(data: bytes) -> str:
    """The message of an error reply, whether it has OpenAI's form or another."""
    text = data.decode("utf-8", "replace")
    try:
        reply = json.loads(text)
        error = reply.get("error", reply)
        text = str(error.get("message") or error.get("detail") or text) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError, RecursionError):
        pass
    return " ".join(text.split())[:300] or "no message"


def _seconds(retry_after: str | None) -> float:
    """The seconds of a Retry-After, in either form that HTTP allows."""
    try:
        seconds = float(retry_after or 0)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(str(retry_after)).timestamp() - time.time()
        except (ValueError, TypeError, LookupError, OverflowError):
            return 0.0
    return min(max(0.0, seconds), LONGEST_PAUSE_SECONDS)
