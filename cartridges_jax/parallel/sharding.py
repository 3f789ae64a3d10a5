"""How arrays lie on the devices: the mesh, and a table that says for every array how it is split.

There is always a mesh. It has three axes, all of size 1 on a laptop: `data` and `fsdp` split the rows of a batch,
`fsdp` also splits the width of the frozen weights, and `tensor` splits heads, MLP and vocabulary. A step of training
runs as one program on every device, on the device's own parts of the arrays (`on_mesh`). The communication in such a
program is in `collectives.py`.

`fsdp` has to divide the model's width; `tensor` the number of query heads, the MLP's width and the vocabulary; `data`
times `fsdp` the rows of a batch. Other sizes are refused (`check`). If `tensor` does not divide the kv heads, every
device holds all of them, those of the cartridge too, and takes those that its query heads read
(`collectives.local_kv_heads`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from cartridges_jax.command_line.errors import UserError

if TYPE_CHECKING:
    from cartridges_jax.models.config import ModelConfig

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
Specs = Any  # a PartitionSpec, or a tree of them

PAGES = P("tensor")  # head pages …: of serving; a device has those of the kv heads that its query heads read
CARTRIDGE = P(None, None, "tensor")  # l p k, with h for keys and values; the optimizer's moments lie like it
PLACEMENT = P(None, "tensor")  # l k: how many slots the heads of a cartridge have; its offset is a number
BATCH = P(None, ROWS)  # accumulation b …
LOGITS = P(None, None, "tensor")  # b t v: of small inputs, which every device has


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh's axes."""

    data: int | None = None  # None: as many devices as the other axes leave
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        if min(self.fsdp, self.tensor, 1 if self.data is None else self.data) < 1:
            raise UserError(f"the mesh is data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}: expected 1 or more")


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Returns the sizes of data, fsdp and tensor; if they do not come to `num_devices`, it is a UserError."""
    data = num_devices // (config.fsdp * config.tensor) if config.data is None else config.data
    if data * config.fsdp * config.tensor != num_devices:
        raise UserError(
            f"the mesh is data={config.data}, fsdp={config.fsdp}, tensor={config.tensor}, which does not come to the "
            f"{num_devices} devices here: change config.mesh"
        )
    return data, config.fsdp, config.tensor


def make_mesh(config: MeshConfig | None = None, devices: list[Any] | None = None) -> Mesh:
    """Makes a mesh, by default over all devices of the job; neighbours in `tensor` are neighbours in the hardware."""
    from jax.experimental import mesh_utils

    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config or MeshConfig(), len(devices))
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_of(params: Any) -> Mesh:
    """Returns the mesh on which these arrays lie, which has one device if they lie on one."""
    array = jax.tree.leaves(params)[0]
    if isinstance(array.sharding, NamedSharding):
        return array.sharding.mesh
    return Mesh(np.array(list(array.devices())).reshape(1, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check(config: ModelConfig, mesh: Mesh) -> None:
    """Raises a UserError unless the axes of the mesh divide the sizes of the model."""
    needs = [("fsdp", "width", config.embed_dim), ("tensor", "number of query heads", config.num_heads)]
    needs += [("tensor", "MLP width", config.mlp_dim), ("tensor", "vocabulary", config.vocab_size)]
    for axis, what, size in needs:
        if size % mesh.shape[axis]:
            raise UserError(
                f"the mesh's {axis} is {mesh.shape[axis]}, which does not divide this model's {what}, {size}: "
                "choose a divisor"
            )


def check_rows(batch_size: int, mesh: Mesh) -> None:
    """Raises a UserError unless the devices can share the rows of a batch evenly."""
    shares = math.prod(mesh.shape[axis] for axis in ROWS)
    if batch_size % shares:
        raise UserError(
            f"config.batch_size is {batch_size}, which {shares} devices (data times fsdp of the mesh) cannot share "
            "evenly: choose a multiple"
        )


def fitted(shapes: Any, table: Specs, mesh: Mesh) -> Specs:
    """Returns a tree's specs by `table`, without the axes that do not divide.

    A list has what the table's arrays have along their first axis, item by item.
    """
    if isinstance(table, dict) and isinstance(shapes, list):
        of_item = {name: P(*spec[1:]) for name, spec in table.items()}
        return [fitted(shape, of_item, mesh) for shape in shapes]
    if isinstance(table, dict):
        return {name: fitted(shape, table[name], mesh) for name, shape in shapes.items()}
    return jax.tree.map(lambda leaf: _fit(leaf.shape, table, mesh), shapes)


def shardings(specs: Specs, mesh: Mesh) -> Any:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P))


def abstract(tree: Any, table: Specs, mesh: Mesh) -> Any:
    """Returns shapes with the shardings of `table`, for compiling a program without its arrays."""
    placements = shardings(fitted(tree, table, mesh), mesh)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, placements)


def placed(tree: Any, table: Specs, mesh: Mesh) -> Any:
    """Lays arrays, which every process holds in full, on the mesh; for a mesh of one device they stay as they are."""
    if mesh.size == 1:
        return tree

    def place(leaf: Any, sharding: NamedSharding) -> Array:
        if not getattr(leaf, "is_fully_addressable", True):
            return jax.jit(lambda x: x, out_shardings=sharding)(leaf)
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree, shardings(fitted(tree, table, mesh), mesh))


def gathered(tree: Any) -> Any:
    """Returns the arrays in full, as numpy, on every process. Every process has to call it."""

    def gather(leaf: Any) -> np.ndarray:
        if not getattr(leaf, "is_fully_addressable", True):
            leaf = jax.jit(lambda x: x, out_shardings=NamedSharding(leaf.sharding.mesh, P()))(leaf)
        return np.asarray(leaf)

    return jax.tree.map(gather, tree)


def on_mesh(function: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Makes `function` a program that each device runs on its own parts of the arguments; one device just calls it."""
    if mesh is None or mesh.size == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _fit(shape: tuple[int, ...], spec: P, mesh: Mesh) -> P:
    sizes = [math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ())) for axis in spec]
    return P(*(axis if n % size == 0 else None for axis, size, n in zip(spec, sizes, shape, strict=False)))
