"""The optimizer: Adam in float32, its learning-rate schedule, and slots that it must not move."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import optax

from cartridges_jax.command_line.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    lr: float = 4e-3  # suits attention matching; with a budget for each head 5e-4 does, other starts bear 2e-2
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0  # step i of them runs at lr * (i + 1) / warmup_steps, which is never zero
    final_fraction: float = 0.1  # of lr, which cosine and linear schedules reach at the end of the last step
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float | None = None  # the largest norm of the gradient, over all slots that move; None: no limit

    def __post_init__(self) -> None:
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise UserError(f"optim.clip_norm is {self.clip_norm}, expected a length above 0, or none")
        if not 0 < self.lr < math.inf or self.warmup_steps < 0 or not 0 <= self.final_fraction <= 1:
            raise UserError(
                f"optim has lr {self.lr}, warmup_steps {self.warmup_steps} and final_fraction {self.final_fraction}: "
                "expected lr > 0, warmup_steps >= 0 and final_fraction from 0 to 1"
            )


def schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Returns the function from a step, 0 to num_steps - 1, to its learning rate."""
    rest = max(num_steps - config.warmup_steps, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(config.lr, rest, config.final_fraction),
        "linear": optax.linear_schedule(config.lr, config.lr * config.final_fraction, rest),
        "constant": optax.constant_schedule(config.lr),
    }[config.schedule]
    if not config.warmup_steps:
        return after
    first = config.lr / config.warmup_steps
    warmup = optax.linear_schedule(first, config.lr, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [config.warmup_steps])


@functools.cache  # one object for one set of arguments: it is a static argument of the jitted step
def optimizer(config: OptimConfig, num_steps: int, num_frozen: int) -> optax.GradientTransformation:
    """Returns Adam whose updates of the first `num_frozen` slots (axis 1 of every leaf) are zero."""

    # the update is masked, not the gradient: Adam's moments could otherwise move a frozen slot
    def freeze(updates: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda update: update.at[:, :num_frozen].set(0), updates)

    adam = optax.adam(schedule(config, num_steps), b1=config.b1, b2=config.b2)
    if config.clip_norm is None:
        return optax.chain(adam, optax.stateless(freeze))
    # the gradient of frozen slots must not count in the norm, or it would shorten the steps of the others
    clip = optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(optax.stateless(freeze), clip, adam, optax.stateless(freeze))
