"""Tests and benchmarks share this table of shapes at which every implementation is checked or timed."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of one call of `prefix_attention`, by the usual axis letters."""

    b: int
    t: int
    n: int
    k: int
    h: int
    p: int
    segments: tuple[int, ...] = ()  # lengths in every row, padding after them; none means one whole segment
    bias: bool = False
    window: int | None = None
    lengths: tuple[int, ...] | None = None  # how many slots each kv head has; None means p

    def __str__(self) -> str:
        sizes = f"b{self.b}-t{self.t}-n{self.n}-k{self.k}-h{self.h}-p{self.p}"
        parts = [sizes, *map(str, self.segments), *["bias"] * self.bias]
        parts += ["lengths", *map(str, self.lengths)] if self.lengths else []
        return "-".join(parts) + (f"-w{self.window}" if self.window else "")

    def draw(self, seed: int = 0) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
        """Draws float32 arguments (the bias may be None), segment ids, and a cotangent.

        The segments stand in another order in each row. Where a head has no slot, there is NaN.
        """
        rng = np.random.default_rng(seed)

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(np.float32)

        own, slots = (self.b, self.t, self.k, self.h), (self.p, self.k, self.h)
        arrays = {"q": 2 * normal(self.b, self.t, self.n, self.h), "k": normal(*own), "v": normal(*own)}
        arrays |= {"prefix_k": normal(*slots), "prefix_v": normal(*slots)}
        arrays["bias"] = normal(self.p, self.k) if self.bias else None
        if self.lengths is not None:
            for name in ("prefix_k", "prefix_v", "bias"):
                if arrays[name] is not None:
                    arrays[name][np.arange(self.p)[:, None] >= self.lengths] = np.nan
        segment_ids = np.zeros((self.b, self.t), np.int32)
        for row in segment_ids:
            lengths = rng.permutation(self.segments or (self.t,))
            row[: lengths.sum()] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        return arrays, segment_ids, normal(self.b, self.t, self.n, self.h)


# one block or a few for a kernel that is interpreted with small blocks
SMALL = (
    Shape(b=2, t=7, n=2, k=2, h=8, p=0),
    Shape(b=1, t=1, n=6, k=2, h=16, p=13, window=1),
    Shape(b=3, t=33, n=6, k=2, h=16, p=13, segments=(5, 1, 20), bias=True),
    Shape(b=2, t=64, n=4, k=2, h=8, p=16, segments=(64,), bias=True, window=9),
    Shape(b=2, t=50, n=4, k=1, h=64, p=37, segments=(11, 30), bias=True, window=40),
    Shape(b=2, t=33, n=6, k=2, h=16, p=40, segments=(5, 1, 20), bias=True, lengths=(40, 3)),
    Shape(b=1, t=20, n=9, k=9, h=8, p=72, window=9, lengths=(72, 0, 1, 2, 0, 0, 1, 3, 2)),  # one of 8 times the average
)
# just below, at and above the block sizes of `xla.py`
LARGE = (
    Shape(b=2, t=64, n=8, k=1, h=8, p=1, segments=(64,)),
    Shape(b=1, t=256, n=3, k=1, h=8, p=37, bias=True),
    Shape(b=2, t=257, n=2, k=2, h=8, p=5, segments=(250, 7)),
    Shape(b=1, t=512, n=3, k=1, h=8, p=0, segments=(100, 300, 60), window=256),
    Shape(b=2, t=543, n=6, k=2, h=8, p=70, segments=(200, 255, 60), bias=True, window=100),
    Shape(b=1, t=5, n=2, k=1, h=8, p=600, bias=True),
    Shape(b=2, t=300, n=6, k=3, h=8, p=600, segments=(260, 30), bias=True, lengths=(600, 0, 193)),
    Shape(b=1, t=9, n=9, k=9, h=8, p=500, bias=True, lengths=(500, 1, 16, 17, 384, 191, 97, 32, 320)),
)
# a few blocks for every kernel as it runs on an accelerator; the last block is not full
ON_DEVICE = (
    Shape(b=1, t=130, n=4, k=2, h=64, p=0),
    Shape(b=3, t=257, n=8, k=1, h=128, p=1, segments=(250, 7)),
    Shape(b=2, t=512, n=9, k=3, h=64, p=500, segments=(100, 200, 150), bias=True),
    Shape(b=1, t=300, n=8, k=4, h=256, p=130, bias=True, window=64),
    Shape(b=2, t=1024, n=32, k=8, h=128, p=700, segments=(300, 724)),
    Shape(b=2, t=300, n=18, k=9, h=64, p=1152, bias=True, lengths=(1152, 0, 1, 2, 62, 20, 40, 16, 3)),
)
# one layer of a model in training; head sizes 64, 128 and 256
MODELS = {
    "smollm2-135m": Shape(b=1, t=2048, n=9, k=3, h=64, p=500, bias=True),
    "llama-3.2-1b": Shape(b=8, t=2048, n=32, k=8, h=64, p=1000, bias=True),
    "llama-3.1-8b": Shape(b=8, t=4096, n=32, k=8, h=128, p=2048, bias=True),
    "gemma-3-4b": Shape(b=8, t=4096, n=8, k=4, h=256, p=2048, bias=True, window=1024),
}
