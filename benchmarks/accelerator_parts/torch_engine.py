"""transformers' `generate` with a static cache, at the shape and the numbers of requests of `engine`."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import torch

from accelerator_parts import sizes, torch_models
from accelerator_parts.measuring import Line, Options, attempts, rounded


def measure(options: Options) -> Iterator[Line]:
    size = sizes.decoding(options.tiny)
    model = torch_models.random_model("tiny" if options.tiny else "llama-3.1-8b").eval()
    for n in size.requests:
        what = {"decoding": "transformers, static cache", "requests": n, "cartridge": "none"}
        yield from attempts([(what, functools.partial(_speed, model, n, size))])
        torch_models.forget()


def _speed(model: Any, n: int, size: sizes.Decoding) -> Line:
    """A token's time is the difference between a long answer's and a short one's, which leaves the prompt out."""
    ids = torch.randint(0, model.config.vocab_size, (n, size.prompt), device=model.device)

    def spent(tokens: int) -> float:
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
        )
        torch_models.wait(None)
        return time.perf_counter() - start

    spent(size.answer), spent(size.answer // 2)  # compiles
    step = (spent(size.answer) - spent(size.answer // 2)) / (size.answer - size.answer // 2)
    return {"ms a step": rounded(step * 1e3), "tokens/s": rounded(n / step)}
