"""The cartridge's own file, `cartridge.safetensors`: keys, values, a bias if there is one, and a JSON header.

Versions 1 and 2 hold arrays `[l, p, k, h]`, whose first slot stands at position 0 and which are followed at p. Version
3 is for all others: it holds the slots that there are behind one another, `[N, h]`, how many each head has, and in the
header the offset. Version 1 has no int8; what an older version can say is written as that.

The file holds the slots in the dtype that they have in memory, or in a smaller one: float16, bfloat16, or int8 with a
scale for every slot of every head. Each is read back as float32. benchmarks/formats.py measures what a smaller dtype
costs in quality.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from cartridges_jax.cartridge import ragged, tensor_file
from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.cartridge.provenance import Provenance
from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError

FORMAT_VERSION = 3  # the newest that is read
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8}
FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


def write(cartridge: Cartridge, path: str | os.PathLike[str], dtype: str | None = None) -> None:
    """Writes the file, whole or not at all; keys and values in `dtype`, by default the one that they have.

    Raises:
      UserError: the dtype is unknown, or cannot hold the values.
      OSError: the folder cannot be written, or the disk is full.
    """
    arrays = {name: np.asarray(array) for name, array in vars(cartridge.slots).items() if array is not None}
    header: dict[str, object] = {"format_version": 2 if dtype == "int8" else 1, **header_of(cartridge)}
    tensors = {}
    if cartridge.lengths is not None or cartridge.offset != cartridge.num_slots:
        header |= {"format_version": 3, "offset": int(cartridge.offset)}
        tensors["lengths"] = cartridge.all_lengths
        mask_lkp = ragged.present(tensors["lengths"], cartridge.num_slots)
        arrays = {name: ragged.flat(array, mask_lkp) for name, array in arrays.items()}
    tensors |= {**_encode("keys", arrays["keys"], dtype), **_encode("values", arrays["values"], dtype)}
    if "bias" in arrays:
        tensors["bias"] = np.ascontiguousarray(arrays["bias"])
    _save(path, tensors, header)


def record_evaluation(path: Path, evaluation: str) -> None:
    """Writes an evaluation, as JSON, into the header of a file that `write` wrote; the arrays keep their bytes."""
    data, metadata = tensor_file.read(path)
    header, tensors = json.loads(metadata["cartridge"]), tensor_file.arrays(data)
    _save(path, tensors, header | {"evaluation": evaluation})


def _save(path: str | os.PathLike[str], tensors: dict[str, np.ndarray], header: dict[str, object]) -> None:
    with files.atomic(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"cartridge": json.dumps(header, sort_keys=True)})
        except SafetensorError as error:  # which safetensors raises even if the disk is full
            raise OSError(f"cannot write {os.fspath(path)}: {error}") from error


def read(path: Path) -> Cartridge:
    """Reads a file that `write` wrote; a missing one is a FileNotFoundError, a damaged or a newer one a UserError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a cartridge.safetensors file")
    try:
        data, metadata = tensor_file.read(path)
        header, tensors = json.loads(metadata["cartridge"]), tensor_file.arrays(data)
        version = header["format_version"]
        if version <= FORMAT_VERSION:
            lengths = tensors.pop("lengths") if version >= 3 else None
            _check_shapes(tensors)
            names = ("keys", "values", *(["bias"] if "bias" in tensors else []))
            arrays = {name: _decode(name, tensors) for name in names}
            if lengths is None:
                return Cartridge(**arrays, **read_header(header))
            return _padded(arrays, lengths, read_header(header), header["offset"])
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a whole cartridge file ({error!r}): make it again") from error
    raise UserError(f"{path} has format {version}, this version reads up to {FORMAT_VERSION}: upgrade")


def header_of(cartridge: Cartridge) -> dict[str, object]:
    """Returns what a cartridge knows beside its arrays; files of other formats hold it too where they have room."""
    return {"num_frozen": cartridge.num_frozen, **cartridge.provenance.as_dict()}


def read_header(header: dict[str, object]) -> dict[str, Any]:
    """Returns a header's `num_frozen` and `provenance`, or raises TypeError, ValueError or KeyError."""
    num_frozen = header["num_frozen"]
    if type(num_frozen) is not int:
        raise TypeError(f"num_frozen is {num_frozen!r}")
    return {"num_frozen": num_frozen, "provenance": Provenance.from_dict(header)}


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """Returns the array in another floating-point dtype; a value too large for it is a UserError."""
    with np.errstate(over="ignore"):
        small = array.astype(DTYPES[dtype])
    if not np.isfinite(small.astype(np.float32)).all():
        largest = np.abs(array).max()
        raise UserError(f"{dtype} cannot hold a value of {largest:.3g}, which this cartridge has: use bfloat16")
    return small


def _encode(name: str, array: object, dtype: str | None) -> dict[str, np.ndarray]:
    """Returns the tensors that hold an array in a file: itself in the dtype, and for int8 its scale."""
    held = np.ascontiguousarray(array)
    if dtype is None:
        return {name: held}
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if dtype != "int8":
        return {name: cast(held, dtype)}
    scale_lpk = np.abs(held.astype(np.float32)).max(-1, initial=0) / 127
    scale_lpk[scale_lpk == 0] = 1.0  # a slot of zeros
    return {name: np.rint(held / scale_lpk[..., None]).astype(np.int8), f"{name}_scale": scale_lpk.astype(np.float32)}


def _check_shapes(tensors: dict[str, np.ndarray]) -> None:
    """Checks shapes and dtypes before the tensors are used: numpy would broadcast those that do not fit together."""
    for name in ("keys", "values"):
        scale, shape = tensors.get(f"{name}_scale"), tensors[name].shape
        if scale is not None and scale.shape != shape[:-1]:
            raise UserError(f"{name}_scale is {scale.shape}, expected {shape[:-1]}")
    for name, tensor in tensors.items():
        is_whole = f"{name}_scale" in tensors if tensor.dtype == np.int8 else tensor.dtype in FLOATS
        if not is_whole:
            raise UserError(f"{name} is {tensor.dtype}, expected one of {', '.join(DTYPES)}, int8 with its scale")


def _padded(arrays: dict[str, np.ndarray], lengths: np.ndarray, said: dict[str, Any], offset: object) -> Cartridge:
    """Returns the cartridge of a file of version 3, or raises a UserError if its parts do not belong together."""
    if type(offset) is not int or not 0 <= offset < 1 << 31:
        raise UserError(f"its offset is {offset!r}, expected a position")
    shape = arrays["keys"].shape
    for name, array in arrays.items():
        if len(shape) != 2 or array.shape != (shape[:1] if name == "bias" else shape):
            raise UserError(f"{name} is {array.shape} and keys are {shape}, expected slots [N, h], and [N] of a bias")
    ragged.check(lengths, len(arrays["keys"]))
    padded = {name: ragged.padded(array, lengths) for name, array in arrays.items()}
    return Cartridge(**padded, **said, lengths=None if np.ptp(lengths) == 0 else lengths, offset=offset)


def _decode(name: str, tensors: dict[str, np.ndarray]) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is not finite then is refused by whoever reads it
        array = tensors[name].astype(np.float32)
        return array * tensors[f"{name}_scale"][..., None] if tensors[name].dtype == np.int8 else array
