"""Arrays as an `.npz` file, which `numpy.load(..., allow_pickle=False)` reads; the async side has no numpy itself.

https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import io
import zipfile
from array import array
from collections.abc import Sequence
from typing import Any

from cartridges_jax.serving.choices import Delta

TYPES = {"i": "<i4", "f": "<f4"}
ALIGNMENT = 64


def of_batch(text: bytes, replies: Sequence[Sequence[Delta]]) -> bytes:
    """`replies`, the JSON `text`; of choice j of request i `completion_ids_i_j`, and what log-probabilities it has."""
    arrays = {"replies": _npy("|u1", (len(text),), text)}
    for i, deltas in enumerate(replies):
        for j, delta in enumerate(deltas):
            arrays[f"completion_ids_{i}_{j}"] = _packed("i", (len(delta.token_ids),), delta.token_ids)
            if not delta.logprobs:
                continue
            best = [best for entry in delta.logprobs for best in entry["top_logprobs"]]
            t = len(delta.logprobs)
            shape = (t, len(best) // t)
            arrays[f"chosen_logprobs_{i}_{j}"] = _packed("f", (t,), [entry["logprob"] for entry in delta.logprobs])
            arrays[f"topk_indices_{i}_{j}"] = _packed("i", shape, [entry["token_id"] for entry in best])
            arrays[f"topk_logprobs_{i}_{j}"] = _packed("f", shape, [entry["logprob"] for entry in best])
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in arrays.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def _packed(kind: str, shape: tuple[int, ...], values: list[Any]) -> bytes:
    return _npy(TYPES[kind], shape, array(kind, values).tobytes())


def _npy(descr: str, shape: tuple[int, ...], data: bytes) -> bytes:
    magic = b"\x93NUMPY\x01\x00"
    header = repr({"descr": descr, "fortran_order": False, "shape": shape})
    header += " " * (-(len(magic) + 2 + len(header) + 1) % ALIGNMENT) + "\n"
    return magic + len(header).to_bytes(2, "little") + header.encode("latin1") + data
