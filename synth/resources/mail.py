"""E-mail: an mbox file, or Gmail; every message a section with its sender, date and subject."""

from __future__ import annotations

import base64
import binascii
import email
import email.policy
import logging
import mailbox
import os
from email.message import EmailMessage
from pathlib import Path

from command_line.errors import UserError
from synth.resources import html
from synth.resources.sections import Section
from synth.resources.web import Api

GMAIL_URL = "https://gmail.googleapis.com"
GMAIL_TOKEN = "GMAIL_TOKEN"  # of the environment: an OAuth access token that may read mail
MOST_MESSAGES = 10_000
HEADERS = ("From", "To", "Cc", "Date", "Subject")

log = logging.getLogger(__name__)


def read_mbox(path: str) -> list[Section]:
    """The messages of an mbox file, in its order.

    Raises:
      FileNotFoundError, UserError: there is no such file, or no message in it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist: expected an mbox file, set config.resource.path")
    box = mailbox.mbox(path, factory=None, create=False)
    try:
        sections = [_section(box.get_bytes(key)) for key in box.keys()]  # noqa: SIM118
    finally:
        box.close()
    if not sections:
        raise UserError(f"{path} holds no message: an mbox file begins each with a line 'From '")
    return sections


def read_gmail(address: str, api_url: str | None = None) -> list[Section]:
    """The messages that fit the query of gmail:QUERY, as in Gmail's own search box, thread by thread.

    Raises:
      UserError: there is no token in the environment, it may not read mail, or no message fits.
      OSError: Gmail cannot be reached.
    """
    token = os.environ.get(GMAIL_TOKEN)
    if not token:
        raise UserError(f"{address} needs an OAuth token that may read mail, in the environment's {GMAIL_TOKEN}")
    query = address.removeprefix("gmail:")
    api = Api(api_url or GMAIL_URL, token)
    threads: dict[str, list[tuple[int, Section]]] = {}
    for message_id in _gmail_ids(api, query):
        message = api.get_json(f"gmail/v1/users/me/messages/{message_id}", format="raw")
        try:
            when, thread = int(message["internalDate"]), str(message["threadId"])
            section = _section(base64.urlsafe_b64decode(message["raw"]))
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise UserError(f"Gmail gave a message that cannot be read, {message_id}: {error!r}") from error
        threads.setdefault(thread, []).append((when, section))
    if not threads:
        raise UserError(f"no message of Gmail fits the query {query!r}")
    ordered = sorted((sorted(thread, key=lambda pair: pair[0]) for thread in threads.values()), key=lambda t: t[0][0])
    return [section for thread in ordered for _, section in thread]


def _gmail_ids(api: Api, query: str) -> list[str]:
    found: list[str] = []
    page = {"q": query, "maxResults": "500"}
    while True:
        reply = api.get_json("gmail/v1/users/me/messages", **page)
        found += [str(message["id"]) for message in reply.get("messages") or ()]
        if len(found) >= MOST_MESSAGES:
            log.warning("more than %d messages fit %r: only so many are read", MOST_MESSAGES, query)
            return found[:MOST_MESSAGES]
        if not reply.get("nextPageToken"):
            return found
        page["pageToken"] = str(reply["nextPageToken"])


def _section(raw: bytes) -> Section:
    message = email.message_from_bytes(raw, policy=email.policy.default)
    headers = {name: _header(message, name) for name in HEADERS}
    lines = [f"{name}: {value}" for name, value in headers.items() if value]
    text = "\n".join([*lines, "", _body(message).strip()])
    return Section(headers["Subject"] or "no subject", text.strip() + "\n\n")


def _header(message: EmailMessage, name: str) -> str:
    try:
        return " ".join(str(message.get(name) or "").split())
    except Exception:  # the library's parser fails in many ways on a header that was never one
        return ""


def _body(message: EmailMessage) -> str:
    """The plain text of a message, or that of its HTML."""
    part = message.get_body(("plain", "html"))
    if part is None:
        return ""
    try:
        text = part.get_content()
    except (LookupError, ValueError):  # a charset or an encoding that nobody knows
        payload = part.get_payload(decode=True)
        text = payload.decode("latin-1") if isinstance(payload, bytes) else str(payload or "")
    return html.to_text(text) if part.get_content_subtype() == "html" else text
