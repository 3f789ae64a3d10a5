"""The programs of training and of decoding, compiled for devices that need not be here, and what they hold."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from cartridges_jax import collectives, sharding
from cartridges_jax.cartridge import Cartridge
from cartridges_jax.kernels.prefix_attention.blockwise import MASKED
from cartridges_jax.losses import CHUNK, Batch
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.transformer import (
    Params,
    abstract_params,
    block_of,
    embedded,
    head_weights,
    project,
    rms_norm,
    rope_tables,
)
from cartridges_jax.optim import optimizer
from cartridges_jax.planning.hlo import Traffic, traffic
from cartridges_jax.step import TrainState, train_step
from cartridges_jax.train import TrainConfig

TOP_K = 20  # teacher entries of a position
TARGETS = 0.5  # of positions that carry a target: a conversation's answers
# A lower effort compiles several times as fast and came to 1 % more memory where both were measured.
# On a CPU nothing of it will run: sizes and collectives are settled before machine code is.
OPTIONS: dict[str, dict[str, Any]] = {
    "tpu": {"exec_time_optimization_effort": -1.0},
    "cpu": {"xla_backend_optimization_level": 0},
}


class DoesNotFit(ValueError):
    """The compiler finds too little memory on the devices."""


@dataclasses.dataclass(frozen=True)
class Requests:
    """What is decoded at once, over all devices; each request has read `length` tokens of its own."""

    count: int = 64
    cartridges: int = 1
    length: int = 1024

    def __post_init__(self) -> None:
        if min(self.count, self.cartridges, self.length) < 1:
            raise ValueError(
                f"{self.count} requests of {self.length} tokens for {self.cartridges} cartridges: expected at least 1"
            )


@dataclasses.dataclass(frozen=True)
class Program:
    """One device's part of a compiled program."""

    arguments: dict[str, int]  # bytes of what goes in, by name
    activations: int  # bytes of what exists only while it runs
    peak: int  # bytes
    collectives: dict[str, Traffic]
    seconds: float  # that compiling took
    text: str
    xla_flops: float  # by XLA's own count, of every loop one turn


def train_program(config: TrainConfig, model: ModelConfig, mesh: Mesh, num_steps: int) -> Program:
    """The step of `train`.

    Raises:
      ValueError: the mesh does not suit the model or the rows.
      DoesNotFit: the compiler says so.
    """
    sharding.check(model, mesh)
    sharding.check_rows(config.batch_size, mesh)
    tx = optimizer(config.optim, num_steps, config.init.num_frozen)
    cartridge = jax.eval_shape(functools.partial(_cartridge, model, config))
    state = TrainState(cartridge, jax.eval_shape(tx.init, cartridge), jax.ShapeDtypeStruct((), jnp.int32))
    given = {
        "state": sharding.abstract(state, sharding.CARTRIDGE, mesh),
        "weights": sharding.abstract(_weights(model, config.dtype), sharding.WEIGHTS, mesh),
        "batch": sharding.abstract(_batch(config), sharding.BATCH, mesh),
    }
    rows = config.batch_size // math.prod(mesh.shape[axis] for axis in sharding.ROWS)
    chunks = target_chunks(rows * config.seq_len)
    options: dict[str, Any] = {"tail": config.tail, "reduction": config.reduction, "remat": config.remat}
    with _compiling_for(mesh):
        lowered = train_step.lower(*given.values(), config=model, tx=tx, mesh=mesh, **options)
    held = {
        "weights": given["weights"],
        "cartridge": given["state"].cartridge,
        "optimizer": given["state"].opt_state,
        "batch": given["batch"],
    }
    return _compiled(lowered, held, mesh, chunks)


def target_chunks(positions: int) -> int:
    """How often the loss's loop turns for as many positions: the one loop whose length depends on the data."""
    return math.ceil(TARGETS * positions / CHUNK)


def decode_program(config: TrainConfig, model: ModelConfig, mesh: Mesh, requests: Requests) -> Program:
    """A step of decoding: one token of every request, which reads its cartridge and its own cache.

    The step is the planner's own and plainer than a server's: it gives logits and samples nothing, its caches are as
    long as each request is, and requests use the cartridges evenly. An engine that runs on a mesh can take its place.

    Raises:
      ValueError, DoesNotFit: as `train_program`.
    """
    sharding.check(model, mesh)
    shares = math.prod(mesh.shape[axis] for axis in sharding.ROWS)
    if requests.count % shares:
        raise ValueError(
            f"--requests is {requests.count}, which {shares} devices (data times fsdp of the mesh) cannot share "
            "evenly: choose a multiple"
        )
    dtype = jnp.dtype(config.dtype)
    heads = model.num_layers, model.num_kv_heads, model.head_dim
    cache = jax.ShapeDtypeStruct((heads[0], requests.count, heads[1], requests.length, heads[2]), dtype)
    slots = jax.ShapeDtypeStruct((heads[0], requests.cartridges, heads[1], config.init.num_slots, heads[2]), dtype)
    bias = jax.ShapeDtypeStruct(slots.shape[:4], jnp.float32)
    per_request = jax.ShapeDtypeStruct((2, requests.count), jnp.int32)
    members = jax.ShapeDtypeStruct((requests.cartridges, requests.count), jnp.int32)
    given = {
        "caches": sharding.abstract((cache, cache), sharding.CACHES, mesh),
        "weights": sharding.abstract(_weights(model, config.dtype), sharding.WEIGHTS, mesh),
        "cartridge": sharding.abstract((slots, slots, bias), sharding.SLOTS, mesh),
        "requests": sharding.abstract((per_request, members), sharding.BATCH, mesh),
    }
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, given)
    step = sharding.on_mesh(
        functools.partial(_decode_step, model=model),
        mesh,
        tuple(specs[name] for name in given),
        (specs["caches"], P(sharding.ROWS, "tensor")),
    )
    with _compiling_for(mesh):
        lowered = jax.jit(step, donate_argnums=0).lower(*given.values())
    return _compiled(lowered, given, mesh, 1)


def _decode_step(
    caches: tuple[Array, Array],  # l r k s h
    params: Params,
    shared: tuple[Array, Array, Array],  # l c k p, with h for keys and values
    requests: tuple[Array, Array],  # token and length of each, and the requests of each cartridge
    *,
    model: ModelConfig,
) -> tuple[tuple[Array, Array], Array]:
    (tokens_r, lengths_r), members_ce = requests
    rope = rope_tables(shared[0].shape[3] + lengths_r[:, None], model)

    def layer(carry: Any, scanned: Any) -> tuple[Any, None]:
        x_r1d, keys_lrksh, values_lrksh = carry
        i, layer_params, slots = scanned

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
            where = i, jnp.arange(k.shape[0]), slice(None), lengths_r
            # the cache is carried and written in place: as a scan's outputs it would exist twice
            keys, values = keys_lrksh.at[where].set(k[:, 0]), values_lrksh.at[where].set(v[:, 0])
            own = collectives.own_heads((keys[i], values[i]), model, axis=1)
            slots_here = collectives.own_heads(slots, model, axis=1)
            return _attention(q[:, 0], *own, lengths_r, slots_here, members_ce)[:, None], (keys, values)

        x_r1d, written = block_of(model, layer_params)(x_r1d, rope, attend)
        return (x_r1d, *written), None

    layers = jnp.arange(model.num_layers), params["blocks"], shared
    (x_r1d, *written), _ = jax.lax.scan(layer, (embedded(params, tokens_r[:, None]), *caches), layers)
    hidden_rd = rms_norm(x_r1d[:, 0], params["final_norm"], model.norm_eps)
    return tuple(written), project("rd,vd->rv", hidden_rd.astype(jnp.float32), head_weights(params))


def _attention(
    q: Float[Array, "r n h"],
    keys: Float[Array, "r k s h"],
    values: Float[Array, "r k s h"],
    lengths: Int[Array, " r"],
    slots: tuple[Array, Array, Array],  # c k p, with h for keys and values
    members: Int[Array, "c e"],
) -> Float[Array, "r n h"]:
    """One softmax over a request's cartridge, whose slots meet all its requests in one product, and its own cache."""
    (r, n, h), (_, k, s, _) = q.shape, keys.shape
    slot_keys, slot_values, bias_ckp = slots
    q_rkgh = (q * h**-0.5).reshape(r, k, n // k, h)
    of_groups = jnp.einsum("cekgh,ckph->cekgp", q_rkgh[members], slot_keys, preferred_element_type=jnp.float32)
    shared_rkgp = jnp.full((r, *of_groups.shape[2:]), MASKED).at[members].set(of_groups + bias_ckp[:, None, :, None])
    own_rkgs = jnp.einsum("rkgh,rksh->rkgs", q_rkgh, keys, preferred_element_type=jnp.float32)
    own_rkgs = jnp.where((jnp.arange(s) <= lengths[:, None])[:, None, None], own_rkgs, MASKED)
    weights = jax.nn.softmax(jnp.concatenate([shared_rkgp, own_rkgs], -1)).astype(values.dtype)
    shared_rkgp, own_rkgs = jnp.split(weights, [bias_ckp.shape[2]], -1)
    of_groups = jnp.einsum("cekgp,ckph->cekgh", shared_rkgp[members], slot_values)
    o_rkgh = jnp.einsum("rkgs,rksh->rkgh", own_rkgs, values).at[members].add(of_groups)
    return o_rkgh.reshape(r, n, h).astype(q.dtype)


def _compiling_for(mesh: Mesh) -> Any:
    return jax.set_mesh(mesh)  # tells the kernels which device they are compiled for


def _compiled(lowered: Any, held: dict[str, Any], mesh: Mesh, unknown_trips: int) -> Program:
    platform = mesh.devices.flat[0].platform
    start = time.monotonic()
    try:
        with _compiling_for(mesh):
            compiled = lowered.compile(OPTIONS.get(platform))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(f"the compiler says: {str(error).splitlines()[0]}") from error
    seconds = time.monotonic() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    peak = memory.peak_memory_in_bytes
    if platform == "cpu":  # where it leaves out what exists only while the program runs
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak += memory.temp_size_in_bytes
    arguments = {name: _bytes_here(tree) for name, tree in held.items()}
    flops = (compiled.cost_analysis() or {}).get("flops", 0.0)
    return Program(arguments, memory.temp_size_in_bytes, peak, traffic(text, unknown_trips), seconds, text, flops)


def _bytes_here(tree: Any) -> int:
    """Of one device's parts."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def _weights(model: ModelConfig, dtype: str) -> Params:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.dtype(dtype)), abstract_params(model))


def _cartridge(model: ModelConfig, config: TrainConfig) -> Cartridge:
    slots = jnp.zeros((model.num_layers, config.init.num_slots, model.num_kv_heads, model.head_dim))
    bias = jnp.zeros(slots.shape[:3]) if config.init.kind == "attention_matching" else None
    return Cartridge(slots, slots, bias, config.init.num_frozen)


def _batch(config: TrainConfig) -> Batch:
    shape = config.accumulation, config.batch_size, config.seq_len
    ids = jax.ShapeDtypeStruct(shape, np.int32)
    entries = (*shape, TOP_K)
    return Batch(
        ids,
        ids,
        ids,
        jax.ShapeDtypeStruct(entries, np.int32),
        jax.ShapeDtypeStruct(entries, np.float32),
        jax.ShapeDtypeStruct(entries, np.bool_),
    )
