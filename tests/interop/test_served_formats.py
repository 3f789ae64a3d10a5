"""Wherever a cartridge is named, every format will do: the server's folder, its --cartridge, and init.pretrained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny

from cartridges_jax import serve
from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.initial.initializers import InitConfig, initial_cartridge
from cartridges_jax.interop.formats import FORMATS, write
from cartridges_jax.serving.store import CartridgeStore, UnknownCartridge


@pytest.fixture
def folder(cartridge: Cartridge, tmp_path: Path) -> Path:
    """A folder of cartridges, one a format, each in a folder of its own but for our own file."""
    folder = tmp_path / "cartridges"
    write(cartridge, folder / "own.safetensors", "safetensors")
    for format in ("peft", "prefix-tuning", "tokasaurus"):
        write(cartridge, folder / format, format)
    write(cartridge, folder / "upstream" / "cartridge.pt", "upstream")
    (folder / "empty").mkdir()
    return folder


def test_the_store_serves_folders_of_every_format(cartridge: Cartridge, folder: Path):
    store = CartridgeStore(folder, lambda path: Cartridge.load(path, model=tiny.model()))
    assert store.list() == sorted({"own", *FORMATS} - {"safetensors"})
    for name in store.list():
        prefix = store.get(name)
        assert isinstance(prefix.cartridge, Cartridge)
        np.testing.assert_array_equal(prefix.cartridge.keys, cartridge.keys)
    before = store.get("peft").key
    write(cartridge.replace(keys=-cartridge.keys), folder / "peft", "peft")
    assert store.get("peft").key != before  # noticed as soon as its config, the last file, is new


def test_a_named_cartridge_lies_anywhere_and_comes_first(cartridge: Cartridge, folder: Path, tmp_path: Path):
    cartridge.save(tmp_path / "elsewhere.safetensors")
    link = {"own": tmp_path / "elsewhere.safetensors", "far": folder / "upstream" / "cartridge.pt"}
    store = CartridgeStore(folder, Cartridge.load, named=link)
    assert {"own", "far", "peft"} <= set(store.list())
    assert store.find("own") == link["own"] and store.get("far").length == cartridge.num_slots
    with pytest.raises(UnknownCartridge):
        store.find("elsewhere")


def test_the_server_takes_cartridges_by_name_and_source(cartridge: Cartridge, folder: Path, tmp_path: Path):
    def loaded(*given: str) -> list[str]:
        args = serve._arguments([f"--model={tiny.folder()}", "--max-length=64", *given])
        server, _ = serve._load(args, tmp_path / "none", None)
        return server._store.list()

    assert loaded(f"--cartridge=a={folder / 'peft'}", f"--cartridge=b={folder / 'upstream'}") == ["a", "b"]
    for given in ("a", "a=", "a/b=c", "=c"):
        with pytest.raises(UserError, match=f"--cartridge is '{given}', expected NAME=SOURCE"):
            loaded(f"--cartridge={given}")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        loaded("--cartridge=a=nowhere")
    with pytest.raises(FileNotFoundError, match="holds no cartridge: expected"):
        loaded(f"--cartridge=a={folder / 'empty'}")


def test_training_starts_from_a_cartridge_of_any_format(cartridge: Cartridge, folder: Path):
    for name in ("own.safetensors", "peft", "upstream", "tokasaurus"):
        config = InitConfig("pretrained", path=str(folder / name), num_frozen=2)
        found = initial_cartridge(config, tiny.model(), tiny.TEXT, [], seed=0)
        np.testing.assert_array_equal(found.values, cartridge.values)
        assert found.num_frozen == 2
