"""Our own synthesis against our own server: a real engine, a small model, the loopback."""

from __future__ import annotations

import asyncio
import random
import re
import urllib.request
from pathlib import Path

import pytest
import tiny
from running import running  # pyrefly: ignore[missing-import] (pytest puts this folder on the path)

import cartridges_jax as cj
from cartridges_jax.serving import engine as engines
from cartridges_jax.serving.server import Server
from cartridges_jax.serving.store import CartridgeStore
from synth import conversation
from synth.config import ChunkerConfig, ClientConfig, ResourceConfig, SamplingConfig, SynthConfig
from synth.pipeline import synthesize

CONVERSATIONS, PER_CHUNK, TOP = 8, 4, 5


def counters(root: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{root}/metrics") as response:
        found = re.findall(r"^cartridges_jax_(\w+) ([\d.]+)$", response.read().decode(), re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_a_document_becomes_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # compiling the others takes longer than they save here
    monkeypatch.setattr(engines, "CPU_PREFILL", engines.PrefillSizes({256: 1}, {256: {1: 1}}, 512))
    (tmp_path / "document.txt").write_text(tiny.TEXT)
    model = tiny.model()
    engine = engines.Engine(model, max_num_seqs=4, max_length=1024, max_top_logprobs=TOP, batch_sizes=[4])
    store = CartridgeStore(tmp_path / "none", cj.Cartridge.load)
    with running(Server(engine, model.tokenizer, store, "tiny", rng=random.Random(0))) as root:
        config = SynthConfig(
            str(tmp_path / "out"),
            CONVERSATIONS,
            ResourceConfig(str(tmp_path / "document.txt")),
            ClientConfig(f"{root}/v1", "tiny", timeout_seconds=100.0),
            ChunkerConfig(200, 300),
            conversations_per_chunk=PER_CHUNK,
            top_logprobs=TOP,
            question=SamplingConfig(max_tokens=10),
            answer=SamplingConfig(temperature=0.0, max_tokens=12),
        )
        made = conversation.read(asyncio.run(synthesize(config)))
        told = counters(root)

    assert [one.metadata["conversation_index"] for one in made] == list(range(CONVERSATIONS))
    for one in made:
        question, answer = one.messages
        assert (question.role, answer.role) == ("user", "assistant") and question.content
        for message in (question, answer):
            assert message.token_ids is not None
            said = model.tokenizer.decode([i for i in message.token_ids if i not in model.tokenizer.stop_ids])
            assert said.strip("\ufffd ") == message.content.strip("\ufffd ")
        top = answer.top_logprobs
        assert top is not None and top.shape == (len(answer.token_ids or ()), TOP)
        best = {}
        for row, token, logprob in zip(top.token_idx, top.token_id, top.logprobs, strict=True):
            best[row] = max(best.get(row, (-9.0, 0)), (logprob, token))
        assert [best[row][1] for row in sorted(best)] == list(answer.token_ids or ()), "a greedy answer takes the best"

    written = sum(len(message.token_ids or ()) for one in made for message in one.messages)
    assert told["completion_tokens_total"] == written == sum(sum(one.metadata["completion_tokens"]) for one in made)
    chunks = {one.system_prompt: len(model.tokenizer.encode(one.system_prompt)) for one in made}
    assert len(chunks) == CONVERSATIONS // PER_CHUNK
    # the questions and answers about a chunk share it: it is computed once, or twice by two that came at the same time
    assert (2 * PER_CHUNK - 2) * sum(chunks.values()) < told["cached_tokens_total"] < told["prompt_tokens_total"]
    assert told["answers_live"] == 0
