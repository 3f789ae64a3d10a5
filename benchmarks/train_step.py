"""The training step against PEFT's CARTRIDGE and against a naive step of our own: same weights, rows and targets.

    make test-parity                      # makes .venv-parity: torch, transformers and peft
    python benchmarks/train_step.py --peft-python=.venv-parity/bin/python [--rounds=3] [--dataset=… --document=…]

SmolLM2-135M's shape with random weights, four rows of 1,024 tokens, 256 slots, float32, 20 teacher entries on half of
the positions. Ours has two devices (`JAX_NUM_CPU_DEVICES=2`), which share the CPU's cores and one copy of the weights.
Each side runs in a process of its own, one after the other, round after round; the fastest step counts, but for the
first of a process: other work on the machine only ever slows one down. MFU divides the FLOPs that the step needs,
whatever a side computes, by the fastest matrix product of our processes, measured between their steps. With --dataset
(`make quickstart` leaves one in runs/…/synth/dataset.parquet), also useful target tokens per second against PEFT's own
example.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cartridges_jax.cartridge.arrays import Cartridge, Placement, Slots
from cartridges_jax.kernels.prefix_attention import prefix_attention
from cartridges_jax.models import hub
from cartridges_jax.models.block import norm
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.hf import load_hf
from cartridges_jax.models.params import Params
from cartridges_jax.models.tokenizer import load_tokenizer
from cartridges_jax.models.transformer import head_weights, run_layers
from cartridges_jax.parallel import sharding
from cartridges_jax.training.batch import Batch
from cartridges_jax.training.data import PackedRows, read_examples
from cartridges_jax.training.step import TrainState, train_step

ROWS, TOKENS, SLOTS, TOP_K, STEPS = 4, 1024, 256, 20, 4
DEVICES = 2
VOCABULARY, LARGE_VOCABULARY = 49_152, 151_936
# What `make quickstart` sets too: large pages for large arrays, whose first use costs most of a page fault's time
# otherwise, and AVX-512's full width, which XLA halves unless told. PEFT's side gets the same.
ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "XLA_FLAGS": "--xla_cpu_prefer_vector_width=512",
    "JAX_NUM_CPU_DEVICES": str(DEVICES),  # the operations of attention are too short for two cores to share them
}
DOCUMENT_TOKENS = 2048  # what PEFT's example keeps of a corpus
SIDES = {"ours": "elementwise", "ours, least memory": "layers", "naive": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft-python", required=True, help="a Python with torch, transformers and peft")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dataset", help="dataset.parquet of synth")
    parser.add_argument("--document", help="the text that the dataset is about")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "DIRECTORY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker[0], Path(args.worker[1]))))
        return
    if bool(args.dataset) != bool(args.document):
        parser.error("--dataset and --document belong together: give both, or neither")
    with tempfile.TemporaryDirectory() as directory:
        compare(Path(directory), args)


def compare(directory: Path, args: argparse.Namespace) -> None:
    peft = [args.peft_python, str(Path(__file__).with_name("train_step_peft.py"))]
    ours = [sys.executable, __file__, "--peft-python=", "--worker"]
    for name, vocabulary, rows in (("small", VOCABULARY, ROWS), ("large", LARGE_VOCABULARY, DEVICES)):
        subprocess.run([*peft, "model", directory / name, str(vocabulary)], check=True)
        (directory / f"job-{name}").mkdir()
        np.savez(directory / f"job-{name}" / "job.npz", **synthetic_job(directory / name, vocabulary, rows))
    os.sync()  # or else the system writes these files while the first side runs
    commands = {side: [*ours, side, directory / "job-small"] for side in SIDES}
    commands["PEFT"] = [*peft, "synthetic", directory / "job-small"]
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in commands}
    for _ in range(args.rounds):
        for side, command in commands.items():
            results[side].append(result_of(command))
    report(results)
    large = {side: result_of([*ours, side, directory / "job-large"])["peak_memory"] for side in SIDES}
    print(f"\nPeak memory with {DEVICES} rows at a vocabulary of {LARGE_VOCABULARY:,}:")
    for side, peak in large.items():
        print(f"- {side}: {peak / 1e9:.2f} GB, {peak / large['naive']:.2f} of the naive step's")
    if args.dataset:
        (directory / "job-real").mkdir()
        targets, examples = real_job(directory, args.dataset, args.document)
        mine = result_of([*ours, "ours", directory / "job-real"])["seconds"][1:]
        theirs = result_of([*peft, "example", directory / "job-real"])["seconds"][1:]
        rate, peft_rate = sum(targets[1:]) / sum(mine), sum(examples[1:]) / sum(theirs)
        print(f"\nUseful target tokens/s on {args.dataset}: {rate:.0f}, PEFT's example {peft_rate:.1f}, ", end="")
        print(f"{rate / peft_rate:.1f} times as many")


def result_of(command: list[Any]) -> dict[str, Any]:
    environment = os.environ | ENVIRONMENT
    out = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(out.splitlines()[-1])


def report(results: dict[str, list[dict[str, Any]]]) -> None:
    def of(side: str, what: str) -> float:
        return min(value for result in results[side] for value in result[what][1:])

    peak_flops = max(result["matmul_flops"] for side in SIDES for result in results[side])
    needed = needed_flops(SMOLLM2)
    memory = {side: max(result["peak_memory"] for result in results[side]) for side in results}
    print(f"Matrix product: {peak_flops / 1e9:.0f} GFLOP/s; the step needs {needed / 1e9:.0f} GFLOP\n")
    print("| | tokens/s | against PEFT | CPU-s a step | MFU | peak memory, GB | against PEFT | compile, s | loss |")
    print("|---|---|---|---|---|---|---|---|---|")
    for side in results:
        seconds, first = of(side, "seconds"), results[side][0]
        print(
            f"| {side} | {ROWS * TOKENS / seconds:.0f} | {of('PEFT', 'seconds') / seconds:.2f} "
            f"| {of(side, 'cpu_seconds'):.2f} | {needed / seconds / peak_flops:.2f} "
            f"| {memory[side] / 1e9:.2f} | {memory[side] / memory['PEFT']:.2f} "
            f"| {first.get('compile_seconds', 0):.1f} | {first['loss']:.5f} |"
        )


def needed_flops(config: ModelConfig) -> float:
    """Of one step: forward products and the gradients of activations. Nothing twice, nothing hidden by the mask."""
    d, h, n, k = config.embed_dim, config.head_dim, config.num_heads, config.num_kv_heads
    weights = config.num_layers * (2 * d * h * (n + k) + 3 * d * config.mlp_dim)
    seen = SLOTS + (TOKENS + 1) / 2
    attention = config.num_layers * n * h * seen * 12  # two products forward, four backward
    return ROWS * TOKENS * (4 * weights + 4 * config.vocab_size * d / 2 + attention)


SMOLLM2 = ModelConfig("llama", VOCABULARY, 30, 576, 9, 3, 64, 1536, 1e-5, 1e5, 8192, True)


def synthetic_job(model: Path, vocabulary: int, rows: int) -> dict[str, Any]:
    rng, shape = np.random.default_rng(0), (1, rows, TOKENS)
    mask = np.zeros((*shape, TOP_K), bool)
    mask[:, :, TOKENS // 2 :] = True
    return {
        "tokens": rng.integers(0, vocabulary, shape).astype(np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(TOKENS, dtype=np.int32), shape),
        "target_ids": rng.integers(0, vocabulary, (*shape, TOP_K)).astype(np.int32),
        "target_logprobs": np.full((*shape, TOP_K), -3.5, np.float32),
        "target_mask": mask,
        **slots_job(model),
    }


def slots_job(model: Path) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    shape = (SMOLLM2.num_layers, SLOTS, SMOLLM2.num_kv_heads, SMOLLM2.head_dim)
    keys, values = rng.standard_normal((2, *shape), np.float32)
    return {"model": str(model), "steps": STEPS, "keys": keys, "values": values}


def real_job(directory: Path, dataset: str, document: str) -> tuple[list[int], list[int]]:
    """Packed rows for our side, conversations and the document for PEFT's; the useful targets in each step of both."""
    tokenizer = load_tokenizer(hub.resolve("smollm2-135m"))
    examples = read_examples(dataset, tokenizer)
    rows = PackedRows(examples, TOKENS, ROWS, 1, 0)
    fields = [rows[i] for i in range(STEPS * ROWS)]
    batches = {name: np.stack([row[name] for row in fields]) for name in fields[0]}
    batches = {name: array.reshape(STEPS, ROWS, *array.shape[1:]) for name, array in batches.items()}
    theirs = examples[:: max(1, len(examples) // STEPS)][:STEPS]
    text = tokenizer.encode(Path(document).read_text(encoding="utf-8"))[:DOCUMENT_TOKENS]
    np.savez(
        directory / "job-real" / "job.npz",
        document=np.asarray(text, np.int32),
        **batches,
        **{f"conversation_{i}": example.tokens for i, example in enumerate(theirs)},
        **slots_job(directory / "small"),
    )
    counts = batches["target_mask"].any(-1).sum((1, 2))
    return counts.tolist(), [len(np.unique(example.target_index)) for example in theirs]


def measure(side: str, directory: Path) -> dict[str, Any]:
    """Runs a job's steps in this process. A job has one batch, or one a step."""
    job, remat = np.load(directory / "job.npz"), SIDES[side]
    mesh = sharding.make_mesh() if remat else sharding.make_mesh(devices=jax.devices()[:1])
    config, params, _ = load_hf(Path(str(job["model"])), jnp.float32, mesh)
    cartridge = Cartridge(jnp.asarray(job["keys"]), jnp.asarray(job["values"]), None, 1)
    tx = optax.adam(1e-3)
    state = jax.tree.map(jnp.copy, TrainState(cartridge.slots, tx.init(cartridge.slots), jnp.zeros((), jnp.int32)))
    state = sharding.placed(state, sharding.CARTRIDGE, mesh)
    placement = sharding.placed(cartridge.placement, sharding.PLACEMENT, mesh)
    fields = {field.name: job[field.name] for field in dataclasses.fields(Batch)}
    steps = range(int(job["steps"]))
    numbered = [{name: array[i % len(array)][None] for name, array in fields.items()} for i in steps]
    batches = [sharding.placed(Batch(**batch), sharding.BATCH, mesh) for batch in numbered]
    if remat is None:
        lowered = naive_step.lower(state, params, batches[0], placement, config=config, tx=tx)
    else:
        options: Any = {"tail": "drop", "reduction": "token", "remat": remat, "mesh": mesh}
        lowered = train_step.lower(state, params, batches[0], placement, config=config, tx=tx, **options)
    start = time.perf_counter()
    step = lowered.compile()
    compile_seconds = time.perf_counter() - start
    seconds, cpu_seconds, losses, matmul_flops = [], [], [], 0.0
    for batch in batches:
        matmul_flops = max(matmul_flops, measure_matmul())
        start, cpu = time.perf_counter(), time.process_time()
        state, metrics = step(state, params, batch, placement)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "loss": losses[0],
        "compile_seconds": compile_seconds,
        "matmul_flops": matmul_flops,
    }


def measure_matmul(size: int = 2048) -> float:
    a = jnp.ones((size, size))
    times = []
    for _ in range(4):
        start = time.perf_counter()
        jnp.dot(a, a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


@jax.jit(static_argnames=("config", "tx"), donate_argnums=0)
def naive_step(
    state: TrainState,
    params: Params,
    batch: Batch,
    placement: Placement,
    *,
    config: ModelConfig,
    tx: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """What one writes first: a dense mask, the logits of every position, and all that autodiff wants to keep."""
    batch = jax.tree.map(lambda a: a[0], batch)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, slots: Any, **options: Any) -> tuple[jax.Array, None]:
        return prefix_attention(q, k, v, *slots, batch.segment_ids, None, "reference", **options), None

    def loss(slots: Slots) -> jax.Array:
        given = params, batch.tokens, batch.positions + placement.offset, attend, (slots.keys, slots.values)
        x_btd, _ = run_layers(*given, config=config)
        logits_btv = norm(x_btd, params["final_norm"], config) @ head_weights(params).T
        student_btj = jnp.take_along_axis(jax.nn.log_softmax(logits_btv), batch.target_ids, axis=-1)
        total = -jnp.sum(jnp.where(batch.target_mask, jnp.exp(batch.target_logprobs) * student_btj, 0))
        return total / batch.target_mask.any(-1).sum()

    value, gradient = jax.value_and_grad(loss)(state.cartridge)
    updates, opt_state = tx.update(gradient, state.opt_state, state.cartridge)
    return TrainState(optax.apply_updates(state.cartridge, updates), opt_state, state.step + 1), {"loss": value}


if __name__ == "__main__":
    main()
