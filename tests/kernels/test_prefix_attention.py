"""Every implementation against the dense definition in float64: outputs and all gradients."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from cartridges_jax.kernels.prefix_attention import prefix_attention
from cartridges_jax.kernels.prefix_attention.xla import BLOCK

IMPLEMENTATIONS = ["xla", "reference"]


@dataclasses.dataclass(frozen=True)
class Case:
    b: int
    t: int
    n: int
    k: int
    h: int
    p: int
    segments: tuple[int, ...] = ()  # lengths in every row, padding after them; none means one whole segment
    bias: bool = False

    def __str__(self) -> str:
        sizes = f"b{self.b}-t{self.t}-n{self.n}-k{self.k}-h{self.h}-p{self.p}"
        return sizes + "".join(f"-{length}" for length in self.segments) + ("-bias" if self.bias else "")


CASES = [
    Case(b=2, t=7, n=2, k=2, h=8, p=0),
    Case(b=1, t=1, n=6, k=2, h=16, p=13),
    Case(b=3, t=33, n=6, k=2, h=16, p=13, segments=(5, 1, 20), bias=True),
    Case(b=2, t=64, n=8, k=1, h=8, p=1, segments=(64,)),
    Case(b=2, t=50, n=8, k=1, h=64, p=129, segments=(11, 30), bias=True),
    Case(b=1, t=BLOCK, n=3, k=1, h=8, p=37, bias=True),
    Case(b=2, t=BLOCK + 1, n=2, k=2, h=8, p=5, segments=(250, 7)),
    Case(b=1, t=2 * BLOCK, n=3, k=1, h=8, p=0, segments=(100, 300, 60)),
    Case(b=2, t=2 * BLOCK + 31, n=6, k=2, h=8, p=70, segments=(200, 255, 60), bias=True),
]


def inputs(case: Case, seed: int = 0) -> tuple[dict[str, np.ndarray | None], np.ndarray, np.ndarray]:
    """Arrays in float32, segment ids, and a cotangent."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    own, slots = (case.b, case.t, case.k, case.h), (case.p, case.k, case.h)
    arrays: dict[str, np.ndarray | None] = {
        "q": 2 * draw(case.b, case.t, case.n, case.h),
        "k": draw(*own),
        "v": draw(*own),
    }
    arrays |= {"prefix_k": draw(*slots), "prefix_v": draw(*slots)}
    arrays["bias"] = draw(case.p, case.k) if case.bias else None
    segment_ids = np.zeros((case.b, case.t), np.int32)
    for row in segment_ids:
        lengths = rng.permutation(case.segments or (case.t,))  # rows are cut in different places
        row[: lengths.sum()] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return arrays, segment_ids, draw(case.b, case.t, case.n, case.h)


def outputs(
    arrays: dict[str, Any], segment_ids: np.ndarray, cotangent: np.ndarray, implementation: str | None
) -> dict[str, np.ndarray]:
    """The output "o" and the gradient of each input."""
    return {n: np.asarray(a) for n, a in _outputs(arrays, segment_ids, cotangent, implementation).items()}


@functools.partial(jax.jit, static_argnums=3)
def _outputs(arrays: dict[str, Any], segment_ids: Any, cotangent: Any, implementation: str | None) -> dict[str, Any]:
    def attend(differentiated: dict[str, Any]) -> Any:
        return prefix_attention(segment_ids=segment_ids, implementation=implementation, **differentiated)

    o, pullback = jax.vjp(attend, {name: a for name, a in arrays.items() if a is not None})
    return {"o": o, **pullback(cotangent.astype(o.dtype))[0]}


def definition(
    arrays: dict[str, np.ndarray | None], segment_ids: np.ndarray, cotangent: np.ndarray
) -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        wide = {name: None if a is None else a.astype(np.float64) for name, a in arrays.items()}
        found = outputs(wide, segment_ids, cotangent.astype(np.float64), "reference")
    assert all(a.dtype == np.float64 for a in found.values())
    return found


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    """Errors as a fraction of an array's largest value: gradients of slots are sums over all queries."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        scale = max(1.0, float(np.abs(array).max(initial=0)))
        assert_allclose(found[name].astype(np.float64), array, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients(case: Case, implementation: str) -> None:
    arrays, segment_ids, cotangent = inputs(case)
    assert_close(
        outputs(arrays, segment_ids, cotangent, implementation), definition(arrays, segment_ids, cotangent), 2e-6
    )


@pytest.mark.parametrize("case", [CASES[2], CASES[8]], ids=str)
def test_bfloat16(case: Case) -> None:
    # Rows in bfloat16, slots and bias in float32 as a cartridge holds them. The definition gets the rounded inputs, so
    # that what is left is rounding inside: weights, output and each gradient a few times, 2^-9 of relative error each.
    arrays, segment_ids, cotangent = inputs(case)
    rounded = {n: a if a is None or n == "bias" else _to_bfloat16(a) for n, a in arrays.items()}
    given = {n: a.astype(jnp.bfloat16) if n in "qkv" else a for n, a in rounded.items() if a is not None}
    found = outputs(given, segment_ids, _to_bfloat16(cotangent), "xla")
    assert {n: a.dtype for n, a in found.items()} == {n: given[n].dtype for n in given} | {"o": jnp.bfloat16}
    assert_close(found, definition(rounded, segment_ids, _to_bfloat16(cotangent)), 3 * 2**-8)


def _to_bfloat16(array: np.ndarray) -> np.ndarray:
    return np.asarray(array.astype(jnp.bfloat16), np.float32)


def test_none_is_the_fastest_that_runs_here() -> None:
    arrays, segment_ids, cotangent = inputs(CASES[2])
    default, xla = (outputs(arrays, segment_ids, cotangent, name) for name in (None, "xla"))
    for name, array in xla.items():
        assert_array_equal(default[name], array)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_rows_are_their_segments_alone(implementation: str) -> None:
    """Outputs and row gradients place by place; the slots' gradients add up."""
    case = Case(b=1, t=300, n=6, k=2, h=8, p=9, segments=(120, 1, 140), bias=True)
    arrays, segment_ids, cotangent = inputs(case)
    cotangent[segment_ids == 0] = 0
    packed = outputs(arrays, segment_ids, cotangent, implementation)
    sums = {name: np.zeros_like(packed[name]) for name in ("prefix_k", "prefix_v", "bias")}
    for segment in (1, 2, 3):
        here = np.flatnonzero(segment_ids[0] == segment)
        own = {n: a if a is None or n not in "qkv" else a[:, here] for n, a in arrays.items()}
        alone = outputs(own, np.ones((1, len(here)), np.int32), cotangent[:, here], implementation)
        rows = ("o", "q", "k", "v")
        assert_close({name: alone[name] for name in rows}, {name: packed[name][:, here] for name in rows}, 2e-6)
        for name in sums:
            sums[name] += alone[name]
    assert_close(sums, {name: packed[name] for name in sums}, 2e-6)


def test_blocks_of_other_segments_are_not_visited() -> None:
    """A packed row costs what its conversations cost alone: a poisoned block would spread wherever it is read."""
    arrays, _, cotangent = inputs(Case(b=1, t=4 * BLOCK, n=2, k=1, h=8, p=5))
    segment_ids = np.repeat([[1, 1, 2, 2]], BLOCK, axis=1).astype(np.int32)
    for name in ("k", "v"):
        arrays[name][:, 2 * BLOCK :] = np.nan
    found = outputs(arrays, segment_ids, cotangent, "xla")
    for name in ("o", "q", "k", "v"):
        assert np.isfinite(found[name][:, : 2 * BLOCK]).all() and np.isnan(found[name][:, 2 * BLOCK :]).any()
    for name in ("k", "v"):
        arrays[name] = np.nan_to_num(arrays[name])
        arrays[name][:, : 2 * BLOCK] = np.nan
    found = outputs(arrays, segment_ids, cotangent, "xla")
    assert np.isfinite(found["o"][:, 2 * BLOCK :]).all() and np.isnan(found["o"][:, : 2 * BLOCK]).any()


def test_no_array_of_queries_times_keys() -> None:
    t, p = 8 * BLOCK, 1000
    arrays, segment_ids, cotangent = inputs(Case(b=1, t=t, n=2, k=1, h=8, p=p, bias=True))
    given = {name: jnp.asarray(a) for name, a in arrays.items()}
    compiled = _outputs.lower(given, segment_ids, cotangent, "xla").compile()
    scores = 2 * t * (p + t) * 4  # bytes, of every head
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_causality_by_gradient(implementation: str) -> None:
    """A query moves with a key exactly if the key is its own or an earlier one of its segment; with a slot always."""
    case = Case(b=2, t=24, n=3, k=1, h=4, p=3, segments=(9, 10))
    arrays, segment_ids, cotangent = inputs(case)

    def reach(name: str) -> np.ndarray:
        def pooled(array: jax.Array) -> jax.Array:
            given = {n: jnp.asarray(a) for n, a in arrays.items() if a is not None} | {name: array}
            o = prefix_attention(segment_ids=jnp.asarray(segment_ids), implementation=implementation, **given)
            return jnp.sum(o * cotangent, axis=(2, 3))  # [b, t]

        return np.asarray(jnp.abs(jax.jit(jax.jacrev(pooled))(jnp.asarray(arrays[name]))).sum((-2, -1)) > 0)

    index = np.arange(case.t)
    causal_bts = (segment_ids[:, :, None] == segment_ids[:, None]) & (index[:, None] >= index)
    expected_btbs = causal_bts[:, :, None] & np.eye(case.b, dtype=bool)[:, None, :, None]
    for name in ("k", "v"):
        assert_array_equal(reach(name), expected_btbs)
    for name in ("prefix_k", "prefix_v"):
        assert reach(name).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_slot_of_no_weight_is_no_slot(implementation: str) -> None:
    case = Case(b=2, t=20, n=4, k=2, h=8, p=6, bias=True)
    arrays, segment_ids, cotangent = inputs(case)
    arrays["bias"][2] = -np.inf
    with_it = outputs(arrays, segment_ids, cotangent, implementation)
    fewer = {n: np.delete(a, 2, axis=0) if n in ("prefix_k", "prefix_v", "bias") else a for n, a in arrays.items()}
    without = outputs(fewer, segment_ids, cotangent, implementation)
    for name in ("prefix_k", "prefix_v", "bias"):
        assert_array_equal(with_it[name][2], 0)
        with_it[name] = np.delete(with_it[name], 2, axis=0)
    assert_close(with_it, without, 2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bias_counts_as_copies(implementation: str) -> None:
    """log 3 on a slot is that slot three times, and bias zero is no bias (arXiv 2602.16284)."""
    case = Case(b=2, t=20, n=4, k=2, h=8, p=4)
    arrays, segment_ids, cotangent = inputs(case)
    plain = outputs(arrays, segment_ids, cotangent, implementation)
    zero = outputs({**arrays, "bias": np.zeros((4, 2), np.float32)}, segment_ids, cotangent, implementation)
    assert_close({n: a for n, a in zero.items() if n != "bias"}, plain, 2e-6)
    thrice = {n: np.concatenate([a, a[:1], a[:1]]) if n.startswith("prefix") else a for n, a in arrays.items()}
    weighed = {**arrays, "bias": np.log(np.array([[3.0, 3.0], [1, 1], [1, 1], [1, 1]], np.float32))}
    copies, bias = (outputs(given, segment_ids, cotangent, implementation)["o"] for given in (thrice, weighed))
    assert_allclose(bias, copies, rtol=0, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_stay_finite(implementation: str) -> None:
    arrays, segment_ids, cotangent = inputs(Case(b=1, t=40, n=2, k=1, h=8, p=5, segments=(20, 10), bias=True))
    arrays["q"] *= 1e4
    arrays["bias"] *= 1e4
    found = outputs(arrays, segment_ids, cotangent, implementation)
    assert all(np.isfinite(a).all() for a in found.values())
    assert np.abs(found["o"]).max() <= max(np.abs(arrays["v"]).max(), np.abs(arrays["prefix_v"]).max()) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("q", (2, 9, 5, 8)),  # 5 query heads over 2 kv heads
        ("q", (2, 9, 4, 16)),
        ("q", (2, 8, 4, 8)),
        ("k", (1, 9, 2, 8)),
        ("v", (2, 9, 2, 4)),
        ("v", (2, 9, 1, 8)),
        ("prefix_k", (3, 1, 8)),
        ("prefix_k", (3, 2, 4)),
        ("prefix_v", (4, 2, 8)),
        ("bias", (2, 3)),
        ("segment_ids", (2, 10)),
        ("segment_ids", (1, 9)),
    ],
)
def test_shapes_that_do_not_belong_together(name: str, shape: tuple[int, ...]) -> None:
    arrays, segment_ids, _ = inputs(Case(b=2, t=9, n=4, k=2, h=8, p=3, bias=True))
    given = {
        **arrays,
        "segment_ids": segment_ids,
        name: np.ones(shape, np.int32 if name == "segment_ids" else np.float32),
    }
    with pytest.raises(ValueError, match="do not belong together: expected"):
        prefix_attention(**{n: jnp.asarray(a) for n, a in given.items()})


def test_unknown_implementation() -> None:
    arrays, segment_ids, _ = inputs(CASES[0])
    with pytest.raises(ValueError, match="implementation is 'cuda', expected one of reference, xla"):
        prefix_attention(segment_ids=segment_ids, implementation="cuda", **arrays)
