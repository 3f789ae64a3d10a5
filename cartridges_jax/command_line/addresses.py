"""The address of a server may hold a user's name and password, which nobody but that server may see."""

from __future__ import annotations

import base64
import re
import urllib.parse

# The last @ before the path ends the credentials, since a password may hold one, too.
_CREDENTIALS = re.compile(r"(?<=://)[^/?#\s\"'<>]*@")


def without_credentials(text: str) -> str:
    """Returns the text with `user:password@` taken out of every address in it."""
    return _CREDENTIALS.sub("", text)


def basic_login(url: str) -> str | None:
    """Returns the `Authorization` header for the user and password in an address, or None if it holds no user."""
    parts = urllib.parse.urlsplit(url)
    if parts.username is None:
        return None
    pair = urllib.parse.unquote(f"{parts.username}:{parts.password or ''}")
    return f"Basic {base64.b64encode(pair.encode()).decode()}"
