"""Attention over pages against one dense softmax for each request, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import BATCHES, Case
from numpy.testing import assert_allclose, assert_array_equal

from cartridges_jax.kernels.prefix_decode_attention import Pages, prefix_decode_attention

CASE = Case()
rng = np.random.default_rng(0)
PAGES = CASE.pages(rng)
run = jax.jit(prefix_decode_attention)


def queries(*shape: int) -> np.ndarray:
    return 2 * rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("batch", "n"), list(zip(BATCHES, (6, 2, 4, 6, 4), strict=True)))
def test_every_request_gets_what_it_gets_alone(batch: tuple[list[int], int], n: int, shared: bool) -> None:
    requests, t = batch
    q = queries(len(requests), t, n, CASE.h)
    positions = np.array([CASE.last_positions(r, t) for r in requests], np.int32)
    found = run(q, positions, PAGES, CASE.metadata(requests, shared))
    for row, r in enumerate(requests):
        assert_allclose(found[row], CASE.alone(q[row], positions[row], r, PAGES), rtol=0, atol=3e-6)


def test_what_nobody_sees_changes_nothing() -> None:
    """Positions behind the filled ones or a query, pages that only pad, and rows of a batch that are no request."""
    requests = [0, 1, 2]
    q, metadata = queries(4, 1, 4, CASE.h) / 2, CASE.metadata(requests, shared=True)
    positions = np.array([*(CASE.last_positions(r, 1) for r in requests), [0]], np.int32)
    metadata = metadata._replace(shared_mask=np.pad(metadata.shared_mask, ((0, 0), (0, 1))))
    before = run(q, positions, PAGES, metadata)
    seen = np.zeros((CASE.num_pages, CASE.z), bool)
    for row, r in enumerate(requests):
        for page, count, first in CASE.sequence(r):
            seen[page, :count] |= first + np.arange(count) <= positions[row, 0]
    keys, values, bias = (jnp.asarray(a) for a in PAGES)
    hidden = ~seen[:, None]
    loud = Pages(
        jnp.where(hidden[:, :, None], 1e3, keys),
        jnp.where(hidden[..., None], 1e3, values),
        jnp.where(hidden, 50.0, bias),
    )
    assert_array_equal(run(q, positions, loud, metadata)[:3], before[:3])
    assert np.isfinite(before).all()
