"""Attention over pages, by every implementation that a CPU can run, against one dense softmax for each request."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest
from decode_cases import BATCHES, REQUESTS, Case, attend, is_interpreted, rotated_and_written
from numpy.testing import assert_allclose

from cartridges_jax import kernels
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.kernels.decode_attention import IMPLEMENTATIONS, KERNELS, decode_attention
from cartridges_jax.kernels.decode_attention.pages import Pages, lay_out_slots, slot_starts
from cartridges_jax.models.block import rotate

CASES = {"uniform": Case(), "ragged": Case(is_ragged=True), "four ragged heads": Case(kv_heads=4, is_ragged=True)}
OPTIONS = {
    "a window": {"window": 3},
    "a scale": {"scale": 0.2},
    "a soft cap": {"soft_cap": 1.5},
    "sinks": {"sinks": np.linspace(-2, 3, 12).astype(np.float32)},
    "all": {"window": 5, "scale": 0.5, "soft_cap": 2.0, "sinks": np.linspace(3, -2, 12).astype(np.float32)},
}
RUN_HERE = [name for name in IMPLEMENTATIONS if not is_interpreted(name)]
PAIRS = list(zip(BATCHES, (3, 1, 2, 3, 2), strict=True))  # a batch, and how many query heads share a kv head
ALONE = [(name, *pair, case) for name in RUN_HERE for pair in PAIRS for case in CASES]
# interpreting takes its time: every batch with one case, and every case with one batch
ALONE += [(name, *pair, "ragged") for name in KERNELS if name not in RUN_HERE for pair in PAIRS]
ALONE += [(name, *PAIRS[0], case) for name in KERNELS if name not in RUN_HERE for case in CASES if case != "ragged"]
WITH_OPTIONS = [(name, batch, how) for name in IMPLEMENTATIONS for batch in (BATCHES[0], BATCHES[3]) for how in OPTIONS]
WITH_OPTIONS = [one for one in WITH_OPTIONS if one[0] in RUN_HERE or one[1] == BATCHES[0] or one[2] == "all"]
rng = np.random.default_rng(0)


def queries(*shape: int) -> np.ndarray:
    return 2 * rng.standard_normal(shape).astype(np.float32)


@functools.cache
def program(implementation: str | None, options: str | None = None):
    """Interpreted kernels are hardly optimized, since compiling is what takes their tests' time."""
    how = OPTIONS[options] if options else {}
    hurry: dict[str, Any] = {"xla_backend_optimization_level": 0} if is_interpreted(implementation) else {}
    call = functools.partial(attend, implementation=implementation, **how)
    return jax.jit(lambda q, pages, metadata: call(q, pages, metadata), compiler_options=hurry)


@pytest.mark.parametrize(("implementation", "batch", "g", "name"), ALONE)
def test_every_request_gets_what_it_gets_alone(implementation: str, batch: tuple[list[int], int], g: int, name: str):
    """What is nobody's, or lies behind a request's last token, is NaN here."""
    (requests, t), case = batch, CASES[name]
    q = queries(len(requests), t, g * case.kv_heads, case.h)
    found = program(implementation)(q, case.pages(implementation), case.given(requests, t))
    for row, r in enumerate(requests):
        assert_allclose(found[row], case.alone(q[row], r), rtol=0, atol=3e-6)


@pytest.mark.parametrize(("implementation", "batch", "options"), WITH_OPTIONS)
def test_every_option_is_the_definition_s(implementation: str, batch: tuple[list[int], int], options: str):
    (requests, t), case = batch, CASES["ragged" if is_interpreted(implementation) else "four ragged heads"]
    q = queries(len(requests), t, 12, case.h)
    found = program(implementation, options)(q, case.pages(implementation), case.given(requests, t))
    for row, r in enumerate(requests):
        assert_allclose(found[row], case.alone(q[row], r, **OPTIONS[options]), rtol=0, atol=3e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_that_only_pads_a_batch_gets_numbers_and_changes_none(implementation: str):
    case, (requests, t) = CASES["ragged"], BATCHES[0]
    q, metadata = queries(len(requests) + 1, t, 4, case.h), case.given(requests, t)
    rows = {"starts": 0, "block_table": -1, "cartridge_ids": -1}
    given = {name: getattr(metadata, name) for name in rows}
    padded = {name: np.concatenate([a, np.full_like(a[:1], rows[name])]) for name, a in given.items()}
    found = program(implementation)(q, case.pages(implementation), metadata._replace(**padded))
    assert np.isfinite(found).all()
    for row, r in enumerate(requests):
        assert_allclose(found[row], case.alone(q[row], r), rtol=0, atol=3e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("without", ["a", "b"])
def test_a_cartridge_of_nan_reaches_nobody_behind_another_in_the_same_page(without: str, implementation: str):
    case, (requests, t) = CASES["ragged"], BATCHES[0]
    q = queries(len(requests), t, 4, case.h)
    pages, metadata = case.pages(implementation, without), case.given(requests, t)
    found = program(implementation)(q, pages, metadata)
    for row, r in enumerate(requests):
        if REQUESTS[r][0] != without:
            assert_allclose(found[row], case.alone(q[row], r), rtol=0, atol=3e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [None, 3])
def test_beginnings_that_requests_share_are_read_for_all_who_do(window: int | None, implementation: str):
    """Two requests see the same five pages, the last half full; a third sees the first two of them and one of its own,
    in which a window lies. A request behind another cartridge shares nothing, and one is alone."""
    case = CASES["ragged"]
    metadata = case.given([4, 0, 4, 1, 4], 1)
    starts, table = metadata.starts.copy(), metadata.block_table.copy()
    starts[2], table[2, 2:] = 9, -1
    table[2, 2] = table[1, 1]  # of request 0: its positions 4 and 5 stand at 8 and 9 here
    q = queries(5, 1, 4, case.h)
    run = jax.jit(functools.partial(attend, implementation=implementation, window=window))
    found = run(q, case.pages(implementation), metadata._replace(starts=starts, block_table=table))
    for row, r in ((0, 4), (1, 0), (3, 1), (4, 4)):
        assert_allclose(found[row], case.alone(q[row], r, window), rtol=0, atol=3e-6)
    mixed = Case(is_ragged=True)
    mixed.contents[4] = tuple(np.concatenate([mixed.contents[4][i][:8], mixed.contents[0][i][4:6]]) for i in range(3))
    assert_allclose(found[2], mixed.alone(q[2], 4, window, tokens=10), rtol=0, atol=3e-6)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("t", [1, 21])
def test_new_keys_are_rotated_and_written_where_they_belong(t: int, implementation: str):
    """Beside them nothing changes; a token that has no page is written nowhere, and chunks may begin inside pages."""
    k, n, h, z, r, layers, layer = 2, 4, 16, 32, 3, 2, 1
    metadata = Case().given([0, 1, 2][:r], 1)._replace(slot_lens=np.zeros((layers, 2, k), np.int32), layer=layer)
    pages = Pages.empty(12 * layers * k, z, h, np.float32, False)
    pages = pages.replace(keys=pages.keys + 1, values=pages.values + 2)
    first = np.array([5 * z + 3, 2 * z + 15, 8 * z - 1])  # the last one's go on in page 8
    slot_mapping = (first[:, None] + np.arange(t)).astype(np.int32)
    slot_mapping[1, t // 2 :] = 12 * z
    heads, angles = queries(r, t, n + 2 * k, h), rng.standard_normal((r, t, h // 2)).astype(np.float32)
    rope = np.cos(angles), np.sin(angles)
    q, found = jax.jit(functools.partial(rotated_and_written, implementation=implementation))(
        heads, rope, slot_mapping, pages, metadata
    )
    turned = np.asarray(rotate(heads, rope))
    assert_allclose(q, turned[:, :, :n], rtol=0, atol=1e-6)
    keys, values = np.array(pages.keys), np.array(pages.values)
    for row, token in np.ndindex(r, t):
        page, offset = divmod(int(slot_mapping[row, token]), z)
        if page < 12:
            at = page * layers * k + layer * k
            keys[at : at + k, offset] = turned[row, token, n : n + k]
            values[at : at + k, offset] = heads[row, token, n + k :]
    assert_allclose(found.keys, keys, rtol=0, atol=1e-6)
    assert_allclose(found.values, values, rtol=0, atol=0)


def test_slots_lie_flat():
    """Head behind head and layer behind layer; no memory is lost but behind the last slot."""
    lengths = np.array([[5, 0, 2], [1, 4, 3]])
    slots = np.arange(2 * 5 * 3).reshape(2, 5, 3) + 1
    laid = lay_out_slots(slots, lengths, np.array([[0, 1, 2]]), 4, 4)
    assert laid.shape == (1, 4, 4)
    first, second = slots
    flat = [*first[:, 0], *first[:2, 2], *second[:1, 0], *second[:4, 1], *second[:3, 2], 0]
    assert laid.reshape(-1).tolist() == flat
    on_two = lay_out_slots(slots, lengths, np.array([[0], [2]]), 4, 2)
    assert on_two.reshape(2, 8).tolist() == [
        [*first[:, 0], *second[:1, 0], 0, 0],
        [*first[:2, 2], *second[:3, 2], 0, 0, 0],
    ]
    assert slot_starts(lengths).tolist() == [[0, 5, 5], [7, 8, 12]]


def test_an_implementation_that_is_none_or_cannot_run_here_is_refused(monkeypatch: pytest.MonkeyPatch):
    case, (requests, t) = Case(), BATCHES[2]
    arguments = queries(1, t, 2, case.h), case.pages("xla"), case.given(requests, t)
    with pytest.raises(UserError, match="implementation is 'cuda', expected one of reference, xla, cpu, gpu, tpu"):
        decode_attention(*arguments, "cuda")
    monkeypatch.setattr(kernels, "platform", lambda: "tpu")
    with pytest.raises(UserError, match=r"implementation is 'cpu', whose kernel cannot run here \(tpu\)"):
        decode_attention(*arguments, "cpu")
