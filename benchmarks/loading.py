"""What a start costs: weights into their shards, process by process, and programs from the compilation cache.

    python benchmarks/loading.py [--layers=32] [--processes=4]

The model has Llama 3.1 8B's widths and the given number of layers, in bfloat16, in four files of zeros that take no
room on the disk. The processes are one job over loopback, each with one device, the weights shared by `fsdp`. They
load one after another, so that this machine needs room for one host's part and not for the model. For each: the bytes
that its device holds; the most anonymous memory it had above what it began with, in samples 10 ms apart; and the file's
pages that it had mapped, which the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.hf import load_hf
from cartridges_jax.models.shapes import SHAPES
from cartridges_jax.models.spec import file_names
from cartridges_jax.parallel import processes, sharding
from cartridges_jax.parallel.sharding import MeshConfig
from cartridges_jax.planning import chips
from cartridges_jax.planning.programs import train_program
from cartridges_jax.training.config import TrainConfig

FILES, GB = 4, 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--load", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(Path(args.load), args.processes)
    elif args.compile:
        print(json.dumps(compile_once()))
    else:
        with tempfile.TemporaryDirectory() as folder:
            report(Path(folder), args.layers, args.processes)


def report(folder: Path, layers: int, count: int) -> None:
    size = write_zeros(folder / "model", layers)
    print(f"{layers} layers, {size / GB:.2f} GB in bfloat16, {count} processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address}
    command = [sys.executable, __file__, f"--processes={count}", f"--load={folder / 'model'}"]
    job = [
        subprocess.Popen(
            command,
            env=environment | {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for i in range(count)
    ]
    for i, process in enumerate(job):
        found = in_turn(process)
        print(
            f"process {i}: holds {found['held'] / GB:.2f} GB ({found['held'] / size:.1%}), at most "
            f"{found['anonymous'] / GB:.2f} GB above its start, {found['mapped'] / GB:.2f} GB of files mapped, "
            f"{found['seconds']:.0f} s",
            flush=True,
        )
    for process in job:
        process.wait()
    cache = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    for start in ("first", "second"):
        done = subprocess.run([sys.executable, __file__, "--compile"], env=cache, stdout=subprocess.PIPE, check=True)
        print(f"{start} start: the training step of SmolLM2-135M is there after {json.loads(done.stdout):.1f} s")


def write_zeros(folder: Path, layers: int) -> int:
    """A Hugging Face folder of zeros; returns how many bytes its tensors are."""
    folder.mkdir()
    raw = SHAPES["llama-3.1-8b"] | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(raw))
    model = ModelConfig.from_hf(raw)
    sizes = {name: array.file_shape(model) for name, array, _ in file_names(model)}
    names, total = list(sizes), 0
    weight_map = {}
    for i in range(FILES):
        header, end = {}, 0
        for name in names[i::FILES]:
            begin, end = end, end + 2 * math.prod(sizes[name])
            header[name] = {"dtype": "BF16", "shape": sizes[name], "data_offsets": [begin, end]}
            weight_map[name] = f"model-{i}.safetensors"
        text = json.dumps(header).encode()
        with (folder / f"model-{i}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        total += end
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def in_turn(process: subprocess.Popen[bytes]) -> dict[str, float]:
    """Lets this one load, and returns what it found."""
    assert process.stdin and process.stdout
    process.stdin.write(b"\n")
    process.stdin.close()
    return json.loads(next(line for line in process.stdout if line.startswith(b"{")))  # behind what Gloo says


def load(folder: Path, count: int) -> None:
    with processes.joined_job(count > 1):
        mesh = sharding.make_mesh(MeshConfig(fsdp=count))
        input()  # until it is this process's turn
        print(json.dumps(measured(folder, mesh)), flush=True)


def measured(folder: Path, mesh: Mesh) -> dict[str, float]:
    before, most = resident(), {"RssAnon": 0, "RssFile": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            for name, size in resident().items():
                most[name] = max(most[name], size - before[name])

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.monotonic()
    params = jax.block_until_ready(load_hf(folder, jnp.bfloat16, mesh)[1])
    seconds = time.monotonic() - start
    done.set()
    watcher.join()
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    return {"held": held, "anonymous": most["RssAnon"], "mapped": most["RssFile"], "seconds": seconds}


def resident() -> dict[str, int]:
    """Bytes in memory, as Linux counts them."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: 1024 * int(lines[name].split()[0]) for name in ("RssAnon", "RssFile")}


def compile_once() -> float:
    chips.compile_here()
    model = ModelConfig.from_hf(SHAPES["smollm2-135m"])
    mesh = sharding.make_mesh(MeshConfig(), jax.devices())
    return train_program(TrainConfig("-", "-", "-"), model, mesh, 100).seconds


if __name__ == "__main__":
    main()
