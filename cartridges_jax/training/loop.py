"""The loop of a training run: steps, evaluations and checkpoints, and when it is over."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.parallel import processes, sharding
from cartridges_jax.training.batch import Batch
from cartridges_jax.training.checkpoint import Checkpoints
from cartridges_jax.training.data import PackedRows, batches
from cartridges_jax.training.evals.during import Evals
from cartridges_jax.training.metrics import BEFORE, Journal
from cartridges_jax.training.optim import schedule
from cartridges_jax.training.step import TrainState, train_step

if TYPE_CHECKING:
    from cartridges_jax.training.config import TrainConfig


@flax.struct.dataclass
class Best:
    """The cartridge with the least watched loss so far, behind `step` steps, and how many evaluations ago that was."""

    cartridge: Cartridge
    step: jax.Array
    loss: jax.Array
    stale: jax.Array

    @classmethod
    def of(cls, cartridge: Cartridge) -> Best:
        copy = jax.tree.map(jnp.copy, cartridge)  # a step takes its own away
        none = jnp.zeros((), jnp.int32)
        return cls(copy, none, jnp.asarray(np.inf, jnp.float32), none)

    def after(self, train: TrainState, loss: float, mesh: Mesh) -> Best:
        if np.float32(loss) < float(self.loss):  # as it is kept: rounding makes nothing better
            numbers = (int(train.step), jnp.int32), (loss, jnp.float32), (0, jnp.int32)
            return Best(Best.of(train.cartridge).cartridge, *(_scalar(*number, mesh) for number in numbers))
        return dataclasses.replace(self, stale=_scalar(int(self.stale) + 1, jnp.int32, mesh))


@flax.struct.dataclass
class RunState:
    """All that a checkpoint holds. `best` is there if the run stops early."""

    train: TrainState
    best: Best | None
    seconds: jax.Array  # of training, evaluations not counted


@dataclasses.dataclass(frozen=True)
class Job:
    config: TrainConfig
    model: LanguageModel
    rows: PackedRows
    tx: optax.GradientTransformation
    num_steps: int
    mesh: Mesh
    evals: Evals

    def tokens(self, num_steps: int) -> int:
        """Of the first so many steps."""
        rows = num_steps * self.config.batch_size * self.config.accumulation
        return sum(self.rows.num_tokens(i) for i in range(rows))


def run_loop(job: Job, run: RunState, journal: Journal, checkpoints: Checkpoints) -> RunState:
    """Trains from where `run` is until it is over."""
    config, step = job.config, int(run.train.step)
    tokens, seconds_before = job.tokens(step), float(run.seconds)
    learning_rate = schedule(config.optim, job.num_steps)
    step_rows = config.batch_size * config.accumulation
    if step == 0 and job.evals:
        run = _evaluated(job, run, BEFORE, journal)
    over = step >= job.num_steps or _out_of_time(config, seconds_before) or _out_of_patience(config, run)
    upcoming = _stacked(job, step)
    pending = None
    while not over:
        state, metrics = train_step(
            run.train,
            job.model.params,
            next(upcoming),
            config=job.model.config,
            tx=job.tx,
            tail=config.tail,
            reduction=config.reduction,
            remat=config.remat,
            mesh=job.mesh,
        )
        tokens += sum(job.rows.num_tokens(i) for i in range(step * step_rows, (step + 1) * step_rows))
        if pending:  # one step late, so that the host prepares the next batch while the device computes
            journal.step(*pending)
        seconds = seconds_before + journal.seconds
        run = RunState(state, run.best, _scalar(seconds, jnp.float32, job.mesh))
        pending = (step, metrics, float(learning_rate(step)), tokens, seconds)
        step += 1
        over = step >= job.num_steps or _out_of_time(config, seconds)
        evaluates = bool(job.evals) and (over or (config.evals.every is not None and step % config.evals.every == 0))
        saves = step % config.checkpoint_every == 0
        if over or evaluates or saves:
            journal.step(*pending)  # before the checkpoint: a run killed between them would lack the line for ever
            pending = None
        if evaluates:
            run = _evaluated(job, run, step - 1, journal)
            over = over or _out_of_patience(config, run)
        if over or saves:
            checkpoints.save(step, run)
    return run


def _out_of_time(config: TrainConfig, seconds: float) -> bool:
    return config.max_minutes is not None and bool(processes.agreed(seconds >= 60 * config.max_minutes))


def _out_of_patience(config: TrainConfig, run: RunState) -> bool:
    return config.evals.patience is not None and run.best is not None and int(run.best.stale) >= config.evals.patience


def _evaluated(job: Job, run: RunState, step: int, journal: Journal) -> RunState:
    start = time.monotonic()
    metrics, answers = job.evals.run(run.train.cartridge)
    journal.evaluation(step, metrics, answers, time.monotonic() - start)
    if run.best is None:
        return run
    watched = metrics[str(job.evals.watched)]
    return dataclasses.replace(run, best=run.best.after(run.train, watched, job.mesh))


def _scalar(value: float, dtype: Any, mesh: Mesh) -> jax.Array:
    """One number of the state, on all devices."""
    return sharding.placed(jnp.asarray(value, dtype), P(), mesh)


def _stacked(job: Job, first: int) -> Iterator[Batch]:
    """The batches of a run, on the devices; each process reads the rows that its own devices hold."""
    shape = (job.config.accumulation, job.config.batch_size)
    placement = NamedSharding(job.mesh, sharding.BATCH)
    held = np.zeros(shape, bool)
    for index in placement.addressable_devices_indices_map(shape).values():
        held[index] = True
    place_in_share = np.cumsum(held[0]) - 1  # of a row of a micro-batch, among those that are read here

    def place(share: np.ndarray) -> Any:
        share = share.reshape(shape[0], -1, *share.shape[1:])
        if job.mesh.size == 1:
            return share
        whole = (*shape, *share.shape[2:])
        return jax.make_array_from_callback(whole, placement, lambda index: share[:, place_in_share[index[1]]])

    for batch in batches(job.rows, held.size, first, np.flatnonzero(held).tolist()):
        yield jax.tree.map(place, batch)
