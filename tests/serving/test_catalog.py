"""Cartridges as a server manages them: `/v1/cartridges`, new versions, pins, remote sources, compositions."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_server import SAID, Client, FakeCartridge, ScriptEngine, folder, serving, until  # pyrefly: ignore

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.cartridge.composition import compose
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.serving.store import CartridgeStore, Reference, TooMany, UnknownCartridge

__all__ = ["folder"]  # a fixture


async def act(client: Client, what: str, **body: object) -> tuple[int, dict]:
    return await client.post(f"/v1/cartridges/{what}", json=body)


def test_loading_pinning_and_unloading(folder: Path):
    async def test(client: Client) -> None:
        _, listed = await client.get("/v1/cartridges")
        assert [(c["id"], c["loaded"]) for c in listed["data"]] == [(n, False) for n in ("manual", "nested", "wrong")]
        status, loaded = await act(client, "load", id="manual")
        assert status == 200 and loaded["slots"] == 5 and loaded["made_of"] == "five!" and not loaded["pinned"]
        assert (await client.get("/v1/cartridges/manual"))[1] == loaded
        assert (await act(client, "pin", id="manual"))[1]["pinned"]
        status, refused = await act(client, "unload", id="manual")
        assert status == 409 and "unpin it first" in refused["error"]["message"]
        await act(client, "unpin", id="manual")
        assert not (await act(client, "unload", id="manual"))[1]["loaded"]
        assert (await act(client, "unload", id="manual"))[0] == 409
        for id, wanted in (("none", 404), ("../secret", 400), ("wrong", 400), (5, 400)):
            assert (await act(client, "load", id=id))[0] == wanted, id

    serving(ScriptEngine(SAID), test, folder, describe=lambda cartridge: {"made_of": cartridge.content})


def test_a_new_version_leaves_those_that_run_alone(folder: Path):
    engine = ScriptEngine(list(b"abc"), max_num_seqs=2, pause=0.05)

    async def test(client: Client) -> None:
        before = (await act(client, "load", id="manual"))[1]["version"]
        running = asyncio.create_task(client.chat(model="tiny:manual", max_tokens=60))
        await until(lambda: engine.steps > 2)
        assert (await client.get("/v1/cartridges/manual"))[1]["in_use"] == 1
        (folder / "manual.safetensors").write_text("longer now")
        assert (await client.chat(model="tiny:manual", max_tokens=1))[1]["usage"]["prompt_tokens_details"][
            "cartridge_tokens"
        ] == 10
        assert (await running)[1]["usage"]["prompt_tokens_details"]["cartridge_tokens"] == 5
        entry = (await client.get("/v1/cartridges/manual"))[1]
        assert entry["version"] != before and entry["in_use"] == 0
        again = (await act(client, "load", id="manual", force_redownload=True))[1]["version"]
        assert again != entry["version"], "the same content, read again, is a new version"
        (folder / "manual.safetensors").write_text("bad")
        status, reply = await client.chat(model="tiny:manual")
        assert status == 400 and "another model" in reply["error"]["message"]

    serving(engine, test, folder)


def test_remote_sources_are_fetched_once_and_block_nobody(folder: Path, tmp_path: Path):
    (tmp_path / "far").write_text("far away")
    fetched, gate = [], threading.Event()

    def fetch(name: str) -> Path:
        fetched.append(name)
        assert gate.wait(10)
        if "none" in name:
            raise FileNotFoundError(f"{name} does not exist")
        if "down" in name:
            raise ConnectionError("the hub cannot be reached")
        return tmp_path / "far"

    def remote(id: str, source: str = "huggingface", **more: object) -> list[dict[str, object]]:
        return [{"id": id, "source": source, **more}]

    async def test(client: Client) -> None:
        waiting = [asyncio.create_task(client.chat(cartridges=remote("org/far"))) for _ in range(2)]
        await until(lambda: bool(fetched))
        assert (await client.chat(model="tiny:manual"))[0] == 200, "others are served meanwhile, cartridges loaded"
        gate.set()
        for task in waiting:
            assert (await task)[1]["usage"]["prompt_tokens_details"]["cartridge_tokens"] == 8
        await client.chat(cartridges=remote("org/far"))
        assert fetched == ["hf:org/far"]
        await client.chat(cartridges=remote("org/far", force_redownload=True))
        await client.chat(cartridges=remote("e/p/run", "wandb"))
        assert fetched == ["hf:org/far", "hf:org/far", "wandb:e/p/run"]
        assert [c["id"] for c in (await client.get("/v1/cartridges"))[1]["data"]] == [
            *("manual", "nested", "wrong"),
            *("org/far", "e/p/run"),
        ]
        for id, wanted in (("org/none", 404), ("org/down", 502)):
            status, reply = await client.chat(cartridges=remote(id))
            assert status == wanted and reply["error"]["param"] == "cartridges"

    serving(ScriptEngine(SAID), test, folder, fetch=fetch)


def test_compositions_keep_their_order_and_follow_their_parts(folder: Path):
    store = CartridgeStore(folder, FakeCartridge, compose=FakeCartridge.compose)
    pair = [Reference("manual"), Reference("nested")]
    both, turned = store.prefix(pair), store.prefix(pair[::-1])
    assert isinstance(both.cartridge, FakeCartridge) and both.cartridge.content == "five!ine slot"
    assert turned.key != both.key and store.prefix(pair) is both and store.ready(pair) is both
    (folder / "nested" / "cartridge.safetensors").write_text("other")
    assert store.ready(pair) is None and store.prefix(pair).length == 9
    store.unload(pair[0])
    assert store.state(pair[0]) == (None, False) and store.num_held == 1, "compositions go with their parts"


def test_pinned_cartridges_are_never_dropped(folder: Path):
    loaded = []

    def load(path: Path) -> FakeCartridge:
        loaded.append(path.name)
        return FakeCartridge(path)

    for name in "abc":
        (folder / f"{name}.safetensors").write_text(name)
    store = CartridgeStore(folder, load, capacity=2)
    store.get("a")
    store.pin(Reference("a"), True)
    for name in "bcbca":
        store.get(name)
    assert loaded.count("a.safetensors") == 1 and store.num_held == 2
    with pytest.raises(TooMany, match="unpin one first"):
        store.pin(Reference("c"), True)
    with pytest.raises(UnknownCartridge, match="not loaded"):
        store.pin(Reference("b"), True)


def test_composing_drops_the_second_sink():
    first, second = (Cartridge.from_text(tiny.model(), tiny.TEXT[i:], 6, num_frozen=2) for i in (0, 40))
    made = compose([first, second.replace(bias=jnp.ones(second.keys.shape[:3]))])
    assert made.num_slots == 10 and made.num_frozen == 2
    np.testing.assert_array_equal(made.keys, np.concatenate([first.keys, second.keys[:, 2:]], 1))
    np.testing.assert_array_equal(made.values[:, 6:], second.values[:, 2:])
    np.testing.assert_array_equal(made.bias[0, :, 0], [0] * 6 + [1] * 4)
    with pytest.raises(UserError, match="compose those of one model"):
        compose([first, second.replace(keys=second.keys[:1], values=second.values[:1])])
    with pytest.raises(UserError, match="all 6 slots of cartridge 2 are frozen"):
        compose([first, second.replace(num_frozen=6)])
