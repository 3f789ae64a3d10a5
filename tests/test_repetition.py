"""A document that is repeated: every token of it is asked for, and the targets are the model's own behind all of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny_runs import config_of, interrupted, metrics_of, settings_in

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.initial.chunks import MatchingConfig, bodies, repetitions
from cartridges_jax.training.repetition import TOP, taught_repetitions
from cartridges_jax.training.run import train

LENGTH = 96


@pytest.mark.parametrize("shift", [0.0, 0.25, 0.5])
def test_every_token_is_a_target_once(shift: float):
    model = tiny.model()
    tokens = model.tokenizer.encode(tiny.TEXT)
    examples = repetitions(model, tokens, LENGTH, shift)
    assert [int(i) for example in examples for i in example.target_ids] == tokens
    for example in examples:
        assert len(example.tokens) <= LENGTH
        np.testing.assert_array_equal(example.tokens[example.target_index + 1], example.target_ids)


@pytest.mark.parametrize("chunk_tokens", [4096, 300])
def test_the_targets_are_the_models_own_behind_what_stands_before_a_question(chunk_tokens: int):
    """Read from the forward pass of the whole conversation, without a cartridge."""
    model, config = tiny.model(), MatchingConfig(chunk_tokens=chunk_tokens)
    texts, (before, after) = bodies(model, tiny.TEXT, config)
    examples = taught_repetitions(model, tiny.TEXT, 1, LENGTH, config)
    pieces = [(text, piece) for text in texts for piece in repetitions(model, text, LENGTH)]
    assert len(texts) > (3 if chunk_tokens == 300 else 0)
    for (text, piece), example in list(zip(pieces, examples, strict=True))[::5]:
        prefix = [*before, *text, *after]
        logits = np.asarray(model.logits(np.asarray([*prefix, *piece.tokens])[None]))[0, len(prefix) :]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_array_equal(example.tokens, piece.tokens)
        np.testing.assert_array_equal(example.target_index, np.repeat(piece.target_index, TOP))
        found = logprobs[example.target_index, example.target_ids]
        np.testing.assert_allclose(example.target_logprobs, found, atol=1e-4)
        best = np.sort(logprobs[piece.target_index], -1)[:, ::-1][:, :TOP]
        np.testing.assert_allclose(example.target_logprobs.reshape(-1, TOP), best, atol=1e-4)


def test_the_document_alone_trains_a_cartridge_and_a_resumed_run_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "corpus.txt").write_text(tiny.TEXT, encoding="utf-8")
    settings = settings_in(tmp_path, tmp_path) | {"dataset": None, "repeats": 2, "num_epochs": 2, "num_steps": None}
    config = config_of(settings)
    other = dataclasses.replace(config, output_dir=str(tmp_path / "whole"))
    train(other, tiny.model())
    interrupted(config, 4, monkeypatch)
    train(config, tiny.model())
    ours, theirs = (Path(one.output_dir) / "cartridge.safetensors" for one in (config, other))
    assert ours.read_bytes() == theirs.read_bytes()
    losses = [line["loss"] for line in metrics_of(config.output_dir)]
    assert losses[-1] < losses[0] - 0.01
    assert "repeated 2 times" in Cartridge.load(tmp_path / "whole" / "cartridge.safetensors").provenance.recipe


def test_a_row_without_room_for_a_text_is_refused():
    with pytest.raises(UserError, match=r"a row of 4 tokens leaves no room"):
        repetitions(tiny.model(), [1, 2, 3], 4)


def test_nothing_to_train_on_is_refused():
    with pytest.raises(UserError, match="train on the document itself with repeats"):
        config_of(settings_in(Path("run"), Path("inputs")) | {"dataset": None})
