"""The engine and offline generation against the plain forward pass: the cache, its slots and what shares them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cartridges_jax.cartridge import Cartridge
from cartridges_jax.serving.engine import PREFILL_SIZES, Engine
from cartridges_jax.serving.generate import generate, generate_ids, run
from cartridges_jax.serving.scheduler import Finished, Prefix, Request, Sampled, Scheduler, SlotInput, Token

TOLERANCE = 1e-4
LENGTH = 384
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


CARTRIDGES = {"none": None, "a": cartridge_of(7, 0), "b": cartridge_of(20, 1), "biased": cartridge_of(12, 2, True)}


def prefix_of(name: str) -> Prefix | None:
    cartridge = CARTRIDGES[name]
    return None if cartridge is None else Prefix(name, cartridge.num_slots, cartridge)


def slots_of(name: str) -> int:
    cartridge = CARTRIDGES[name]
    return 0 if cartridge is None else cartridge.num_slots


def inputs(slot: int, token: int, position: int, **how: Any) -> SlotInput:
    return SlotInput(
        slot, token, position, **({"temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0, "step": 0} | how)
    )


def expected(tokens: Sequence[int], name: str) -> np.ndarray:
    """Log-probabilities after each token, by the forward pass; padded, so that one length is compiled."""
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = tiny.model().logits(padded, cartridge=CARTRIDGES[name])
    return np.asarray(jax.nn.log_softmax(logits))[0, : len(tokens)]


def same(sampled: Sampled, log_probs: np.ndarray) -> None:
    assert sampled.token == sampled.top_ids[0] == int(np.argmax(log_probs))
    assert sampled.logprob == pytest.approx(float(log_probs.max()), abs=TOLERANCE)
    np.testing.assert_allclose(sampled.top_logprobs, np.sort(log_probs)[::-1][: len(sampled.top_ids)], atol=TOLERANCE)
    np.testing.assert_allclose(log_probs[list(sampled.top_ids)], sampled.top_logprobs, atol=TOLERANCE)


def fill(engine: Engine, slot: int, name: str, tokens: Sequence[int]) -> None:
    engine.clear(slot, prefix_of(name))
    engine.prefill(slot, tokens, slots_of(name))


def continue_greedily(engine: Engine, slot: int, name: str, tokens: Sequence[int], count: int) -> list[Sampled]:
    """`tokens[:-1]` are in the cache already."""
    token, position, out = tokens[-1], slots_of(name) + len(tokens) - 1, []
    for step in range(count):
        (sampled,) = engine.decode([inputs(slot, token, position + step, step=step)])
        out.append(sampled)
        token = sampled.token
    return out


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny.model(), num_slots=4, max_length=LENGTH)


@pytest.mark.parametrize("name", CARTRIDGES)
def test_step_by_step_decoding_is_the_forward_pass(engine: Engine, name: str):
    tokens, start = TOKENS[100:154], slots_of(name)
    fill(engine, 1, name, tokens[:30])
    sampled = [engine.decode([inputs(1, tokens[i], start + i)])[0] for i in range(30, 54)]
    log_probs = expected(tokens, name)
    for i, s in enumerate(sampled, start=30):
        same(s, log_probs[i])
    assert len({s.token for s in sampled}) > 5  # a model that always says one thing would prove little


def test_a_cartridge_and_its_bias_matter():
    tokens = TOKENS[100:130]
    plain, a, biased = (expected(tokens, name) for name in ("none", "a", "biased"))
    without_bias = tiny.model().logits(np.asarray(tokens)[None], cartridge=CARTRIDGES["biased"].replace(bias=None))
    assert np.abs(plain - a).max() > 0.1
    assert np.abs(biased - np.asarray(jax.nn.log_softmax(without_bias))[0]).max() > 0.1


@pytest.mark.parametrize("token_by_token", [False, True])
def test_prefill_is_decoding_what_is_known(engine: Engine, token_by_token: bool):
    tokens = TOKENS[:20]
    engine.clear(0, prefix_of("biased"))
    if token_by_token:
        for i, token in enumerate(tokens[:-1]):
            engine.decode([inputs(0, token, slots_of("biased") + i)])
    else:
        engine.prefill(0, tokens[:-1], slots_of("biased"))
    (sampled,) = continue_greedily(engine, 0, "biased", tokens, 1)
    same(sampled, expected(tokens, "biased")[-1])


def test_slots_with_different_cartridges_decode_together(engine: Engine):
    prompts = {name: TOKENS[40 * i : 40 * i + 10 + 7 * i] for i, name in enumerate(CARTRIDGES)}
    for slot, (name, prompt) in enumerate(prompts.items()):
        fill(engine, slot, name, prompt[:-1])
    said: dict[str, list[Sampled]] = {name: [] for name in prompts}
    for step in range(8):
        batch = []
        for slot, (name, prompt) in enumerate(prompts.items()):
            token = said[name][-1].token if step else prompt[-1]
            batch.append(inputs(slot, token, slots_of(name) + len(prompt) - 1 + step))
        if step % 2:
            batch.reverse()  # the order of the inputs is the order of the results, not of the slots
        names = list(prompts) if step % 2 == 0 else list(reversed(prompts))
        for name, sampled in zip(names, engine.decode(batch), strict=True):
            said[name].append(sampled)
    for name, prompt in prompts.items():
        log_probs = expected([*prompt, *(s.token for s in said[name])], name)
        for i, sampled in enumerate(said[name]):
            same(sampled, log_probs[len(prompt) - 1 + i])


@pytest.mark.parametrize("name", ["none", "biased"])
def test_a_copy_goes_its_own_way(engine: Engine, name: str):
    common = TOKENS[:30]
    fill(engine, 0, name, common)
    fill(engine, 3, "b", TOKENS[50:150])  # what the copy must overwrite
    engine.copy(0, 3)
    ours, theirs = (*common, *TOKENS[200:210]), (*common, *TOKENS[300:320])
    engine.prefill(0, ours[30:-1], slots_of(name) + 30)
    engine.prefill(3, theirs[30:-1], slots_of(name) + 30)
    for slot, tokens in ((0, ours), (3, theirs)):
        (sampled,) = continue_greedily(engine, slot, name, tokens, 1)
        same(sampled, expected(tokens, name)[-1])


@pytest.mark.parametrize("size", sorted({s + d for s in PREFILL_SIZES for d in (-1, 0, 1)} | {1, 300}))
def test_prefill_of_any_size(engine: Engine, size: int):
    tokens = TOKENS[: size + 1]
    fill(engine, 2, "b", tokens[:-1])
    (sampled,) = continue_greedily(engine, 2, "b", tokens, 1)
    same(sampled, expected(tokens, "b")[-1])


def test_prefill_in_pieces_is_prefill_at_once(engine: Engine):
    tokens, start = TOKENS[:101], slots_of("a")
    engine.clear(2, prefix_of("a"))
    for first, last in ((0, 3), (3, 20), (20, 36), (36, 100)):
        engine.prefill(2, tokens[first:last], start + first)
    (sampled,) = continue_greedily(engine, 2, "a", tokens, 1)
    same(sampled, expected(tokens, "a")[-1])


@pytest.mark.parametrize("tail", [1, 5, 17])
def test_prefill_and_decoding_reach_the_last_position(engine: Engine, tail: int):
    """The padding of the last prefill lies past the cache: it must not wrap around or be clamped onto real tokens."""
    tokens = TOKENS[: LENGTH - slots_of("a")]
    fill(engine, 1, "a", tokens[: -tail - 1])
    engine.prefill(1, tokens[-tail - 1 : -1], LENGTH - tail - 1)
    (sampled,) = continue_greedily(engine, 1, "a", tokens, 1)
    same(sampled, expected(tokens, "a")[-1])


@pytest.mark.parametrize("name", ["none", "a"])
def test_a_used_slot_is_as_good_as_new(name: str):
    """Bit for bit: neither older tokens nor an older cartridge's bias are left."""
    used, fresh = (Engine(tiny.model(), num_slots=2, max_length=128) for _ in range(2))
    fill(used, 0, "biased", TOKENS[:100])
    continue_greedily(used, 0, "biased", TOKENS[:101], 3)
    used.copy(0, 1)
    tokens = TOKENS[200:225]
    for slot in (0, 1):
        answers = []
        for engine in (used, fresh):
            fill(engine, slot, name, tokens[:-1])
            answers.append(continue_greedily(engine, slot, name, tokens, 5))
        assert answers[0] == answers[1]


def test_a_slot_that_waits_is_left_alone(engine: Engine):
    fill(engine, 0, "none", TOKENS[:29])
    fill(engine, 1, "a", TOKENS[:40])
    for i in range(5):
        engine.decode([inputs(1, TOKENS[40 + i], slots_of("a") + 40 + i)])
    (sampled,) = continue_greedily(engine, 0, "none", TOKENS[:30], 1)
    same(sampled, expected(TOKENS[:30], "none")[-1])


def test_an_engine_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"max_length is 1025, expected at most .* window, 1024"):
        Engine(tiny.model(), max_length=1025)
    with pytest.raises(ValueError, match="num_slots is 0, expected at least 1"):
        Engine(tiny.model(), num_slots=0, max_length=64)


def test_a_cartridge_of_another_shape_is_refused(engine: Engine):
    wrong = Cartridge(jnp.zeros((2, 3, 4, 8)), jnp.zeros((2, 3, 4, 8)))
    with pytest.raises(ValueError, match="the cartridge's keys are"):
        engine.clear(0, Prefix("wrong", 3, wrong))


def test_warmup_leaves_an_engine_that_works():
    engine = Engine(tiny.model(), num_slots=2, max_length=128)
    engine.warmup()
    fill(engine, 0, "a", TOKENS[:29])
    (sampled,) = continue_greedily(engine, 0, "a", TOKENS[:30], 1)
    same(sampled, expected(TOKENS[:30], "a")[-1])


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
    with pytest.raises(
        ValueError, match=r"20 slots, a prompt of 1000 tokens and an answer of 10 exceed .* 1024: shorten"
    ):
        generate_ids(model, [(1,), TOKENS[:1000]], CARTRIDGES["b"], max_tokens=10)
    with pytest.raises(ValueError, match="prompt 1 has no tokens: expected at least one"):
        generate(model, ["a", ""])
    with pytest.raises(ValueError, match="max_tokens is 0, expected at least 1"):
        generate(model, ["a"], max_tokens=0)
    assert generate(model, []) == []
    assert len(generate_ids(model, [TOKENS[: 1024 - 20 - 4]], CARTRIDGES["b"], max_tokens=4)[0]) <= 4


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


def test_a_request_answers_the_same_alone_as_among_others():
    engine = Engine(tiny.model(), num_slots=3, max_length=128)
    requests = [request(i) for i in range(9)]
    together = sampled_tokens(engine, requests)
    backwards = sampled_tokens(engine, requests[::-1])
    for r in requests:
        alone = sampled_tokens(engine, [r])[r.id]
        for other in (together[r.id], backwards[r.id]):
            assert [s.token for s in other] == [s.token for s in alone]
            np.testing.assert_allclose([s.logprob for s in other], [s.logprob for s in alone], atol=TOLERANCE)
            np.testing.assert_allclose([s.top_logprobs for s in other], [s.top_logprobs for s in alone], atol=TOLERANCE)


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
@pytest.mark.parametrize("name", ["none", "a", "biased"])
def test_a_prompt_is_scored_as_the_forward_pass_sees_it(engine: Engine, name: str, length: int):
    prompt = TOKENS[:length]
    scored = engine.score(prompt, prefix_of(name), 5)
    wanted_tv = expected(prompt, name)
    assert [s.sampled.token for s in scored] == list(prompt[1:])
    for row_v, found in zip(wanted_tv, scored, strict=False):
        own = row_v[found.sampled.token]
        assert abs(found.sampled.logprob - own) < TOLERANCE
        assert (row_v > own + TOLERANCE).sum() < found.rank <= 1 + (row_v > own - TOLERANCE).sum()
        np.testing.assert_allclose(found.sampled.top_logprobs, np.sort(row_v)[::-1][:5], atol=TOLERANCE)
        np.testing.assert_allclose(row_v[list(found.sampled.top_ids)], found.sampled.top_logprobs, atol=TOLERANCE)


def test_scoring_touches_no_slot(engine: Engine):
    fill(engine, 0, "a", TOKENS[:20])
    before = jax.tree.map(np.asarray, engine._cache)
    engine.score(TOKENS[30:60], prefix_of("b"), 3)
    jax.tree.map(np.testing.assert_array_equal, before, engine._cache)
