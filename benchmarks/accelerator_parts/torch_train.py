"""The same training step in PyTorch: transformers with SDPA and trainable slots, and PEFT's CARTRIDGE."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import CartridgeConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from accelerator_parts import sizes, torch_models
from accelerator_parts.measuring import Line, Options, attempts, rounded, seconds

# what trains, and the logits of the second half of each row
Student = tuple[list[torch.Tensor], Callable[[], torch.Tensor]]


def measure(options: Options) -> Iterator[Line]:
    size = sizes.training(options.tiny)
    for name in ("tiny",) if options.tiny else sizes.LARGE:
        model = torch_models.random_model(name)
        what = _what(name, "transformers, SDPA", size)
        yield from attempts([(what, functools.partial(_speed, _slots, model, size))])
        what = _what(name, "PEFT's CARTRIDGE", size)
        yield from attempts([(what, functools.partial(_speed, _peft, model, size))])
        for layer in model.model.layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        what = _what(name, "transformers, SDPA, layers recomputed", size)
        yield from attempts([(what, functools.partial(_speed, _slots, model, size))])
        del model


def _what(name: str, side: str, size: sizes.Training) -> Line:
    return {"step of": name, "side": side, "rows": size.rows, "t": size.t, "p": size.p}


class _Prefix(DynamicCache):
    """Slots before a row's own keys, which are not kept: a layer that is computed again finds what it found first.

    transformers' own recomputation drops the cache.
    """

    def append(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> None:
        super().update(keys, values, layer)

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *_: Any, **__: Any) -> Any:
        slots = self.layers[layer_idx]
        return torch.cat([slots.keys, key_states], -2), torch.cat([slots.values, value_states], -2)


def _slots(model: Any, tokens: torch.Tensor, p: int) -> Student:
    config, (rows, t) = model.config, tokens.shape
    shape = (config.num_hidden_layers, 1, config.num_key_value_heads, p, config.head_dim)
    slots = [torch.randn(shape, device=model.device, requires_grad=True) for _ in range(2)]
    positions = torch.arange(p, p + t, device=model.device)[None].expand(rows, -1)

    def logits() -> torch.Tensor:
        cache = _Prefix(config=config)
        for layer in range(config.num_hidden_layers):
            keys, values = (a[layer].to(model.dtype).expand(rows, -1, -1, -1) for a in slots)
            cache.append(keys, values, layer)
        return model(
            input_ids=tokens, past_key_values=cache, position_ids=positions, use_cache=True, logits_to_keep=t // 2
        ).logits

    return slots, logits


def _peft(model: Any, tokens: torch.Tensor, p: int) -> Student:
    adapted: Any = get_peft_model(
        model, CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=p, num_frozen_tokens=1)
    )
    trained = [a for a in adapted.parameters() if a.requires_grad]
    return trained, lambda: adapted(input_ids=tokens, logits_to_keep=tokens.shape[1] // 2).logits


def _speed(student: Callable[..., Student], model: Any, size: sizes.Training) -> Line:
    rows, t, v = size.rows, size.t, model.config.vocab_size
    tokens = torch.randint(0, v, (rows, t), device=model.device)
    ids = torch.randint(0, v, (rows, t // 2, sizes.TOP_K), device=model.device)
    torch_models.forget()
    trained, logits = student(model.train(), tokens, size.p)
    adam = torch.optim.Adam(trained, lr=1e-3)

    def step() -> torch.Tensor:
        logprobs = logits().float().log_softmax(-1).gather(-1, ids)
        loss = -(0.03 * logprobs).sum(-1).mean()
        loss.backward()
        adam.step()
        adam.zero_grad()
        return loss.detach()

    spent = seconds(step, torch_models.wait, repeats=2, series=2)
    return {
        "tokens/s": rounded(rows * t / spent),
        "peak memory, GiB": rounded(torch_models.peak_bytes() / 2**30),
        "loss": rounded(float(step()), 5),
    }
