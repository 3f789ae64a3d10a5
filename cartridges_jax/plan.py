"""Plans a run on devices that are not here: its memory, FLOPs, communication and time, and when it pays for itself.

    python -m cartridges_jax.plan --config=configs/large.py:train --topology=v5p-64
    python -m cartridges_jax.plan --config=configs/large.py:train --topology=h100:8 --what=decode
    python -m cartridges_jax.plan --config=configs/large.py:train --topology=v6e-16 --what=sweep --json

The step is compiled by the compilers for those devices (`pip install '.[aot]'`), which do not need the devices. Of the
model only the shapes are needed, not the weights. Times are those of a roofline (`planning/costs.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from typing import Any

from cartridges_jax.command_line.config import build, load, run
from cartridges_jax.command_line.progress import stage
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.shapes import shape_of
from cartridges_jax.parallel import sharding
from cartridges_jax.planning import chips, sweep
from cartridges_jax.planning.chips import Chip
from cartridges_jax.planning.costs import decode_costs, received, train_costs
from cartridges_jax.planning.economics import Query, economics
from cartridges_jax.planning.programs import (
    STEPS,
    Program,
    Requests,
    decode_program,
    kernels_per_layer,
    longest_head,
    train_program,
    with_dtype,
)
from cartridges_jax.training.config import TrainConfig

Plan = dict[str, Any]  # all that is printed, as JSON has it; sizes are bytes, times seconds


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
    if args.attention is not None and args.what != "decode":
        config = dataclasses.replace(config, attention=args.attention)
    found: Plan = {"model": config.model, "topology": args.topology, "what": args.what}
    found |= {"devices": len(devices), "source": chip.source}
    if args.what == "sweep":
        found |= _sweep(config, model, chip, devices)
    else:
        found |= _step(args.what, args.attention, config, model, chip, devices, requests)
    if args.what == "decode":
        found["tokens_per_second"] = requests.count / found["seconds"]
        found["requests"] = dataclasses.asdict(requests)
    if args.what == "train":
        found |= _run(config, model, chip, len(devices), found["seconds"], query, requests.count)
    print(json.dumps(found) if args.json else _text(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cartridges_jax.plan", description=__doc__)
    parser.add_argument("--topology", required=True, help=f"{chips.KNOWN}; chips: {', '.join(chips.CHIPS)}")
    parser.add_argument("--what", choices=("train", "decode", "sweep"), default="train")
    parser.add_argument("--attention", help="the implementation of attention; by default the one that a run would take")
    parser.add_argument("--json", action="store_true", help="prints one object of JSON instead of text")
    for kind in (Query(), Requests()):
        for field, default in dataclasses.asdict(kind).items():
            flag = {"count": "--requests"}.get(field, f"--{field}")
            flag += "-tokens" if isinstance(kind, Query) else ""
            parser.add_argument(flag, type=int, default=default, help="default: %(default)s")
    return parser


def _step(
    what: str,
    attention: str | None,
    config: TrainConfig,
    model: ModelConfig,
    chip: Chip,
    devices: list[Any],
    requests: Requests,
) -> Plan:
    """What one step does on each device, of training or of decoding."""
    mesh = sharding.make_mesh(config.mesh, devices)
    if what == "train":
        costs = train_costs(config, model, mesh.devices.shape, chips.name_of(devices[0]))
    else:
        costs = decode_costs(config, model, mesh.devices.shape, requests)

    def compiled(model: ModelConfig) -> Program:
        if what == "train":
            return train_program(config, model, mesh, _num_steps(config))
        return decode_program(config, model, mesh, requests, attention)

    with stage("compiling"):
        program = compiled(model)
    with stage("compiling a few layers, to count what one launches"):
        per_layer = kernels_per_layer(compiled, model)
    seconds = costs.seconds(chip, received(program.collectives))
    return {
        "slots": config.init.num_slots,
        "longest_head": longest_head(config),
        "mesh": dict(zip(sharding.AXES, mesh.devices.shape, strict=True)),
        "dtype": config.dtype,
        "attention": config.attention if what == "train" else attention,
        "memory": {**program.arguments, "activations": program.activations, "peak": program.peak},
        "memory_here": chip.memory,
        "fits": sweep.fits(program, chip),
        "flops": costs.flops,
        "needed_flops": costs.needed,
        "collectives": {kind: dataclasses.asdict(each) for kind, each in program.collectives.items()},
        "kernels_per_layer": per_layer,
        "kernels_per_step": program.launches.count,
        "host_waits": program.launches.waits,
        "bytes_per_step": program.launches.num_bytes,
        "least_bytes_per_step": sum(part.num_bytes for part in costs.parts),
        "seconds": seconds,
        "mfu": costs.mfu(chip, seconds),
        "measured_seconds": None,  # no step of a chip that can be planned for has been measured
        "compile_seconds": program.seconds,
    }


def _run(
    config: TrainConfig,
    model: ModelConfig,
    chip: Chip,
    num_devices: int,
    seconds: float,
    query: Query,
    together: int,
) -> Plan:
    """What the whole run costs, and after how many queries it has paid for itself; None: never."""
    num_steps = _num_steps(config)
    tokens = num_steps * config.batch_size * config.accumulation * config.seq_len
    trained = num_steps * seconds * num_devices
    made = tokens // config.num_epochs
    pays = economics(model, chip, config.dtype, config.init.num_slots, query, trained, made, together)
    facts = {name: None if value == math.inf else value for name, value in dataclasses.asdict(pays).items()}
    return {
        "num_steps": num_steps,
        "num_steps_assumed": config.num_steps is None,
        "tokens": tokens,
        "device_seconds": trained,
        "self_study_tokens": made,
        "query": dataclasses.asdict(query),
        "economics": facts,
    }


def _num_steps(config: TrainConfig) -> int:
    return STEPS if config.num_steps is None else config.num_steps


def _sweep(config: TrainConfig, model: ModelConfig, chip: Chip, devices: list[Any]) -> Plan:
    found = sweep.sweep(config, model, chip, devices)
    candidates = [
        {
            "mesh": dict(zip(sharding.AXES, each.mesh, strict=True)),
            "batch_size": each.config.batch_size,
            "accumulation": each.config.accumulation,
            "peak": each.program.peak,
            "seconds": each.seconds,
            "mfu": each.mfu,
        }
        for each in found
    ]
    best = found[0]
    flags = [f"--config.mesh.{axis}={n}" for axis, n in zip(sharding.AXES[1:], best.mesh[1:], strict=True)]
    flags += [f"--config.batch_size={best.config.batch_size}", f"--config.accumulation={best.config.accumulation}"]
    return {"candidates": candidates, "best": flags}


def _text(plan: Plan) -> str:
    lines = [f"{plan['model']} on {plan['topology']}: {plan['devices']} devices ({plan['source']})"]
    lines += {"sweep": _sweep_lines, "train": _train_lines, "decode": _decode_lines}[plan["what"]](plan)
    return "\n".join(lines)


def _sweep_lines(plan: Plan) -> list[str]:
    lines = ["mesh (data x fsdp x tensor) | rows at once | accumulation | peak GiB | step, ms | MFU"]
    for each in plan["candidates"]:
        mesh = " x ".join(map(str, each["mesh"].values()))
        lines.append(
            f"{mesh} | {each['batch_size']} | {each['accumulation']} | {each['peak'] / chips.GIB:.2f} "
            f"| {each['seconds'] * 1e3:,.1f} | {each['mfu']:.0%}"
        )
    return [*lines, f"best: {' '.join(plan['best'])}"]


def _step_lines(plan: Plan) -> list[str]:
    longest, slots, mesh = plan["longest_head"], plan["slots"], plan["mesh"]
    of_longest = f" on average, about {longest} at most" if longest > slots else ""
    fits = "fits" if plan["fits"] else "does not fit"
    return [
        f"the cartridge: {slots} slots a head{of_longest}",
        f"mesh {' '.join(f'{axis}={n}' for axis, n in mesh.items())}, {plan['dtype']}; each device:",
        *(f"  {name:12} {_size(size)}" for name, size in plan["memory"].items()),
        f"  {'memory':12} {_size(plan['memory_here'])}: {fits}",
        f"  {'FLOPs':12} {plan['flops']:10.3e}, of which {plan['needed_flops']:.3e} are needed",
        *(f"  {kind:12} {_size(each['num_bytes'])} in {each['count']:,}" for kind, each in plan["collectives"].items()),
        f"  {'moved':12} {_size(plan['bytes_per_step'])} in a step, at least {_size(plan['least_bytes_per_step'])}",
        f"  {'kernels':12} {plan['kernels_per_step']:10,} in a step, {plan['kernels_per_layer']:,} of each layer; "
        f"the host waits {plan['host_waits']:,} times",
        f"a step takes {plan['seconds'] * 1e3:,.2f} ms by the roofline, MFU {plan['mfu']:.0%} "
        f"(compiled in {plan['compile_seconds']:.0f} s); no step has been measured on this chip",
    ]


def _decode_lines(plan: Plan) -> list[str]:
    count = plan["requests"]["count"]
    return [*_step_lines(plan), f"all devices: {plan['tokens_per_second']:,.0f} tokens/s for {count} requests at once"]


def _train_lines(plan: Plan) -> list[str]:
    assumed = " (assumed: the config leaves it to the dataset)" if plan["num_steps_assumed"] else ""
    pays, query = plan["economics"], plan["query"]
    uncached, cached = (
        "infinitely many" if pays[name] is None else f"{pays[name]:,.0f}"
        for name in ("queries_uncached", "queries_cached")
    )
    return [
        *_step_lines(plan),
        f"the run: {plan['num_steps']:,} steps{assumed}, {plan['tokens']:,} tokens, "
        f"{plan['device_seconds'] / 3600:,.2f} device-hours; self-study of {plan['self_study_tokens']:,} tokens, "
        f"{pays['self_study'] / 3600:,.2f} device-hours",
        f"a query of {query['question']} + {query['answer']} tokens about {query['document']:,}, in device-seconds: "
        f"{pays['with_cartridge']:.3f} with {plan['slots']} slots, {pays['cached']:.3f} behind the document's cache, "
        f"{pays['uncached']:.3f} reading it",
        f"paid for after {uncached} queries against prompts that are read each time, {cached} against prefix caching",
    ]


def _size(size: float) -> str:
    return f"{size / chips.GIB:10.3f} GiB"


if __name__ == "__main__":
    run(main)
