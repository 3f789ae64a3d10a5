"""A start from a summary, which a server on loopback writes; without it, the run goes on all the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from loopback import QuietHandler, serving
from tiny_runs import config_of, interrupted, metrics_of, settings_in

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.initial.initializers import InitConfig, initial_cartridge
from cartridges_jax.initial.texts import SummaryConfig
from cartridges_jax.training.data import MixConfig
from cartridges_jax.training.evals.during import EvalsConfig, LossEval
from cartridges_jax.training.run import train

SUMMARY = "Cats, owls, foxes and hens sleep in boxes of the house, the barn, the wood and the yard."


def summarizer(answer: str, asked: list[dict]) -> type[QuietHandler]:
    class Server(QuietHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body | {"path": self.path})
            self.send(200, json.dumps({"choices": [{"message": {"content": answer}}]}).encode())

    return Server


def test_a_summary_is_asked_for_and_becomes_the_slots(tmp_path: Path):
    model, asked = tiny.model(), []
    tokens = model.tokenizer.encode(SUMMARY)
    with serving(summarizer(SUMMARY, asked)) as url:
        config = InitConfig("summary", 16, summary=SummaryConfig(f"{url}/v1", "writer", "In {words} words, please."))
        cartridge = initial_cartridge(config, model, tiny.TEXT, [], 0)
        short = initial_cartridge(InitConfig("summary", 500, summary=config.summary), model, tiny.TEXT, [], 0)
    np.testing.assert_array_equal(cartridge.keys, Cartridge.from_tokens(model, tokens[:16]).keys)
    assert short.num_slots == len(tokens) < 500
    assert asked[0]["path"] == "/v1/chat/completions" and asked[0]["model"] == "writer"
    assert asked[0]["messages"][0] == {"role": "system", "content": tiny.TEXT}
    assert asked[0]["messages"][1]["content"] == "In 12 words, please."
    assert asked[0]["max_tokens"] == 16


def test_a_server_that_is_gone_or_says_nothing_is_one_sentence():
    config = InitConfig("summary", 16, summary=SummaryConfig("http://127.0.0.1:9/v1"))
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9/v1/chat/completions cannot be asked"):
        initial_cartridge(config, tiny.model(), tiny.TEXT, [], 0)
    with serving(summarizer("  ", [])) as url:
        config = InitConfig("summary", 16, summary=SummaryConfig(url))
        with pytest.raises(UserError, match="answers without a text"):
            initial_cartridge(config, tiny.model(), tiny.TEXT, [], 0)


def test_a_run_goes_on_without_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With the same bytes, and accumulation, a mix, evaluations and early stopping on."""
    dataset = tiny.write_dataset(tmp_path / "dataset.parquet", tiny.model())
    (tmp_path / "corpus.txt").write_text(tiny.TEXT, encoding="utf-8")
    asked: list[dict] = []
    with serving(summarizer(SUMMARY, asked)) as url:
        config = config_of(
            settings_in(tmp_path, tmp_path),
            init={"kind": "summary", "num_slots": 16, "summary": SummaryConfig(url)},
            mix=(MixConfig(str(dataset), 0.2),),
            evals=EvalsConfig(every=1, loss=(LossEval("own", str(dataset)),), patience=3),
            num_steps=3,
            checkpoint_every=1,
            accumulation=2,
            batch_size=1,
        )
        whole = dataclasses.replace(config, output_dir=str(tmp_path / "whole"))
        expected = train(whole, tiny.model()).read_bytes()
        interrupted(config, 2, monkeypatch)
    assert train(config, tiny.model()).read_bytes() == expected and len(asked) == 2
    assert metrics_of(config.output_dir) == metrics_of(whole.output_dir)
