"""Plans a run on devices that are not here: its memory, FLOPs, communication and time, and when it pays for itself.

    python -m cartridges_jax.plan --config=configs/large.py:train --topology=v5p-64
    python -m cartridges_jax.plan --config=configs/large.py:train --topology=h100:8 --what=decode
    python -m cartridges_jax.plan --config=configs/large.py:train --topology=v6e-16 --what=sweep

The step is compiled by the compilers for those devices (`pip install '.[aot]'`), which do not need the devices. Of the
model only the shapes are needed, not the weights. Times are those of a roofline (`planning/costs.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from cartridges_jax.command_line.config import build, load, run
from cartridges_jax.command_line.progress import stage
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.shapes import shape_of
from cartridges_jax.parallel import sharding
from cartridges_jax.planning import chips, sweep
from cartridges_jax.planning.chips import Chip
from cartridges_jax.planning.costs import Costs, decode_costs, received, train_costs
from cartridges_jax.planning.economics import Query, economics
from cartridges_jax.planning.programs import (
    STEPS,
    Program,
    Requests,
    decode_program,
    longest_head,
    train_program,
    with_dtype,
)
from cartridges_jax.training.config import TrainConfig


def main(argv: list[str]) -> int:
    args, rest = _parser().parse_known_args(argv)
    name, sides = chips.parse(args.topology)
    chips.compile_here(sides[0] if name == "cpu" else 1)
    config = build(TrainConfig, load(rest, TrainConfig))
    query = Query(args.document_tokens, args.question_tokens, args.answer_tokens)
    requests = Requests(args.requests, args.cartridges, args.length)
    model = shape_of(config.model)
    chip, devices = chips.devices_of(args.topology)
    config = with_dtype(config, chip)
    print(f"{config.model} on {args.topology}: {len(devices)} devices ({chip.source})")
    if args.what == "sweep":
        _print_sweep(config, model, chip, devices)
        return 0
    mesh = sharding.make_mesh(config.mesh, devices)
    num_steps = STEPS if config.num_steps is None else config.num_steps
    with stage("compiling"):
        if args.what == "train":
            program = train_program(config, model, mesh, num_steps)
            costs = train_costs(config, model, mesh.devices.shape)
        else:
            program = decode_program(config, model, mesh, requests)
            costs = decode_costs(config, model, mesh.devices.shape, requests)
    seconds = costs.seconds(chip, received(program.collectives))
    _print_device(config, chip, mesh.devices.shape, program, costs, seconds)
    if args.what == "decode":
        print(f"all devices: {requests.count / seconds:,.0f} tokens/s for {requests.count} requests at once")
        return 0
    _print_run(config, model, chip, len(devices), seconds, num_steps, query, requests.count)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cartridges_jax.plan", description=__doc__)
    parser.add_argument("--topology", required=True, help=f"{chips.KNOWN}; chips: {', '.join(chips.CHIPS)}")
    parser.add_argument("--what", choices=("train", "decode", "sweep"), default="train")
    for kind in (Query(), Requests()):
        for field, default in dataclasses.asdict(kind).items():
            flag = {"count": "--requests"}.get(field, f"--{field}")
            flag += "-tokens" if isinstance(kind, Query) else ""
            parser.add_argument(flag, type=int, default=default, help="default: %(default)s")
    return parser


def _print_device(
    config: TrainConfig, chip: Chip, mesh: tuple[int, ...], program: Program, costs: Costs, seconds: float
) -> None:
    longest = longest_head(config)
    of_longest = f" on average, about {longest} at most" if longest > config.init.num_slots else ""
    print(f"the cartridge: {config.init.num_slots} slots a head{of_longest}")
    print(f"mesh data={mesh[0]} fsdp={mesh[1]} tensor={mesh[2]}, {config.dtype}; each device:")
    for name, size in {**program.arguments, "activations": program.activations, "peak": program.peak}.items():
        print(f"  {name:12} {_size(size)}")
    fits = "fits" if sweep.fits(program, chip) else "does not fit"
    print(f"  {'memory':12} {_size(chip.memory)}: {fits}")
    print(f"  {'FLOPs':12} {costs.flops:10.3e}, of which {costs.needed:.3e} are needed")
    for kind, found in program.collectives.items():
        print(f"  {kind:12} {_size(found.num_bytes)} in {found.count:,}")
    print(
        f"a step takes {seconds * 1e3:,.2f} ms by the roofline, MFU {costs.mfu(chip, seconds):.0%} "
        f"(compiled in {program.seconds:.0f} s)"
    )


def _print_run(
    config: TrainConfig,
    model: ModelConfig,
    chip: Chip,
    num_devices: int,
    seconds: float,
    num_steps: int,
    query: Query,
    together: int,
) -> None:
    tokens = num_steps * config.batch_size * config.accumulation * config.seq_len
    trained = num_steps * seconds * num_devices
    made = tokens // config.num_epochs
    pays = economics(model, chip, config.dtype, config.init.num_slots, query, trained, made, together)
    assumed = "" if config.num_steps is not None else " (assumed: the config leaves it to the dataset)"
    print(f"the run: {num_steps:,} steps{assumed}, {tokens:,} tokens, {trained / 3600:,.2f} device-hours; ", end="")
    print(f"self-study of {made:,} tokens, {pays.self_study / 3600:,.2f} device-hours")
    print(
        f"a query of {query.question} + {query.answer} tokens about {query.document:,}, in device-seconds: "
        f"{pays.with_cartridge:.3f} with {config.init.num_slots} slots, {pays.cached:.3f} behind the document's cache, "
        f"{pays.uncached:.3f} reading it"
    )
    print(
        f"paid for after {pays.queries_uncached:,.0f} queries against prompts that are read each time, "
        f"{pays.queries_cached:,.0f} against prefix caching"
    )


def _print_sweep(config: TrainConfig, model: ModelConfig, chip: Chip, devices: list[Any]) -> None:
    found = sweep.sweep(config, model, chip, devices)
    print("mesh (data x fsdp x tensor) | rows at once | accumulation | peak GiB | step, ms | MFU")
    for candidate in found:
        mesh = " x ".join(map(str, candidate.mesh))
        size = candidate.program.peak / chips.GIB
        print(
            f"{mesh} | {candidate.config.batch_size} | {candidate.config.accumulation} | {size:.2f} "
            f"| {candidate.seconds * 1e3:,.1f} | {candidate.mfu:.0%}"
        )
    best = found[0]
    flags = [f"--config.mesh.{axis}={n}" for axis, n in zip(sharding.AXES[1:], best.mesh[1:], strict=True)]
    flags += [f"--config.batch_size={best.config.batch_size}", f"--config.accumulation={best.config.accumulation}"]
    print(f"best: {' '.join(flags)}")


def _size(size: float) -> str:
    return f"{size / chips.GIB:10.3f} GiB"


if __name__ == "__main__":
    run(main)
