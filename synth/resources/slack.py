"""Reads Slack, from an export or its API. Every day of a channel is a section, with replies under what they answer."""

from __future__ import annotations

import dataclasses
import datetime
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from synth.resources import slack_blocks
from synth.resources.sections import Section, Sections
from synth.resources.web import Api

URL = "https://slack.com/api"
TOKEN = "SLACK_BOT_TOKEN"  # of the environment: may read channels, their history and users
LARGEST_EXPORT = 2**31  # bytes, unpacked

# The subtypes of messages that are Slack's own, and what each is counted as.
_MOVES = "joins and leaves"
_DELETED = "deleted messages"
_NOTICES = "notices of Slack's (topics, names, pins, archiving)"
HOUSEKEEPING = (
    {f"{kind}_{what}": _MOVES for kind in ("channel", "group") for what in ("join", "leave")}
    | {"tombstone": _DELETED, "message_deleted": _DELETED}
    | {
        f"{kind}_{what}": _NOTICES
        for kind in ("channel", "group")
        for what in ("archive", "name", "posting_permissions", "purpose", "topic", "unarchive")
    }
    | dict.fromkeys(
        (
            "app_conversation_join",
            "bot_add",
            "bot_disable",
            "bot_enable",
            "bot_remove",
            "channel_canvas_updated",
            "channel_convert_to_private",
            "channel_convert_to_public",
            "ekm_access_denied",
            "huddle_thread",
            "message_replied",
            "pinned_item",
            "reminder_add",
            "reminder_delete",
            "sh_room_created",
            "sh_room_shared",
            "unpinned_item",
        ),
        _NOTICES,
    )
)

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
PROFILE_NAMES = ("display_name", "real_name", "name")

Message = Mapping[str, Any]


def read_export(path: str) -> Sections:
    """The messages of an export of Slack's, a folder or a .zip file.

    Raises:
      FileNotFoundError, UserError: there is no such thing at `path`, or no message in it.
    """
    found = _zip_files(Path(path)) if Path(path).is_file() else _folder_files(Path(path))
    users: dict[str, str] = {}
    channels: dict[str, list[Message]] = {}
    for name, data in found:
        content = files.parse_json(data, f"{path} is no Slack export: {name} in it")
        parts = PurePosixPath(name).parts
        if parts[-1] == "users.json":
            users |= _names(content)
        elif len(parts) > 1 and isinstance(content, list):
            channels.setdefault(parts[-2], []).extend(message for message in content if isinstance(message, dict))
    sections = _sections(channels, users)
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


def _names(users: Iterable[Any]) -> dict[str, str]:
    names = {}
    for user in users:
        if isinstance(user, dict):
            profile = user.get("profile") or {}
            found = [*(profile.get(name) for name in PROFILE_NAMES), user.get("real_name"), user.get("name"), "?"]
            names[str(user.get("id"))] = next(filter(None, found))
    return names


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
    for file in slack_blocks.dicts(message.get("files")):
        title = file.get("title") or file.get("name")
        if not title or file.get("mode") in ("tombstone", "hidden_by_limit"):
            counts.left_out["deleted or hidden files"] += 1
            continue
        inside = file.get("plain_text") or file.get("preview_plain_text") or file.get("preview") or ""
        text = f"{text} [file: {title}]" + (f"\n{inside}" if inside else "")
        counts.left_out["files, but for their names"] += not inside
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
    for key in ("user_profile", "bot_profile"):
        profile = message.get(key)
        names = [profile.get(name) for name in PROFILE_NAMES] if isinstance(profile, dict) else []
        if any(names):
            return str(next(filter(None, names)))
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
