"""PyTorch's compiled `flex_attention` with a prefix mask, which is what upstream runs, at the shapes of `attention`."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from accelerator_parts import sizes
from accelerator_parts.measuring import Line, Options, attempts, rounded, seconds
from accelerator_parts.torch_models import DEVICE, wait


def measure(options: Options) -> Iterator[Line]:
    name = "flex_attention, compiled" if DEVICE == "cuda" else "flex_attention"
    for shape in sizes.attention(options.tiny):
        what = {"attention": name, "t": shape.t, "p": shape.p}
        yield from attempts([(what, functools.partial(_speed, shape))])


def _speed(shape: sizes.Attention) -> Line:
    b, t, p, n, k, h = shape.b, shape.t, shape.p, shape.n, shape.k, shape.h
    q, cotangent = (torch.randn(b, n, t, h, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    keys, values = (torch.randn(b, k, p + t, h, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    inputs = [a.requires_grad_(DEVICE == "cuda") for a in (q, keys, values)]
    mask = create_block_mask(lambda b, n, i, j: (j < p) | (i >= j - p), None, None, t, p + t, device=DEVICE)
    compiled = torch.compile(flex_attention) if DEVICE == "cuda" else flex_attention
    forward = functools.partial(compiled, *inputs, block_mask=mask, enable_gqa=True)

    def both() -> None:
        torch.autograd.grad(forward(), inputs, cotangent)

    found: Line = {}
    passes = [("forward", forward, 2), ("both passes", both, 7)]
    for name, call, products in passes if DEVICE == "cuda" else passes[:1]:  # a CPU has the forward pass only
        spent = seconds(call, wait)
        rate = products * shape.product / spent / 1e12
        found |= {f"{name}, ms": rounded(spent * 1e3), f"{name}, TFLOP/s": rounded(rate)}
    return found
