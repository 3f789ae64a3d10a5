"""The bytes of a safetensors file and what its header says beside the tensors; no JAX.

A cartridge's file may be replaced at any time, also in place (`cp`). A mapped file that is cut short kills the process
which reads it, so these are read into memory. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import deserialize

from cartridges_jax.command_line.errors import UserError

LARGEST_METADATA = 1 << 20  # characters
LARGEST_HEADER = 8 * LARGEST_METADATA  # bytes: JSON may write six for a character
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I8": np.int8}


def read(path: Path) -> tuple[bytes, dict[str, str]]:
    """What `safetensors.*.load` takes, and the file's metadata.

    Raises:
      ValueError, TypeError, KeyError, AttributeError, RecursionError: not such a file, or one with more metadata
        than a cartridge has.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > LARGEST_HEADER:
            raise UserError(f"its header has {size} bytes, expected at most {LARGEST_HEADER}")
        header = json.loads(file.read(size))
        metadata = header.pop("__metadata__", None) or {}
        if sum(map(len, metadata.values())) > LARGEST_METADATA:
            raise UserError(f"its metadata have more than {LARGEST_METADATA} characters")
        # before they are read: a file may be of any length
        expected = max((end for _, end in (tensor["data_offsets"] for tensor in header.values())), default=0)
        found = os.fstat(file.fileno()).st_size - 8 - size
        if found != expected:
            raise UserError(f"it holds {found} bytes of tensors, its header says {expected}")
        file.seek(0)
        return file.read(8 + size + expected), metadata


def arrays(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a file's bytes. Raises: SafetensorError, KeyError: no whole file, or a dtype of no cartridge."""
    return {
        name: np.frombuffer(told["data"], DTYPES[told["dtype"]]).reshape(told["shape"])
        for name, told in deserialize(data)
    }
