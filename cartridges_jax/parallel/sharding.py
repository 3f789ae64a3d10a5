"""How every array lies on the devices: a mesh that always exists and one table (design §7).

The mesh has three axes, all of size 1 on a laptop: `data` and `fsdp` share the rows of a batch, `fsdp` also shares the
width of the frozen weights, `tensor` shares heads, MLP and vocabulary. The step of training runs as one program on
every device's own parts (`on_mesh`); what such a program communicates is in `collectives.py`.

Sizes: `fsdp` must divide the model's width, `tensor` the query heads, the MLP's width and the vocabulary, and both
with `data` the rows of a batch; anything else is refused (`check`). Kv heads that `tensor` does not divide are held
whole by every device, the cartridge with them, and a device picks those that its query heads read
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

PAGES = P(None, "tensor")  # pages k …: of serving; a device has the kv heads that its query heads read
CARTRIDGE = P(None, None, "tensor")  # l p k, with h for keys and values; the optimizer's moments lie like it
BATCH = P(None, ROWS)  # accumulation b …
LOGITS = P(None, None, "tensor")  # b t v: of small inputs, which every device has


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int | None = None  # None: as many as the others leave
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        if min(self.fsdp, self.tensor, 1 if self.data is None else self.data) < 1:
            raise UserError(f"the mesh is data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}: expected 1 or more")


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Sizes of the axes.

    Raises:
      UserError: they do not multiply to the number of devices.
    """
    data = num_devices // (config.fsdp * config.tensor) if config.data is None else config.data
    if data * config.fsdp * config.tensor != num_devices:
        raise UserError(
            f"the mesh is data={config.data}, fsdp={config.fsdp}, tensor={config.tensor}, which does not come to the "
            f"{num_devices} devices here: change config.mesh"
        )
    return data, config.fsdp, config.tensor


def make_mesh(config: MeshConfig | None = None, devices: list[Any] | None = None) -> Mesh:
    """A mesh over all devices of the job; neighbours in `tensor` are neighbours in the hardware."""
    from jax.experimental import mesh_utils

    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config or MeshConfig(), len(devices))
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_of(params: Any) -> Mesh:
    """The mesh on which these arrays lie; an array of one device lies on a mesh of one."""
    array = jax.tree.leaves(params)[0]
    if isinstance(array.sharding, NamedSharding):
        return array.sharding.mesh
    return Mesh(np.array(list(array.devices())).reshape(1, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check(config: ModelConfig, mesh: Mesh) -> None:
    """Refuses sizes that do not go together (see above).

    Raises:
      UserError: says which.
    """
    needs = [("fsdp", "width", config.embed_dim), ("tensor", "number of query heads", config.num_heads)]
    needs += [("tensor", "MLP width", config.mlp_dim), ("tensor", "vocabulary", config.vocab_size)]
    for axis, what, size in needs:
        if size % mesh.shape[axis]:
            raise UserError(
                f"the mesh's {axis} is {mesh.shape[axis]}, which does not divide this model's {what}, {size}: "
                "choose a divisor"
            )


def check_rows(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError unless the devices can share the rows of a batch evenly."""
    shares = math.prod(mesh.shape[axis] for axis in ROWS)
    if batch_size % shares:
        raise UserError(
            f"config.batch_size is {batch_size}, which {shares} devices (data times fsdp of the mesh) cannot share "
            "evenly: choose a multiple"
        )


def fitted(shapes: Any, table: Specs, mesh: Mesh) -> Specs:
    """The specs of a tree of arrays (or of their shapes): `table`, without axes that do not divide a dimension.

    A list of such trees has one table for all of them.
    """
    if isinstance(table, dict) and isinstance(shapes, list):
        return [fitted(shape, table, mesh) for shape in shapes]
    if isinstance(table, dict):
        return {name: fitted(shape, table[name], mesh) for name, shape in shapes.items()}
    return jax.tree.map(lambda leaf: _fit(leaf.shape, table, mesh), shapes)


def shardings(specs: Specs, mesh: Mesh) -> Any:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P))


def abstract(tree: Any, table: Specs, mesh: Mesh) -> Any:
    """The shapes of a tree of arrays (or of their shapes) and how they lie, to compile for without having them."""
    placements = shardings(fitted(tree, table, mesh), mesh)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, placements)


def placed(tree: Any, table: Specs, mesh: Mesh) -> Any:
    """Arrays that every process holds in full, laid on the mesh; on a mesh of one device, as they are."""
    if mesh.size == 1:
        return tree

    def place(leaf: Any, sharding: NamedSharding) -> Array:
        if not getattr(leaf, "is_fully_addressable", True):
            return jax.jit(lambda x: x, out_shardings=sharding)(leaf)
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree, shardings(fitted(tree, table, mesh), mesh))


def gathered(tree: Any) -> Any:
    """The arrays in full, as numpy, on every process: all of them have to ask."""

    def gather(leaf: Any) -> np.ndarray:
        if not getattr(leaf, "is_fully_addressable", True):
            leaf = jax.jit(lambda x: x, out_shardings=NamedSharding(leaf.sharding.mesh, P()))(leaf)
        return np.asarray(leaf)

    return jax.tree.map(gather, tree)


def on_mesh(function: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` as one program on every device's parts of its arguments; on one device, the function itself."""
    if mesh is None or mesh.size == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _fit(shape: tuple[int, ...], spec: P, mesh: Mesh) -> P:
    sizes = [math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ())) for axis in spec]
    return P(*(axis if n % size == 0 else None for axis, size, n in zip(spec, sizes, shape, strict=False)))
