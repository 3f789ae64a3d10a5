"""How much of the communication of a training step on GPUs XLA hides behind products, by the flags it is given.

    python -m benchmarks.exposed            # wants `pip install '.[aot]'`; two to five minutes

`configs/large.py` (Llama-3.1-8B, 32 rows of 2,048 tokens, 2,048 slots), compiled for eight GPUs that are not here.
Bytes are those that a device's collectives put out in a step; exposed are those of collectives between whose start and
end the schedule has no product, kernel or loop. It says what can overlap, not how fast it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from cartridges_jax.command_line.config import build, load
from cartridges_jax.models.shapes import shape_of
from cartridges_jax.parallel import sharding
from cartridges_jax.parallel.sharding import MeshConfig
from cartridges_jax.planning.chips import GIB, compile_here, devices_of
from cartridges_jax.planning.hlo import exposed
from cartridges_jax.planning.programs import STEPS, target_chunks, train_program
from cartridges_jax.training.config import TrainConfig

PLANS = [("a100:8", 8, 1), ("h100:8", 8, 1), ("h100:8", 4, 2)]
SCHEDULER = "--xla_gpu_enable_latency_hiding_scheduler=true"
PIPELINED = "--xla_gpu_enable_pipelined_all_gather=true"


def main() -> None:
    print("| GPUs | fsdp x tensor | XLA_FLAGS | exposed, GB | of, GB | peak, GiB |", "|---" * 6 + "|", sep="\n")
    for topology, fsdp, tensor in PLANS:
        for flags in ("", SCHEDULER, f"{SCHEDULER} {PIPELINED}"):
            command = [sys.executable, "-m", "benchmarks.exposed", topology, str(fsdp), str(tensor)]
            # in a process of its own: XLA reads its flags once
            done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, stdout=subprocess.PIPE, check=True)
            alone, whole, peak = json.loads(done.stdout)
            sizes = f"{alone / 1e9:.1f} | {whole / 1e9:.1f} | {peak / GIB:.1f}"
            print(f"| {topology} | {fsdp} x {tensor} | {flags} | {sizes} |", flush=True)


def compiled(topology: str, fsdp: int, tensor: int) -> tuple[int, int, int]:
    """Bytes exposed and in all, and at the peak of memory."""
    compile_here()
    config = build(TrainConfig, load(["--config=configs/large.py:train", "--config.attention=gpu"], TrainConfig))
    mesh = sharding.make_mesh(MeshConfig(None, fsdp, tensor), devices_of(topology)[1])
    program = train_program(config, shape_of(config.model), mesh, STEPS)
    chunks = target_chunks(config.batch_size // fsdp * config.seq_len, "gpu")
    whole = sum(found.num_bytes for found in program.collectives.values())
    return sum(exposed(program.text, chunks).values()), whole, program.peak


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(compiled(sys.argv[1], *map(int, sys.argv[2:]))))
    else:
        main()
