"""The likelihood of each of many answers, which one table of means could not give a bootstrap interval of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.training.data import pack

ROW = 512  # tokens that a packed row has at least, and hardly more than those that its examples need


def answer_nlls(
    model: LanguageModel, prefix: Cartridge | None, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[float]:
    """Returns the negative log-likelihood of each answer behind its prompt and the prefix, in nats."""
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(lengths)
    length = -(-longest * -(-ROW // longest) // 128) * 128  # room for whole examples of the longest kind
    room = model.config.max_position_embeddings - (0 if prefix is None else prefix.offset)
    length = max(longest, min(length, room))
    nlls: dict[int, float] = {}
    for members in pack(lengths, length, range(len(lengths))):
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


def _nll(logits_tv: np.ndarray, targets: Sequence[int]) -> float:
    logits_tv = logits_tv - logits_tv.max(-1, keepdims=True)
    total_t = np.log(np.exp(logits_tv).sum(-1, dtype=np.float64))
    return float((total_t - logits_tv[np.arange(len(targets)), list(targets)]).sum())
