"""Reads Slack, from an export or its API. Every day of a channel is a section, with replies under what they answer."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from synth.resources import slack_blocks
from synth.resources.json_tree import dicts
from synth.resources.sections import Section, Sections
from synth.resources.web import Api

URL = "https://slack.com/api"
TOKEN = "SLACK_BOT_TOKEN"  # of the environment: may read channels, their history and users
LARGEST_EXPORT = 2**31  # bytes, unpacked

# The subtypes of messages that are Slack's own, and what each is counted as.
_NOTICES = "notices of Slack's (topics, names, pins, archiving)"
HOUSEKEEPING = dict.fromkeys(("tombstone", "message_deleted"), "deleted messages")
for _kind in ("channel", "group"):
    HOUSEKEEPING |= dict.fromkeys((f"{_kind}_join", f"{_kind}_leave"), "joins and leaves")
    for _what in ("archive", "name", "posting_permissions", "purpose", "topic", "unarchive"):
        HOUSEKEEPING[f"{_kind}_{_what}"] = _NOTICES
_OTHERS = ("app_conversation_join", "bot_add", "bot_disable", "bot_enable", "bot_remove", "channel_canvas_updated")
_OTHERS += ("channel_convert_to_private", "channel_convert_to_public", "ekm_access_denied", "huddle_thread")
_OTHERS += ("message_replied", "pinned_item", "reminder_add", "reminder_delete", "sh_room_created", "sh_room_shared")
HOUSEKEEPING |= dict.fromkeys((*_OTHERS, "unpinned_item"), _NOTICES)

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}\.json")
PROFILE_NAMES = ("display_name", "real_name", "name")

Message = Mapping[str, Any]

log = logging.getLogger(__name__)


def read_export(path: str) -> Sections:
    """The messages of an export of Slack's, a folder or a .zip file.

    Raises:
      FileNotFoundError, UserError: there is no such thing at `path`, or no message in it.
    """
    found = _zip_files(Path(path)) if Path(path).is_file() else _folder_files(Path(path))
    users: dict[str, str] = {}
    channels: dict[str, list[Message]] = {}
    unread: Counter[str] = Counter()
    for name, data in found:
        parts = PurePosixPath(name).parts
        if parts[0] == "__MACOSX" or parts[-1].startswith("._"):  # a Mac's own notes about the files it packed
            continue
        is_day = len(parts) > 1 and bool(_DAY.fullmatch(parts[-1]))
        if not is_day and parts[-1] != "users.json":
            unread["files that are neither users.json nor a day of a channel"] += 1
            continue
        try:
            content = dicts(files.parse_json(data, f"{path}: {name} in it"))
        except UserError as error:
            log.warning("%s: left out", error)
            unread["files that cannot be read"] += 1
            continue
        if is_day:
            channels.setdefault(parts[-2], []).extend(content)
        else:
            users |= _names(content)
    sections = _sections(channels, users)
    sections.left_out.update(unread)
    if not sections:
        raise UserError(f"{path} is no Slack export: expected users.json and a folder of JSON files for every channel")
    return sections


def read_api(address: str, api_url: str | None = None) -> Sections:
    """The messages of the channels in slack:NAME,NAME; the address slack: means all that the token's owner is in.

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
    sections = _sections({name: _history(api, channel) for name, channel in channels.items()}, users)
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


def _names(users: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    return {
        str(user.get("id")): _name(user.get("profile")) or str(user.get("real_name") or user.get("name") or "?")
        for user in users
    }


def _name(profile: Any) -> str:
    found = (profile.get(name) for name in PROFILE_NAMES) if isinstance(profile, dict) else ()
    return str(next(filter(None, found), ""))


def _sections(channels: Mapping[str, Iterable[Message]], users: Mapping[str, str]) -> Sections:
    counts = _Counts()
    sections = [s for name in sorted(channels) for s in _channel(name, channels[name], users, counts)]
    return Sections(sections, {"messages": counts.messages, "channels": len(channels)}, counts.left_out)


@dataclasses.dataclass
class _Counts:
    messages: int = 0
    left_out: Counter[str] = dataclasses.field(default_factory=Counter)


def _channel(name: str, messages: Iterable[Message], users: Mapping[str, str], counts: _Counts) -> Iterator[Section]:
    """Yields the days of a channel in order. A thread belongs to the day on which it began."""
    latest = _latest(messages, counts)
    threads: dict[str, list[Message]] = {}
    for ts in sorted(latest, key=_seconds):
        threads.setdefault(str(latest[ts].get("thread_ts") or ts), []).append(latest[ts])
    days: dict[str, list[str]] = {}
    for ts in sorted(threads, key=_seconds):
        lines = [line for message in threads[ts] if (line := _line(message, users, counts))]
        days.setdefault(_time(ts).date().isoformat(), []).extend(lines)
    for day, lines in days.items():
        if lines:
            yield Section(f"#{name}, {day}", f"#{name}, {day}\n" + "\n".join(lines) + "\n\n")


def _latest(messages: Iterable[Message], counts: _Counts) -> dict[str, Message]:
    """The messages of people, by their times, as they are after all edits. Slack's own notices are left out."""
    latest: dict[str, Message] = {}
    deleted: set[str] = set()
    for message in messages:
        subtype = message.get("subtype")
        if subtype == "message_changed" and isinstance(message.get("message"), dict):
            message = message["message"]
            subtype = message.get("subtype")
        if subtype in ("message_deleted", "tombstone"):
            deleted.add(str(message.get("deleted_ts") or message.get("ts")))
        ts = str(message.get("ts") or "")
        if reason := "messages without a time" if not ts else HOUSEKEEPING.get(str(subtype)):
            counts.left_out[reason] += 1
        elif ts not in latest or _edited(message) >= _edited(latest[ts]):
            latest[ts] = message
    for ts in deleted & latest.keys():
        del latest[ts]
    return latest


def _edited(message: Message) -> float:
    edited = message.get("edited")
    return _seconds(str(edited.get("ts") or 0)) if isinstance(edited, dict) else 0.0


def _line(message: Message, users: Mapping[str, str], counts: _Counts) -> str:
    text = slack_blocks.text_of(message, users)
    for file in dicts(message.get("files")):
        title = file.get("title") or file.get("name")
        if not title or file.get("mode") in ("tombstone", "hidden_by_limit"):
            counts.left_out["deleted or hidden files"] += 1
            continue
        inside = file.get("plain_text") or file.get("preview_plain_text") or file.get("preview") or ""
        text = f"{text} [file: {title}]" + (f"\n{inside}" if inside else "")
        is_cut = file.get("preview_is_truncated") or file.get("lines_more")
        counts.left_out["files, but for their names"] += not inside
        counts.left_out["files, but for their beginnings"] += bool(inside and is_cut)
    if not (text := text.strip()):
        counts.left_out["messages without words"] += 1
        return ""
    counts.messages += 1
    is_reply = str(message.get("thread_ts") or message["ts"]) != str(message["ts"])
    return f"{'  > ' if is_reply else ''}{_time(str(message['ts'])):%H:%M} {_who(message, users)}: {text}"


def _who(message: Message, users: Mapping[str, str]) -> str:
    """The name of a message's author: from users.json, or else from the message, if that is of another workspace."""
    if known := users.get(str(message.get("user"))):
        return known
    if said := _name(message.get("user_profile")) or _name(message.get("bot_profile")):
        return said
    return str(message.get("username") or message.get("user") or "someone")


def _seconds(ts: str) -> float:
    try:
        seconds = float(ts)
        _EPOCH + datetime.timedelta(seconds=seconds)
    except (ValueError, OverflowError) as error:
        raise UserError(f"a Slack message has the time {ts!r}, expected seconds") from error
    return seconds


def _time(ts: str) -> datetime.datetime:
    return _EPOCH + datetime.timedelta(seconds=_seconds(ts))
