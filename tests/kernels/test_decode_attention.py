"""Attention over pages, by every implementation that a CPU can run, against one dense softmax for each request."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from decode_cases import BATCHES, LAYER, REQUESTS, Case
from numpy.testing import assert_allclose

from cartridges_jax import kernels
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.kernels.decode_attention import IMPLEMENTATIONS, decode_attention, ordered
from cartridges_jax.kernels.decode_attention.pages import lay_out_slots, slot_starts

CASES = {"uniform": Case(), "ragged": Case(is_ragged=True), "four ragged heads": Case(kv_heads=4, is_ragged=True)}
OPTIONS = {
    "a window": {"window": 3},
    "a scale": {"scale": 0.2},
    "a soft cap": {"soft_cap": 1.5},
    "sinks": {"sinks": np.linspace(-2, 3, 12).astype(np.float32)},
    "all": {"window": 5, "scale": 0.5, "soft_cap": 2.0, "sinks": np.linspace(3, -2, 12).astype(np.float32)},
}
rng = np.random.default_rng(0)


def queries(*shape: int) -> np.ndarray:
    return 2 * rng.standard_normal(shape).astype(np.float32)


@functools.cache
def program(implementation: str | None, options: str | None = None):
    how = OPTIONS[options] if options else {}
    return jax.jit(lambda q, pages, metadata: decode_attention(q, pages, metadata, implementation, **how))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("batch", "g"), list(zip(BATCHES, (3, 1, 2, 3, 2), strict=True)))
def test_every_request_gets_what_it_gets_alone(batch: tuple[list[int], int], g: int, name: str, implementation: str):
    """What is nobody's, or lies behind a request's last token, is NaN here."""
    (requests, t), case = batch, CASES[name]
    q = queries(len(requests), t, g * case.kv_heads, case.h)
    found = program(implementation)(q, case.pages(implementation), case.metadata(requests, t, implementation))
    for row, r in enumerate(requests):
        assert_allclose(found[row], case.alone(q[row], r), rtol=0, atol=3e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("batch", [BATCHES[0], BATCHES[3]])
def test_every_option_is_the_definition_s(batch: tuple[list[int], int], options: str, implementation: str):
    (requests, t), case = batch, CASES["four ragged heads"]
    q = queries(len(requests), t, 12, case.h)
    found = program(implementation, options)(q, case.pages(implementation), case.metadata(requests, t, implementation))
    for row, r in enumerate(requests):
        assert_allclose(found[row], case.alone(q[row], r, **OPTIONS[options]), rtol=0, atol=3e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_that_only_pads_a_batch_gets_numbers_and_changes_none(implementation: str):
    case, (requests, t) = CASES["ragged"], BATCHES[0]
    q, metadata = queries(len(requests) + 1, t, 4, case.h), case.given(requests, t)
    rows = {"starts": 0, "block_table": -1, "cartridge_ids": -1}
    given = {name: getattr(metadata, name) for name in rows}
    padded = {name: np.concatenate([a, np.full_like(a[:1], rows[name])]) for name, a in given.items()}
    metadata = ordered(metadata._replace(**padded), case.z, implementation).of_layer(LAYER)
    found = program(implementation)(q, case.pages(implementation), metadata)
    assert np.isfinite(found).all()
    for row, r in enumerate(requests):
        assert_allclose(found[row], case.alone(q[row], r), rtol=0, atol=3e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("without", ["a", "b"])
def test_a_cartridge_of_nan_reaches_nobody_behind_another_in_the_same_page(without: str, implementation: str):
    case, (requests, t) = CASES["ragged"], BATCHES[0]
    q = queries(len(requests), t, 4, case.h)
    pages, metadata = case.pages(implementation, without), case.metadata(requests, t, implementation)
    found = program(implementation)(q, pages, metadata)
    for row, r in enumerate(requests):
        if REQUESTS[r][0] != without:
            assert_allclose(found[row], case.alone(q[row], r), rtol=0, atol=3e-6)


def test_slots_lie_flat():
    """Head behind head and layer behind layer; no memory is lost but behind the last slot."""
    lengths = np.array([[5, 0, 2], [1, 4, 3]])
    slots = np.arange(2 * 5 * 3).reshape(2, 5, 3) + 1
    laid = lay_out_slots(slots, lengths, 4)
    assert laid.shape == (4, 4)
    first, second = slots
    flat = [*first[:, 0], *first[:2, 2], *second[:1, 0], *second[:4, 1], *second[:3, 2], 0]
    assert laid.reshape(-1).tolist() == flat
    assert slot_starts(lengths).tolist() == [[0, 5, 5], [7, 8, 12]]


def test_an_implementation_that_is_none_or_cannot_run_here_is_refused(monkeypatch: pytest.MonkeyPatch):
    case, (requests, t) = Case(), BATCHES[2]
    arguments = queries(1, t, 2, case.h), case.pages("xla"), case.metadata(requests, t, "xla")
    with pytest.raises(UserError, match="implementation is 'cuda', expected one of reference, xla, cpu"):
        decode_attention(*arguments, "cuda")
    monkeypatch.setattr(kernels, "platform", lambda: "tpu")
    with pytest.raises(UserError, match=r"implementation is 'cpu', whose kernel cannot run here \(tpu\)"):
        decode_attention(*arguments, "cpu")
