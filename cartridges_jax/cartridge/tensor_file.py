"""Reading safetensors files (https://huggingface.co/docs/safetensors) without JAX: their bytes and their metadata.

A cartridge's file may be replaced at any time, even in place (`cp`). If a mapped file is cut short, the process that
reads it is killed, so these files are read into memory instead.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from safetensors import deserialize

from cartridges_jax.command_line.errors import UserError

LARGEST_METADATA = 1 << 20  # characters
LARGEST_HEADER = 8 * LARGEST_METADATA  # bytes; JSON may take six for a character


def read(path: Path) -> tuple[bytes, dict[str, str]]:
    """Returns the file's bytes, which `safetensors.*.load` takes, and its metadata.

    Raises:
      ValueError, TypeError, KeyError, AttributeError, RecursionError: it is no safetensors file, or has more metadata
        than a cartridge.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > LARGEST_HEADER:
            raise UserError(f"its header has {size} bytes, expected at most {LARGEST_HEADER}")
        header = json.loads(file.read(size))
        metadata = header.pop("__metadata__", None) or {}
        if sum(map(len, metadata.values())) > LARGEST_METADATA:
            raise UserError(f"its metadata have more than {LARGEST_METADATA} characters")
        # checked before the tensors are read, since a file may be of any length
        expected = max((end for _, end in (tensor["data_offsets"] for tensor in header.values())), default=0)
        found = os.fstat(file.fileno()).st_size - 8 - size
        if found != expected:
            raise UserError(f"it holds {found} bytes of tensors, its header says {expected}")
        file.seek(0)
        return file.read(8 + size + expected), metadata


def arrays(data: bytes) -> dict[str, np.ndarray]:
    """Returns a file's tensors, or raises SafetensorError or KeyError: it is not whole, or has an unknown dtype."""
    import ml_dtypes  # which the environment of vLLM, whose plugin calls `read`, does not have

    dtypes = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    dtypes |= {"I8": np.int8, "I32": np.int32}
    return {
        name: np.frombuffer(told["data"], dtypes[told["dtype"]]).reshape(told["shape"])
        for name, told in deserialize(data)
    }
