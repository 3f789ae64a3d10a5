"""The programs of training and of decoding, compiled for devices that need not be here, and the memory they need."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cartridges_jax import kernels
from cartridges_jax.cartridge.arrays import Placement, Slots
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.kernels.block_sizes import of_device
from cartridges_jax.kernels.decode_attention import thresholds
from cartridges_jax.kernels.decode_attention.pages import AttentionMetadata, slot_starts
from cartridges_jax.kernels.decode_attention.sharing import Thresholds, head_pages_read
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.params import Params, abstract_params, decode_specs, weight_specs
from cartridges_jax.parallel import collectives, sharding
from cartridges_jax.planning.chips import Chip
from cartridges_jax.planning.hlo import Traffic, traffic
from cartridges_jax.planning.launches import Launches, Paged, launches
from cartridges_jax.serving.decoder import to_decode_layout
from cartridges_jax.serving.metadata import PAGE_SIZE
from cartridges_jax.serving.sampling import GREEDY, SamplingParams
from cartridges_jax.serving.sequences import DecodeBatch
from cartridges_jax.serving.steps import BATCH, decode_step, empty_cache
from cartridges_jax.training.batch import Batch
from cartridges_jax.training.config import TrainConfig
from cartridges_jax.training.optim import optimizer
from cartridges_jax.training.step import TrainState, train_step

STEPS = 1000  # assumed of a run whose config leaves their number to its dataset
TOP_K = 20  # the teacher's entries for a position
LONGEST_SHARE = 10  # the longest head of a profile, times the average, at a tenth of a document
TARGETS = 0.5  # the share of positions that have a target: the answers of conversations
# A lower effort compiles several times as fast, and came to 1 % more memory where both were measured. On a CPU the
# program is never run, and its sizes and collectives do not depend on the machine code.
OPTIONS: dict[str, dict[str, Any]] = {
    "tpu": {"exec_time_optimization_effort": -1.0},
    "cpu": {"xla_backend_optimization_level": 0},
}


class DoesNotFit(UserError):
    """The compiler finds too little memory on the devices."""


@dataclasses.dataclass(frozen=True)
class Requests:
    """The requests that are decoded at once, on all devices; each has `length` tokens behind its cartridge."""

    count: int = 64
    cartridges: int = 1
    length: int = 1024

    def __post_init__(self) -> None:
        if min(self.count, self.cartridges, self.length) < 1:
            raise UserError(
                f"{self.count} requests of {self.length} tokens for {self.cartridges} cartridges: expected at least 1"
            )


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, as one device runs it."""

    arguments: dict[str, int]  # bytes of its arguments, by name
    activations: int  # bytes of the arrays that exist only while it runs
    peak: int  # bytes
    collectives: dict[str, Traffic]
    launches: Launches  # in one run
    seconds: float  # that compiling took
    text: str
    xla_flops: float  # by XLA's own analysis, which counts a loop's body once


def with_dtype(config: TrainConfig, chip: Chip) -> TrainConfig:
    """Returns the config with the dtype that "auto" would be on this chip."""
    fastest = "float32" if chip.platform == "cpu" else "bfloat16"
    return dataclasses.replace(config, dtype=fastest) if config.dtype == "auto" else config


def kernels_per_layer(program_of: Callable[[ModelConfig], Program], model: ModelConfig) -> int:
    """Returns what another layer launches: of programs of a few layers, since compiling more says the same."""
    layers = min(model.num_layers, 3)
    more, fewer = (program_of(dataclasses.replace(model, num_layers=n)) for n in (layers, layers - 1))
    return more.launches.count - fewer.launches.count


def train_program(config: TrainConfig, model: ModelConfig, mesh: Mesh, num_steps: int) -> Program:
    """Compiles a step of training.

    Raises:
      UserError: the mesh does not divide the sizes of the model or of the batch.
      DoesNotFit: the compiler finds too little memory.
    """
    sharding.check(model, mesh)
    sharding.check_rows(config.batch_size, mesh)
    tx = optimizer(config.optim, num_steps, config.init.num_frozen)
    slots = jax.eval_shape(functools.partial(_slots, model, config))
    state = TrainState(slots, jax.eval_shape(tx.init, slots), jax.ShapeDtypeStruct((), jnp.int32))
    given = {
        "state": sharding.abstract(state, sharding.CARTRIDGE, mesh),
        "weights": sharding.abstract(_weights(model, config.dtype), weight_specs(model), mesh),
        "batch": sharding.abstract(_batch(config), sharding.BATCH, mesh),
        "placement": sharding.abstract(_placement(model, config), sharding.PLACEMENT, mesh),
    }
    rows = config.batch_size // math.prod(mesh.shape[axis] for axis in sharding.ROWS)
    options: dict[str, Any] = {name: getattr(config, name) for name in ("tail", "reduction", "remat", "attention")}
    with jax.set_mesh(mesh):  # tells the kernels which device they are compiled for
        lowered = train_step.lower(*given.values(), config=model, tx=tx, mesh=mesh, **options)
        chunks = target_chunks(rows * config.seq_len, kernels.device_name())
    held = {
        "weights": given["weights"],
        "cartridge": given["state"].cartridge,
        "optimizer": given["state"].opt_state,
        "batch": given["batch"],
    }
    return _compiled(lowered, held, mesh, chunks)


def target_chunks(positions: int, device: str) -> int:
    """Returns how many chunks the loss visits for so many positions; no other loop's length depends on the data."""
    return math.ceil(TARGETS * positions / of_device(device).loss_chunk)


def decode_program(
    config: TrainConfig, model: ModelConfig, mesh: Mesh, requests: Requests, attention: str | None = None
) -> Program:
    """Compiles a step of a server's engine, which decodes one token of every request.

    The devices of `tensor` are one engine, and there are `data` times `fsdp` engines, which share the requests. On a
    CPU an engine may hold its weights in half of the bytes that are given here (`serving.decoder.to_decode_layout`).
    The requests are greedy; those for one cartridge see it together, and no two see the same tokens.

    Args:
      attention: the implementation of `decode_attention`; None for what an engine takes.

    Raises:
      UserError, DoesNotFit: as `train_program`.
    """
    sharding.check(model, mesh)
    engines = math.prod(mesh.shape[axis] for axis in sharding.ROWS)
    if requests.count % engines:
        raise UserError(
            f"--requests is {requests.count}, which {engines} engines (data times fsdp of the mesh) cannot share "
            "evenly: choose a multiple"
        )
    b, mesh = requests.count // engines, Mesh(mesh.devices[:1, :1], mesh.axis_names, axis_types=mesh.axis_types)
    slots, tokens = (math.ceil(count / PAGE_SIZE) for count in (config.init.num_slots, requests.length))
    # the ends of cartridges share pages
    shared, own = math.ceil(min(requests.cartridges, b) * config.init.num_slots / PAGE_SIZE), b * tokens

    def pages(count: int) -> Any:
        with jax.set_mesh(mesh):
            shapes = empty_cache.eval_shape(model, count, jnp.dtype(config.dtype), mesh, attention)
        return sharding.abstract(shapes, sharding.PAGES, mesh)

    given = sharding.abstract(_weights(model, config.dtype), weight_specs(model), mesh)
    with jax.set_mesh(mesh):
        weights = jax.eval_shape(functools.partial(to_decode_layout, config=model, mesh=mesh), given)
    weights = sharding.abstract(weights, decode_specs(model), mesh)
    asked = _decode_inputs(b, slots + tokens, model, mesh)
    with jax.set_mesh(mesh):
        options: dict[str, Any] = {"config": model, "mesh": mesh, "num_top": TOP_K, "implementation": attention}
        wants = None if kernels.platform() == "cpu" else GREEDY
        lowered = decode_step.lower(weights, pages(shared + own), *asked, **options, wants=wants)
        together = thresholds(attention)
    paged = _paged(pages(shared + own), b, slots, tokens, min(requests.cartridges, b), config, model, together)
    held = {"weights": weights, "cartridge": pages(shared), "caches": pages(own), "requests": asked}
    return _compiled(lowered, held, mesh, 1, paged)


def _paged(
    pool: Any,
    b: int,
    slot_pages: int,
    token_pages: int,
    num_cartridges: int,
    config: TrainConfig,
    model: ModelConfig,
    together: Thresholds,
) -> Paged:
    """What a layer's attention reads on average, by the block tables of the requests that are planned for."""
    tensor = pool.bias.sharding.mesh.shape["tensor"]
    k = len(collectives.kv_heads_by_device(model, tensor)[0])
    cartridge_ids = np.arange(b, dtype=np.int32) % num_cartridges
    tokens = np.arange(b * token_pages, dtype=np.int32).reshape(b, token_pages)
    lens = np.full((model.num_layers, num_cartridges, k), config.init.num_slots, np.int32)
    starts = np.stack([slot_starts(lens[:, 0])] * num_cartridges, axis=1)
    slots = np.zeros((num_cartridges, slot_pages), np.int32)
    metadata = AttentionMetadata(np.full(b, token_pages * PAGE_SIZE - 1), tokens, cartridge_ids, slots, starts, lens)
    head_pages = float(head_pages_read(metadata, PAGE_SIZE, together).mean())
    shapes = [(a.sharding.shard_shape(a.shape), a.dtype.itemsize) for a in (pool.keys, pool.values, pool.bias)]
    return Paged(shapes[0][0][0], head_pages * sum(math.prod(shape[1:]) * width for shape, width in shapes))


def _decode_inputs(b: int, pages_each: int, model: ModelConfig, mesh: Mesh) -> tuple[Any, ...]:
    """Returns the shapes of a step's other arguments: the last tokens, and the batch."""

    def of(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    ids_b, table = of(np.int32, b), of(np.int32, b, pages_each)
    heads = collectives.kv_heads_by_device(model, mesh.shape["tensor"]).size
    by_head = of(np.int32, model.num_layers, b, heads)
    metadata = AttentionMetadata(ids_b, table, ids_b, table, by_head, by_head)
    sampling_params = SamplingParams(of(np.float32, b), of(np.float32, b), ids_b, ids_b, ids_b, ids_b)
    inputs = ids_b, DecodeBatch(ids_b, ids_b, metadata, sampling_params)
    specs = P(), BATCH.replace(sampling_params=jax.tree.map(lambda _: P(), sampling_params))
    return jax.tree.map(
        lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)), inputs, specs
    )


def _compiled(
    lowered: Any, held: dict[str, Any], mesh: Mesh, unknown_trips: int, paged: Paged | None = None
) -> Program:
    platform = mesh.devices.flat[0].platform
    start = time.monotonic()
    try:
        with jax.set_mesh(mesh):
            compiled = lowered.compile(OPTIONS.get(platform))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(f"the compiler says: {str(error).splitlines()[0]}") from error
    seconds = time.monotonic() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    peak = memory.peak_memory_in_bytes
    if platform == "cpu":  # whose peak leaves out the arrays that exist only while the program runs
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak += memory.temp_size_in_bytes
    arguments = {name: _bytes_here(tree) for name, tree in held.items()}
    flops = (compiled.cost_analysis() or {}).get("flops", 0.0)
    launched = launches(text, paged, unknown_trips, is_gpu=platform == "gpu")
    communicated = traffic(text, unknown_trips)
    return Program(arguments, memory.temp_size_in_bytes, peak, communicated, launched, seconds, text, flops)


def _bytes_here(tree: Any) -> int:
    """Returns the bytes of one device's parts of these arrays."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def _weights(model: ModelConfig, dtype: str) -> Params:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.dtype(dtype)), abstract_params(model))


def _slots(model: ModelConfig, config: TrainConfig) -> Slots:
    keys = jnp.zeros((model.num_layers, longest_head(config), model.num_kv_heads, model.head_dim))
    bias = jnp.zeros(keys.shape[:3]) if config.init.kind == "attention_matching" else None
    return Slots(keys, keys, bias)


def longest_head(config: TrainConfig) -> int:
    """Returns how long a cartridge's arrays are in training: as its longest head, which a plan can only estimate."""
    if config.init.budget == "uniform":
        return config.init.num_slots
    return int(config.init.num_slots * (config.init.max_share or LONGEST_SHARE))


def _placement(model: ModelConfig, config: TrainConfig) -> Placement:
    lengths = jax.ShapeDtypeStruct((model.num_layers, model.num_kv_heads), jnp.int32)
    return Placement(None if config.init.budget == "uniform" else lengths, jax.ShapeDtypeStruct((), jnp.int32))


def _batch(config: TrainConfig) -> Batch:
    shape = config.accumulation, config.batch_size, config.seq_len
    ids = jax.ShapeDtypeStruct(shape, np.int32)
    entries = (jax.ShapeDtypeStruct((*shape, TOP_K), dtype) for dtype in (np.int32, np.float32, np.bool_))
    return Batch(ids, ids, ids, *entries)
