"""What training takes on devices that are not here: `python -m cartridges_jax.plan --config=… --topology=v5p-64`.

Compiles the step for the slice, on this machine, and prints what one device holds, computes and communicates; then the
least time that takes, and what the whole run costs. The config is that of `cartridges_jax.train`.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cartridges_jax import sharding
from cartridges_jax.cartridge import Cartridge
from cartridges_jax.losses import CHUNK, Batch
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.transformer import abstract_params
from cartridges_jax.optim import optimizer
from cartridges_jax.planning.hardware import Slice, devices_of, slice_of
from cartridges_jax.planning.hlo import Traffic, traffic
from cartridges_jax.planning.roofline import READS, Workload, break_even, step_flops, step_seconds
from cartridges_jax.planning.shapes import shape_of
from cartridges_jax.step import TrainState, train_step
from cartridges_jax.train import TrainConfig
from command_line.config import build, load, run
from command_line.progress import stage

TOP_K = 20  # of the teacher, in the batches that are planned for


def plan(config: TrainConfig, topology: str, document: int = 100_000, answer: int = 256) -> str:
    """The report of a run on a slice; of its rows every token is taken for a target, and for one conversation.

    Args:
      document: tokens of the text that the cartridge stands in for.
      answer: tokens of an answer, for the comparison with prompting.

    Raises:
      ValueError: an unknown slice or model, or sizes that do not go together.
      ImportError: the slice's compiler is not installed.
    """
    slice_, model = slice_of(topology), shape_of(config.model)
    sharding.mesh_shape(config.mesh, slice_.num_devices)
    if config.num_steps is None:
        raise ValueError("config.num_steps is None, expected the number of steps: no dataset is read here")
    devices = devices_of(slice_)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check(model, mesh)
    sharding.check_rows(config.batch_size, mesh)
    arguments = state, params, batch = _arguments(config, model, mesh)
    tx = optimizer(config.optim, config.num_steps, config.init.num_frozen)
    with stage(f"compiling the step for {slice_.num_devices} x {slice_.kind}"), jax.set_mesh(mesh):
        lowered = train_step.lower(
            *arguments,
            config=model,
            tx=tx,
            tail=config.tail,
            reduction=config.reduction,
            remat=config.remat,
            mesh=mesh,
        )
        program = lowered.compile()
    rows = config.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    found = traffic(program.as_text(), unknown_trips=-(-rows * config.seq_len // CHUNK))
    memory = program.memory_analysis()
    held = {
        "weights": _bytes_here(params),
        "cartridge": _bytes_here(state.cartridge),
        "optimizer": _bytes_here(state.opt_state),
        "batch": _bytes_here(batch),
        "activations, gathered weights and gradients": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
    }
    return _report(config, model, slice_, held, found, document, answer)


def _arguments(config: TrainConfig, model: ModelConfig, mesh: Any) -> tuple[TrainState, Any, Batch]:
    """Shapes of what the step takes, and where they lie."""

    def abstract(tree: Any, table: Any) -> Any:
        placements = sharding.shardings(sharding.fitted(tree, table, mesh), mesh)
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, placements)

    def shape(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    params = jax.tree.map(lambda leaf: shape(dtype, *leaf.shape), abstract_params(model))
    slots = shape(jnp.float32, model.num_layers, config.init.num_slots, model.num_kv_heads, model.head_dim)
    cartridge = Cartridge(slots, slots, num_frozen=config.init.num_frozen)  # type: ignore[arg-type]
    tx = optimizer(config.optim, config.num_steps or 1, config.init.num_frozen)
    state = TrainState(cartridge, jax.eval_shape(tx.init, cartridge), shape(jnp.int32))  # type: ignore[arg-type]
    rows = (config.accumulation, config.batch_size, config.seq_len)
    whole, entries = shape(jnp.int32, *rows), (*rows, TOP_K)
    targets = shape(jnp.int32, *entries), shape(jnp.float32, *entries), shape(bool, *entries)
    batch = Batch(whole, whole, whole, *targets)  # type: ignore[arg-type]
    return abstract(state, sharding.CARTRIDGE), abstract(params, sharding.WEIGHTS), abstract(batch, sharding.BATCH)


def _bytes_here(tree: Any) -> int:
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def _report(
    config: TrainConfig,
    model: ModelConfig,
    slice_: Slice,
    held: dict[str, int],
    found: dict[str, Traffic],
    document: int,
    answer: int,
) -> str:
    devices, chip, steps = slice_.num_devices, slice_.chip, config.num_steps or 0
    tokens = config.accumulation * config.batch_size * config.seq_len
    work = Workload(tokens, tokens, config.seq_len / 2, config.init.num_slots)
    done, needed = (step_flops(model, work, recomputed=again) / devices for again in (True, False))
    links = sum(kind.num_bytes for kind in found.values())
    read = READS * config.accumulation * held["weights"] * config.mesh.fsdp
    times = step_seconds(chip, done, read, links)
    longest = max(times, key=lambda name: times[name])
    seconds = times[longest]
    hours = steps * seconds * devices / 3600
    lines = [f"{config.model} on {devices} x {slice_.kind}, {config.init.num_slots} slots, each device holds:"]
    lines += [f"  {name}: {size / 2**30:.2f} GiB" for name, size in held.items()]
    lines += [f"  of {chip.memory / 2**30:.0f} GiB", "and in a step:", f"  computes {done / 1e12:.1f} TFLOP"]
    lines += [f"  {kind}: {one.count} times, {one.num_bytes / 2**30:.2f} GiB" for kind, one in found.items()]
    lines += [f"  {name}: at least {value:.3f} s" for name, value in times.items()]
    lines += [f"a step takes at least {seconds:.3f} s ({longest}), MFU at most {needed / seconds / chip.flops:.0%}"]
    lines += [f"the run: {steps} steps, {steps * tokens / 1e6:.1f} M tokens, {hours:.2f} device-hours"]
    for cached, how in ((False, "without prefix caching"), (True, "with the document cached")):
        queries = break_even(model, chip, hours * 3600, document, config.init.num_slots, answer, cached=cached)
        lines.append(f"pays for itself after {queries:,.0f} queries against prompting {how}")
    lines.append(f"  (document of {document} tokens, answers of {answer}; self-study is not counted)")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m cartridges_jax.plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("--topology", required=True, help="v5p-64, v5e-16, v6e-8, v4-32, h100:8")
    parser.add_argument("--document-tokens", type=int, default=100_000)
    parser.add_argument("--answer-tokens", type=int, default=256)
    args, rest = parser.parse_known_args(argv)
    jax.config.update("jax_platforms", "cpu")  # an installed compiler is no device
    print(plan(build(TrainConfig, load(rest)), args.topology, args.document_tokens, args.answer_tokens))
    return 0


if __name__ == "__main__":
    run(main)
