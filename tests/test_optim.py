"""The learning rate of every step, and the slots that no step moves."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.training.optim import OptimConfig, optimizer, schedule

STEPS = 20


def rates(config: OptimConfig, num_steps: int = STEPS) -> np.ndarray:
    rate = schedule(config, num_steps)
    return np.asarray([float(rate(step)) for step in range(num_steps)])


def shape_of(kind: str, done: float) -> float:
    """What is left of lr after the fraction `done` of the steps, from 1 to a tenth."""
    return {
        "cosine": 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - 0.9 * done,
        "constant": 1.0,
    }[kind]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_every_step_runs_at_the_rate_that_the_config_says(kind: str, warmup: int):
    found = rates(OptimConfig(lr=0.02, schedule=kind, warmup_steps=warmup, final_fraction=0.1))
    rising = [0.02 * (i + 1) / warmup for i in range(warmup)]
    falling = [0.02 * shape_of(kind, i / (STEPS - warmup)) for i in range(STEPS - warmup)]
    np.testing.assert_allclose(found, rising + falling, rtol=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "num_steps"), [(1, 1), (5, 5), (9, 5), (1000, 5), (0, 1)])
def test_no_step_runs_at_zero(kind: str, warmup: int, num_steps: int):
    found = rates(OptimConfig(schedule=kind, warmup_steps=warmup, final_fraction=0.0), num_steps)
    assert (found > 0).all()


def test_the_rate_ends_at_the_final_fraction():
    for kind in ("cosine", "linear"):
        rate = schedule(OptimConfig(lr=0.02, schedule=kind, warmup_steps=3, final_fraction=0.25), STEPS)
        assert float(rate(STEPS)) == pytest.approx(0.005, rel=1e-5)


@pytest.mark.parametrize("num_frozen", [0, 1, 3])
def test_frozen_slots_keep_their_bits_also_when_the_moments_are_full(num_frozen: int):
    rng = np.random.default_rng(0)
    keys, values = (jnp.asarray(rng.standard_normal((2, 5, 2, 4)), jnp.float32) for _ in range(2))
    start = Cartridge(keys, values, jnp.asarray(rng.standard_normal((2, 5, 2)), jnp.float32), num_frozen)
    tx = optimizer(OptimConfig(lr=0.1, warmup_steps=2), STEPS, num_frozen)
    cartridge, state = start, tx.init(start)
    for _ in range(4):
        gradient = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), jnp.float32), start)
        updates, state = tx.update(gradient, state, cartridge)
        assert not any(np.asarray(update)[:, :num_frozen].any() for update in jax.tree.leaves(updates))
        cartridge = optax.apply_updates(cartridge, updates)
    assert jax.tree.structure(cartridge) == jax.tree.structure(start)
    for before, after in zip(jax.tree.leaves(start), jax.tree.leaves(cartridge), strict=True):
        before, after = np.asarray(before), np.asarray(after)
        assert before[:, :num_frozen].tobytes() == after[:, :num_frozen].tobytes()
        assert (before[:, num_frozen:] != after[:, num_frozen:]).all()


def test_the_first_update_of_adam_is_the_learning_rate():
    start = Cartridge(jnp.zeros((1, 2, 1, 1)), jnp.zeros((1, 2, 1, 1)), None, 1)
    tx = optimizer(OptimConfig(lr=0.5, warmup_steps=2), STEPS, 1)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, start), tx.init(start), start)
    np.testing.assert_allclose(updates.keys.ravel(), [0.0, -0.25], rtol=1e-5)


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.999), (0.5, 0.999), (0.9, 0.9)])
def test_the_moments_forget_as_the_config_says(b1: float, b2: float):
    start = Cartridge(jnp.zeros((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1)), None, 0)
    tx = optimizer(OptimConfig(lr=0.5, schedule="constant", b1=b1, b2=b2), STEPS, 0)
    gradients = [jax.tree.map(lambda a, g=g: jnp.full_like(a, g), start) for g in (1.0, 3.0)]
    state = tx.update(gradients[0], tx.init(start), start)[1]
    second = tx.update(gradients[1], state, start)[0].keys.item()
    mean, square = (b1 + 3) / (b1 + 1), (b2 + 9) / (b2 + 1)  # (1 - b) / (1 - b^2) = 1 / (1 + b)
    assert second == pytest.approx(-0.5 * mean / math.sqrt(square), rel=1e-4)


@pytest.mark.parametrize(
    "bad",
    [{"lr": 0.0}, {"lr": -1.0}, {"lr": math.nan}, {"lr": math.inf}, {"warmup_steps": -1}]
    + [{"final_fraction": value} for value in (-0.1, 1.1, math.nan)],
)
def test_settings_out_of_range_are_refused(bad: dict[str, float]):
    with pytest.raises(UserError, match="expected lr > 0, warmup_steps >= 0 and final_fraction from 0 to 1"):
        OptimConfig(**bad)


def test_a_long_gradient_is_clipped_without_what_is_frozen():
    shape = (1, 3, 1, 2)
    start = Cartridge(jnp.zeros(shape), jnp.zeros(shape), None, 1)
    long = jax.tree.map(lambda a: jnp.full(a.shape, 2.0).at[:, 0].set(1e6), start)
    short = jax.tree.map(lambda a: jnp.full(a.shape, 0.01), start)

    def second_update(config: OptimConfig, first: Cartridge) -> np.ndarray:
        tx = optimizer(config, STEPS, 1)
        state = tx.update(first, tx.init(start), start)[1]
        return np.asarray(tx.update(short, state, start)[0].keys)

    clipped = second_update(OptimConfig(lr=2e-2, clip_norm=1.0), long)
    norm = math.sqrt(8 * 2.0**2)  # of the eight numbers that move
    by_hand = second_update(OptimConfig(lr=2e-2), jax.tree.map(lambda g: g / norm, long))
    np.testing.assert_allclose(clipped, by_hand, rtol=1e-5)
    assert (np.abs(clipped - second_update(OptimConfig(lr=2e-2), long)) > 1e-4)[:, 1:].all()
    with pytest.raises(UserError, match=r"clip_norm is 0\.0, expected a length above 0"):
        OptimConfig(clip_norm=0.0)
