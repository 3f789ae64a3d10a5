"""The likelihood of each of many answers, which one table of means could not give a bootstrap interval of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.models.language_model import LanguageModel

ROW = 512  # tokens of a packed row; a longer prompt makes the rows longer


def answer_nlls(
    model: LanguageModel, prefix: Cartridge | None, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[float]:
    """Returns the negative log-likelihood of each answer behind its prompt and the prefix, in nats."""
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    length = -(-max(ROW, *lengths) // 64) * 64
    nlls: dict[int, float] = {}
    for members in _packed(lengths, length):
        tokens, segment_ids, positions = (np.zeros((1, length), np.int32) for _ in range(3))
        starts, start = [], 0
        for segment, i in enumerate(members, start=1):
            inside = slice(start, start + lengths[i])
            tokens[0, inside] = [*prompts[i], *answers[i]]
            segment_ids[0, inside], positions[0, inside] = segment, np.arange(lengths[i])
            starts.append(start)
            start += lengths[i]
        logits_tv = np.asarray(model.logits(tokens, segment_ids, positions, prefix)[0])
        for i, start in zip(members, starts, strict=True):
            first = start + len(prompts[i]) - 1
            nlls[i] = _nll(logits_tv[first : first + len(answers[i])], answers[i])
    return [nlls[i] for i in range(len(lengths))]


def _packed(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Returns the indices of the examples of each row, which holds at most so many tokens."""
    rows: list[list[int]] = []
    left = 0
    for i, length in enumerate(lengths):
        if length > left:
            rows.append([])
            left = most
        rows[-1].append(i)
        left -= length
    return rows


def _nll(logits_tv: np.ndarray, targets: Sequence[int]) -> float:
    logits_tv = logits_tv - logits_tv.max(-1, keepdims=True)
    total_t = np.log(np.exp(logits_tv).sum(-1, dtype=np.float64))
    return float((total_t - logits_tv[np.arange(len(targets)), list(targets)]).sum())
