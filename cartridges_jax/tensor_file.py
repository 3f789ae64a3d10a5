"""The bytes of a safetensors file and what its header says beside the tensors; no JAX.

A cartridge's file may be replaced at any time, also in place (`cp`). A mapped file that is cut short kills the process
which reads it, so these are read into memory. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import deserialize

from command_line.errors import UserError

LARGEST_METADATA = 1 << 20  # characters
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I8": np.int8}


def read(path: Path) -> tuple[bytes, dict[str, str]]:
    """What `safetensors.*.load` takes, and the file's metadata.

    Raises:
      ValueError, TypeError, RecursionError: not such a file, or one with more metadata than a cartridge has.
    """
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__") or {}
    if sum(map(len, metadata.values())) > LARGEST_METADATA:
        raise UserError(f"its metadata have more than {LARGEST_METADATA} characters")
    return data, metadata


def arrays(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a file's bytes. Raises: SafetensorError, KeyError: no whole file, or a dtype of no cartridge."""
    return {
        name: np.frombuffer(told["data"], DTYPES[told["dtype"]]).reshape(told["shape"])
        for name, told in deserialize(data)
    }
