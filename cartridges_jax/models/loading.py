"""This file fills the parameter tree from named tensors, by the table of their names; it tells all problems together.

Both loaders (`hf.py`, `gguf.py`) speak Hugging Face names. A parameter is read, checked and placed before the next:
of each tensor only the rows and columns that this process's devices hold, so that no host ever holds a large model.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.params import Params, abstract_params, weight_specs
from cartridges_jax.models.spec import ENDS, FAMILIES, file_names
from cartridges_jax.parallel import sharding


class Tensor(Protocol):
    """A tensor in a file, of one or two axes: like a numpy array, but read only where it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: Any) -> np.ndarray: ...


ReadTensor = Callable[[str], Tensor]
Bounds = tuple[tuple[int, int], ...]  # first and last index of a part of an array, for each axis
ALIGNMENT = 64  # bytes
SAMPLES = 256  # values of a tensor that go into the fingerprint


def known_name(name: str) -> bool:
    """Whether a model of some family may have a tensor of this name."""
    layer = re.fullmatch(r"model\.layers\.\d+\.(.+)", name)
    if layer is None:
        return any(array.hf == name for array in ENDS)
    return any(array.hf == layer[1] for family in FAMILIES.values() for array in family.arrays)


def load_params(
    config: ModelConfig,
    names: Iterable[str],
    read: ReadTensor,
    dtype: Any,
    mesh: Mesh | None = None,
    num_ids: int = 0,
) -> tuple[Params, str]:
    """Reads the parameters of `config` through `read`, casts them to `dtype` and stacks layers on axis 0.

    Args:
      mesh: on which they are laid as `weight_specs` says; by default they come to one device.
      num_ids: one more than the largest id that the model's tokenizer gives, for each of which there has to be a row.

    Returns:
      The parameters and a fingerprint: SHA-256 over each tensor's name, shape and 256 evenly spaced values as float32.

    Raises:
      UserError: the missing, unknown and misshapen tensors, or those with numbers that are NaN or infinite, all in one
        sentence; or a mesh that does not fit.
    """
    tree = abstract_params(config)
    placements = None
    if mesh is not None:
        sharding.check(config, mesh)
        placements = sharding.shardings(sharding.fitted(tree, weight_specs(config), mesh), mesh)
    expected = {name: (array, layer) for name, array, layer in file_names(config)}
    available = {n: n for n in names if not n.endswith("rotary_emb.inv_freq")}
    problems = _untied(available, read) if config.tie_embeddings else []
    if num_ids > config.vocab_size:
        problems.append(f"its tokenizer has ids up to {num_ids - 1} and the embedding rows for {config.vocab_size} ids")
    problems += [f"{n} is missing" for n in sorted(expected.keys() - available.keys())]
    problems += [f"{n} is unknown" for n in sorted(available.keys() - expected.keys())]
    tensors = {name: read(available[name]) for name in expected if name in available}
    for name, tensor in tensors.items():
        array, _ = expected[name]
        if tuple(tensor.shape) != array.file_shape(config):
            problems.append(f"{name} is {tuple(tensor.shape)}, expected {array.shape(config)} as {array.pattern!r}")
    _refuse(config, problems)  # before anything of these sizes is made
    infinite: list[str] = []
    samples: dict[str, bytes] = {}

    def load(path: Any, leaf: jax.ShapeDtypeStruct) -> Array:
        place = tuple(key.key for key in path)
        placement = None if placements is None else _leaf(placements, place)
        parts = {bounds: _empty(bounds, dtype) for bounds in _parts_here(leaf.shape, placement)}
        for name, (array, layer) in expected.items():
            if array.name != place[-1]:
                continue
            tensor = tensors[name]
            if placement is None:
                tensor = tensor[:]  # read once, for its fingerprint too
            for bounds, part in parts.items():
                target, bounds = (part, bounds) if layer is None else (part[layer], bounds[1:])
                ends = [_theirs(array.pattern, [bound[i] for bound in bounds], config.head_dim) for i in (0, 1)]
                rows, *columns = (slice(*end) for end in zip(*ends, strict=True))
                piece = tensor[rows][(slice(None), *columns)]
                target[...] = einops.rearrange(
                    piece, array.pattern, **({"h": config.head_dim} if "h" in array.axes else {})
                )
                if not _finite(target):
                    infinite.append(f"{name} holds numbers that are NaN or infinite")
            samples[name] = f"{name}{tuple(tensor.shape)}".encode() + _sample(tensor).tobytes()
        if placement is None:
            return jnp.asarray(*parts.values())
        return jax.make_array_from_callback(leaf.shape, placement, lambda index: parts[_bounds(index, leaf.shape)])

    with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is told by the name of the tensor
        params = jax.tree.map_with_path(load, tree)
    _refuse(config, sorted(set(infinite)))
    digest = hashlib.sha256(b"".join(samples[name] for name in expected))
    return params, digest.hexdigest()


def _refuse(config: ModelConfig, problems: Sequence[str]) -> None:
    if problems:
        shown = "; ".join(problems[:12]) + ("" if len(problems) <= 12 else f"; and {len(problems) - 12} more")
        raise UserError(f"these weights do not fit a {config.family} of {config.num_layers} layers: {shown}")


def _untied(available: dict[str, str], read: ReadTensor) -> list[str]:
    """Takes the head out of `available` if it repeats the embedding, or puts it in the place of one that is absent."""
    head, embed = "lm_head.weight", "model.embed_tokens.weight"
    if head not in available:
        return []
    repeated = available.pop(head)
    if embed not in available:
        available[embed] = repeated
    elif not _same(read(repeated), read(embed)):
        return [f"{head} differs from {embed}, and the config ties them"]
    return []


def _same(one: Tensor, other: Tensor) -> bool:
    if tuple(one.shape) != tuple(other.shape):
        return False
    parts = (slice(start, start + 4096) for start in range(0, one.shape[0], 4096))
    return all(np.array_equal(one[part].astype(np.float32), other[part].astype(np.float32), True) for part in parts)


def _finite(array: np.ndarray) -> bool:
    """Whether no number is NaN or infinite, by their bits: beyond those of an infinity there are only NaNs."""
    infinity, size = np.array(np.inf, array.dtype), array.dtype.itemsize
    positive, negative = infinity.view(f"i{size}"), (-infinity).view(f"u{size}")
    return bool(
        array.view(positive.dtype).max(initial=0) < positive and array.view(negative.dtype).max(initial=0) < negative
    )


def _bounds(index: Sequence[slice], shape: tuple[int, ...]) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _parts_here(shape: tuple[int, ...], placement: NamedSharding | None) -> list[Bounds]:
    """Lists the different parts of an array that this process's devices hold."""
    if placement is None:
        return [_bounds([slice(None)] * len(shape), shape)]
    indices = placement.addressable_devices_indices_map(shape).values()
    return sorted({_bounds(index, shape) for index in indices if index is not None})


def _empty(bounds: Bounds, dtype: Any) -> np.ndarray:
    """Makes an array that is aligned as XLA wants it, so that the devices of a CPU use its memory without a copy."""
    shape, dtype = [stop - start for start, stop in bounds], jnp.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _theirs(pattern: str, ours: Sequence[int], head_dim: int) -> tuple[int, ...]:
    """Turns sizes (or ends) of our axes into theirs: "(n h) d -> d n h" takes (d, n, h) to (n * h, d)."""
    left, right = pattern.split(" -> ")
    sizes = dict(zip(right.split(), ours, strict=True))
    axes = re.findall(r"\(\w h\)|\w", left)
    return tuple(sizes[axis[1]] * head_dim if axis.startswith("(") else sizes[axis] for axis in axes)


def _sample(tensor: Tensor) -> np.ndarray:
    """Takes evenly spaced values in row-major order and reads only the rows that hold them."""
    size = math.prod(tensor.shape)
    index = np.arange(0, size, max(1, size // SAMPLES))
    width = size // tensor.shape[0]
    rows, where = np.unique(index // width, return_inverse=True)
    return tensor[rows].reshape(len(rows), width)[where, index % width].astype(np.float32)


def _leaf(tree: Any, path: tuple[str, ...]) -> np.ndarray:
    for key in path:
        tree = tree[key]
    return tree
