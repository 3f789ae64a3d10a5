"""Distils self-study conversations into a cartridge: `python -m cartridges_jax.train --config=configs/….py`.

The base model is frozen: what trains is the first argument of the loss, everything else is an argument beside it. A run
that is killed and started again continues from its last checkpoint and ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cartridges_jax.cartridge import Cartridge
from cartridges_jax.checkpoint import Checkpoints
from cartridges_jax.data import Example, PackedRows, batches, dataset_files, read_corpus, read_examples
from cartridges_jax.initializers import InitConfig, initial_cartridge
from cartridges_jax.losses import Batch, Reduction, Tail, loss_sum
from cartridges_jax.metrics import MetricsLog
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.language_model import LanguageModel, load_model
from cartridges_jax.models.transformer import Params, Remat
from cartridges_jax.optim import OptimConfig, optimizer, schedule
from command_line import files
from command_line.config import build, load, run
from command_line.progress import Progress, stage

INITIAL = "initial.safetensors"  # the initial state, beside the run's config


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    dataset: str  # dataset.parquet of `synth`, a folder of such files, or hf:org/name
    corpus: str  # the text file the cartridge stands in for
    output_dir: str
    model: str = "smollm2-135m"
    dtype: str = "float32"  # of the frozen weights; "auto" is what the hardware multiplies fastest
    seed: int = 0
    seq_len: int = 1024  # tokens of a packed row
    batch_size: int = 1  # rows whose gradients are computed together
    accumulation: int = 1  # batches whose gradients are added before a step
    num_epochs: int = 1
    num_steps: int | None = None  # stops earlier than the epochs would
    checkpoint_every: int = 50  # steps
    remat: Remat = "layers"  # computed again in the backward pass; "elementwise" holds more memory
    tail: Tail = "drop"
    reduction: Reduction = "token"
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "accumulation", "num_epochs", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.num_steps is not None and self.num_steps < 0:
            raise ValueError(f"num_steps is {self.num_steps}, expected at least 0")


@flax.struct.dataclass
class TrainState:
    cartridge: Cartridge
    opt_state: Any
    step: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "tx", "tail", "reduction", "remat"), donate_argnums=0)
def train_step(
    state: TrainState,
    params: Params,
    batch: Batch,  # leaves are [accumulation, b, …]
    *,
    config: ModelConfig,
    tx: optax.GradientTransformation,
    tail: Tail,
    reduction: Reduction,
    remat: Remat,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update. Sums are accumulated and divided once, so that accumulation equals one large batch."""

    def loss(cartridge: Cartridge, micro: Batch) -> tuple[jax.Array, jax.Array]:
        return loss_sum(cartridge, params, micro, config=config, tail=tail, reduction=reduction, remat=remat)

    def accumulate(carry: Any, micro: Batch) -> tuple[Any, None]:
        (total, count), gradient = jax.value_and_grad(loss, has_aux=True)(state.cartridge, micro)
        return jax.tree.map(jnp.add, carry, (total, count, gradient)), None

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jax.tree.map(jnp.zeros_like, state.cartridge))
    (total, count, gradient), _ = jax.lax.scan(accumulate, start, batch)
    gradient = jax.tree.map(lambda g: g / jnp.maximum(count, 1), gradient)
    updates, opt_state = tx.update(gradient, state.opt_state, state.cartridge)
    cartridge = optax.apply_updates(state.cartridge, updates)
    metrics = {"loss": total / jnp.maximum(count, 1), "targets": count, "grad_norm": optax.tree.norm(gradient)}
    return TrainState(cartridge, opt_state, state.step + 1), metrics


def train(config: TrainConfig, model: LanguageModel | None = None) -> Path:
    """Runs or resumes a training run and returns the path of its `cartridge.safetensors`.

    Raises:
      FileNotFoundError, ValueError: a missing or unusable input, before anything is written.
    """
    corpus = read_corpus(config.corpus)
    dataset_files(config.dataset)
    model = model or load_model(config.model, config.dtype)
    config = dataclasses.replace(config, dtype=str(model.params["embed"].dtype))  # what "auto" came to
    if config.init.kind != "pretrained":  # of which the file decides
        _check_window(config.init.num_slots, config, model)
    directory = Path(config.output_dir)
    _refuse_other_config(directory, config)
    with stage("laying out conversations"):
        examples = read_examples(config.dataset, model.tokenizer)
        rows = PackedRows(
            examples, config.seq_len, config.batch_size * config.accumulation, config.num_epochs, config.seed
        )
    cartridge = _initial(config, model, corpus, examples)
    _check_window(cartridge.num_slots, config, model)
    num_steps = len(rows) // (config.batch_size * config.accumulation)
    num_steps = num_steps if config.num_steps is None else min(num_steps, config.num_steps)
    tx = _optimizer(config.optim, num_steps, cartridge.num_frozen)
    _begin(directory, config, cartridge)
    state = TrainState(cartridge, tx.init(cartridge), jnp.zeros((), jnp.int32))
    checkpoints = Checkpoints(directory / "checkpoints")
    try:
        latest = checkpoints.latest_step()
        if latest is not None:
            state = checkpoints.restore(latest, state)
        state, tokens = _loop(config, model, rows, tx, num_steps, state, checkpoints, directory / "metrics.jsonl")
    finally:
        checkpoints.close()
    path = directory / "cartridge.safetensors"
    trained = _with_training(state.cartridge, config, model.config, num_steps, tokens)
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(trained)):
        raise ValueError("the trained slots are not finite: training diverged, lower config.optim.lr")
    trained.save(path)
    return path


def _loop(
    config: TrainConfig,
    model: LanguageModel,
    rows: PackedRows,
    tx: optax.GradientTransformation,
    num_steps: int,
    state: TrainState,
    checkpoints: Checkpoints,
    metrics_path: Path,
) -> tuple[TrainState, int]:
    first = int(state.step)
    step_rows = config.batch_size * config.accumulation
    tokens_before = sum(int((rows[i]["segment_ids"] > 0).sum()) for i in range(first * step_rows))
    log, learning_rate = MetricsLog(metrics_path, first), schedule(config.optim, num_steps)
    progress = Progress("training", num_steps, "steps", done=first)
    tokens, pending = tokens_before, None
    start = time.monotonic()

    def report(step: int, metrics: dict[str, jax.Array], seen: int) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        for name in ("loss", "grad_norm"):
            if not np.isfinite(values[name]):
                raise ValueError(
                    f"the {name} of step {step} is {values[name]}: training diverged, lower config.optim.lr"
                )
        rate = (seen - tokens_before) / (time.monotonic() - start)
        log.write(
            step, {**values, "lr": float(learning_rate(step)), "tokens": seen, "tokens_per_second": round(rate, 1)}
        )
        progress.advance(note=f"loss {values['loss']:.3f}, {rate:.0f} tokens/s")

    try:
        for step, batch in zip(range(first, num_steps), _stacked(rows, config, first), strict=False):
            tokens += int((batch.segment_ids > 0).sum())
            state, metrics = train_step(
                state,
                model.params,
                batch,
                config=model.config,
                tx=tx,
                tail=config.tail,
                reduction=config.reduction,
                remat=config.remat,
            )
            if pending:  # one step late, so that the host prepares the next batch while the device computes
                report(*pending)
            pending = (step, metrics, tokens)
            if (step + 1) % config.checkpoint_every == 0:
                report(*pending)  # before the checkpoint: a run killed between them would lack the line for ever
                pending = None
                checkpoints.save(step + 1, state)
        if pending:
            report(*pending)
        if num_steps > 0:
            checkpoints.save(num_steps, state)
    finally:
        progress.close()
        log.close()
    return state, tokens


def _stacked(rows: PackedRows, config: TrainConfig, first: int) -> Iterator[Batch]:
    for batch in batches(rows, config.batch_size * config.accumulation, first):
        yield jax.tree.map(lambda a: a.reshape(config.accumulation, config.batch_size, *a.shape[1:]), batch)


@functools.cache  # one object for one set of arguments: it is a static argument of the jitted step
def _optimizer(config: OptimConfig, num_steps: int, num_frozen: int) -> optax.GradientTransformation:
    return optimizer(config, num_steps, num_frozen)


def _check_window(num_slots: int, config: TrainConfig, model: LanguageModel) -> None:
    if num_slots + config.seq_len > model.config.window:
        raise ValueError(
            f"{num_slots} slots and rows of {config.seq_len} tokens exceed {model.name}'s window of "
            f"{model.config.window}: lower config.init.num_slots or config.seq_len"
        )


def _initial(config: TrainConfig, model: LanguageModel, corpus: str, examples: list[Example]) -> Cartridge:
    """The initial state, which a resumed run finds in its directory."""
    saved = Path(config.output_dir) / INITIAL
    if saved.is_file():
        return Cartridge.load(saved, model=model)
    with stage(f"initial state: {config.init.kind}"):
        return jax.block_until_ready(initial_cartridge(config.init, model, corpus, examples, config.seed))


def _settings(config: TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config) | {"output_dir": ""}  # a run may be moved


def _refuse_other_config(directory: Path, config: TrainConfig) -> None:
    """Keeps another config from mixing into a run that has begun."""
    path = directory / "config.json"
    if not path.is_file():
        return
    mine, theirs = _settings(config), json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(key for key in mine if mine[key] != theirs.get(key))
    if changed:
        raise ValueError(
            f"{directory} holds a run with another {', '.join(changed)}: choose another config.output_dir or remove it"
        )


def _begin(directory: Path, config: TrainConfig, cartridge: Cartridge) -> None:
    """Records what the run starts from: its config and its initial state."""
    files.write_text(directory / "config.json", json.dumps(_settings(config), indent=2, sort_keys=True) + "\n")
    if not (directory / INITIAL).is_file():
        cartridge.save(directory / INITIAL)


def _with_training(
    cartridge: Cartridge, config: TrainConfig, model_config: ModelConfig, num_steps: int, tokens: int
) -> Cartridge:
    block_weights = (
        model_config.embed_dim * model_config.head_dim * 2 * (model_config.num_heads + model_config.num_kv_heads)
    )
    weights = model_config.num_layers * (block_weights + 3 * model_config.embed_dim * model_config.mlp_dim)
    provenance = dataclasses.replace(
        cartridge.provenance,
        recipe=f"{cartridge.provenance.recipe}; {num_steps} steps of distillation, lr {config.optim.lr}, "
        f"tail {config.tail}",
        training_tokens=tokens,
        training_flops=4.0 * weights * tokens,  # a forward pass and the gradient of the activations; weights are frozen
    )
    return cartridge.replace(provenance=provenance)  # type: ignore[attr-defined]


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs tracebacks of what we say in one sentence
    print(f"cartridge: {train(build(TrainConfig, load(argv)))}")
    return 0


if __name__ == "__main__":
    run(main)
