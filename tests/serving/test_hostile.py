"""Hostile cartridges beside clean requests, however a CPU computes attention: no numbers reach another's answer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scoring import score  # pyrefly: ignore[missing-import] (pytest puts this folder on the path)

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.kernels import decode_attention, gathered_matmul
from cartridges_jax.kernels.decode_attention import IMPLEMENTATIONS, KERNELS
from cartridges_jax.models.language_model import load_model
from cartridges_jax.serving import decoder
from cartridges_jax.serving.engine import Engine
from cartridges_jax.serving.generate import generate_ids, run
from cartridges_jax.serving.scheduler import Finished, Prefix, Request, Sampled, Scheduler, Token

TOLERANCE = 1e-4
TOKENS = tuple(tiny.model().tokenizer.encode(tiny.TEXT))
LARGEST = float(np.finfo(np.float32).max)
HOSTILE = {
    "keys of NaN": ("keys", math.nan),
    "values of NaN": ("values", math.nan),
    "infinite keys": ("keys", math.inf),
    "infinite values": ("values", -math.inf),
    "large keys": ("keys", 1e38),
    "keys far below every mask": ("keys", -LARGEST),
    "large values": ("values", 1e38),
    "the largest values": ("values", LARGEST),
    "a large bias": ("bias", 1e38),
    "a bias far below every mask": ("bias", -1e38),
    "an infinite bias": ("bias", math.inf),
    "a bias of NaN": ("bias", math.nan),
}


def clean_cartridge(num_slots: int, seed: int) -> Cartridge:
    return Cartridge.from_tokens(tiny.model(), TOKENS[seed : seed + num_slots])


def hostile_cartridge(kind: str, num_slots: int = 20) -> Cartridge:
    """Clean but for every third slot; of signs that differ, so that no sum of products is of one sign."""
    name, value = HOSTILE[kind]
    cartridge = clean_cartridge(num_slots, 3).replace(bias=jnp.zeros((tiny.LAYERS, num_slots, tiny.KV_HEADS)))
    array = np.array(getattr(cartridge, name))
    array[:, ::3] = value
    if name != "bias":
        array[:, ::6] *= -1
    return cartridge.replace(**{name: jnp.asarray(array)})


CLEAN = {"a": clean_cartridge(7, 0), "b": clean_cartridge(140, 1)}


def requests(which: Sequence[int]) -> list[Request]:
    """Greedy and drawn, with either cartridge or none, some with a beginning in common."""
    made = []
    for i in which:
        name = (None, "a", "b")[i % 3]
        prefix = None if name is None else Prefix.of(name, CLEAN[name])
        prompt = (*TOKENS[: 150 * (i % 2)], *TOKENS[11 * i : 11 * i + 6 + i])
        made.append(
            Request(
                f"clean {i}", prompt, prefix, 9, (0.0, 0.0, 0.9)[i // 2 % 3], (1.0, 0.9)[i % 2], seed=i, top_logprobs=5
            )
        )
    return made


def attacks(kind: str, count: int) -> list[Request]:
    prefix = Prefix(kind, 20, hostile_cartridge(kind))
    return [Request(f"{kind} {i}", TOKENS[40 * i : 40 * i + 8], prefix, 6, top_logprobs=5) for i in range(count)]


def answers(engine: Engine, asked: Sequence[Request]) -> tuple[dict[str, list[Sampled]], dict[str, str]]:
    """What each says, and why it ends."""
    said: dict[str, list[Sampled]] = {request.id: [] for request in asked}
    reasons = {}
    for event in run(Scheduler(engine, len(asked)), asked):
        if isinstance(event, Token):
            said[event.id].append(event.sampled)
        elif isinstance(event, Finished):
            reasons[event.id] = event.reason
    return said, reasons


def agree(found: Sequence[Sampled], wanted: Sequence[Sampled]) -> None:
    assert [s.token for s in found] == [s.token for s in wanted]
    np.testing.assert_allclose([s.logprob for s in found], [s.logprob for s in wanted], atol=TOLERANCE)
    np.testing.assert_allclose([s.top_logprobs for s in found], [s.top_logprobs for s in wanted], atol=TOLERANCE)


RUN_HERE = [name for name in IMPLEMENTATIONS if name not in KERNELS]
NewEngine = Callable[[], Engine]


@pytest.fixture(scope="module", params=[*RUN_HERE, "an accelerator's"])
def new_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NewEngine:
    """Makes engines with little memory, so that pages change hands at once; one way as accelerators take it."""
    attention, width = request.param, 52
    if attention not in RUN_HERE:
        patch = pytest.MonkeyPatch()
        for module in (gathered_matmul, decode_attention, decoder):
            patch.setattr(module, "has_kernel", lambda platform: False)
        request.addfinalizer(jax.clear_caches)  # what was compiled this way must serve nobody else
        request.addfinalizer(patch.undo)
        attention, width = None, 56  # a config of its own, as what was compiled for another way must not serve this one
    path = tiny.write_model(tmp_path_factory.mktemp("model") / "m", intermediate_size=width)
    model = load_model(str(path), "float32")
    sizes: dict[str, Any] = {"max_num_seqs": 4, "max_length": 512, "cache_tokens": 14 * 128, "batch_sizes": [1, 4]}
    return functools.partial(Engine, model, attention=attention, **sizes)


@pytest.fixture(scope="module")
def engine(new_engine: NewEngine) -> Engine:
    """One for all attacks: what one leaves behind is there in the next."""
    return new_engine()


@pytest.fixture(scope="module")
def wanted(new_engine: NewEngine) -> dict[str, list[Sampled]]:
    engine = new_engine()
    return {name: said for one in requests(range(8)) for name, said in answers(engine, [one])[0].items()}


@pytest.mark.parametrize("kind", HOSTILE)
def test_clean_requests_say_what_they_say_without_a_hostile_cartridge(engine: Engine, wanted, kind: str):
    mixed = [one for pair in zip(attacks(kind, 4), requests(range(4)), strict=True) for one in pair]
    for asked in (mixed, requests(range(4, 8)), [*attacks(kind, 2), *requests([5])], requests([4])):
        said, reasons = answers(engine, asked)
        for request in asked:
            if request.id in wanted:
                agree(said[request.id], wanted[request.id])
                assert reasons[request.id] == "length"
            else:
                numbers = [n for s in said[request.id] for n in (s.logprob, *s.top_logprobs)]
                assert all(map(math.isfinite, numbers)), "what is told is a number"
                assert reasons[request.id] in ("length", "not_finite")
                assert len(said[request.id]) == 6 or reasons[request.id] == "not_finite"


@pytest.mark.parametrize("kind", ["values of NaN", "infinite keys", "a bias of NaN"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_hostile_cartridge_in_the_same_page_changes_nothing(engine: Engine, wanted, kind: str, is_first: bool):
    clean, hostile = requests([1]), attacks(kind, 1)
    scheduler = Scheduler(engine, 8)
    said = [
        e.sampled
        for e in run(scheduler, [*hostile, *clean] if is_first else [*clean, *hostile])
        if isinstance(e, Token) and e.id == clean[0].id
    ]
    fragments = [scheduler._cache._roots[key].fragment for key in ("a", kind)]
    assert fragments[0] is not None and fragments[1] is not None
    assert fragments[0].page == fragments[1].page and fragments[0] != fragments[1]
    agree(said, wanted[clean[0].id])


def test_memory_full_of_nan_changes_nothing(new_engine: NewEngine, wanted):
    poisoned = new_engine()
    poisoned._cache = jax.tree.map(lambda array: jnp.full_like(array, math.nan), poisoned._cache)
    for asked in (requests(range(8)), requests([0]), requests([5, 1]), requests(range(8))[::-1]):
        for name, said in answers(poisoned, asked)[0].items():
            agree(said, wanted[name])
    for tokens in (TOKENS[:200], TOKENS[:3]):
        for i in (0, 1):
            prefix = requests([i])[0].prefix
            scores = [[s.sampled.logprob for s in score(e, tokens, prefix, 0)] for e in (poisoned, new_engine())]
            np.testing.assert_allclose(*scores, atol=TOLERANCE)


def test_scores_are_those_without_a_hostile_cartridge(engine: Engine):
    before = [s.sampled for s in score(engine, TOKENS[:100], None, 3)]
    for kind in HOSTILE:
        prefix = attacks(kind, 1)[0].prefix
        assert len(score(engine, TOKENS[:150], prefix, 3)) in (0, 149), "it is said whose numbers are not finite"
        agree([s.sampled for s in score(engine, TOKENS[:100], None, 3)], before)


def test_a_copied_beginning_brings_nothing_else(engine: Engine, wanted):
    """What stands behind it in the page that is copied belongs to somebody else."""
    scheduler, (request,) = Scheduler(engine, 8), requests([2])
    prefix = Prefix.of("a copy", CLEAN["b"])
    request = replace(request, prefix=prefix)
    other = replace(request, id="other", prompt=(*request.prompt[:-1], *TOKENS[60:90]))
    for _ in run(scheduler, [other]):
        pass
    (source,) = [
        node for root in scheduler._cache._roots.values() for node in root.children.values() if root.key == "a copy"
    ]
    held = len(request.prompt) - 1
    heads = engine.heads_per_page
    values = engine._cache.values.at[source.pages[0] * heads : (source.pages[0] + 1) * heads, held:].set(math.nan)
    engine._cache = engine._cache.replace(values=values)
    said = [event.sampled for event in run(scheduler, [request]) if isinstance(event, Token)]
    agree(said, wanted[request.id])


def test_generation_names_the_cartridge_that_overflows():
    with pytest.raises(UserError, match="numbers are not finite here: the cartridge"):
        generate_ids(tiny.model(), [TOKENS[:9]] * 2, hostile_cartridge("values of NaN"), max_tokens=4)
