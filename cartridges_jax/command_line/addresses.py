"""Addresses of servers, which may carry a name and a password: those are for the server alone."""

from __future__ import annotations

import base64
import re
import urllib.parse

# Up to the last @ before a path: a password may hold one.
_CREDENTIALS = re.compile(r"(?<=://)[^/?#\s\"'<>]*@")


def without_credentials(text: str) -> str:
    """A text, such as an address, with `user:password@` taken out of every address in it."""
    return _CREDENTIALS.sub("", text)


def basic_login(url: str) -> str | None:
    """The value of an `Authorization` header for the user and the password in an address."""
    parts = urllib.parse.urlsplit(url)
    if parts.username is None:
        return None
    pair = urllib.parse.unquote(f"{parts.username}:{parts.password or ''}")
    return f"Basic {base64.b64encode(pair.encode()).decode()}"
