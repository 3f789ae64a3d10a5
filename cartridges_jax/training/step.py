"""One step of training, on one device or on a mesh of devices.

The model is frozen. The cartridge, which trains, is the first argument of the loss, and the gradient is taken with
respect to that argument alone.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cartridges_jax.cartridge.arrays import Cartridge, Placement, Slots
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.params import Params, weight_specs
from cartridges_jax.models.transformer import Remat
from cartridges_jax.parallel import collectives, sharding
from cartridges_jax.training.batch import Batch
from cartridges_jax.training.losses import Reduction, Tail, loss_sum


@flax.struct.dataclass
class TrainState:
    cartridge: Slots  # its arrays; checkpoints have them by this name
    opt_state: Any
    step: jax.Array


OPTIONS = ("config", "tx", "tail", "reduction", "remat", "attention", "mesh")


@functools.partial(jax.jit, static_argnames=OPTIONS, donate_argnums=0)
def train_step(
    state: TrainState,
    params: Params,
    batch: Batch,  # leaves are [accumulation, b, …]
    placement: Placement,
    *,
    config: ModelConfig,
    tx: optax.GradientTransformation,
    tail: Tail,
    reduction: Reduction,
    remat: Remat,
    attention: str | None = None,  # the implementation; None: the fastest that has been measured here
    mesh: Mesh | None = None,  # None: one device
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Makes one update, and returns the new state and the step's metrics."""

    def sums(slots: Slots, params: Params, batch: Batch, placement: Placement) -> Any:
        """Returns the sums over all rows of the batch: of loss, its divisor, targets and gradients."""

        def loss(slots: Slots, micro: Batch) -> tuple[jax.Array, jax.Array]:
            options: Any = {"config": config, "tail": tail, "reduction": reduction, "remat": remat}
            return loss_sum(Cartridge.of(slots, placement), params, micro, attention=attention, **options)

        def accumulate(carry: Any, micro: Batch) -> tuple[Any, None]:
            (total, count), gradient = jax.value_and_grad(loss, has_aux=True)(slots, micro)
            return jax.tree.map(jnp.add, carry, (total, count, micro.num_targets, gradient)), None

        zero = jnp.zeros((), jnp.promote_types(jnp.float32, params["embed"].dtype))
        none = jnp.zeros((), jnp.float32)
        start = (zero, none, none, jax.tree.map(jnp.zeros_like, slots))
        (*numbers, gradient), _ = jax.lax.scan(accumulate, start, batch)
        return *collectives.sum_over_rows(tuple(numbers)), collectives.sum_gradient_over_rows(gradient, config)

    if mesh is not None:
        shapes = state.cartridge, params, batch, placement
        tables = sharding.CARTRIDGE, weight_specs(config), sharding.BATCH, sharding.PLACEMENT
        specs = tuple(sharding.fitted(*pair, mesh) for pair in zip(shapes, tables, strict=True))
        sums = sharding.on_mesh(sums, mesh, specs, (P(), P(), P(), specs[0]))
    # summed over micro-batches and divided once, so that accumulating equals one large batch
    total, count, targets, gradient = sums(state.cartridge, params, batch, placement)
    gradient = jax.tree.map(lambda g: g / jnp.maximum(count, 1), gradient)
    updates, opt_state = tx.update(gradient, state.opt_state, state.cartridge)
    slots = optax.apply_updates(state.cartridge, updates)
    metrics = {"loss": total / jnp.maximum(count, 1), "targets": targets, "grad_norm": optax.tree.norm(gradient)}
    return TrainState(slots, opt_state, state.step + 1), metrics
