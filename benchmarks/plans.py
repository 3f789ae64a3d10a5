"""The table of plans in docs/scale.md: what a training step of four models holds on slices that suit them.

    python -m benchmarks.plans            # wants `pip install '.[aot]'`; a few minutes

`configs/large.py`: 2,048 slots, 32 rows of 2,048 tokens in a step, bfloat16; sizes are GiB. Every row is what
`python -m cartridges_jax.plan --config=configs/large.py:train` prints for that model, topology, mesh and `--attention`,
the kernels of the platform; nothing here ran on the chips that it names.
"""

from __future__ import annotations

import dataclasses

from cartridges_jax.command_line.config import build, load
from cartridges_jax.command_line.progress import stage
from cartridges_jax.models.shapes import shape_of
from cartridges_jax.parallel import sharding
from cartridges_jax.parallel.sharding import MeshConfig
from cartridges_jax.planning.chips import GIB, compile_here, devices_of, name_of
from cartridges_jax.planning.costs import received, train_costs
from cartridges_jax.planning.programs import STEPS, train_program
from cartridges_jax.training.config import TrainConfig

PLANS = [
    ("Qwen3-4B", "v5e-8", 8, 1),
    ("Qwen3-4B", "v6e-4", 4, 1),
    ("Llama-3.1-8B", "v5e-16", 8, 1),
    ("Llama-3.1-8B", "h100:8", 4, 2),
    ("Llama-3.1-8B", "a100:8", 8, 1),
    ("Qwen3-32B", "v5p-16", 8, 1),
    ("Llama-3.3-70B", "v5p-64", 8, 4),
]
HEADER = (
    "model | slice | data x fsdp x tensor | weights | cartridge + optimizer | activations | peak | of | step, s | MFU"
)


def main() -> None:
    compile_here()
    config = build(TrainConfig, load(["--config=configs/large.py:train"], TrainConfig))
    print(f"| {HEADER} |", "|---" * 10 + "|", sep="\n")
    for name, topology, fsdp, tensor in PLANS:
        with stage(f"compiling {name} for {topology}"):
            line = row(config, name, topology, MeshConfig(None, fsdp, tensor))
        print(f"| {line} |", flush=True)


def row(config: TrainConfig, name: str, topology: str, mesh_config: MeshConfig) -> str:
    model, (chip, devices) = shape_of(name), devices_of(topology)
    config = dataclasses.replace(config, model=name, mesh=mesh_config, attention=chip.platform)
    mesh = sharding.make_mesh(mesh_config, devices)
    program = train_program(config, model, mesh, STEPS)
    costs = train_costs(config, model, mesh.devices.shape, name_of(devices[0]))
    seconds = costs.seconds(chip, received(program.collectives))
    held = program.arguments
    sizes = held["weights"], held["cartridge"] + held["optimizer"], program.activations, program.peak
    cells = [name, topology, " x ".join(map(str, mesh.devices.shape)), *(f"{size / GIB:.1f}" for size in sizes)]
    return " | ".join([*cells, f"{chip.memory / GIB:.3g}", f"{seconds:.2f}", f"{costs.mfu(chip, seconds):.0%}"])


if __name__ == "__main__":
    main()
