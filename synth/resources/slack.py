"""Slack: an export, zipped or not, or the API; every channel's day a section, replies under what they answer."""

from __future__ import annotations

import datetime
import json
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from command_line.errors import UserError
from synth.resources.sections import Section
from synth.resources.web import Api

URL = "https://slack.com/api"
TOKEN = "SLACK_BOT_TOKEN"  # of the environment: may read channels, their history and users
LARGEST_EXPORT = 2**31  # bytes, unpacked

_MENTION = re.compile(r"<([@#!])([^|>]+)(?:\|([^>]*))?>")
_LINK = re.compile(r"<((?:https?|mailto):[^|>]+)(?:\|([^>]*))?>")
_ENTITIES = (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&"))

Message = Mapping[str, Any]


def read_export(path: str) -> list[Section]:
    """From the folder or the .zip file that Slack's export gives.

    Raises:
      FileNotFoundError, UserError: there is no such thing at `path`, or no message in it.
    """
    files = _zip_files(Path(path)) if Path(path).is_file() else _folder_files(Path(path))
    users: dict[str, str] = {}
    channels: dict[str, list[Message]] = {}
    for name, data in files:
        try:
            content = json.loads(data)
        except ValueError as error:
            raise UserError(f"{path} is no Slack export: {name} in it is not JSON: {error}") from error
        parts = PurePosixPath(name).parts
        if parts[-1] == "users.json":
            users |= _names(content)
        elif len(parts) > 1 and isinstance(content, list):
            channels.setdefault(parts[-2], []).extend(message for message in content if isinstance(message, dict))
    sections = [s for name in sorted(channels) for s in _channel(name, channels[name], users)]
    if not sections:
        raise UserError(f"{path} is no Slack export: expected users.json and a folder of JSON files for every channel")
    return sections


def read_api(address: str, api_url: str | None = None) -> list[Section]:
    """The channels of slack:NAME,NAME, or of slack: every one that the token's owner is a member of.

    Raises:
      UserError: there is no token in the environment, Slack refuses it, or there is no such channel or message.
      OSError: Slack cannot be reached.
    """
    token = os.environ.get(TOKEN)
    if not token:
        raise UserError(f"{address} needs a token that may read channels, in the environment's {TOKEN}")
    api = Api(api_url or URL, token)
    wanted = [name.strip().lstrip("#") for name in address.removeprefix("slack:").split(",") if name.strip()]
    channels = {
        str(channel["name"]): str(channel["id"])
        for channel in _pages(api, "conversations.list", "channels", types="public_channel,private_channel")
        if channel["name"] in wanted or (not wanted and channel.get("is_member"))
    }
    if missing := [name for name in wanted if name not in channels]:
        raise UserError(f"Slack shows no channel {missing[0]!r} to this token: invite its owner or change the path")
    users = _names(_pages(api, "users.list", "members"))
    sections = [s for name in sorted(channels) for s in _channel(name, _history(api, channels[name]), users)]
    if not sections:
        raise UserError(f"{address} gives no message of {', '.join(sorted(channels)) or 'any channel'}")
    return sections


def _history(api: Api, channel: str) -> list[Message]:
    messages = list(_pages(api, "conversations.history", "messages", channel=channel))
    for parent in [message for message in messages if message.get("reply_count")]:
        messages += _pages(api, "conversations.replies", "messages", channel=channel, ts=str(parent["ts"]))
    return messages


def _pages(api: Api, method: str, key: str, **parameters: str) -> Iterator[dict[str, Any]]:
    while True:
        reply = api.get_json(method, limit="200", **parameters)
        if not reply.get("ok"):
            raise UserError(f"Slack refused {method}: {reply.get('error') or 'it does not say why'}")
        yield from reply.get(key) or ()
        cursor = (reply.get("response_metadata") or {}).get("next_cursor")
        if not cursor:
            return
        parameters["cursor"] = str(cursor)


def _zip_files(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".json")]
            if sum(member.file_size for member in members) > LARGEST_EXPORT:
                raise UserError(
                    f"{path} unpacks to more than {LARGEST_EXPORT} bytes: unpack it by hand, or a part of it"
                )
            for member in members:
                yield member.filename, archive.read(member)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path} is not a zip file that can be read: {error}") from error


def _folder_files(path: Path) -> Iterator[tuple[str, bytes]]:
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist: expected a Slack export, a folder or a .zip file")
    for file in sorted([*path.glob("*.json"), *path.glob("*/*.json")]):
        yield file.relative_to(path).as_posix(), file.read_bytes()


def _names(users: Iterable[Any]) -> dict[str, str]:
    names = {}
    for user in users:
        profile = user.get("profile") or {}
        names[str(user.get("id"))] = (
            profile.get("display_name") or profile.get("real_name") or user.get("real_name") or user.get("name") or "?"
        )
    return names


def _channel(name: str, messages: Iterable[Message], users: Mapping[str, str]) -> Iterator[Section]:
    """Days in order; a thread belongs to the day on which it began."""
    unique = {str(message.get("ts")): message for message in messages if message.get("ts")}
    threads: dict[str, list[Message]] = {}
    for ts in sorted(unique, key=_seconds):
        threads.setdefault(str(unique[ts].get("thread_ts") or ts), []).append(unique[ts])
    days: dict[str, list[str]] = {}
    for ts in sorted(threads, key=_seconds):
        lines = [_line(message, users, is_reply=i > 0) for i, message in enumerate(threads[ts])]
        days.setdefault(_time(ts).date().isoformat(), []).extend(line for line in lines if line)
    for day, lines in days.items():
        if lines:
            yield Section(f"#{name}, {day}", f"#{name}, {day}\n" + "\n".join(lines) + "\n\n")


def _line(message: Message, users: Mapping[str, str], is_reply: bool) -> str:
    text = str(message.get("text") or "")
    text = _MENTION.sub(lambda found: _mention(found, users), text)
    text = _LINK.sub(lambda found: f"{found[2]} ({found[1]})" if found[2] else found[1], text)
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    files = [file for file in message.get("files") or () if isinstance(file, dict)]
    text = " ".join([text, *(f"[file: {file.get('title') or file.get('name')}]" for file in files)]).strip()
    if not text:
        return ""
    who = users.get(str(message.get("user"))) or message.get("username") or message.get("user") or "someone"
    return f"{'  > ' if is_reply else ''}{_time(str(message['ts'])):%H:%M} {who}: {text}"


def _mention(found: re.Match[str], users: Mapping[str, str]) -> str:
    sign, what, label = found.groups()
    return f"@{label or what}" if sign == "!" else sign + (label or users.get(what, what))


def _seconds(ts: str) -> float:
    try:
        return float(ts)
    except ValueError as error:
        raise UserError(f"a Slack message has the time {ts!r}, expected seconds") from error


def _time(ts: str) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(_seconds(ts), datetime.UTC)
