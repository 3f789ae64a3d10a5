"""Run by tests in a process of its own: `PROGRAM TOPOLOGY [[DATA, FSDP, TENSOR, LAYERS], …]`.

It prints what the planner finds, as lines of JSON.

The model and the run are small; sizes are those that the kernels take.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import Counter

from cartridges_jax.initial.initializers import InitConfig
from cartridges_jax.kernels.prefix_attention import KERNELS
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.parallel import sharding
from cartridges_jax.parallel.sharding import MeshConfig
from cartridges_jax.planning import chips
from cartridges_jax.planning.programs import train_program, with_dtype
from cartridges_jax.training.config import TrainConfig

CONFIG = TrainConfig("-", "-", "-", seq_len=128, batch_size=16, accumulation=2, init=InitConfig(num_slots=128))
# of one turn of every loop
SINGLE = dataclasses.replace(CONFIG, batch_size=1, accumulation=1)


def model(layers: int) -> ModelConfig:
    return ModelConfig("llama", 1024, layers, 256, 8, 4, 64, 512, 1e-5, 1e4, 512, tie_embeddings=False)


def main(topology: str, cases: list[list[int]]) -> None:
    name, sides = chips.parse(topology)
    chips.compile_here(sides[0] if name == "cpu" else 1)
    chip, devices = chips.devices_of(topology)
    attention = chip.platform if chip.platform in KERNELS else None
    config = with_dtype(dataclasses.replace(CONFIG, dtype="auto", attention=attention), chip)
    single = None
    if chip.platform == "cpu":
        one = sharding.make_mesh(MeshConfig(), devices[:1])
        single = train_program(SINGLE, model(1), one, 10).xla_flops
    for data, fsdp, tensor, layers in cases:
        mesh = sharding.make_mesh(MeshConfig(data, fsdp, tensor), devices[: data * fsdp * tensor])
        program = train_program(config, model(layers), mesh, 10)
        found = {name: getattr(program, name) for name in ("arguments", "activations", "peak")}
        found |= {"mesh": [data, fsdp, tensor], "layers": layers, "dtype": config.dtype, "xla_flops": single}
        found["collectives"] = {kind: each.num_bytes for kind, each in program.collectives.items()}
        found["kernels"] = Counter(re.findall(r'custom_call_target="([^"]+)"', program.text))
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
