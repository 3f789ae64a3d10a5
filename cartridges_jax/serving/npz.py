"""The answers to a batch as an `.npz` file, which `numpy.load(..., allow_pickle=False)` reads."""

from __future__ import annotations

import io
from collections.abc import Sequence

from cartridges_jax.serving.choices import Delta


def of_batch(text: bytes, replies: Sequence[Sequence[Delta]]) -> bytes:
    """Packs the JSON `text`, and for choice j of request i its token ids and, if it has them, its log-probabilities."""
    import numpy as np  # the server itself needs no arrays

    arrays = {"replies": np.frombuffer(text, np.uint8)}
    for i, deltas in enumerate(replies):
        for j, delta in enumerate(deltas):
            arrays[f"completion_ids_{i}_{j}"] = np.array(delta.token_ids, np.int32)
            if delta.logprobs:
                best = [entry["top_logprobs"] for entry in delta.logprobs]
                arrays[f"chosen_logprobs_{i}_{j}"] = np.array(
                    [entry["logprob"] for entry in delta.logprobs], np.float32
                )
                arrays[f"topk_indices_{i}_{j}"] = np.array([[one["token_id"] for one in row] for row in best], np.int32)
                arrays[f"topk_logprobs_{i}_{j}"] = np.array(
                    [[one["logprob"] for one in row] for row in best], np.float32
                )
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()
