"""Distils self-study conversations into a cartridge: `python -m cartridges_jax.train --config=configs/….py`.

A run that is killed and started again continues from its last checkpoint and ends with the same bytes.
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

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from cartridges_jax import processes, sharding
from cartridges_jax.cartridge import Cartridge
from cartridges_jax.checkpoint import Checkpoints
from cartridges_jax.data import Example, PackedRows, batches, dataset_files, read_corpus, read_examples
from cartridges_jax.initializers import InitConfig, initial_cartridge
from cartridges_jax.losses import Batch, Reduction, Tail
from cartridges_jax.metrics import MetricsLog
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.language_model import LanguageModel, load_model
from cartridges_jax.models.transformer import Remat
from cartridges_jax.optim import OptimConfig, optimizer, schedule
from cartridges_jax.sharding import MeshConfig
from cartridges_jax.step import TrainState, train_step
from command_line import files
from command_line.config import build, load, run
from command_line.progress import Progress, stage

INITIAL = "initial.safetensors"  # the initial state, beside the run's config


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    dataset: str  # dataset.parquet of `synth`, a folder of such files, hf:… or wandb:…
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
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)  # how many devices share rows, weights, heads
    distributed: bool = False  # one of several processes, on one host or many: see `processes.joined_job`
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_size", "accumulation", "num_epochs", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.num_steps is not None and self.num_steps < 0:
            raise ValueError(f"num_steps is {self.num_steps}, expected at least 0")


def train(config: TrainConfig, model: LanguageModel | None = None) -> Path:
    """Runs or resumes a training run and returns the path of its `cartridge.safetensors`.

    On several hosts `output_dir` has to be a folder that all of them see; the first process writes there.

    Args:
      model: by default `config.model`, laid on the devices as `config.mesh` says; a given one stays where it is.

    Raises:
      FileNotFoundError, ValueError: a missing or unusable input, before anything is written.
    """
    corpus = read_corpus(config.corpus)
    dataset_files(config.dataset)
    mesh = sharding.make_mesh(config.mesh) if model is None else sharding.mesh_of(model.params)
    sharding.check_rows(config.batch_size, mesh)
    model = model or load_model(config.model, config.dtype, None if mesh.size == 1 else mesh)
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
    state = sharding.placed(state, sharding.CARTRIDGE, mesh)
    checkpoints = Checkpoints(directory / "checkpoints")
    try:
        latest = checkpoints.latest_step()
        if latest is not None:
            state = checkpoints.restore(latest, state)
        state, tokens = _loop(config, model, rows, tx, num_steps, state, checkpoints, directory / "metrics.jsonl", mesh)
    finally:
        checkpoints.close()
    path = directory / "cartridge.safetensors"
    trained = _with_training(sharding.gathered(state.cartridge), config, model.config, num_steps, tokens)
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(trained)):
        raise ValueError("the trained slots are not finite: training diverged, lower config.optim.lr")
    if processes.is_first():
        trained.save(path)
    processes.wait_for_all("the cartridge is saved")
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
    mesh: Mesh,
) -> tuple[TrainState, int]:
    first = int(state.step)
    step_rows = config.batch_size * config.accumulation
    tokens_before = sum(rows.num_tokens(i) for i in range(first * step_rows))
    log = MetricsLog(metrics_path, first) if processes.is_first() else None
    learning_rate = schedule(config.optim, num_steps)
    progress = Progress("training", num_steps, "steps", done=first) if log else None
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
        if log and progress:
            log.write(
                step, {**values, "lr": float(learning_rate(step)), "tokens": seen, "tokens_per_second": round(rate, 1)}
            )
            progress.advance(note=f"loss {values['loss']:.3f}, {rate:.0f} tokens/s")

    try:
        for step, batch in zip(range(first, num_steps), _stacked(rows, config, first, mesh), strict=False):
            tokens += sum(rows.num_tokens(i) for i in range(step * step_rows, (step + 1) * step_rows))
            state, metrics = train_step(
                state,
                model.params,
                batch,
                config=model.config,
                tx=tx,
                tail=config.tail,
                reduction=config.reduction,
                remat=config.remat,
                mesh=mesh,
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
        if log and progress:
            progress.close()
            log.close()
    return state, tokens


def _stacked(rows: PackedRows, config: TrainConfig, first: int, mesh: Mesh) -> Iterator[Batch]:
    """The batches of a run, on the devices; each process reads the rows that its own devices hold."""
    shape = (config.accumulation, config.batch_size)
    placement = NamedSharding(mesh, sharding.BATCH)
    held = np.zeros(shape, bool)
    for index in placement.addressable_devices_indices_map(shape).values():
        held[index] = True
    place_in_share = np.cumsum(held[0]) - 1  # of a row of a micro-batch, among those that are read here

    def place(share: np.ndarray) -> Any:
        share = share.reshape(config.accumulation, -1, *share.shape[1:])
        if mesh.size == 1:
            return share
        whole = (*shape, *share.shape[2:])
        return jax.make_array_from_callback(whole, placement, lambda index: share[:, place_in_share[index[1]]])

    for batch in batches(rows, held.size, first, np.flatnonzero(held).tolist()):
        yield jax.tree.map(place, batch)


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
    if processes.agreed(saved.is_file()):
        return Cartridge.load(saved, model=model)
    with stage(f"initial state: {config.init.kind}"):
        return jax.block_until_ready(initial_cartridge(config.init, model, corpus, examples, config.seed))


def _settings(config: TrainConfig) -> dict[str, Any]:
    """What a run is made of: it may be moved, to another folder or other devices."""
    return dataclasses.asdict(dataclasses.replace(config, output_dir="", mesh=MeshConfig(), distributed=False))


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
    whole = sharding.gathered(cartridge)
    if processes.is_first():
        files.write_text(directory / "config.json", json.dumps(_settings(config), indent=2, sort_keys=True) + "\n")
        if not (directory / INITIAL).is_file():
            whole.save(directory / INITIAL)
    processes.wait_for_all("the run has begun")


def _with_training(
    cartridge: Cartridge, config: TrainConfig, model_config: ModelConfig, num_steps: int, tokens: int
) -> Cartridge:
    provenance = dataclasses.replace(
        cartridge.provenance,
        recipe=f"{cartridge.provenance.recipe}; {num_steps} steps of distillation, lr {config.optim.lr}, "
        f"tail {config.tail}",
        training_tokens=tokens,
        # a forward pass and the gradient of the activations; weights are frozen
        training_flops=4.0 * model_config.num_layers * model_config.layer_weights * tokens,
    )
    return cartridge.replace(provenance=provenance)  # type: ignore[attr-defined]


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs tracebacks of what we say in one sentence
    config = build(TrainConfig, load(argv, TrainConfig))
    with processes.joined_job(config.distributed):
        path = train(config)
        if processes.is_first():
            print(f"cartridge: {path}", flush=True)
    return 0


if __name__ == "__main__":
    run(main)
