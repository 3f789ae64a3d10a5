"""The loop of a training run: when it steps, evaluates and writes checkpoints, and when it ends."""

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

from cartridges_jax.cartridge.arrays import Cartridge, Slots
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.parallel import processes, sharding
from cartridges_jax.training.batch import Batch
from cartridges_jax.training.checkpoint import Checkpoints
from cartridges_jax.training.data import PackedRows, batches
from cartridges_jax.training.evals.during import Evals
from cartridges_jax.training.metrics import BEFORE, MetricsWriter
from cartridges_jax.training.optim import schedule
from cartridges_jax.training.step import TrainState, train_step

if TYPE_CHECKING:
    from cartridges_jax.training.config import TrainConfig


@flax.struct.dataclass
class Best:
    """The slots whose watched loss was the lowest so far: the copy that a run with early stopping keeps."""

    cartridge: Slots
    step: jax.Array  # how many steps it had behind it
    loss: jax.Array
    stale: jax.Array  # how many evaluations there were since, none of them better

    @classmethod
    def of(cls, slots: Slots) -> Best:
        copy = jax.tree.map(jnp.copy, slots)  # a training step overwrites the arrays that it is given
        none = jnp.zeros((), jnp.int32)
        return cls(copy, none, jnp.asarray(np.inf, jnp.float32), none)

    def after(self, train: TrainState, loss: float, mesh: Mesh) -> Best:
        """Returns the best after one more evaluation, which found `loss` for the cartridge of `train`."""
        if np.float32(loss) < float(self.loss):  # rounded as the best is kept, or an equal loss could look better
            numbers = (int(train.step), jnp.int32), (loss, jnp.float32), (0, jnp.int32)
            return Best(Best.of(train.cartridge).cartridge, *(_scalar(*number, mesh) for number in numbers))
        return dataclasses.replace(self, stale=_scalar(int(self.stale) + 1, jnp.int32, mesh))


@flax.struct.dataclass
class RunState:
    """Everything that a checkpoint holds."""

    train: TrainState
    best: Best | None  # None for a run without early stopping
    seconds: jax.Array  # of training, evaluations not counted


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """What stays the same from a run's first step to its last."""

    config: TrainConfig
    model: LanguageModel
    initial: Cartridge  # from which training starts
    rows: PackedRows
    tx: optax.GradientTransformation
    num_steps: int
    mesh: Mesh
    evals: Evals

    def tokens(self, num_steps: int) -> int:
        """Returns how many tokens the first `num_steps` steps read."""
        rows = num_steps * self.config.batch_size * self.config.accumulation
        return sum(self.rows.num_tokens(i) for i in range(rows))


def run_loop(run: TrainingRun, state: RunState, writer: MetricsWriter, checkpoints: Checkpoints) -> RunState:
    """Trains from `state` on until the run's steps, minutes or patience are used up; returns the last state."""
    config, step = run.config, int(state.train.step)
    tokens, seconds_before = run.tokens(step), float(state.seconds)
    rates = schedule(config.optim, run.num_steps)(jnp.arange(run.num_steps))  # one number if it is constant
    learning_rates = np.broadcast_to(rates, run.num_steps).tolist()
    step_rows = config.batch_size * config.accumulation
    if step == 0 and run.evals:
        state = _evaluated(run, state, BEFORE, writer)
    over = step >= run.num_steps or _out_of_time(config, seconds_before) or _out_of_patience(config, state)
    upcoming = _stacked(run, step)
    batch = next(upcoming, None)
    placement = sharding.placed(jax.tree.map(jnp.asarray, run.initial.placement), sharding.PLACEMENT, run.mesh)
    pending = None
    while not over:
        train_state, metrics = train_step(
            state.train,
            run.model.params,
            batch,
            placement,
            config=run.model.config,
            tx=run.tx,
            tail=config.tail,
            reduction=config.reduction,
            remat=config.remat,
            mesh=run.mesh,
        )
        batch = next(upcoming, None)  # on the device before the step ends
        tokens += sum(run.rows.num_tokens(i) for i in range(step * step_rows, (step + 1) * step_rows))
        if pending:  # one step late, so that the device never waits for the host
            writer.step(*pending)
        seconds = seconds_before + writer.seconds
        state = dataclasses.replace(state, train=train_state)
        pending = (step, metrics, learning_rates[step], tokens, seconds)
        step += 1
        over = step >= run.num_steps or _out_of_time(config, seconds)
        evaluates = bool(run.evals) and (over or (config.evals.every is not None and step % config.evals.every == 0))
        saves = step % config.checkpoint_every == 0
        if over or evaluates or saves:
            writer.step(*pending)  # before the checkpoint: a run killed between them would never write the line
            pending = None
        if evaluates:
            state = _evaluated(run, state, step - 1, writer)
            over = over or _out_of_patience(config, state)
        if over or saves:
            state = dataclasses.replace(state, seconds=_scalar(seconds, jnp.float32, run.mesh))
            checkpoints.save(step, state)
    return state


def _out_of_time(config: TrainConfig, seconds: float) -> bool:
    return config.max_minutes is not None and bool(processes.agreed(seconds >= 60 * config.max_minutes))


def _out_of_patience(config: TrainConfig, state: RunState) -> bool:
    patience = config.evals.patience
    return patience is not None and state.best is not None and int(state.best.stale) >= patience


def _evaluated(run: TrainingRun, state: RunState, step: int, writer: MetricsWriter) -> RunState:
    """Evaluates the cartridge after update `step`, writes what is found, and returns the state with its best."""
    start = time.monotonic()
    metrics, answers = run.evals.run(run.initial.with_slots(state.train.cartridge))
    writer.evaluation(step, metrics, answers, time.monotonic() - start)
    if state.best is None:
        return state
    watched = metrics[str(run.evals.watched)]
    return dataclasses.replace(state, best=state.best.after(state.train, watched, run.mesh))


def _scalar(value: float, dtype: Any, mesh: Mesh) -> jax.Array:
    """Returns a number of the state as an array that lies on all devices."""
    return sharding.placed(jnp.asarray(value, dtype), P(), mesh)


def _stacked(run: TrainingRun, first: int) -> Iterator[Batch]:
    """Yields the batches from step `first` on, laid on the devices; a process reads only the rows that its own hold."""
    shape = (run.config.accumulation, run.config.batch_size)
    placement = NamedSharding(run.mesh, sharding.BATCH)
    held = np.zeros(shape, bool)
    for index in placement.addressable_devices_indices_map(shape).values():
        held[index] = True
    place_in_share = np.cumsum(held[0]) - 1  # where a row of a micro-batch stands among the rows that are read here

    def place(share: np.ndarray) -> Any:
        share = share.reshape(shape[0], -1, *share.shape[1:])
        if run.mesh.size == 1:
            return jax.device_put(share)
        whole = (*shape, *share.shape[2:])
        return jax.make_array_from_callback(whole, placement, lambda index: share[:, place_in_share[index[1]]])

    for batch in batches(run.rows, held.size, first, np.flatnonzero(held).tolist()):
        yield jax.tree.map(place, batch)
