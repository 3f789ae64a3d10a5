"""Attention matching: exact when nothing is left out, and closer to the document than what it starts from."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jaxtyping import Array

from cartridges_jax.attention_matching import attention_matching
from cartridges_jax.cartridge import Cartridge
from cartridges_jax.data import Example, read_examples
from cartridges_jax.initializers import InitConfig, initial_cartridge

QUESTION = [{"role": "user", "content": "Where does the owl number 5 sleep?"}]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    path = tiny.write_dataset(tmp_path_factory.mktemp("data") / "dataset.parquet", tiny.model(), count=60)
    return read_examples(path, tiny.model().tokenizer)


@pytest.fixture(scope="module")
def document() -> list[int]:
    return tiny.model().tokenizer.chat_ids(
        [{"role": "system", "content": tiny.TEXT[:1200]}], add_generation_prompt=False
    )


def _logits(cartridge: Cartridge) -> Array:
    model = tiny.model()
    return model.logits(np.array([model.tokenizer.turn_ids(QUESTION, add_generation_prompt=True)]), cartridge=cartridge)


def _error(cartridge: Cartridge, document: list[int]) -> float:
    return float(jnp.abs(_logits(cartridge) - _logits(Cartridge.from_tokens(tiny.model(), document))).mean())


def test_with_a_slot_for_every_token_it_is_the_document(examples: list[Example], document: list[int]):
    cartridge = attention_matching(tiny.model(), tiny.TEXT[:1200], examples, len(document))
    assert _error(cartridge, document) < 1e-3


def test_it_is_closer_to_the_document_than_its_parts_are(examples: list[Example], document: list[int]):
    p = len(document) // 4
    matched = attention_matching(tiny.model(), tiny.TEXT[:1200], examples, p)
    first = Cartridge.from_tokens(tiny.model(), document[:p])
    assert matched.keys.shape[1] == p and matched.bias is not None
    assert _error(matched, document) < 0.7 * _error(first, document)
    assert _error(matched, document) < 0.9 * _error(matched.replace(bias=None), document)


def test_the_sink_comes_first_and_keeps_its_key(examples: list[Example], document: list[int]):
    p = len(document) // 4
    model = tiny.model()
    matched = attention_matching(model, tiny.TEXT[:1200], examples, p)
    # the slot is the document's first key, moved back by len(document) - p
    full = Cartridge.from_tokens(model, document)
    norms = jnp.linalg.norm(full.keys[:, 0], axis=-1), jnp.linalg.norm(matched.keys[:, 0], axis=-1)
    np.testing.assert_allclose(*norms, rtol=1e-5)  # a rotation keeps lengths


def test_a_document_shorter_than_the_slots_is_refused(examples: list[Example]):
    with pytest.raises(ValueError, match="choose fewer slots"):
        initial_cartridge(InitConfig("attention_matching", 900), tiny.model(), "A cat.", examples, seed=0)
