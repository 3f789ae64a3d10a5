"""`decode_attention` is attention of a few tokens of each request over keys and values that lie in pages.

Each implementation is a file of its name. Tests hold all of them to `reference`.
"""

from __future__ import annotations

import importlib
from typing import Any

from jaxtyping import Array, Float, Int

from cartridges_jax import kernels
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.kernels.decode_attention.pages import AttentionMetadata, Pages
from cartridges_jax.kernels.decode_attention.sharing import Thresholds, default_thresholds
from cartridges_jax.kernels.decode_attention.softmax import Options
from cartridges_jax.kernels.gathered_matmul import has_kernel

IMPLEMENTATIONS = ("reference", "xla", "cpu", "gpu", "tpu")
KERNELS = ("gpu", "tpu")  # written in Pallas, each for the platform of its name
HAVE_RUN: tuple[str, ...] = ()  # those of them that have been measured where they run, and so may be the default there
# Those that they take. Arrays whose last axis is shorter than a register lie otherwise on a TPU than its kernel needs.
HEAD_SIZES = {"gpu": (64, 128, 256), "tpu": (128, 256)}


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
      implementation: "reference", "xla", "cpu", "gpu", "tpu", or None for the fastest that has been measured here.
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
    """Makes an empty pool of so many head pages in the layout of an implementation.

    Raises:
      UserError: an implementation that cannot run here, or not with heads of this size.
    """
    name = chosen(implementation)
    if name in KERNELS and h not in HEAD_SIZES[name]:
        raise UserError(
            f"implementation is {name!r}, which takes heads of {' or '.join(map(str, HEAD_SIZES[name]))} numbers, and "
            f"those of the model have {h}: choose 'xla'"
        )
    module = _module(name)
    whole = -(-num_head_pages // module.MULTIPLE) * module.MULTIPLE if hasattr(module, "MULTIPLE") else num_head_pages
    return Pages.empty(whole, page_size, h, dtype, module.POSITIONS_LAST)


def rotate_and_write(
    heads: Float[Array, "r t n+2k h"],
    rope: tuple[Float[Array, "r t h/2"], Float[Array, "r t h/2"]],
    slot_mapping: Int[Array, "r t"],
    pages: Pages,
    metadata: AttentionMetadata,
    implementation: str,
) -> tuple[Float[Array, "r t n h"], Pages]:
    """Rotates a layer's queries and keys, writes the keys and the values to their pages, and gives the queries.

    All of it is one kernel, which those of `KERNELS` have.

    Args:
      heads: those of the queries, of the keys and of the values beside each other, not rotated.
      rope: cosines and sines of the tokens' positions.
      slot_mapping: the index of each token among all positions of all pages; one that does not exist is not written.
      pages, metadata: as `decode_attention` has them.
    """
    return getattr(_module(implementation), f"{implementation}_rotate_and_write")(
        heads, rope, slot_mapping, pages, metadata
    )


def ordered(metadata: AttentionMetadata, page_size: int, implementation: str | None = None) -> AttentionMetadata:
    """Adds to the metadata what an implementation works out once for all layers of a step."""
    module = _module(chosen(implementation))
    return metadata._replace(order=module.ordered(metadata, page_size)) if hasattr(module, "ordered") else metadata


def thresholds(implementation: str | None = None) -> Thresholds:
    """From which size on an implementation reads what requests share together.

    Only kernels have any. What the others read does not depend on the pages that there are.
    """
    name = chosen(implementation)
    return default_thresholds(name) if name in KERNELS else Thresholds(1, 0)


def chosen(implementation: str | None) -> str:
    """Gives the name of the implementation that was asked for, if it can run here, or of the fastest that can."""
    platform = kernels.platform()
    runs_here = {"cpu": has_kernel(platform), **{name: name == platform for name in KERNELS}}
    if implementation is None:
        return platform if platform in ("cpu", *HAVE_RUN) and runs_here[platform] else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"implementation is {implementation!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    if not runs_here.get(implementation, True):
        raise UserError(
            f"implementation is {implementation!r}, whose kernel cannot run here ({platform}): expected None, for the "
            "fastest that can"
        )
    return implementation


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")
