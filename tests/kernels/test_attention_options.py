"""The options of attention that families bring: what each means, and that the implementations agree on it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against_definition import assert_close, is_interpreted, outputs
from numpy.testing import assert_allclose

from cartridges_jax import kernels
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.kernels.prefix_attention import prefix_attention
from cartridges_jax.kernels.prefix_attention.shapes import SMALL, Shape

SHAPE = SMALL[2]
SINKS = np.linspace(-1, 4, SHAPE.n)
OPTIONS: dict[str, dict[str, Any]] = {
    "scale": {"scale": 0.6},
    "soft_cap": {"soft_cap": 3.0},
    "sinks": {"sinks": SINKS},
    "lengths": {"lengths": np.array([SHAPE.p, 4])},
    "window": {"window": np.array(6)},  # an array, as a scan over layers has it
    "all": {"scale": 0.6, "soft_cap": 3.0, "sinks": SINKS, "lengths": np.array([0, 9]), "window": np.array(6)},
}


def found(implementation: str, dtype: Any, shape: Shape = SHAPE, **options: Any) -> dict[str, np.ndarray]:
    """The output "o" and the gradients of every input."""
    arrays, segment_ids, cotangent = shape.draw()
    given = {name: jnp.asarray(a, dtype) for name, a in arrays.items() if a is not None}

    @jax.jit
    def differentiate(given: dict[str, jax.Array], options: dict[str, Any]) -> dict[str, jax.Array]:
        def of(given: dict[str, jax.Array]) -> jax.Array:
            static = {name: OPTIONS["all"][name] for name in ("soft_cap", "scale") if name in options}
            return prefix_attention(segment_ids=segment_ids, implementation=implementation, **given, **options | static)

        o, pullback = jax.vjp(of, given)
        return {"o": o, **pullback(jnp.asarray(cotangent, dtype))[0]}

    return {name: np.asarray(a) for name, a in differentiate(given, options).items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_blocks_agree_with_the_definition(options: dict[str, Any]) -> None:
    plain = found("xla", jnp.float32)
    with jax.enable_x64(True):
        expected = found("reference", jnp.float64, **options)
    assert_close(found("xla", jnp.float32, **options), expected, 2e-6)
    assert np.abs(expected["o"] - plain["o"]).max() > 1e-3, "the option does something"


def attended(**options: Any) -> np.ndarray:
    """The output of one query to three slots and its own key, by one head; see the tests below."""
    q, k, v = np.ones((3, 1, 1, 1, 2), np.float32)
    slots = np.array([[[1.0, 0]], [[0, 2]], [[-1, -1]]], np.float32)
    return np.asarray(prefix_attention(q, k, v, slots, slots, np.ones((1, 1), int), **options))[0, 0, 0]


SCORES = np.array([1.0, 2.0, -2.0, 2.0])  # of the products of ones with what `attended` has
VALUES = np.array([[1.0, 0], [0, 2], [-1, -1], [1, 1]])


def softmax(scores: np.ndarray, sink: float = -np.inf) -> np.ndarray:
    return np.exp(scores) / (np.exp(scores).sum() + np.exp(sink))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_what_the_options_mean(implementation: str) -> None:
    def check(probs: np.ndarray, **options: Any) -> None:
        assert_allclose(attended(implementation=implementation, **options), probs @ VALUES, rtol=1e-5, atol=1e-6)

    check(softmax(SCORES / 2**0.5))
    check(softmax(SCORES * 0.3), scale=0.3)
    check(softmax(1.5 * np.tanh(SCORES / 1.5)), scale=1.0, soft_cap=1.5)
    check(softmax(SCORES, sink=3.0), scale=1.0, sinks=np.array([3.0]))
    check(softmax(np.where([True, False, False, True], SCORES, -np.inf)), scale=1.0, lengths=np.array([1]))


@pytest.mark.parametrize("option", ["soft_cap", "sinks"])
def test_a_kernel_without_an_option_refuses_it_and_none_does_without_the_kernel(option: str) -> None:
    arrays, segment_ids, _ = SHAPE.draw()
    for implementation in ("gpu", "tpu"):
        with pytest.raises(UserError, match=f"'{implementation}', which has no {option}: expected None"):
            prefix_attention(segment_ids=segment_ids, implementation=implementation, **arrays, **OPTIONS[option])


@pytest.mark.parametrize("implementation", ["gpu", "tpu"])
def test_kernels_take_a_scale(implementation: str) -> None:
    arrays, segment_ids, cotangent = SMALL[1].draw()
    plain = outputs(arrays, segment_ids, cotangent, implementation)
    assert is_interpreted(implementation) or kernels.platform() == implementation
    scaled = outputs(arrays | {"scale": np.float32(2 * SMALL[1].h ** -0.5)}, segment_ids, cotangent, implementation)
    expected = outputs(arrays | {"q": 2 * arrays["q"]}, segment_ids, cotangent, implementation)
    assert np.abs(scaled["o"] - plain["o"]).max() > 1e-3
    assert_allclose(scaled["o"], expected["o"], rtol=0, atol=2e-6)
