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


class Http:
    """A session with one server, an async context manager; `timeout` seconds are for a whole request and its reply."""

    def __init__(self, timeout: float, api_key: str | None = None, login: str | None = None):
        self._timeout = timeout
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        if login:
            self._headers["Authorization"] = login

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # whoever calls bounds the requests in flight
            timeout=aiohttp.ClientTimeout(total=self._timeout),
            headers=self._headers,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(self, url: str) -> Any:
        return parse(await self._bytes("GET", url, None), url)

    async def post(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        """Sends a JSON object and returns the one that comes back."""
        reply = parse(await self._bytes("POST", url, body), url)
        if not isinstance(reply, dict):
            raise Unavailable(f"{url} gave a {type(reply).__name__}, expected a JSON object", "broken reply")
        return reply

    async def post_for_bytes(self, url: str, body: dict[str, Any]) -> bytes:
        return await self._bytes("POST", url, body)

    async def models(self, url: str) -> list[str]:
        """The models that the server at `url` serves, from OpenAI's list of them or Together's bare one."""
        return [str(entry["id"]) for entry in await self._listed(url)]

    async def aliases(self, url: str, model: str) -> set[str]:
        """Other names under which the server serves the model: vLLM answers with the first of several."""
        listed = await self._listed(url)
        roots = [entry["root"] for entry in listed if entry["id"] == model and isinstance(entry.get("root"), str)]
        return {*roots, *(entry["id"] for entry in listed if entry.get("root") in roots)}

    async def _listed(self, url: str) -> list[dict[str, Any]]:
        try:
            reply = await self.get(f"{url}/models")
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

    async def check_model(self, url: str, model: str) -> None:
        """Raises: Refused, if the server does not list `model`. Of MODEL:CARTRIDGE our server lists MODEL alone."""
        served = await self.models(url)
        if model not in served and model.rpartition(":")[0] not in served:
            raise Refused(
                f"{url} does not serve {model!r}, it serves {', '.join(served)[:300] or 'nothing'}: "
                "change config.client.model"
            )

    async def _bytes(self, method: str, url: str, body: dict[str, Any] | None) -> bytes:
        try:
            # a request is meant for the configured server and for no other
            async with self._session.request(method, url, json=body, allow_redirects=False) as response:
                data = await _read(response, url)
        except TimeoutError as error:
            raise Unavailable(f"{url} gave no answer in {self._timeout:g} s", "timeout") from error
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


class HttpClient:
    """What all clients share: a session with the server at `url`, which ends in /v1, and the check of its model."""

    def __init__(self, config: ClientConfig, url: str):
        self._config = config
        self._url = without_credentials(url).rstrip("/")
        self._root = self._url.removesuffix("/v1")  # where routes live that are not OpenAI's
        self._http = Http(config.timeout_seconds, config.api_key, basic_login(url))
        self._aliases: set[str] = set()

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.__aexit__()

    async def check(self) -> None:
        await self._http.check_model(self._url, self._config.model)

    async def _check_named(self, reply: dict[str, Any]) -> None:
        """Raises: Refused, if another model answered."""
        named, model = reply.get("model"), self._config.model
        try:
            check_same_model(named, model, self._aliases)
        except Refused:
            with reading(self._url):
                self._aliases |= await self._http.aliases(f"{self._root}/v1", model)
            check_same_model(named, model, self._aliases)


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
