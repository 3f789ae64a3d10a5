"""Every implementation against the dense definition in float64: outputs and all gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against_definition import BLOCK, assert_close, definition, jitted, outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh
from numpy.testing import assert_allclose, assert_array_equal

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.kernels.prefix_attention import gpu, prefix_attention, tpu, xla
from cartridges_jax.kernels.prefix_attention.blockwise import MASKED
from cartridges_jax.kernels.prefix_attention.shapes import LARGE, SMALL, Shape

IMPLEMENTATIONS = ["xla", "reference"]
KERNELS = ["tpu", "gpu"]
EVERYWHERE = [(name, shape) for name in IMPLEMENTATIONS for shape in SMALL + LARGE]
INTERPRETED = [(name, shape) for name in KERNELS for shape in SMALL]


@pytest.mark.parametrize(("implementation", "shape"), EVERYWHERE + INTERPRETED, ids=str)
def test_output_and_gradients(implementation: str, shape: Shape) -> None:
    drawn = shape.draw()
    options = shape.window, shape.lengths
    assert_close(outputs(*drawn, implementation, *options), definition(*drawn, *options), 2e-6)


@pytest.mark.parametrize(
    ("implementation", "shape"), [("xla", SMALL[2]), ("xla", LARGE[4]), ("tpu", SMALL[5]), ("gpu", SMALL[5])], ids=str
)
def test_bfloat16(implementation: str, shape: Shape) -> None:
    # Rows in bfloat16, slots and bias in float32 as a cartridge holds them. The definition gets the rounded inputs, so
    # that what is left is rounding inside: weights, output and each gradient a few times, 2^-9 of relative error each.
    arrays, segment_ids, cotangent = shape.draw()
    rounded = {n: a if a is None or n == "bias" else _to_bfloat16(a) for n, a in arrays.items()}
    given = {n: a.astype(jnp.bfloat16) if n in "qkv" else a for n, a in rounded.items() if a is not None}
    options = shape.window, shape.lengths
    found = outputs(given, segment_ids, _to_bfloat16(cotangent), implementation, *options)
    assert {n: a.dtype for n, a in found.items()} == {n: given[n].dtype for n in given} | {"o": jnp.bfloat16}
    assert_close(found, definition(rounded, segment_ids, _to_bfloat16(cotangent), *options), 3 * 2**-8)


def _to_bfloat16(array: np.ndarray) -> np.ndarray:
    return np.asarray(array.astype(jnp.bfloat16), np.float32)


def test_none_is_the_fastest_that_runs_here() -> None:
    arrays, segment_ids, cotangent = SMALL[2].draw()
    default, xla = (outputs(arrays, segment_ids, cotangent, name) for name in (None, "xla"))
    for name, array in xla.items():
        assert_array_equal(default[name], array)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_rows_are_their_segments_alone(implementation: str) -> None:
    """Outputs and row gradients place by place; the slots' gradients add up."""
    shape = Shape(b=1, t=300, n=6, k=2, h=8, p=9, segments=(120, 1, 140), bias=True)
    arrays, segment_ids, cotangent = shape.draw()
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


@pytest.mark.parametrize("implementation", ["xla", *KERNELS])
def test_blocks_of_other_segments_are_not_visited(implementation: str) -> None:
    """A packed row costs what its conversations cost alone: a poisoned block would spread wherever it is read."""
    half = 2 * BLOCK[implementation]
    arrays, _, cotangent = Shape(b=1, t=2 * half, n=2, k=1, h=8, p=5).draw()
    segment_ids = np.repeat([[1, 2]], half, axis=1).astype(np.int32)
    for name in ("k", "v"):
        arrays[name][:, half:] = np.nan
    found = outputs(arrays, segment_ids, cotangent, implementation)
    for name in ("o", "q", "k", "v"):
        assert np.isfinite(found[name][:, :half]).all() and np.isnan(found[name][:, half:]).any()
    for name in ("k", "v"):
        arrays[name] = np.nan_to_num(arrays[name])
        arrays[name][:, :half] = np.nan
    found = outputs(arrays, segment_ids, cotangent, implementation)
    assert np.isfinite(found["o"][:, half:]).all() and np.isnan(found["o"][:, :half]).any()


@pytest.mark.parametrize("implementation", ["xla", *KERNELS])
def test_blocks_before_the_window_are_not_visited(implementation: str) -> None:
    block = BLOCK[implementation]
    arrays, segment_ids, cotangent = Shape(b=1, t=4 * block, n=2, k=1, h=8, p=5).draw()
    for name in ("k", "v"):
        arrays[name][:, :block] = np.nan
    o = outputs(arrays, segment_ids, cotangent, implementation, block)["o"]
    assert np.isnan(o[:, :block]).all() and np.isfinite(o[:, 2 * block :]).all()


def test_no_array_of_queries_times_keys() -> None:
    t, p = 8 * BLOCK["xla"], 1000
    arrays, segment_ids, cotangent = Shape(b=1, t=t, n=2, k=1, h=8, p=p, bias=True).draw()
    given = {name: jnp.asarray(a) for name, a in arrays.items()}
    compiled = jitted.lower(given, segment_ids, cotangent, "xla").compile()
    scores = 2 * t * (p + t) * 4  # bytes, of every head
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_causality_by_gradient(implementation: str) -> None:
    """A query moves with a key exactly if the key is its own or an earlier one of its segment; with a slot always."""
    shape = Shape(b=2, t=24, n=3, k=1, h=4, p=3, segments=(9, 10))
    arrays, segment_ids, cotangent = shape.draw()

    def reach(name: str) -> np.ndarray:
        def pooled(array: jax.Array) -> jax.Array:
            given = {n: jnp.asarray(a) for n, a in arrays.items() if a is not None} | {name: array}
            o = prefix_attention(segment_ids=jnp.asarray(segment_ids), implementation=implementation, **given)
            return jnp.sum(o * cotangent, axis=(2, 3))  # [b, t]

        return np.asarray(jnp.abs(jax.jit(jax.jacrev(pooled))(jnp.asarray(arrays[name]))).sum((-2, -1)) > 0)

    index = np.arange(shape.t)
    causal_bts = (segment_ids[:, :, None] == segment_ids[:, None]) & (index[:, None] >= index)
    expected_btbs = causal_bts[:, :, None] & np.eye(shape.b, dtype=bool)[:, None, :, None]
    for name in ("k", "v"):
        assert_array_equal(reach(name), expected_btbs)
    for name in ("prefix_k", "prefix_v"):
        assert reach(name).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_slot_of_no_weight_is_no_slot(implementation: str) -> None:
    shape = Shape(b=2, t=20, n=4, k=2, h=8, p=6, bias=True)
    arrays, segment_ids, cotangent = shape.draw()
    arrays["bias"][2] = -np.inf
    with_it = outputs(arrays, segment_ids, cotangent, implementation)
    fewer = {n: np.delete(a, 2, axis=0) if n in ("prefix_k", "prefix_v", "bias") else a for n, a in arrays.items()}
    without = outputs(fewer, segment_ids, cotangent, implementation)
    for name in ("prefix_k", "prefix_v", "bias"):
        assert_array_equal(with_it[name][2], 0)
        with_it[name] = np.delete(with_it[name], 2, axis=0)
    assert_close(with_it, without, 2e-6)


RAGGED = SMALL[5]
SLOTS = ("prefix_k", "prefix_v", "bias")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS + KERNELS)
def test_what_is_no_slot_may_be_any_number_and_gets_no_gradient(implementation: str) -> None:
    arrays, *rest = RAGGED.draw()
    missing_pk = np.arange(RAGGED.p)[:, None] >= np.array(RAGGED.lengths)
    others = [np.nan, np.inf, -np.inf, np.float32(3e38)]
    filled = dict(arrays)
    for name in SLOTS:
        filled[name] = np.nan_to_num(arrays[name])
        arrays[name] = filled[name].copy()
        filled[name][missing_pk] = np.resize(others, arrays[name][missing_pk].shape)
        arrays[name][missing_pk] = 0
    found, zeros = (outputs(a, *rest, implementation, None, RAGGED.lengths) for a in (filled, arrays))
    for name, array in zeros.items():
        assert_array_equal(found[name], array, err_msg=name)
    for name in SLOTS:
        assert not found[name][missing_pk].any() and found[name][~missing_pk].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS + KERNELS)
def test_a_head_attends_as_if_its_slots_were_all_there_are(implementation: str) -> None:
    arrays, segment_ids, cotangent = RAGGED.draw()
    found = outputs(arrays, segment_ids, cotangent, implementation, None, RAGGED.lengths)
    g = RAGGED.n // RAGGED.k
    assert RAGGED.lengths is not None
    for head, length in enumerate(RAGGED.lengths):
        queries, keys = np.s_[:, :, head * g : (head + 1) * g], np.s_[:, :, head : head + 1]
        places = {"q": queries, "o": queries, "k": keys, "v": keys}
        places |= dict.fromkeys(SLOTS, np.s_[:length, head : head + 1])
        alone = definition({n: a[places[n]] for n, a in arrays.items()}, segment_ids, cotangent[queries])
        assert_close({name: array[places[name]] for name, array in found.items()}, alone, 2e-6)


@pytest.mark.parametrize("kernel", [tpu, gpu])
def test_kernels_do_not_visit_blocks_that_a_head_does_not_have(kernel: Any, monkeypatch: Any) -> None:
    """A poisoned block would spread wherever it is read, into its own gradient too."""
    shape = dataclasses.replace(RAGGED, p=96, lengths=(40, 3))
    arrays, *rest = shape.draw()
    arrays |= {name: np.nan_to_num(arrays[name], nan=MASKED if name == "bias" else 0) for name in SLOTS}
    is_unvisited_pk = np.arange(shape.p)[:, None] >= 16 * -(-np.array(shape.lengths) // 16)

    def poisoned(*slots_and_lengths: Any) -> Any:
        slots = slots_and_lengths[:3]
        return tuple(a + np.where(is_unvisited_pk.reshape(96, 2, *[1] * (a.ndim - 2)), np.nan, 0) for a in slots)

    monkeypatch.setattr(kernel, "visible_slots", poisoned)
    jax.clear_caches()
    found = outputs(arrays, *rest, kernel.__name__.split(".")[-1], None, shape.lengths)
    jax.clear_caches()
    assert_close(found, definition(arrays, *rest, None, shape.lengths), 2e-6)


def test_xla_visits_about_as_many_slots_as_heads_have(monkeypatch: Any) -> None:
    visited, read = [], xla._slots

    def counted(slots: Any, block: Any) -> Any:
        jax.debug.callback(lambda _: visited.append(block.size), block.start)
        return read(slots, block)

    monkeypatch.setattr(xla, "_slots", counted)
    shape = dataclasses.replace(RAGGED, n=4, k=4, p=1600, lengths=(1600, 62, 0, 2))
    jax.clear_caches()
    outputs(*shape.draw(), "xla", None, shape.lengths)
    jax.effects_barrier()
    jax.clear_caches()
    assert 2 * shape.b * sum(shape.lengths) <= sum(visited) <= 2 * shape.b * (sum(shape.lengths) * 4 / 3 + 16)


def test_one_program_serves_the_lengths_of_all_layers() -> None:
    arrays, segment_ids, _ = SMALL[2].draw()
    lengths_lk = np.array([[13, 2], [0, 5], [1, 0]], np.int32)

    def layer(_: None, lengths: Any) -> tuple[None, jax.Array]:
        return None, prefix_attention(segment_ids=segment_ids, lengths=lengths, **arrays)

    scanned = jax.jit(lambda lengths: jax.lax.scan(layer, None, lengths)[1])
    for lengths in (lengths_lk, lengths_lk[::-1]):
        o_lbtnh = scanned(lengths)
        for own, o in zip(lengths, o_lbtnh, strict=True):
            assert_allclose(o, layer(None, own)[1], rtol=0, atol=2e-6)
    assert scanned._cache_size() == 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bias_counts_as_copies(implementation: str) -> None:
    """log 3 on a slot is that slot three times, and bias zero is no bias (arXiv 2602.16284)."""
    shape = Shape(b=2, t=20, n=4, k=2, h=8, p=4)
    arrays, segment_ids, cotangent = shape.draw()
    plain = outputs(arrays, segment_ids, cotangent, implementation)
    zero = outputs({**arrays, "bias": np.zeros((4, 2), np.float32)}, segment_ids, cotangent, implementation)
    assert_close({n: a for n, a in zero.items() if n != "bias"}, plain, 2e-6)
    thrice = {n: np.concatenate([a, a[:1], a[:1]]) if n.startswith("prefix") else a for n, a in arrays.items()}
    weighed = {**arrays, "bias": np.log(np.array([[3.0, 3.0], [1, 1], [1, 1], [1, 1]], np.float32))}
    copies, bias = (outputs(given, segment_ids, cotangent, implementation)["o"] for given in (thrice, weighed))
    assert_allclose(bias, copies, rtol=0, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_stay_finite(implementation: str) -> None:
    arrays, segment_ids, cotangent = Shape(b=1, t=40, n=2, k=1, h=8, p=5, segments=(20, 10), bias=True).draw()
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
        ("lengths", (3,)),
    ],
)
def test_shapes_that_do_not_belong_together(name: str, shape: tuple[int, ...]) -> None:
    arrays, segment_ids, _ = Shape(b=2, t=9, n=4, k=2, h=8, p=3, bias=True).draw()
    given = {
        **arrays,
        "segment_ids": segment_ids,
        name: np.ones(shape, np.int32 if name in ("segment_ids", "lengths") else np.float32),
    }
    with pytest.raises(UserError, match="do not belong together: expected"):
        prefix_attention(**{n: jnp.asarray(a) for n, a in given.items()})


def test_unknown_implementation() -> None:
    arrays, segment_ids, _ = SMALL[0].draw()
    with pytest.raises(UserError, match="implementation is 'cuda', expected one of reference, xla, tpu, gpu"):
        prefix_attention(segment_ids=segment_ids, implementation="cuda", **arrays)


def test_a_window_holds_a_key() -> None:
    arrays, segment_ids, _ = SMALL[0].draw()
    with pytest.raises(UserError, match="window is 0, expected at least 1 key"):
        prefix_attention(segment_ids=segment_ids, window=0, **arrays)


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_kernel_that_cannot_run_here(implementation: str) -> None:
    arrays, segment_ids, _ = SMALL[4].draw()
    with pytest.raises(UserError, match=f"is '{implementation}', which needs a .* here are cpu, head size 64"):
        prefix_attention(segment_ids=segment_ids, implementation=implementation, **arrays)


@pytest.mark.parametrize(
    ("platform", "h", "dtype", "kernel"),
    [
        ("tpu", 128, jnp.bfloat16, True),
        ("gpu", 64, jnp.float32, True),
        ("tpu", 8, jnp.float32, False),
        ("gpu", 64, jnp.float16, False),
        ("cpu", 64, jnp.float32, False),
    ],
)
@pytest.mark.parametrize("have_run", [(), tuple(KERNELS)])
def test_none_is_the_kernel_of_the_devices_that_are_compiled_for_once_it_has_run_there(
    platform: str, h: int, dtype: Any, kernel: bool, have_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cartridges_jax.kernels.prefix_attention.HAVE_RUN", have_run)
    own = [jax.ShapeDtypeStruct((1, 16, n, h), dtype) for n in (4, 2, 2)]
    slots = [jax.ShapeDtypeStruct((5, 2, h), jnp.float32)] * 2
    device = AbstractDevice(device_kind="some", num_cores=1, platform=platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        jaxpr = jax.make_jaxpr(lambda *arrays: prefix_attention(*arrays))(
            *own, *slots, jax.ShapeDtypeStruct((1, 16), jnp.int32)
        )
    assert ("pallas_call" in str(jaxpr)) == (kernel and platform in have_run)


@pytest.mark.parametrize(
    ("attention", "platform", "call"),
    [(tpu.tpu_attention, "tpu", "@tpu_custom_call"), (gpu.gpu_attention, "cuda", "@__gpu$xla.gpu.triton")],
)
def test_kernels_with_lengths_lower_where_no_accelerator_is(attention: Any, platform: str, call: str) -> None:
    """To Mosaic and to Triton, in the blocks that they have there; what compiles these is not asked."""
    rows = [jax.ShapeDtypeStruct((2, 512, n, 64), jnp.bfloat16) for n in (9, 3, 3)]
    slots = [jax.ShapeDtypeStruct((1600, 3, 64), jnp.float32)] * 2

    def both(lengths: Any, segment_ids: Any, bias: Any, *arrays: Any) -> Any:
        o, pullback = jax.vjp(lambda *a: attention(*a[:-1], segment_ids, a[-1], lengths, None), *arrays, bias)
        return o, pullback(o)

    shapes = ((3,), jnp.int32), ((2, 512), jnp.int32), ((1600, 3), jnp.float32)
    others = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    lowered = jax.jit(both).trace(*others, *rows, *slots).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count(call) == 4


HEADS_SLOTS_WINDOW = [(2, 2, 0, None), (6, 2, 13, None), (4, 1, 1, 5), (3, 3, 16, 1), (3, 1, 40, 17), (4, 2, 0, 30)]


@pytest.mark.parametrize("implementation", ["xla", *KERNELS])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(choice=st.sampled_from(HEADS_SLOTS_WINDOW[1:3]), cuts=st.sets(st.integers(1, 40)), seed=st.integers(0, 99))
def test_any_layout_of_segments(implementation: str, choice: Any, cuts: set[int], seed: int) -> None:
    """Heads, slots and windows are few, since each is a compilation; the slow test takes more of them."""
    _check_layout(implementation, choice, 41, cuts, seed)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", *KERNELS])
@settings(max_examples=60, deadline=None)
@given(
    choice=st.sampled_from(HEADS_SLOTS_WINDOW),
    t=st.sampled_from([1, 15, 48]),
    cuts=st.sets(st.integers(1, 47)),
    seed=st.integers(0, 99),
)
def test_any_shape_and_layout(implementation: str, choice: Any, t: int, cuts: set[int], seed: int) -> None:
    _check_layout(implementation, choice, t, cuts, seed)


def _check_layout(implementation: str, choice: Any, t: int, cuts: set[int], seed: int) -> None:
    n, k, p, window = choice
    arrays, _, cotangent = Shape(b=2, t=t, n=n, k=k, h=8, p=p, bias=True).draw(seed)
    bounds = sorted(cut for cut in cuts if cut < t)
    ids = np.searchsorted(bounds, np.arange(t), side="right") + 1
    ids[bounds[-1] if seed % 2 and bounds else t :] = 0  # sometimes the last one is padding
    segment_ids = np.stack([ids, np.ones(t, int)]).astype(np.int32)
    given = arrays, segment_ids, cotangent
    assert_close(outputs(*given, implementation, window), definition(*given, window), 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [SMALL[2], SMALL[5]], ids=str)
def test_no_race_nor_unwritten_memory_on_tpu(shape: Shape) -> None:
    """The TPU's memories and their transfers are simulated: slow, so a small shape."""
    drawn = shape.draw()
    # where the interpreter keeps what it found has no public name
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    assert_close(outputs(*drawn, "tpu", None, shape.lengths, simulated), definition(*drawn, None, shape.lengths), 2e-6)
    assert not interpret_pallas_call.races.races_found
