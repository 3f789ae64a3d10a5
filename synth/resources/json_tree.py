"""Reads JSON and JSON lines as one line for every value, after the path to it, so that any stretch explains itself.

Numbers stay as they are written.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cartridges_jax.command_line import files
from synth.resources.sections import Section
from synth.resources.text import read as read_whole


class _Object(list[tuple[str, Any]]):
    """A JSON object as a list of names and values, since a name may occur more than once."""


def read_json(path: str) -> list[Section]:
    return _sections(path, files.parse_json(read_whole(path), path, _Object, str))


def read_jsonl(path: str) -> list[Section]:
    """The values of a file of JSON lines, numbered from 1 as lines are."""
    lines = files.json_lines(read_whole(path))
    return _sections(
        path, _Object((str(n), files.parse_json(line, f"{path}, line {n},", _Object, str)) for n, line in lines)
    )


def _sections(path: str, tree: Any) -> list[Section]:
    """One section for every object or list that directly holds values, named by its path."""
    groups = itertools.groupby(_leaves(tree), key=lambda leaf: leaf[0])
    return [
        Section(parent or Path(path).name, "".join(f"{where}: {value}\n" for _, where, value in leaves) + "\n")
        for parent, leaves in groups
    ]


def _leaves(tree: Any) -> Iterator[tuple[str, str, str]]:
    """Yields (path of the container, own path, value as text) in the file's order, without recursion."""
    waiting: list[tuple[str, str, Any]] = [("", "", tree)]
    while waiting:
        parent, where, node = waiting.pop()
        if isinstance(node, list) and node:
            children = node if isinstance(node, _Object) else enumerate(node)
            below = f"{where}/" if where else ""
            waiting += [(where, f"{below}{key}", child) for key, child in reversed(list(children))]
        else:
            empty = {} if isinstance(node, _Object) else node
            yield parent, where or ".", node if isinstance(node, str) else json.dumps(empty)


def dicts(value: Any) -> list[dict[str, Any]]:
    """The objects in a list, or none if the value is no list."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
