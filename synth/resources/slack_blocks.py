"""Finds the words of one Slack message: its text, and what its blocks and attachments say beside that."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from synth.resources.json_tree import dicts

Users = Mapping[str, str]  # names by ids

DEEPEST = 40  # elements inside of elements; Slack's own go five deep

_MENTION = re.compile(r"<([@#!])([^|>]+)(?:\|([^>]*))?>")
_LINK = re.compile(r"<((?:https?|mailto|tel):[^|>]+)(?:\|([^>]*))?>")
_STYLE = re.compile(r"(?<!\w)[*_~`]+|[*_~`]+(?!\w)")
_ENTITIES = (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&"))
_NAMED = ("pretext", "author_name", "title", "label", "text", "description", "value", "alt_text", "hint", "footer")
_NESTED = ("elements", "fields", "rows", "blocks", "accessory", "element", "attachments", "message_blocks", "message")


def text_of(message: Mapping[str, Any], users: Users) -> str:
    """The text of a message, then that of blocks which say more, as those of apps do, then that of attachments."""
    text = _plain(str(message.get("text") or ""), users)
    pieces = [text] if text.strip() else []
    blocks = dicts(message.get("blocks"))
    # What a person types comes both as text and as one block of rich text. An app's text may be a mere hint at its own.
    is_app = message.get("bot_id") or message.get("subtype") == "bot_message"
    if not pieces or is_app or [block.get("type") for block in blocks] != ["rich_text"]:
        pieces = _joined(pieces, "\n".join(_words(block, users) for block in blocks))
    for attachment in dicts(message.get("attachments")):
        own = _words({key: value for key, value in attachment.items() if key != "fallback"}, users)
        pieces = _joined(pieces, own or _plain(str(attachment.get("fallback") or ""), users))
    return "\n".join(pieces)


def _joined(pieces: list[str], more: str) -> list[str]:
    """The pieces together with `more`, but without any whose lines all stand in another."""
    if any(_lines(more) <= _lines(piece) for piece in [*pieces, ""]):
        return pieces
    return [*(piece for piece in pieces if not _lines(piece) <= _lines(more)), more.strip()]


def _lines(text: str) -> set[str]:
    """The lines that say something, without Slack's marks of bold, italic, struck and code."""
    return {" ".join(_STYLE.sub("", line).split()) for line in text.split("\n") if line.strip()}


def _words(node: Mapping[str, Any], users: Users) -> str:
    lines = "".join(_pieces(node, users, 0)).split("\n")
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _pieces(node: Any, users: Users, depth: int) -> Iterator[str]:
    """Yields a block's texts in their order. Each is a line, but for the runs that make up a line of rich text."""
    if depth > DEEPEST:
        return
    if isinstance(node, list):
        for one in node:
            yield from _pieces(one, users, depth + 1)
        return
    if not isinstance(node, dict):
        return
    kind = node.get("type")
    if kind == "actions":  # buttons and menus
        return
    if run := _run(node, users):
        yield run
        return
    for key in _NAMED:
        value = node.get(key)
        if isinstance(value, str) and value.strip():
            yield _plain(value, users) + "\n"
        elif isinstance(value, dict):
            yield from _pieces(value, users, depth + 1)
    for key in _NESTED:
        if isinstance(value := node.get(key), list | dict):
            is_list = kind == "rich_text_list" and key == "elements"
            for one in value if isinstance(value, list) else [value]:
                yield "- " if is_list else ""
                yield from _pieces(one, users, depth + 1)
    if str(kind).startswith("rich_text"):
        yield "\n"


def _run(node: Mapping[str, Any], users: Users) -> str:
    """The text of an element that stands inside of a line of rich text, or nothing for any other node."""
    match node.get("type"):
        case "text":
            return str(node.get("text") or "")
        case "link":
            url, text = str(node.get("url") or ""), str(node.get("text") or "")
            return f"{text} ({url})" if text else url
        case "user":
            return "@" + users.get(str(node.get("user_id")), str(node.get("user_id")))
        case "usergroup" | "channel" | "broadcast":
            name = node.get("usergroup_id") or node.get("channel_id") or node.get("range")
            return f"{'#' if node.get('type') == 'channel' else '@'}{name}"
        case "emoji":
            return f":{node.get('name')}:"
        case "date":
            return str(node.get("fallback") or node.get("timestamp") or "")
        case _:
            return ""


def _plain(text: str, users: Users) -> str:
    """A text with Slack's own marks (mentions, links, entities) written as a reader sees them."""
    text = _MENTION.sub(lambda found: _mention(found, users), text)
    text = _LINK.sub(lambda found: f"{found[2]} ({found[1]})" if found[2] else found[1], text)
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    return text


def _mention(found: re.Match[str], users: Users) -> str:
    sign, what, label = found.groups()
    return f"@{label or what}" if sign == "!" else sign + (label or users.get(what, what))
