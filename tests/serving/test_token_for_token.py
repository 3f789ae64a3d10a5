"""A conversation made by synthesis against our own server reads the same ids in training and behind a cartridge."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import urllib.request
from pathlib import Path
from typing import Any

import chat_templates
import pytest
import tiny
from running import running  # pyrefly: ignore[missing-import] (pytest puts this folder on the path)

import cartridges_jax as cj
from cartridges_jax.chat import Chat
from cartridges_jax.initial.initializers import InitConfig
from cartridges_jax.serving import engine as engines
from cartridges_jax.serving import generate as generation
from cartridges_jax.serving.protocol import Fields
from cartridges_jax.serving.requests import Reader
from cartridges_jax.serving.server import Server
from cartridges_jax.serving.store import CartridgeStore
from cartridges_jax.training.config import TrainConfig
from cartridges_jax.training.data import example_of
from cartridges_jax.training.evals import during
from cartridges_jax.training.evals.conditions import Condition, EvalConfig, _asked
from cartridges_jax.training.evals.during import Evals, EvalsConfig, GenerationEval
from cartridges_jax.training.evals.questions import Question
from cartridges_jax.training.run import train
from synth import conversation
from synth.config import ChunkerConfig, ClientConfig, ResourceConfig, SamplingConfig, SynthConfig
from synth.pipeline import synthesize


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> cj.LanguageModel:
    folder = tmp_path_factory.mktemp("models") / "thinker"
    backend = chat_templates.backend("bytes")
    tiny.write_model(folder, vocab_size=backend.get_vocab_size())
    chat_templates.write_tokenizer(folder, "bytes", chat_templates.QWEN3)
    (folder / "generation_config.json").unlink()
    return cj.load_model(str(folder))


def prompted(root: str, body: dict[str, Any]) -> list[int]:
    """The ids that the server was prompted with."""
    url = f"{root}/v1/{'chat/' if 'messages' in body else ''}completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())["prompt_token_ids"]


@pytest.mark.parametrize("mode", [None, True, False])
def test_the_same_ids_in_all_places(
    mode: bool | None, model: cj.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engines, "CPU_PREFILL", engines.PrefillSizes({256: 1}, {256: {1: 1}}, 512))
    tokenizer = model.tokenizer
    (tmp_path / "document.txt").write_text(tiny.TEXT)
    cartridges = tmp_path / "cartridges"
    engine = engines.Engine(model, max_num_seqs=4, max_length=1024, max_top_logprobs=5, batch_sizes=[4])
    store = CartridgeStore(cartridges, lambda path: cj.Cartridge.load(path, model=model))
    with running(Server(engine, tokenizer, store, "thinker", rng=random.Random(0))) as root:
        config = SynthConfig(
            str(tmp_path / "out"),
            4,
            ResourceConfig(str(tmp_path / "document.txt")),
            ClientConfig(f"{root}/v1", "thinker", timeout_seconds=100.0),
            ChunkerConfig(60, 90),
            conversations_per_chunk=2,
            rounds=2,
            top_logprobs=5,
            question=SamplingConfig(max_tokens=10),
            answer=SamplingConfig(max_tokens=12, thinking=None if mode is None else float(mode)),
        )
        dataset = asyncio.run(synthesize(config))
        made = conversation.read(dataset)
        assert any(len(one.messages) == 4 for one in made)
        assert all(one.metadata.get("thinking") is mode for one in made)

        settings = TrainConfig(
            corpus=str(tmp_path / "document.txt"),
            output_dir=str(tmp_path / "run"),
            dataset=str(dataset),
            model=model.name,
            seq_len=512,
            num_steps=0,
            init=InitConfig(kind="text", num_slots=8),
        )
        cartridges.mkdir()
        train(settings, model).rename(cartridges / "thought.safetensors")
        cartridge = cj.Cartridge.load(cartridges / "thought.safetensors", model=model)
        assert cartridge.provenance.thinking is mode

        body = {"model": "thinker:thought", "max_tokens": 1, "return_token_ids": True}
        teacher = {"model": "thinker", "max_tokens": 1, "return_token_ids": True}
        if mode is not None:
            teacher["chat_template_kwargs"] = {"enable_thinking": mode}
        for one in made:
            turns = [{"role": message.role, "content": message.content} for message in one.messages]
            examples = example_of(one, tokenizer)
            assert len(examples) == len(turns) // 2
            for example, i in zip(examples, range(1, len(turns), 2), strict=True):
                sampled = list(one.messages[i].token_ids or ())
                trained = example.tokens.tolist()
                assert trained[len(trained) - len(sampled) :] == sampled
                trained = trained[: len(trained) - len(sampled)]
                assert prompted(root, body | {"messages": turns[:i]}) == trained
                seen = [{"role": "system", "content": one.system_prompt}, *turns[:i]]
                told = prompted(root, teacher | {"messages": seen})
                assert told[len(told) - len(trained) :] == trained
                assert tokenizer.turn_ids(turns[:i], add_generation_prompt=True, thinking=mode) == trained
                text = tokenizer.render_turns(turns[:i], add_generation_prompt=True, thinking=mode)
                assert prompted(root, body | {"prompt": text}) == trained
                ends_unthought = tokenizer.decode(trained, skip_special_tokens=False).endswith("</think>\n\n")
                assert ends_unthought == (mode is False)

        # told otherwise, a server does otherwise
        turns = [{"role": "user", "content": made[0].messages[0].content}]
        for other in (True, False):
            asked = body | {"messages": turns, "chat_template_kwargs": {"enable_thinking": other}}
            assert prompted(root, asked) == tokenizer.turn_ids(turns, add_generation_prompt=True, thinking=other)

    # the terminal's chat and the evaluations ask in the cartridge's mode as well
    question = turns[0]["content"].strip()
    asked = [{"role": "user", "content": question}]
    expected = tuple(tokenizer.turn_ids(asked, add_generation_prompt=True, thinking=mode))
    chat = Chat(engine, tokenizer, store.get("thought"), max_tokens=1, temperature=0.0, rng=random.Random(0))
    assert chat._request(asked, chat.prefix).prompt == expected
    evaluated = EvalConfig("c", "d", "o", questions="q", thinking=cartridge.thinking)
    ids, _ = _asked(Condition("cartridge", cartridge), Question(question, "The owl."), evaluated, model)
    assert tuple(ids) == expected
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": question, "answer": "The owl."}) + "\n")
    prompts: list[tuple[int, ...]] = []

    def generate(_: object, given: list[tuple[int, ...]], *rest: object, **options: object) -> list[list[int]]:
        prompts.extend(given)
        return [[] for _ in given]

    monkeypatch.setattr(generation, "generate_ids", generate)
    text = tokenizer.render_turns(asked, add_generation_prompt=True, thinking=cartridge.thinking)
    cj.generate(model, [text], cartridge=cartridge)
    monkeypatch.setattr(during, "generate_ids", generate)
    evals = EvalsConfig(generation=(GenerationEval("asked", str(questions)),))
    Evals(evals, model, "logprobs", "bucket", cartridge.thinking).run(cartridge)
    assert prompts == [expected, expected]


def test_a_text_behind_a_cartridge_begins_no_text(tmp_path: Path):
    """SentencePiece would put a space before it."""
    tokenizer = chat_templates.tokenizer("vicuna", "pieces")
    model = dataclasses.replace(tiny.model(), tokenizer=tokenizer)
    cj.Cartridge.from_tokens(model, [1, 2, 3]).save(tmp_path / "c.safetensors")
    store = CartridgeStore(tmp_path, lambda path: cj.Cartridge.load(path, model=model))
    engine = engines.Engine(model, max_num_seqs=1, max_length=256, max_top_logprobs=1, batch_sizes=[1])
    reader = Reader(engine, tokenizer, store, "tiny", max_choices=1, rng=random.Random(0))
    turns = [{"role": "user", "content": "Who sleeps in box 3?"}]
    text = tokenizer.render_turns(turns, add_generation_prompt=True)
    generation = reader.completion(Fields({"model": "tiny:c", "prompt": text}))
    assert list(generation.requests[0].prompt) == tokenizer.turn_ids(turns, add_generation_prompt=True)
    alone = reader.completion(Fields({"model": "tiny", "prompt": text}))
    assert list(alone.requests[0].prompt) == tokenizer.encode(text, add_special_tokens=True)
