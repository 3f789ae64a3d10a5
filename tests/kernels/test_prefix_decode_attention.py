"""Attention over pages against one dense softmax for each request, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from cartridges_jax.kernels.prefix_decode_attention import (
    Pages,
    Plan,
    Reading,
    own_entries,
    prefix_decode_attention,
    shared_entries,
)

Z, K, H, NUM_PAGES = 4, 2, 8, 40
# (page, places in use, position of the first): two cartridges of 19 and 3 slots, each on pages of its own, and together
# on more than are read in one turn
CARTRIDGES = {"a": [(30 + i, min(Z, 19 - i * Z), i * Z) for i in range(5)], "b": [(36, 3, 0)], None: []}
# the cartridge of each request, and how many tokens it has behind it
REQUESTS = [("a", 6), ("b", 1), (None, 9), ("a", 1), ("a", 17)]
rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


PAGES = Pages(normal(NUM_PAGES, K, H, Z), normal(NUM_PAGES, K, Z, H), normal(NUM_PAGES, K, Z))


def sequence(r: int) -> list[tuple[int, int, int]]:
    """All pages of a request; its own are 6r, 6r + 1, …"""
    cartridge, tokens = REQUESTS[r]
    p = sum(count for _, count, _ in CARTRIDGES[cartridge])
    return CARTRIDGES[cartridge] + [(6 * r + i, Z, p + i * Z) for i in range(-(-tokens // Z))]


def last_positions(r: int, t: int) -> np.ndarray:
    cartridge, tokens = REQUESTS[r]
    return sum(count for _, count, _ in CARTRIDGES[cartridge]) + tokens - t + np.arange(t)


def plan_of(requests: list[int], shared: bool) -> Plan:
    together = [page for cartridge in ("a", "b") for page in CARTRIDGES[cartridge]] if shared else []
    if len(requests) == 1:
        together = sequence(requests[0])
    listed = Reading.of(together, shared_entries(len(together) + 1))  # with padding that is not reached, or is
    members = np.array([[page in sequence(r) for r in requests] for page in together], bool)
    members = np.pad(members.reshape(-1, len(requests)), ((0, len(listed.page) - len(together)), (0, 0)))
    own = [(row, page) for row, r in enumerate(requests) for page in sequence(r) if page not in together]
    own_reading = Reading.of([page for _, page in own], own_entries(len(own) + 1, len(requests)))
    reader = np.zeros(len(own_reading.page), np.int32)
    reader[: len(own)] = [row for row, _ in own]
    return Plan(listed, members, own_reading, reader)


def alone(q_tnh: np.ndarray, positions_t: np.ndarray, r: int, pages: Pages) -> np.ndarray:
    """The definition."""
    keys_skh, values_skh, bias_sk, position_s = [], [], [], []
    for page, count, first in sequence(r):
        for i in range(count):
            keys_skh.append(pages.keys[page, :, :, i])
            values_skh.append(pages.values[page, :, i])
            bias_sk.append(pages.bias[page, :, i])
            position_s.append(first + i)
    keys, values, bias = (np.array(a, np.float64) for a in (keys_skh, values_skh, bias_sk))
    t, n, h = q_tnh.shape
    q_tkgh = q_tnh.astype(np.float64).reshape(t, K, n // K, h)
    scores = np.einsum("tkgh,skh->tkgs", q_tkgh, keys) * h**-0.5 + bias.T[None, :, None]
    scores = np.where((np.array(position_s) <= positions_t[:, None])[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("tkgs,skh->tkgh", weights / weights.sum(-1, keepdims=True), values).reshape(t, n, h)


run = jax.jit(prefix_decode_attention)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("requests", "t", "n"), [([0, 1, 2, 3, 4], 1, 6), ([4, 2], 1, 2), ([3], 1, 4), ([4], 9, 6), ([2, 0], 3, 4)]
)
def test_every_request_gets_what_it_gets_alone(requests: list[int], t: int, n: int, shared: bool) -> None:
    q = 2 * normal(len(requests), t, n, H)
    positions = np.array([last_positions(r, t) for r in requests], np.int32)
    found = run(q, positions, PAGES, plan_of(requests, shared))
    for row, r in enumerate(requests):
        assert_allclose(found[row], alone(q[row], positions[row], r, PAGES), rtol=0, atol=3e-6)


def test_what_nobody_sees_changes_nothing() -> None:
    """Places past a count or a position, pages that only pad, and rows of a batch that are no request."""
    requests = [0, 1, 2]
    q, plan = normal(4, 1, 4, H), plan_of(requests, shared=True)
    positions = np.array([*(last_positions(r, 1) for r in requests), [0]], np.int32)
    plan = plan._replace(members=np.pad(plan.members, ((0, 0), (0, 1))))
    before = run(q, positions, PAGES, plan)
    seen = np.zeros((NUM_PAGES, Z), bool)
    for row, r in enumerate(requests):
        for page, count, first in sequence(r):
            seen[page, :count] |= first + np.arange(count) <= positions[row, 0]
    keys, values, bias = (jnp.asarray(a) for a in PAGES)
    hidden = ~seen[:, None]
    loud = Pages(
        jnp.where(hidden[:, :, None], 1e3, keys),
        jnp.where(hidden[..., None], 1e3, values),
        jnp.where(hidden, 50.0, bias),
    )
    assert_array_equal(run(q, positions, loud, plan)[:3], before[:3])
    assert np.isfinite(before).all()
