"""Decoding by groups against each request alone, in float64; and against a row of `prefix_attention`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from cartridges_jax.kernels.prefix_attention import prefix_attention
from cartridges_jax.kernels.prefix_decode_attention import Shared, prefix_decode_attention

R = 5  # requests: 0 and 3 share the second cartridge, 2 is alone with the first, 1 and 4 have none
MEMBERS = np.array([[2, R, R], [3, 0, R + 7]], np.int32)
CARTRIDGE = [1, None, 0, 1, None]


@dataclasses.dataclass(frozen=True)
class Step:
    t: int
    n: int
    k: int
    p: int
    window: int | None = None


STEPS = [Step(t=1, n=6, k=2, p=7), Step(t=3, n=4, k=4, p=7, window=4), Step(t=2, n=3, k=1, p=0)]


def draw(step: Step, s: int = 11, h: int = 8) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    slots = (2, step.k, step.p, h)
    used = np.array([min(4, step.p), step.p], np.int32)
    return {
        "q": 2 * normal(R, step.t, step.n, h),
        "keys": normal(R, step.k, s, h),
        "values": normal(R, step.k, s, h),
        "lengths": np.array([11, 3, 8, 5, 4], np.int32),
        "shared": Shared(normal(*slots), normal(*slots), normal(*slots[:3]), used, MEMBERS),
    }


def decode(drawn: dict[str, Any], window: int | None = None) -> np.ndarray:
    return np.asarray(jax.jit(lambda a: prefix_decode_attention(**a, window=window))(drawn))


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_groups_are_their_requests_alone(step: Step) -> None:
    drawn = draw(step)
    found = decode(drawn, step.window)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, drawn)
        expected = prefix_decode_attention(**wide, implementation="reference", window=step.window)
        assert expected.dtype == np.float64
    assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_a_decoded_token_is_the_last_of_its_row() -> None:
    step = STEPS[0]
    drawn = draw(step)
    shared = drawn["shared"]
    found = decode(drawn)
    for r in (0, 1):  # one with a cartridge, one without
        c, length = CARTRIDGE[r], drawn["lengths"][r]
        p = 0 if c is None else shared.lengths[c]
        slots = [jnp.asarray(a[c or 0, :, :p].swapaxes(0, 1)) for a in (shared.keys, shared.values, shared.bias)]
        k, v = (jnp.asarray(drawn[name][r, :, :length].swapaxes(0, 1))[None] for name in ("keys", "values"))
        q = jnp.zeros((1, length, step.n, 8)).at[:, -1].set(drawn["q"][r, 0])
        ids = jnp.ones((1, length), jnp.int32)
        o = prefix_attention(q, k, v, slots[0], slots[1], ids, slots[2], implementation="reference")
        assert_allclose(found[r, 0], o[0, -1], rtol=0, atol=2e-6)


def test_what_nobody_reads_changes_nothing() -> None:
    """Positions past a length, slots past a cartridge's, and places of a group that hold no request."""
    drawn = draw(STEPS[0])
    before = decode(drawn)
    for name in ("keys", "values"):
        for r, length in enumerate(drawn["lengths"]):
            drawn[name][r, :, length:] = 1e3
    drawn["shared"].keys[0, :, 4:] = drawn["shared"].values[0, :, 4:] = 1e3
    assert_array_equal(decode(drawn), before)


def test_mistakes() -> None:
    drawn = draw(STEPS[0])
    with pytest.raises(ValueError, match="implementation is 'tpu', expected one of reference, xla"):
        prefix_decode_attention(**drawn, implementation="tpu")
    with pytest.raises(ValueError, match=r"do not belong together: expected \[r,t,n,h\]"):
        prefix_decode_attention(**{**drawn, "lengths": drawn["lengths"][:2]})
