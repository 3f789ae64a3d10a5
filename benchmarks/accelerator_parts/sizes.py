"""The sizes that both sides of a comparison have: this imports neither JAX nor torch."""

from __future__ import annotations

import dataclasses

LARGE = ("llama-3.1-8b", "qwen3-4b")  # models whose shapes are measured, with random weights
TOP_K = 20  # of the teacher's entries at a target


@dataclasses.dataclass(frozen=True)
class Attention:
    """One layer: rows, tokens of a row, slots, query heads, kv heads, head size."""

    b: int
    t: int
    p: int
    n: int = 32
    k: int = 8
    h: int = 128

    @property
    def product(self) -> float:
        """FLOPs of one of attention's products, over the pairs that a query sees: 2 are needed forward, 5 backward."""
        return self.b * self.n * self.t * (self.p + (self.t + 1) / 2) * 2 * self.h


@dataclasses.dataclass(frozen=True)
class Training:
    """Rows of a step, tokens of a row, slots."""

    rows: int
    t: int
    p: int


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Requests at once, slots of the cartridge that they share, tokens of a prompt and of an answer, of a document."""

    requests: tuple[int, ...]
    slots: int
    prompt: int
    answer: int
    document: int


@dataclasses.dataclass(frozen=True)
class DecodeAttention:
    """One layer: requests at once, slots of the cartridge that they share, tokens of each, and heads."""

    requests: tuple[int, ...]
    slots: tuple[int, ...]
    tokens: int
    n: int = 32
    k: int = 8
    h: int = 128
    dtype: str = "bfloat16"


def attention(tiny: bool) -> list[Attention]:
    """8,192 tokens in every call, the shape that matters most first."""
    if tiny:
        return [Attention(1, 64, 32, 4, 2, 64)]
    pairs = (2048, 2048), (512, 512), (8192, 512), (512, 8192), (8192, 2048), (2048, 8192), (8192, 8192)
    return [Attention(8192 // t, t, p) for t, p in pairs]


def training(tiny: bool) -> Training:
    return Training(2, 32, 24) if tiny else Training(4, 2048, 2048)


def decoding(tiny: bool) -> Decoding:
    return Decoding((4,), 24, 16, 8, 200) if tiny else Decoding((1, 64, 16, 256), 2048, 128, 64, 8000)


def decode_attention(tiny: bool) -> DecodeAttention:
    if tiny:
        return DecodeAttention((4,), (150,), 40, 4, 2, 8, "float32")
    return DecodeAttention((1, 4, 16, 256, 64), (0, 512, 2048), 1024)
