"""`decode_attention` is attention of a few tokens of each request over keys and values that lie in pages.

Each implementation is a file of its name. Tests hold all of them to `reference`.
"""

from __future__ import annotations

import importlib
from typing import Any

from jaxtyping import Array, Float

from cartridges_jax import kernels
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.kernels.decode_attention.pages import AttentionMetadata, Pages
from cartridges_jax.kernels.decode_attention.softmax import Options
from cartridges_jax.kernels.gathered_matmul import has_kernel

IMPLEMENTATIONS = ("reference", "xla", "cpu")


def decode_attention(
    q: Float[Array, "r t n h"],
    pages: Pages,
    metadata: AttentionMetadata,
    implementation: str | None = None,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " n"] | None = None,
) -> Float[Array, "r t n h"]:
    """Each query attends to all slots of its request's cartridge and to the request's tokens up to its own.

    Scores, softmax and sums are in float32. What a query does not see has no part in its result, whatever number it is,
    as long as values are finite that stand behind the last token of its own pages, and beside its cartridge's slots in
    the cartridge's head pages: `serving.engine` fills both with zeros. (Values that are not, in slots of other heads of
    the same cartridge, may reach it.)

    Args:
      q: the rotated queries of t tokens of each request, one behind the other; n is a multiple of k.
      pages: the pool, made by `new_pages` for this implementation, with the queries' own keys and values in it.
      metadata: a layer's (`AttentionMetadata.of_layer`) of what `ordered` gives for this implementation.
      implementation: "reference", "xla", "cpu", or None for the fastest that can run here.
      window: how many tokens a query sees, its own included; None means all. Slots are always seen.
      scale: what a query's products with the keys are multiplied by; None means h**-0.5.
      soft_cap: what no score may exceed before its bias: cap * tanh(score / cap); None means no limit.
      sinks: for each query head, the score of one more key, which has no value.

    Raises:
      UserError: an unknown implementation or one that cannot run here.
    """
    name = chosen(implementation)
    attention = getattr(_module(name), f"{name}_attention")
    return attention(q, pages, metadata, Options(window, scale, soft_cap, sinks))


def new_pages(num_head_pages: int, page_size: int, h: int, dtype: Any, implementation: str | None = None) -> Pages:
    """Makes an empty pool of so many head pages in the layout of an implementation."""
    return Pages.empty(num_head_pages, page_size, h, dtype, _module(chosen(implementation)).POSITIONS_LAST)


def ordered(metadata: AttentionMetadata, page_size: int, implementation: str | None = None) -> AttentionMetadata:
    """Adds to the metadata what an implementation works out once for all layers of a step."""
    name = chosen(implementation)
    return metadata._replace(order=_module(name).ordered(metadata, page_size)) if name == "cpu" else metadata


def chosen(implementation: str | None) -> str:
    """Gives the name of the implementation that was asked for, if it can run here, or of the fastest that can."""
    has_cpu = has_kernel(kernels.platform())
    if implementation is None:
        return "cpu" if has_cpu else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"implementation is {implementation!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "cpu" and not has_cpu:
        raise UserError(
            f"implementation is 'cpu', whose kernel cannot run here ({kernels.platform()}): expected None, for the "
            "fastest that can"
        )
    return implementation


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")
