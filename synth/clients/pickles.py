"""Reads the pickles that Tokasaurus replies with, without running anything in them.

A pickle is a program, and `find_class` decides what it may call. Such a reply needs OpenAI's reply types only, and for
each of these a kind of dictionary is made here. Any other name ends the reading.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

from synth.clients.base import Refused, Unavailable

_REPLY_TYPES = "openai.types."


class Fields(dict[str, Any]):
    """The fields of any of OpenAI's reply types, by name."""

    def __setstate__(self, state: Any) -> None:
        """Takes the fields from pydantic's state, which keeps those that the type does not know apart."""
        for part in (state.get("__dict__"), state.get("__pydantic_extra__")):
            self.update(part or {})


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(_REPLY_TYPES) and name.isidentifier():
            return Fields
        if name == "set" and module in ("builtins", "__builtin__"):  # before protocol 4: which fields were given
            return set
        raise Refused(
            f"the reply is a pickle that names {module}.{name}, expected OpenAI's reply types only: it was not run; "
            "check that config.client.base_url is a Tokasaurus server you trust"
        )


def read(data: bytes) -> Any:
    """What the pickle holds. Raises: Refused, if it names anything else; Unavailable, if it is damaged."""
    try:
        return _Reader(io.BytesIO(data)).load()
    except Refused:
        raise
    except Exception as error:  # a damaged pickle may fail anywhere, a made-up length as MemoryError
        raise Unavailable(f"the reply is no whole pickle ({type(error).__name__}: {error})", "broken reply") from error
