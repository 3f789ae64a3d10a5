"""The engine and offline generation against the plain forward pass: pages, what shares them, and what is compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from engine_context import log_normal_lengths
from scoring import score  # pyrefly: ignore[missing-import] (pytest puts this folder on the path)

from cartridges_jax import kernels
from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.kernels.decode_attention import IMPLEMENTATIONS, KERNELS
from cartridges_jax.kernels.decode_attention.pages import lay_out_slots
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.models.params import init_params
from cartridges_jax.serving.cache import PageCache
from cartridges_jax.serving.engine import ACCELERATOR_PREFILL, CPU_PREFILL, PAGE_SIZE, Engine, PrefillSizes
from cartridges_jax.serving.generate import generate, generate_ids, run
from cartridges_jax.serving.metadata import num_pages
from cartridges_jax.serving.scheduler import (
    BlockTable,
    Chunk,
    Finished,
    LogitsRules,
    Prefix,
    Request,
    Sampled,
    Scheduler,
    SequenceInput,
    Started,
    Token,
)
from cartridges_jax.serving.steps import decode_step
from cartridges_jax.serving.warmup import Warmup

RUN_HERE = [name for name in IMPLEMENTATIONS if name not in KERNELS]
TOLERANCE = 1e-4
LENGTH = 512
TOKENS = tuple(tiny.model().tokenizer.encode(tiny.TEXT))


def cartridge_of(num_slots: int, seed: int, with_bias: bool = False) -> Cartridge:
    """Real keys and values with noise, so that nothing but these slots gives what they give."""
    rng = np.random.default_rng(seed)
    start = Cartridge.from_tokens(tiny.model(), TOKENS[seed : seed + num_slots])
    keys, values = (
        a + 0.5 * jnp.asarray(rng.standard_normal(a.shape), jnp.float32) for a in (start.keys, start.values)
    )
    bias = jnp.asarray(rng.standard_normal(keys.shape[:3]) * 2, jnp.float32) if with_bias else None
    return start.replace(keys=keys, values=values, bias=bias)


CARTRIDGES = {"none": None, "a": cartridge_of(7, 0), "b": cartridge_of(140, 1), "biased": cartridge_of(12, 2, True)}
# of these heads one is longer than a request may be in memory, while their average is 167
RAGGED = cartridge_of(600, 3, True).replace(lengths=np.array([[600, 2], [0, 66]]), num_frozen=0)
KNOWN = CARTRIDGES | {"ragged": RAGGED}


def prefix_of(name: str) -> Prefix | None:
    cartridge = KNOWN[name]
    return None if cartridge is None else Prefix.of(name, cartridge)


def slots_of(name: str) -> int:
    prefix = prefix_of(name)
    return 0 if prefix is None else prefix.length


def block_table_of(engine: Engine, index: int, name: str) -> BlockTable:
    """Pages that no other sequence has, the first of them whole ones for the cartridge."""
    each = engine.num_pages // engine.max_num_seqs
    return block_table_in(engine, range(index * each, (index + 1) * each), name)


def block_table_in(engine: Engine, pages: Sequence[int], name: str) -> BlockTable:
    return engine.block_table(prefix_of(name), pages)


def inputs(block_table: BlockTable, index: int, token: int, position: int) -> SequenceInput:
    return SequenceInput(index, token, position, block_table, 0.0, 1.0, 0, seed=0, step=0, top_logprobs=20)


def decode(engine: Engine, batch: Sequence[SequenceInput]) -> list[Sampled]:
    """A step of sequences that begin."""
    for sequence in batch:
        engine.begin(sequence)
    return engine.harvest(engine.decode([sequence.index for sequence in batch]))


def prefill(engine: Engine, tokens: Sequence[int], position: int, block_table: BlockTable) -> None:
    engine.prefill([Chunk(tokens, position, block_table)])


def expected(tokens: Sequence[int], name: str) -> np.ndarray:
    """Log-probabilities after each token, by the forward pass; padded, so that one length is compiled."""
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = tiny.model().logits(padded, cartridge=KNOWN[name])
    return np.asarray(jax.nn.log_softmax(logits))[0, : len(tokens)]


def same(sampled: Sampled, log_probs: np.ndarray) -> None:
    assert sampled.token == sampled.top_ids[0] == int(np.argmax(log_probs))
    assert sampled.logprob == pytest.approx(float(log_probs.max()), abs=TOLERANCE)
    np.testing.assert_allclose(sampled.top_logprobs, np.sort(log_probs)[::-1][: len(sampled.top_ids)], atol=TOLERANCE)
    np.testing.assert_allclose(log_probs[list(sampled.top_ids)], sampled.top_logprobs, atol=TOLERANCE)


def fill(engine: Engine, block_table: BlockTable, name: str, tokens: Sequence[int]) -> None:
    prefix = prefix_of(name)
    if prefix is not None:
        engine.load(prefix, block_table.slots)
    if tokens:
        prefill(engine, tokens, 0, block_table)


def continue_greedily(
    engine: Engine, block_table: BlockTable, tokens: Sequence[int], count: int, index: int = 0
) -> list[Sampled]:
    """`tokens[:-1]` are in the cache already. Nothing is looked at before the last step has begun."""
    engine.begin(inputs(block_table, index, tokens[-1], len(tokens) - 1))
    decoded = [engine.decode([index]) for _ in range(count)]
    return [engine.harvest(step)[0] for step in decoded]


@pytest.fixture(scope="module", params=RUN_HERE)
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(tiny.model(), max_num_seqs=4, max_length=LENGTH, attention=request.param)


@pytest.mark.parametrize("name", KNOWN)
def test_step_by_step_decoding_is_the_forward_pass(engine: Engine, name: str):
    tokens, block_table = TOKENS[100:154], block_table_of(engine, 1, name)
    fill(engine, block_table, name, tokens[:30])
    sampled = [decode(engine, [inputs(block_table, 1, tokens[i], i)])[0] for i in range(30, 54)]
    log_probs = expected(tokens, name)
    for i, s in enumerate(sampled, start=30):
        same(s, log_probs[i])
    assert len({s.token for s in sampled}) > 5  # a model that always says one thing would prove little


def test_every_family_decodes_as_its_forward_pass(tiny_model: LanguageModel):
    tokens = np.random.default_rng(0).integers(0, tiny_model.config.vocab_size, 30).tolist()
    engine = Engine(tiny_model, 1, 64, batch_sizes=[1])
    block_table = BlockTable(range(engine.num_pages))
    prefill(engine, tokens[:10], 0, block_table)
    wanted = np.asarray(jax.nn.log_softmax(tiny_model.logits(np.asarray([tokens]))))[0]
    for i in range(10, 30):
        [sampled] = decode(engine, [inputs(block_table, 0, tokens[i], i)])
        same(sampled, wanted[i])


def test_a_cartridge_and_its_bias_matter():
    tokens = TOKENS[100:130]
    plain, a, biased = (expected(tokens, name) for name in ("none", "a", "biased"))
    without_bias = tiny.model().logits(np.asarray(tokens)[None], cartridge=CARTRIDGES["biased"].replace(bias=None))
    assert np.abs(plain - a).max() > 0.1
    assert np.abs(biased - np.asarray(jax.nn.log_softmax(without_bias))[0]).max() > 0.1


@pytest.mark.parametrize("token_by_token", [False, True])
def test_prefill_is_decoding_what_is_known(engine: Engine, token_by_token: bool):
    tokens, block_table = TOKENS[:20], block_table_of(engine, 0, "biased")
    fill(engine, block_table, "biased", [] if token_by_token else tokens[:-1])
    if token_by_token:
        for i, token in enumerate(tokens[:-1]):
            decode(engine, [inputs(block_table, 0, token, i)])
    same(continue_greedily(engine, block_table, tokens, 1)[0], expected(tokens, "biased")[-1])


def test_requests_with_different_cartridges_decode_together(engine: Engine):
    prompts = {name: TOKENS[40 * i : 40 * i + 10 + 7 * i] for i, name in enumerate(CARTRIDGES)}
    block_tables = {name: block_table_of(engine, index, name) for index, name in enumerate(prompts)}
    for name, prompt in prompts.items():
        fill(engine, block_tables[name], name, prompt[:-1])
    said: dict[str, list[Sampled]] = {name: [] for name in prompts}
    indices = {name: index for index, name in enumerate(prompts)}
    for name, prompt in prompts.items():
        engine.begin(inputs(block_tables[name], indices[name], prompt[-1], len(prompt) - 1))
    for step in range(8):
        if step % 3 == 2:  # the order of the indices is that of the results, not of the sequences
            indices = dict(reversed(indices.items()))
        for name, sampled in zip(indices, engine.harvest(engine.decode(list(indices.values()))), strict=True):
            said[name].append(sampled)
    for name, prompt in prompts.items():
        log_probs = expected([*prompt, *(s.token for s in said[name])], name)
        for i, sampled in enumerate(said[name]):
            same(sampled, log_probs[len(prompt) - 1 + i])


@pytest.mark.parametrize("name", ["b", "biased", "ragged"])
def test_a_shared_cartridge_is_as_good_as_a_copy(engine: Engine, name: str):
    """Two share one, a third has its own and a fourth none."""
    shared = block_table_in(engine, [engine.num_pages - 2, engine.num_pages - 1], name)
    fill(engine, shared, name, [])
    block_tables = [BlockTable([2 * i, 2 * i + 1], shared.slots) for i in range(2)]
    block_tables += [block_table_of(engine, 2, name), BlockTable([4])]
    fill(engine, block_tables[2], name, [])
    prompts, names = [TOKENS[9 * i : 20 + 20 * i] for i in range(4)], [name] * 3 + ["none"]
    for block_table, prompt in zip(block_tables, prompts, strict=True):
        prefill(engine, prompt[:-1], 0, block_table)
    batch = [
        inputs(block_table, index, prompt[-1], len(prompt) - 1)
        for index, (block_table, prompt) in enumerate(zip(block_tables, prompts, strict=True))
    ]
    for sampled, prompt, of in zip(decode(engine, batch), prompts, names, strict=True):
        same(sampled, expected(prompt, of)[-1])


@pytest.mark.parametrize("name", ["none", "biased"])
def test_a_copy_goes_its_own_way(engine: Engine, name: str):
    common, ours, theirs = TOKENS[:30], (*TOKENS[:30], *TOKENS[200:210]), (*TOKENS[:30], *TOKENS[300:320])
    mine, other = block_table_of(engine, 0, name), block_table_of(engine, 3, name)
    fill(engine, mine, name, common)
    fill(engine, other, name, TOKENS[50:150])  # what the copy must overwrite
    engine.copy(mine.pages[0], other.pages[0], len(common))
    for block_table, tokens in ((mine, ours), (other, theirs)):
        prefill(engine, tokens[30:-1], 30, block_table)
        same(continue_greedily(engine, block_table, tokens, 1)[0], expected(tokens, name)[-1])


@pytest.mark.parametrize("size", sorted({s + d for s in CPU_PREFILL.tokens for d in (-1, 0, 1)} | {1, 300}))
def test_prefill_of_any_size(engine: Engine, size: int):
    tokens, block_table = TOKENS[: size + 1], block_table_of(engine, 2, "b")
    fill(engine, block_table, "b", tokens[:-1])
    same(continue_greedily(engine, block_table, tokens, 1)[0], expected(tokens, "b")[-1])


@pytest.mark.parametrize("sizes", [CPU_PREFILL, ACCELERATOR_PREFILL])
def test_prefill_of_several_requests_is_that_of_each(
    engine: Engine, sizes: PrefillSizes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine, "_prefill_sizes", sizes)
    names = ["a", "none", "b", "a"]
    prompts = [TOKENS[50 * i : 50 * i + n] for i, n in enumerate((20, 200, 14, 170))]
    block_tables = [block_table_of(engine, index, name) for index, name in enumerate(names)]
    for name, block_table, prompt in zip(names, block_tables, prompts, strict=True):
        fill(engine, block_table, name, prompt[:5])
    engine.prefill([Chunk(prompt[5:-1], 5, table) for prompt, table in zip(prompts, block_tables, strict=True)])
    batch = [inputs(block_tables[i], i, prompt[-1], len(prompt) - 1) for i, prompt in enumerate(prompts)]
    for sampled, prompt, name in zip(decode(engine, batch), prompts, names, strict=True):
        same(sampled, expected(prompt, name)[-1])


def test_prefill_in_pieces_is_prefill_at_once(engine: Engine):
    tokens, block_table = TOKENS[:201], block_table_of(engine, 2, "a")
    fill(engine, block_table, "a", [])
    for first, last in ((0, 3), (3, 20), (20, 36), (36, 200)):
        prefill(engine, tokens[first:last], first, block_table)
    same(continue_greedily(engine, block_table, tokens, 1)[0], expected(tokens, "a")[-1])


@pytest.mark.parametrize("tail", [1, 5, 17])
def test_prefill_and_decoding_reach_the_last_position(engine: Engine, tail: int):
    """The padding of the last prefill lies past the pages: it must not wrap around or be clamped onto real tokens."""
    tokens, block_table = TOKENS[: LENGTH - slots_of("a")], block_table_of(engine, 1, "a")
    fill(engine, block_table, "a", tokens[: -tail - 1])
    prefill(engine, tokens[-tail - 1 : -1], len(tokens) - tail - 1, block_table)
    same(continue_greedily(engine, block_table, tokens, 1)[0], expected(tokens, "a")[-1])


@pytest.mark.parametrize("attention", RUN_HERE)
@pytest.mark.parametrize("name", ["none", "a"])
def test_a_used_page_is_as_good_as_new(name: str, attention: str):
    """Bit for bit: neither older tokens nor an older cartridge's bias are left."""
    used, fresh = (Engine(tiny.model(), max_num_seqs=1, max_length=128, attention=attention) for _ in range(2))
    pages = range(used.num_pages)
    fill(used, block_table_in(used, pages, "biased"), "biased", TOKENS[:100])
    used.copy(0, 1, 100)
    tokens = TOKENS[200:225]
    block_table = block_table_in(used, pages, name)
    answers = []
    for engine in (used, fresh):
        fill(engine, block_table, name, tokens[:-1])
        answers.append(continue_greedily(engine, block_table, tokens, 5))
    assert answers[0] == answers[1]


def test_a_request_that_waits_is_left_alone(engine: Engine):
    waiting, other = block_table_of(engine, 0, "none"), block_table_of(engine, 1, "a")
    fill(engine, waiting, "none", TOKENS[:29])
    fill(engine, other, "a", TOKENS[:40])
    continue_greedily(engine, other, TOKENS[:41], 5, index=1)
    same(continue_greedily(engine, waiting, TOKENS[:30], 1)[0], expected(TOKENS[:30], "none")[-1])


def test_an_engine_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="max_num_seqs is 0, expected at least 1"):
        Engine(tiny.model(), max_num_seqs=0, max_length=64)
    with pytest.raises(UserError, match="cache_tokens is 256, expected at least 384 for a request of 200 positions"):
        Engine(tiny.model(), max_length=200, cache_tokens=256)


def test_an_engine_needs_nothing_of_the_model_s_weights():
    """So that a server holds them once."""
    model = replace(tiny.model(), params=jax.tree.map(jnp.copy, tiny.model().params))
    engine = Engine(model, max_num_seqs=1, max_length=128)
    for leaf in jax.tree.leaves(model.params):
        leaf.delete()
    block_table = block_table_of(engine, 0, "none")
    fill(engine, block_table, "none", TOKENS[:19])
    same(continue_greedily(engine, block_table, TOKENS[:20], 1)[0], expected(TOKENS[:20], "none")[-1])


def test_weights_that_bfloat16_holds_lie_in_it_and_nothing_else_does(engine: Engine):
    """Multiplied in float32 all the same: what is said is what the same weights in float32 say."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), tiny.model().params)
    model, tokens = replace(tiny.model(), params=params), TOKENS[100:130]
    rounded = Engine(model, max_num_seqs=4, max_length=LENGTH)
    fill(rounded, block_table_of(rounded, 1, "none"), "none", tokens[:-1])
    [sampled] = continue_greedily(rounded, block_table_of(rounded, 1, "none"), tokens, 1, index=1)
    same(sampled, np.asarray(jax.nn.log_softmax(model.logits(np.asarray([tokens]))))[0, -1])
    names = {"qkv", "o", "gate_up", "down"}  # the vocabulary is not a multiple of 16
    for made, dtype in ((rounded, "bfloat16"), (engine, "float32")):
        weights = made._weights | made._weights["layers"]
        assert {leaf.dtype for name in names for leaf in jax.tree.leaves(weights[name])} == {jnp.dtype(dtype)}
        assert {a.dtype for a in jax.tree.leaves(made._cache)} == {jnp.dtype(jnp.float32)}


def test_a_cpu_compiles_one_layer_however_many_there_are():
    """So that a deep model starts as soon, and takes as little memory for its programs, as a shallow one."""

    def lines(num_layers: int) -> int:
        config = replace(tiny.model().config, num_layers=num_layers)
        model = replace(tiny.model(), config=config, params=init_params(config, jax.random.key(0)))
        engine = Engine(model, max_num_seqs=1, max_length=128)
        options = {"config": config, "mesh": engine._mesh, "num_top": 0}
        program = decode_step.lower(engine._weights, engine._cache, engine._last, engine._next_batch([0]), **options)
        return program.as_text().count("\n")

    assert lines(2) == lines(9)


def test_a_cartridge_of_another_shape_is_refused(engine: Engine):
    wrong = Cartridge(jnp.zeros((2, 3, 4, 8)), jnp.zeros((2, 3, 4, 8)))
    with pytest.raises(UserError, match="the cartridge's keys are"):
        engine.load(Prefix("wrong", 3, wrong), [0])


def greedy(prompt: Sequence[int], name: str, count: int) -> list[int]:
    """Generation without a cache."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(expected(tokens, name)[-1])))
        if tokens[-1] in tiny.model().tokenizer.stop_ids:
            return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", ["none", "biased"])
def test_greedy_generation_is_the_forward_pass_again_and_again(name: str):
    prompts = [TOKENS[i : i + n] for i, n in ((0, 5), (10, 1), (30, 40))]
    found = generate_ids(tiny.model(), prompts, CARTRIDGES[name], max_tokens=12)
    assert found == [greedy(prompt, name, 12) for prompt in prompts]


def test_the_text_as_a_cartridge_is_the_text_in_the_prompt():
    model, lines = tiny.model(), tiny.TEXT.splitlines(keepends=True)
    text, questions = "".join(lines[:8]), lines[8:11]
    assert model.tokenizer.encode(text) + model.tokenizer.encode(lines[8]) == model.tokenizer.encode(text + lines[8])
    inside = generate(model, [text + q for q in questions], max_tokens=16)
    behind = generate(model, questions, cartridge=Cartridge.from_text(model, text), max_tokens=16)
    assert behind == inside
    assert behind != generate(model, questions, max_tokens=16)
    assert len(set(behind)) > 1


def test_generation_ends_at_a_stop_token(monkeypatch: pytest.MonkeyPatch):
    model, prompts = tiny.model(), [TOKENS[i : i + 20] for i in range(3)]
    answers = generate_ids(model, prompts, max_tokens=20, temperature=1.0)
    stop = answers[0][8]
    monkeypatch.setattr(model.tokenizer, "stop_ids", frozenset({stop}))
    expected = [answer[: [*answer, stop].index(stop)] for answer in answers]
    assert generate_ids(model, prompts, max_tokens=20, temperature=1.0) == expected
    assert len(expected[0]) < len(answers[0])


def test_generation_gives_as_many_tokens_as_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiny.model().tokenizer, "stop_ids", frozenset())
    for count in (1, 2, 17):
        assert [len(a) for a in generate_ids(tiny.model(), [TOKENS[:3], TOKENS[:50]], max_tokens=count)] == [count] * 2


def test_what_does_not_fit_is_refused_in_one_sentence():
    model = tiny.model()
    with pytest.raises(ValueError, match=r"a prompt of 1020 tokens and an answer of 10 exceed .* 1024: shorten"):
        generate_ids(model, [(1,), TOKENS[:1020]], CARTRIDGES["b"], max_tokens=10)
    with pytest.raises(UserError, match="prompt 1 has no tokens: expected at least one"):
        generate(model, ["a", ""])
    with pytest.raises(UserError, match="max_tokens is 0, expected at least 1"):
        generate(model, ["a"], max_tokens=0)
    assert generate(model, []) == []


def test_slots_use_up_no_positions_of_the_model(tmp_path: Path):
    """Slots, prompt and answer exceed the window together; prompt and answer fill it."""
    model = tiny.load_model(str(tiny.write_model(tmp_path, max_position_embeddings=64)))
    prompt, cartridge = TOKENS[:60], CARTRIDGES["b"]
    [answer] = generate_ids(model, [prompt], cartridge, max_tokens=4)
    logits = model.logits(np.asarray([[*prompt, *answer]]), cartridge=cartridge)
    assert answer == np.argmax(logits[0, 59 : 59 + len(answer)], axis=-1).tolist() and answer
    [told] = sampled_tokens(Engine(model, 1, 256), [Request("0", prompt, prefix_of("b"), 4, top_logprobs=3)]).values()
    logits = model.logits(np.asarray([[*prompt, *(s.token for s in told[:-1])]]), cartridge=cartridge)
    for sampled, log_probs in zip(told, np.asarray(jax.nn.log_softmax(logits))[0, 59:], strict=True):
        same(sampled, log_probs)
    with pytest.raises(UserError, match=r"61 tokens of the prompt and 4 of the answer exceed the model's window of 64"):
        sampled_tokens(Engine(model, 1, 256), [Request("0", TOKENS[:61], prefix_of("b"), 4)])


def sampled_tokens(engine: Engine, requests: Sequence[Request]) -> dict[str, list[Sampled]]:
    out: dict[str, list[Sampled]] = {request.id: [] for request in requests}
    for event in run(Scheduler(engine, max_queue=len(requests)), requests):
        if isinstance(event, Token):
            out[event.id].append(event.sampled)
        assert not isinstance(event, Finished) or event.reason in ("stop", "length")
    return out


def request(i: int, **how: Any) -> Request:
    name = list(CARTRIDGES)[i % 4]
    prompt = TOKENS[13 * i : 13 * i + 5 + 11 * (i % 5)]
    settings = {"max_tokens": 6 + i % 5, "temperature": (0.0, 0.8, 1.5)[i % 3], "seed": 100 + i, "top_logprobs": 3}
    settings |= {"top_p": (1.0, 0.9)[i % 2], "top_k": (0, 0, 0, 12)[i % 4]}
    return Request(str(i), prompt, prefix_of(name), **settings | how)


def agree(found: Sequence[Sampled], wanted: Sequence[Sampled]) -> None:
    assert [s.token for s in found] == [s.token for s in wanted]
    np.testing.assert_allclose([s.logprob for s in found], [s.logprob for s in wanted], atol=TOLERANCE)
    np.testing.assert_allclose([s.top_logprobs for s in found], [s.top_logprobs for s in wanted], atol=TOLERANCE)


@pytest.mark.parametrize("attention", RUN_HERE)
def test_a_request_answers_the_same_alone_as_among_others(attention: str):
    engine = Engine(tiny.model(), max_num_seqs=3, max_length=256, attention=attention)
    requests = [request(i) for i in range(9)]
    together = sampled_tokens(engine, requests)
    backwards = sampled_tokens(engine, requests[::-1])
    for r in requests:
        alone = sampled_tokens(engine, [r])[r.id]
        agree(together[r.id], alone)
        agree(backwards[r.id], alone)


def test_with_too_little_memory_for_all_cartridges_each_is_loaded_again():
    plenty = Engine(tiny.model(), max_num_seqs=2, max_length=256, batch_sizes=[2])
    scarce = Engine(tiny.model(), max_num_seqs=2, max_length=256, cache_tokens=4 * PAGE_SIZE, batch_sizes=[2])
    requests = [request(i) for i in range(8)] + [replace(request(i), id=str(8 + i)) for i in range(8)]
    wanted, found = sampled_tokens(plenty, requests), sampled_tokens(scarce, requests)
    for r in requests:
        agree(found[r.id], wanted[r.id])


def test_a_request_that_gives_its_pages_back_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch):
    """Three prompts fill a page each, and of five pages there are not enough for the second page of all answers."""
    scarce = Engine(tiny.model(), max_num_seqs=3, max_length=256, cache_tokens=5 * PAGE_SIZE, batch_sizes=[3])
    begun: list[int] = []
    begin = scarce.begin
    monkeypatch.setattr(scarce, "begin", lambda sequence: (begun.append(sequence.step), begin(sequence)))
    requests = [Request(str(i), TOKENS[150 * i :][:120], max_tokens=20, temperature=0.8, seed=i) for i in range(3)]
    found = sampled_tokens(scarce, requests)
    assert len(begun) == 4 and begun[:3] == [0, 0, 0] and begun[3] > 0, "one went on behind its first tokens"
    for r in requests:
        agree(found[r.id], sampled_tokens(scarce, [r])[r.id])
        assert len(found[r.id]) == 20 or found[r.id][-1].token in r.stop_ids


@pytest.mark.parametrize("attention", RUN_HERE)
def test_a_shared_beginning_of_prompts_is_written_once_and_read_by_all(attention: str):
    engine = Engine(tiny.model(), max_num_seqs=4, max_length=512, batch_sizes=[4], attention=attention)
    requests = [replace(request(1), id=str(i), prompt=(*TOKENS[:300], *TOKENS[10 * i : 10 * i + 7])) for i in range(4)]
    started = [e for e in run(Scheduler(engine, 4), requests) if isinstance(e, Started)]
    assert [e.cached_tokens for e in started] == [0, 300, 300, 300]
    together = sampled_tokens(engine, requests)
    for r in requests:
        agree(together[r.id], sampled_tokens(Engine(tiny.model(), 1, 512, batch_sizes=[1]), [r])[r.id])


class EveryToken:
    """Allows every token."""

    def mask(self) -> None:
        return None

    def take(self, token: int) -> None:
        pass


def test_rare_programs_are_compiled_between_requests_and_touch_none_of_their_pages():
    engine = Engine(tiny.model(), max_num_seqs=3, max_length=384, batch_sizes=[1, 3])
    scheduler = Scheduler(engine, 4)
    first = replace(request(1), prompt=TOKENS[:300])
    before = [e for e in run(scheduler, [first]) if isinstance(e, Token)]
    warmup = Warmup(rare=engine.rare_programs())
    while warmup.run_rare():
        pass
    again = list(run(scheduler, [replace(first, id="again")]))
    assert [e.cached_tokens for e in again if isinstance(e, Started)] == [299]
    agree([e.sampled for e in again if isinstance(e, Token)], [e.sampled for e in before])


@pytest.fixture
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs as this platform has them, but for its kernels. They run on a CPU, and no others are kept."""
    jax.clear_caches()
    monkeypatch.setattr(kernels, "platform", lambda: request.param)
    yield
    jax.clear_caches()


@contextlib.contextmanager
def nothing_is_compiled() -> Iterator[None]:
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, _, **__: compiled.append(name))
    try:
        yield
        assert not [name for name in compiled if "compile" in name]
        jax.jit(lambda x: x + 1)(1)
        assert [name for name in compiled if "compile" in name]  # the listener does listen
    finally:
        jax.monitoring.clear_event_listeners()


@pytest.mark.parametrize("platform", ["cpu", "gpu"], indirect=True)
def test_nothing_is_compiled_after_warmup(platform: None):
    engine = Engine(tiny.model(), max_num_seqs=3, max_length=384, batch_sizes=[1, 3])
    Warmup([*engine.programs(), *engine.rare_programs()]).run()
    with nothing_is_compiled():
        requests = [replace(request(i), prompt=TOKENS[i : i + 1 + 29 * i]) for i in range(8)]
        requests.append(replace(request(8), prompt=TOKENS[:126]))  # the answer begins a page
        requests.append(replace(request(9), constraint=EveryToken))
        requests += [request(10 + i, **how) for i, how in enumerate(WANTED)]
        assert len(sampled_tokens(engine, requests)) == 10 + len(WANTED)
        score(engine, TOKENS[:100], prefix_of("b"), 5)
        score(engine, TOKENS[:7], None, 0)


def test_an_engine_of_one_request_compiles_no_program_for_the_ends_of_several_prompts():
    engine = Engine(tiny.model(), max_num_seqs=1, max_length=384)
    several = len(Engine(tiny.model(), max_num_seqs=3, max_length=384, batch_sizes=[3]).programs())
    assert len(engine.programs()) == several - 1
    Warmup(engine.programs()).run()
    with nothing_is_compiled():
        prompts = [TOKENS[i : i + 1 + 29 * i] for i in range(8)]
        assert len(sampled_tokens(engine, [replace(request(i), prompt=p) for i, p in enumerate(prompts)])) == 8


WANTED: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.7},
    {"temperature": 1.0, "top_k": 3},
    {"top_logprobs": 3},
    {"temperature": 1.0, "top_logprobs": 2},
    {"logits": LogitsRules(presence_penalty=0.5)},
]


@pytest.fixture(scope="module")
def by_want() -> list[tuple[Request, list[Sampled]]]:
    """Requests that want different things of their sampling, and what a CPU answers."""
    nothing: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "top_logprobs": 0}
    requests = [request(i, **nothing | how) for i, how in enumerate(WANTED)]
    answers = sampled_tokens(Engine(tiny.model(), 8, 384), requests)
    assert len({tuple(sampled.token for sampled in answer) for answer in answers.values()}) > 3
    return [(one, answers[one.id]) for one in requests]


@pytest.mark.parametrize("platform", ["gpu"], indirect=True)
def test_an_accelerator_s_programs_give_what_requests_want(
    by_want: list[tuple[Request, list[Sampled]]], platform: None
):
    """They have no branches: the host, which knows what is wanted, chooses among them."""
    engine = Engine(tiny.model(), 8, 384, batch_sizes=[1, 8], attention="xla")
    together = sampled_tokens(engine, [one for one, _ in by_want])
    for one, answer in by_want:
        agree(sampled_tokens(engine, [one])[one.id], answer)
        agree(together[one.id], answer)


def test_a_seed_is_a_sample():
    model, prompts = tiny.model(), [TOKENS[:10], TOKENS[:10], TOKENS[20:30]]
    a, b, c = (generate_ids(model, prompts, max_tokens=12, temperature=1.0, seed=seed) for seed in (0, 0, 5))
    assert a == b
    assert a != c
    assert a[0] != a[1]  # the same prompt twice is two samples
    assert generate_ids(model, prompts[1:], max_tokens=12, temperature=1.0, seed=1) == a[1:]


def test_a_short_top_p_is_greedy():
    model, prompts = tiny.model(), [TOKENS[:10], TOKENS[5:30]]
    assert generate_ids(model, prompts, temperature=1.0, top_p=1e-6) == generate_ids(model, prompts)


@pytest.mark.parametrize("length", [2, 64, 65, 150])
@pytest.mark.parametrize("name", ["none", "a", "biased", "ragged"])
def test_a_prompt_is_scored_as_the_forward_pass_sees_it(engine: Engine, name: str, length: int):
    prompt = TOKENS[:length]
    scored = score(engine, prompt, prefix_of(name), 5)
    wanted_tv = expected(prompt, name)
    assert [s.sampled.token for s in scored] == list(prompt[1:])
    for row_v, found in zip(wanted_tv, scored, strict=False):
        own = row_v[found.sampled.token]
        assert abs(found.sampled.logprob - own) < TOLERANCE
        assert (row_v > own + TOLERANCE).sum() < found.rank <= 1 + (row_v > own - TOLERANCE).sum()
        np.testing.assert_allclose(found.sampled.top_logprobs, np.sort(row_v)[::-1][:5], atol=TOLERANCE)
        np.testing.assert_allclose(row_v[list(found.sampled.top_ids)], found.sampled.top_logprobs, atol=TOLERANCE)


@pytest.mark.parametrize("mean", [50, 100, 200])
def test_a_cartridge_takes_the_memory_of_its_slots(mean: int):
    """Of a model of SmolLM2's heads, whose cartridge has many short ones and a few long ones."""
    lengths = log_normal_lengths(30, 3, mean)
    heads, count = np.arange(3)[None], num_pages(int(lengths.sum()))
    slots = [np.zeros((30, int(lengths.max()), 3, *h), np.float32) for h in ([64], [64], [])]
    laid = [lay_out_slots(a, lengths, heads, PAGE_SIZE, count)[0] for a in slots]
    cache = PageCache(20, PAGE_SIZE, 90, lambda prefix: len(laid[0]))
    allocations = [cache.allocate(Prefix(str(i), mean, None), [0], 1) for i in range(3)]
    assert all(a is not None for a in allocations)
    taken = {head_page for a in allocations for head_page in head_pages_of(a.slots, len(laid[0]), 90)}
    assert len(taken) == 3 * len(laid[0]), "what several have in common is no head page"
    needed = 2 * 64 * 4 * int(lengths.sum())
    assert needed < sum(a.nbytes for a in laid) <= 1.15 * needed


def head_pages_of(slots: Sequence[int], count: int, heads: int) -> list[int]:
    return [slots[i // heads] + i % heads for i in range(count)]


def test_a_cartridge_may_have_no_slots(engine: Engine):
    none_lpkh = np.zeros((tiny.LAYERS, 0, tiny.KV_HEADS, tiny.HEAD_DIM), np.float32)
    empty = Prefix("empty", 0, Cartridge(none_lpkh, none_lpkh, num_frozen=0))
    assert score(engine, TOKENS[:7], empty, 1) == score(engine, TOKENS[:7], None, 1)
