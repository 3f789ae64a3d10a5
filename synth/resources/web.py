"""Sends GET requests to one host, for resources that are behind an API: arXiv, Slack, Gmail."""

from __future__ import annotations

import http.client
import logging
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from cartridges_jax.command_line import files
from cartridges_jax.command_line.addresses import basic_login, without_credentials
from cartridges_jax.command_line.errors import UserError

TIMEOUT_SECONDS = 60.0
ATTEMPTS = 5
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 120.0
LARGEST_REPLY = 2**26  # bytes

log = logging.getLogger(__name__)


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Refuses redirects to another host, so that none but the configured one is asked or gets the token."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # pyrefly: ignore
        if urllib.parse.urlsplit(newurl)[:2] != urllib.parse.urlsplit(req.full_url)[:2]:
            raise UserError(f"{req.full_url} leads to another host, {newurl}: refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class Api:
    """A host and a token for it. A request that fails or is throttled is tried `ATTEMPTS` times in all."""

    def __init__(self, base_url: str, token: str | None = None):
        if not base_url.startswith(("http://", "https://")):
            shown = without_credentials(base_url)
            raise UserError(f"config.resource.api_url is {shown!r}, expected an address like https://arxiv.org")
        self._base_url = without_credentials(base_url).rstrip("/")
        self._headers = {"User-Agent": "cartridges-jax"} | ({"Authorization": f"Bearer {token}"} if token else {})
        if login := basic_login(base_url):
            self._headers["Authorization"] = login
        self._opener = urllib.request.build_opener(_SameHost())

    def get(self, path: str, largest: int = LARGEST_REPLY, **parameters: str) -> bytes:
        """The body of a reply.

        Raises:
          UserError: the request is refused, or the reply longer than `largest` bytes.
          OSError: no answer came after all attempts.
        """
        query = "?" + urllib.parse.urlencode(parameters) if parameters else ""
        url = f"{self._base_url}/{path}{query}"
        for attempt in range(1, ATTEMPTS + 1):
            wait = min(FIRST_WAIT_SECONDS * 2 ** (attempt - 1), LONGEST_WAIT_SECONDS)
            try:
                request = urllib.request.Request(url, headers=self._headers)
                with self._opener.open(request, timeout=TIMEOUT_SECONDS) as reply:
                    body = reply.read(largest + 1)
                if len(body) > largest:
                    raise UserError(f"{url} gave more than {largest} bytes: refused")
                return body
            except urllib.error.HTTPError as error:
                with error:
                    words = error.read(300).decode(errors="replace")
                problem = f"HTTP {error.code}: {' '.join(words.split()) or error.reason}"
                if error.code != 429 and error.code < 500:
                    raise UserError(f"{url} refused a request, {problem}") from error
                wait = min(max(wait, _seconds(error.headers.get("Retry-After"))), LONGEST_WAIT_SECONDS)
            except (OSError, http.client.HTTPException) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < ATTEMPTS:
                log.warning("%s: %s; attempt %d of %d in %.1f s", url, problem, attempt + 1, ATTEMPTS, wait)
                time.sleep(wait)
        raise ConnectionError(f"{url} failed {ATTEMPTS} times, at last with {problem}")

    def get_json(self, path: str, **parameters: str) -> dict[str, Any]:
        body = self.get(path, **parameters)
        try:
            reply = files.parse_json(body, path)
        except UserError as error:
            raise UserError(f"{self._base_url}/{path} gave a reply that is not JSON: {body[:100]!r}") from error
        if not isinstance(reply, dict):
            raise UserError(f"{self._base_url}/{path} gave a reply that is not a JSON object: {body[:100]!r}")
        return reply


def _seconds(header: str | None) -> float:
    """The seconds of a Retry-After, which these APIs send as a number."""
    try:
        return float(header or 0)
    except ValueError:
        return 0.0
