"""The bytes of a safetensors file and what its header says beside the tensors; no JAX.

A cartridge's file may be replaced at any time, also in place (`cp`). A mapped file that is cut short kills the process
which reads it, so these are read into memory. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from command_line.errors import UserError

LARGEST_METADATA = 1 << 20  # characters
LARGEST_HEADER = 8 * LARGEST_METADATA  # bytes: JSON may write six for a character


def read(path: Path) -> tuple[bytes, dict[str, str]]:
    """What `safetensors.*.load` takes, and the file's metadata.

    Raises:
      ValueError, TypeError, LookupError, AttributeError, RecursionError: not such a file, or one with more metadata
        than a cartridge has.
    """
    with open(path, "rb") as file:
        length = file.read(8)
        size = int.from_bytes(length, "little")
        if size > LARGEST_HEADER:
            raise UserError(f"its header has {size} bytes, expected at most {LARGEST_HEADER}")
        text = file.read(size)
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        if sum(map(len, metadata.values())) > LARGEST_METADATA:
            raise UserError(f"its metadata have more than {LARGEST_METADATA} characters")
        # before they are read: a file may be of any length
        expected = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        found = os.fstat(file.fileno()).st_size - 8 - size
        if found != expected:
            raise UserError(f"it holds {found} bytes of tensors, its header says {expected}")
        return b"".join((length, text, file.read(expected))), metadata
