"""Reads e-mail from an mbox file or Gmail. Every message is a section with its sender, date and subject."""

from __future__ import annotations

import base64
import binascii
import codecs
import email
import email.policy
import logging
import mimetypes
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path, PurePath
from typing import Any

from cartridges_jax.command_line.errors import UserError
from synth.resources import documents, extras, html
from synth.resources.config import APPLE
from synth.resources.sections import Section, Sections
from synth.resources.text import decode
from synth.resources.web import Api

GMAIL_URL = "https://gmail.googleapis.com"
GMAIL_TOKEN = "GMAIL_TOKEN"  # of the environment: an OAuth access token that may read mail
MOST_MESSAGES = 10_000
HEADERS = ("From", "To", "Cc", "Date", "Subject")
TEXT_KINDS = ("application/json", "application/x-ndjson", "application/xml", "application/yaml", "application/x-yaml")
LONGEST_HEADER = 2**14  # characters; the library's parser of addresses takes their number's square in time
DEEPEST = 20  # messages and parts inside of one another

# The envelope, a line before a message: From, an address and a time, as the standard has it or in any other way.
_ENVELOPE = re.compile(
    rb"From .*\b(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) +(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) +\d{1,2}"
    rb" +\d{1,2}:\d\d\b.*\b\d{4}\b"
)
_ODD_ENVELOPE = re.compile(rb"From \S+ (?=.*\b\d{4}\b).*\b\d{1,2}:\d\d\b|From \S*\s*$")
_FIELD = re.compile(rb"[!-9;-~]+[ \t]*:|>?From ")
_KNOWN_FIELD = re.compile(
    rb"(?:Bcc|Cc|Date|Delivered-To|From|In-Reply-To|Message-ID|MIME-Version|Received|References|Reply-To|Return-Path"
    rb"|Sender|Status|Subject|To|(?:ARC|Authentication|Content|DKIM|Envelope|List|Resent|X)-[\w-]+)[ \t]*:|>From ",
    re.IGNORECASE,
)
_QUOTED = re.compile(rb"^>(>*From )", re.MULTILINE)
_NO_BASE64 = re.compile(r"^[A-Za-z0-9+/= \t]*+[^A-Za-z0-9+/=\s]", re.MULTILINE)
_ENCODED_WORD = re.compile(r"=\?([^?*\s]+)(?=[?*])")

# What is labelled so was often written in Windows' or another form of it that has more characters.
_WIDER = {"gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949", "big5": "big5hkscs"}
_WIDER |= {"iso8859-1": "cp1252", "iso8859-9": "cp1254"}
_STUB = 4  # so many times as long is another form of a letter than one that only says to look at that other form

log = logging.getLogger(__name__)


class _Policy(email.policy.EmailPolicy):
    """The library's, on headers of a bounded length, which may hold bytes as they are and labels as people use them."""

    def header_fetch_parse(self, name: str, value: str) -> Any:
        value = decode(value[:LONGEST_HEADER].encode("utf-8", "surrogateescape"))
        return super().header_fetch_parse(name, _ENCODED_WORD.sub(lambda found: f"=?{_codec(found[1])}", value))


POLICY = _Policy()


def read_mbox(path: str) -> Sections:
    """The messages of an mbox file in its order, of a folder that Apple's program wrote, or the one of an .eml file.

    Raises:
      FileNotFoundError, UserError: there is no such file, or no message in it.
    """
    file = Path(path) / APPLE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: expected an mbox file, set config.resource.path")
    left_out: Counter[str] = Counter()
    sections = [_section(raw, left_out) for raw in _split(file)]
    if not sections:
        raise UserError(f"{path} holds no message: an mbox file begins each with a line 'From '")
    return Sections(sections, {"messages": len(sections)}, left_out)


def read_gmail(address: str, api_url: str | None = None) -> Sections:
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
    left_out: Counter[str] = Counter()
    threads: dict[str, list[tuple[int, Section]]] = {}
    for message_id in _gmail_ids(api, query):
        message = api.get_json(f"gmail/v1/users/me/messages/{message_id}", format="raw")
        try:
            when, thread = int(message["internalDate"]), str(message["threadId"])
            section = _section(base64.urlsafe_b64decode(message["raw"]), left_out)
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise UserError(f"Gmail gave a message that cannot be read, {message_id}: {error!r}") from error
        threads.setdefault(thread, []).append((when, section))
    if not threads:
        raise UserError(f"no message of Gmail fits the query {query!r}")
    ordered = sorted((sorted(thread, key=lambda pair: pair[0]) for thread in threads.values()), key=lambda t: t[0][0])
    sections = [section for thread in ordered for _, section in thread]
    return Sections(sections, {"messages": len(sections), "threads": len(ordered)}, left_out)


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


def _split(path: Path) -> Iterator[bytes]:
    """Yields the messages of an mbox file.

    Not all programs quote a line of a message that begins with "From ". So such a line begins a message only if it has
    the form of an envelope and a header below it: one that letters are known to have, unless the envelope is in the
    standard's form and below an empty line. Other forms need that line.
    """
    message: list[bytes] | None = None
    waiting, field = b"", _FIELD  # a line that may be an envelope, and what must be below it
    is_free = True  # there is an empty line above
    with path.open("rb") as file:
        for number, line in enumerate(file):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 0 else line
            if number == 0 and _FIELD.match(line) and not line.startswith(b"From "):  # a letter without an envelope
                message = []
            if waiting:
                if field.match(line):
                    if message is not None:
                        yield _unquoted(message)
                    message = []
                elif message is not None:
                    message.append(waiting)
                waiting = b""
            if line.startswith(b"From "):
                is_standard = bool(_ENVELOPE.match(line))
                if is_standard or (is_free and _ODD_ENVELOPE.match(line)):
                    field = _FIELD if message is None or (is_standard and is_free) else _KNOWN_FIELD
                    waiting, is_free = line, False
                    continue
            is_free = not line.strip()
            if message is not None:
                message.append(line)
    if message is not None:
        yield _unquoted([*message, waiting])


def _unquoted(lines: list[bytes]) -> bytes:
    return _QUOTED.sub(rb"\1", b"".join(lines))


def _section(raw: bytes, left_out: Counter[str]) -> Section:
    try:
        message = email.message_from_bytes(raw, policy=POLICY)
        text = _text(message, left_out, 0)
        return Section(_header(message, "Subject") or "no subject", text.strip() + "\n\n")
    except RecursionError:  # of the library, on parts inside of parts without end
        left_out["messages of too many parts in one another"] += 1
        return Section("no subject", "")


def _text(message: EmailMessage, left_out: Counter[str], depth: int) -> str:
    """A message with its headers, then the text of what is attached to it."""
    headers = {name: _header(message, name) for name in HEADERS}
    cut = sum(len(value) > LONGEST_HEADER for _, value in message.raw_items())
    left_out["ends of headers that are too long"] += cut
    lines = [f"{name}: {value}" for name, value in headers.items() if value]
    return "\n".join([*lines, "", *(text for _, text in _parts(message, left_out, depth))])


def _header(message: EmailMessage, name: str) -> str:
    try:
        return " ".join(str(message.get(name) or "").split())
    except Exception:  # the library's parser fails in many ways on a header that was never one
        return ""


def _parts(part: EmailMessage, left_out: Counter[str], depth: int) -> Iterator[tuple[bool, str]]:
    """Yields the texts of a part and of the parts inside of it, and before each whether it is an attachment."""
    kind, name = _kind(part), _name(part)
    _part_clear_text(part)
    if depth > DEEPEST:
        left_out["parts too deep inside of others"] += 1
    elif kind == "multipart/alternative":
        yield from _best([list(_parts(inside, left_out, depth + 1)) for inside in _inside(part)])
    elif kind in ("message/rfc822", "message/global"):
        for inside in _inside(part) or [email.message_from_bytes(_payload(part), policy=POLICY)]:
            yield True, _attached(name or "message", _text(inside, left_out, depth + 1))
    elif kind.startswith("message/"):  # a report in the form of headers
        for inside in _inside(part):
            yield True, _attached(name or kind, "\n".join(f"{key}: {value}" for key, value in inside.raw_items()))
    elif part.is_multipart():
        for inside in _inside(part):
            yield from _parts(inside, left_out, depth + 1)
    elif kind.startswith(("text/", "multipart/")) or kind in TEXT_KINDS:  # a multipart without parts is damaged
        if text := _decoded(part, kind).strip():
            name = name or ("invitation" if kind == "text/calendar" else None)  # it is no form of the letter's words
            yield bool(name), _attached(name, text) if name else text
    elif name and (text := _document(part, name, left_out)):
        yield True, _attached(name, text)
    else:
        left_out[f"attachments of {kind}"] += 1
    left_out["notes to programs that read no parts"] += bool((part.preamble or "").strip())
    if behind := decode((part.epilogue or "").encode("utf-8", "surrogateescape")).strip():
        yield True, behind


def _part_clear_text(part: EmailMessage) -> None:
    """Makes the text in clear that lists write below one in base64 the part's epilogue, as it is below other parts."""
    payload = part.get_payload()
    is_base64 = isinstance(payload, str) and _header(part, "Content-Transfer-Encoding").lower() == "base64"
    if is_base64 and (found := _NO_BASE64.search(payload)):
        part.set_payload(payload[: found.start()])
        part.epilogue = payload[found.start() :]


def _document(part: EmailMessage, name: str, left_out: Counter[str]) -> str:
    """The text of an attached document, or nothing if there is no library for it or that cannot read it."""
    suffix = PurePath(name).suffix.lower()
    if suffix not in documents.READERS:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"attached{suffix}"
        path.write_bytes(_payload(part))
        try:
            found = documents.READERS[suffix](str(path))
        except UserError as error:
            log.warning("%s, attached to a letter, is left out: %s", name, error)
            return ""
    left_out.update(found.left_out)
    return "".join(section.text for section in found)


def _attached(name: str, text: str) -> str:
    return f"\n--- {name}\n{text.strip()}\n--- end of {name}\n"


def _best(alternatives: list[list[tuple[bool, str]]]) -> Iterator[tuple[bool, str]]:
    """Yields, for a message in several forms, the texts of the first that is no stub, and all attachments."""
    lengths = [sum(len(text) for is_attached, text in texts if not is_attached) for texts in alternatives]
    best = next((i for i, length in enumerate(lengths) if length and length * _STUB >= max(lengths)), 0)
    for number, texts in enumerate(alternatives):
        yield from (one for one in texts if number == best or one[0])


def _inside(part: EmailMessage) -> list[EmailMessage]:
    payload = part.get_payload()
    return [one for one in payload if isinstance(one, EmailMessage)] if isinstance(payload, list) else []


def _kind(part: EmailMessage) -> str:
    """The type that a part says it has, or the one that its name tells."""
    kind = part.get_content_type()
    if kind == "application/octet-stream":
        kind = mimetypes.guess_type(_name(part) or "")[0] or kind
    return kind


def _name(part: EmailMessage) -> str | None:
    try:
        return part.get_filename()
    except Exception:  # as for other headers
        return None


def _payload(part: EmailMessage) -> bytes:
    payload = part.get_payload(decode=True)
    return payload if isinstance(payload, bytes) else b""


def _decoded(part: EmailMessage, kind: str) -> str:
    data = _payload(part)
    try:
        codec = _codec(part.get_content_charset() or (_declared(data) if kind == "text/html" else "utf-8"))
        text = decode(data) if codec in ("ascii", "utf-8") else data.decode(codec, "replace")
    except (LookupError, ValueError):  # a charset that nobody knows
        text = decode(data)
    return html.to_text(text) if kind == "text/html" else text.replace("\r\n", "\n")


def _declared(page: bytes) -> str:
    """The charset that a page says it has."""
    found = extras.load("bs4.dammit", "HTML").EncodingDetector.find_declared_encoding(page, is_html=True)
    return found or "utf-8"


def _codec(charset: str) -> str:
    """Python's name of a charset, or of the wider one that its label stands for in letters."""
    try:
        name = codecs.lookup(charset.lower().removeprefix("x-")).name
    except (LookupError, ValueError):
        return charset
    return _WIDER.get(name, name)
