"""Run by tests in a process of its own, with as many virtual CPU devices as the mesh needs: `PROGRAM OUTPUT`."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.initial.attention_matching import _match
from cartridges_jax.initial.chunks import MatchingConfig, chunks_of
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.hf import load_hf
from cartridges_jax.models.language_model import LanguageModel, load_model
from cartridges_jax.models.loading import load_params
from cartridges_jax.models.params import Params, init_params, weight_specs
from cartridges_jax.parallel import processes, sharding
from cartridges_jax.parallel.sharding import MeshConfig
from cartridges_jax.serving.cache import Prefix
from cartridges_jax.serving.engine import Engine
from cartridges_jax.serving.generate import run
from cartridges_jax.serving.scheduler import PromptScored, Request, Scheduler, Token
from cartridges_jax.serving.steps import decode_step
from cartridges_jax.training.batch import Batch
from cartridges_jax.training.step import TrainState, train_step

CONFIG = ModelConfig("llama", 64, 2, 32, 8, 4, 8, 48, 1e-5, 1e4, 512, tie_embeddings=False)
UNEVEN = dataclasses.replace(CONFIG, num_heads=6, num_kv_heads=3, qkv_bias=True, qk_norm=True, tie_embeddings=True)
MESHES = {"8x1x1": (8, 1, 1), "2x2x2": (2, 2, 2), "1x4x2": (1, 4, 2), "1x1x8": (1, 1, 8)}
ACCUMULATION, ROWS, T, J, SLOTS = 2, 8, 16, 3, 12
SGD = optax.sgd(100.0)


def inputs(config: ModelConfig, rows: int = ROWS) -> tuple[Params, Cartridge, Batch]:
    params = jax.tree.map(np.asarray, init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    slots = (config.num_layers, SLOTS, config.num_kv_heads, config.head_dim)
    cartridge = Cartridge(draw(*slots), draw(*slots), draw(*slots[:3]))
    shape = (ACCUMULATION, rows, T)
    segments = np.sort(rng.integers(1, 4, shape), axis=-1).astype(np.int32)
    first = np.argmax(segments[..., None] == segments[..., None, :], axis=-1)
    batch = Batch(
        rng.integers(0, config.vocab_size, shape).astype(np.int32),
        segments,
        (np.arange(T) - first).astype(np.int32),
        rng.integers(0, config.vocab_size, (*shape, J)).astype(np.int32),
        np.log(rng.random((*shape, J)) / J).astype(np.float32),
        rng.random((*shape, J)) < 0.5,
    )
    return params, cartridge, batch


def mesh_of(shape: tuple[int, int, int]) -> Any:
    return sharding.make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])


def step_and_logits(config: ModelConfig, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """What one step of plain gradient descent makes of the cartridge, its metrics, and the model's logits."""
    mesh = mesh_of(shape)
    sharding.check(config, mesh)
    params, cartridge, batch = inputs(config)
    tables = weight_specs(config), sharding.CARTRIDGE, sharding.BATCH
    params, cartridge, batch = (
        sharding.placed(a, t, mesh) for a, t in zip((params, cartridge, batch), tables, strict=True)
    )
    params, cartridge = jax.tree.map(jnp.asarray, (params, cartridge))
    model = LanguageModel("tiny", config, params, None, "")  # type: ignore[arg-type]
    logits = model.logits(np.asarray(batch.tokens)[0, :2], cartridge=cartridge)
    state = TrainState(cartridge.slots, SGD.init(cartridge.slots), jnp.zeros((), jnp.int32))
    options: dict[str, Any] = {"config": config, "tx": SGD, "tail": "bucket", "reduction": "token", "remat": "layers"}
    before, cartridge_shapes = jax.tree.map(lambda a: a.sharding, cartridge), jax.eval_shape(lambda: cartridge)
    state, metrics = train_step(state, params, batch, cartridge.placement, mesh=mesh, **options)
    if mesh.size > 1:
        after = jax.tree.map(lambda a: a.sharding, state.cartridge)
        for name in ("keys", "values", "bias"):
            was, rank = getattr(before, name), getattr(cartridge_shapes, name).ndim
            assert getattr(after, name).is_equivalent_to(was, rank), f"{name} stay where they were"
    return {"logits": np.asarray(logits), **{k: np.asarray(v) for k, v in metrics.items()}} | {
        name: np.asarray(getattr(state.cartridge, name)) for name in ("keys", "values", "bias")
    }


def equality(output: Path) -> None:
    results = {"1x1x1": step_and_logits(CONFIG, (1, 1, 1)), "uneven 1x1x1": step_and_logits(UNEVEN, (1, 1, 1))}
    results |= {name: step_and_logits(CONFIG, shape) for name, shape in MESHES.items()}
    results["uneven 1x1x2"] = step_and_logits(UNEVEN, (1, 1, 2))
    np.savez(output, **{f"{name}/{what}": a for name, values in results.items() for what, a in values.items()})


def served(config: ModelConfig, shape: tuple[int, int, int], text: Path | None = None) -> dict[str, np.ndarray]:
    """What the engine answers and scores, and in `text` the program of a decoding step."""
    mesh = mesh_of(shape)
    params, cartridge, _ = inputs(config)
    params = jax.tree.map(jnp.asarray, sharding.placed(params, weight_specs(config), mesh))
    model = LanguageModel("tiny", config, params, None, "")  # type: ignore[arg-type]
    engine = Engine(model, 3, 256, max_top_logprobs=5, batch_sizes=[3])
    prefix = Prefix("cartridge", SLOTS, cartridge)
    rng = np.random.default_rng(1)
    asked = [(None, 0.0), (prefix, 0.0), (prefix, 0.7)]
    requests = [
        Request(str(i), tuple(rng.integers(0, config.vocab_size, 40)), prefix, 8, temperature, seed=i, top_logprobs=5)
        for i, (prefix, temperature) in enumerate(asked)
    ]
    events = run(Scheduler(engine, len(requests)), requests)
    tokens = sorted((event.id, i, event.sampled) for i, event in enumerate(events) if isinstance(event, Token))
    asked = Request("scored", tuple(range(30)), prefix, max_tokens=0, prompt_logprobs=5)
    [scored] = [event.scored for event in run(Scheduler(engine, 1), [asked]) if isinstance(event, PromptScored)]
    found = [sampled for _, _, sampled in tokens] + [one.sampled for one in scored]
    if text is not None:
        batch = engine._next_batch(range(3))
        options = {"config": config, "mesh": mesh, "num_top": 5}
        text.write_text(
            decode_step.lower(engine._weights, engine._cache, engine._last, batch, **options).compile().as_text()
        )
    return {
        "tokens": np.array([sampled.token for sampled in found]),
        "logprobs": np.array([[sampled.logprob, *sampled.top_logprobs] for sampled in found]),
    }


def serving(output: Path) -> None:
    results = {"1x1x1": served(CONFIG, (1, 1, 1)), "uneven 1x1x1": served(UNEVEN, (1, 1, 1))}
    results["2x2x2"] = served(CONFIG, (2, 2, 2), output / "decode.txt")
    results["uneven 1x1x2"] = served(UNEVEN, (1, 1, 2))
    arrays = {f"{name}/{what}": a for name, values in results.items() for what, a in values.items()}
    np.savez(output / "results.npz", **arrays)


def matching(output: Path) -> None:
    """The logits behind what attention matching makes of a text, whose heads have different numbers of slots."""
    text = " ".join(f"Number {i} weighs {i * i % 97} grams." for i in range(12))
    lengths = np.array([[5, 120], [60, 40]])
    found = {}
    for name, shape in {"1x1x1": (1, 1, 1), "2x2x2": (2, 2, 2)}.items():
        model = load_model(output / "model", "float32", mesh_of(shape))
        [chunk] = chunks_of(model, text, [], MatchingConfig())
        for keys, fits_keys in (("keys of tokens", False), ("keys fitted", True)):
            cartridge = _match(model, chunk, lengths, fits_keys)
            found[f"{name}/{keys}"] = np.asarray(model.logits(chunk.rows[0]["tokens"][None], cartridge=cartridge))
    np.savez(output / "results.npz", **found)


def compiled(output: Path) -> None:
    """The text of the step for a mesh of 4 by 4 by 2, and that of one device."""
    config = dataclasses.replace(CONFIG, num_layers=3)
    options: dict[str, Any] = {"config": config, "tx": SGD, "tail": "drop", "reduction": "token", "remat": "layers"}
    params, cartridge, batch = inputs(config, rows=16)
    state = TrainState(cartridge.slots, SGD.init(cartridge.slots), np.zeros((), np.int32))
    for name, shape in (("4x4x2", (4, 4, 2)), ("1x1x1", (1, 1, 1))):
        mesh = mesh_of(shape)
        trees = (state, sharding.CARTRIDGE), (params, weight_specs(config)), (batch, sharding.BATCH)
        trees += ((cartridge.placement, sharding.PLACEMENT),)
        arguments = [sharding.abstract(tree, table, mesh) for tree, table in trees]
        (output / f"{name}.txt").write_text(train_step.lower(*arguments, mesh=mesh, **options).compile().as_text())


class Traced:
    """A tensor that counts the bytes that are read of it, those for the fingerprint apart."""

    def __init__(self, array: np.ndarray, counts: dict[str, int]):
        self._array, self._counts, self.shape = array, counts, array.shape

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Traced(self._array[index], self._counts)
        found = self._array[index]
        self._counts["fingerprint" if isinstance(index, np.ndarray) else "parts"] += found.nbytes
        return found


def loading(output: Path) -> None:
    """One of two processes loads its half of a model: what it read, what it holds, and the fingerprint."""
    folder = output / "model"
    with processes.joined_job(True):
        counts = {"parts": 0, "fingerprint": 0}
        config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
        tensors = load_file(folder / "model.safetensors")
        read = {name: Traced(array, counts) for name, array in tensors.items()}
        mesh = sharding.make_mesh(MeshConfig(fsdp=2))
        params, fingerprint = load_params(config, read, read.__getitem__, np.float32, mesh)
        held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
        whole = sharding.gathered(params)
        expected, alone = load_params(config, tensors, tensors.__getitem__, np.float32)
        same = jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), whole, expected))
        result = {**counts, "held": held, "whole": sum(a.nbytes for a in tensors.values()), "same": same}
        result["fingerprints"] = [fingerprint, alone]
        (output / f"{jax.process_index()}.json").write_text(json.dumps(result))


def sharing(output: Path) -> None:
    """The addresses at which two devices of this process hold each weight that both have whole."""
    _, params, _ = load_hf(output / "model", np.float32, sharding.make_mesh(MeshConfig(data=2)))
    leaves = jax.tree.leaves(params)
    addresses = [[shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards] for leaf in leaves]
    (output / "addresses.json").write_text(json.dumps(addresses))


if __name__ == "__main__":
    programs = {f.__name__: f for f in (equality, compiled, loading, matching, serving, sharing)}
    programs[sys.argv[1]](Path(sys.argv[2]))
