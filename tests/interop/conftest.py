"""A cartridge of the tiny model, with slots of every sign and size, as the formats of others have to carry it.

A test marked `readme("row", column="cell")` shows what a cell of the table in docs/formats.md says; it fails where the
table says something else, or names another version of a partner than the one that is here.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from readme_table import CLAIMS, FILES, readme_table

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.cartridge.provenance import Provenance

SLOTS = 16  # a page of Tokasaurus'


@pytest.hookimpl(tryfirst=True)  # before markers take tests out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    claims = config.stash.setdefault(CLAIMS, {})
    config.stash[FILES] = {item.path.name for item in items if item.path.parent == Path(__file__).parent}
    for item in items:
        for mark in item.iter_markers("readme"):
            for column, cell in mark.kwargs.items():
                claims.setdefault((mark.args[0], column), set()).add(cell)


@pytest.fixture(autouse=True)
def the_readme_says_so(request: pytest.FixtureRequest) -> None:
    for mark in request.node.iter_markers("readme"):
        found = readme_table()[mark.args[0]]
        assert {column: found[column] for column in mark.kwargs} == mark.kwargs
        for package, version in re.findall(r"(torch|peft|transformers) ([\d.]+)", mark.kwargs.get("parity", "")):
            try:
                assert f"{importlib.metadata.version(package)}.".startswith(f"{version}."), package
            except importlib.metadata.PackageNotFoundError:
                pytest.skip(f"{package} is not installed: make test-parity")


@pytest.fixture
def cartridge() -> Cartridge:
    rng = np.random.default_rng(0)
    shape = (tiny.LAYERS, SLOTS, tiny.KV_HEADS, tiny.HEAD_DIM)
    keys, values = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    provenance = Provenance.of(tiny.model(), tiny.TEXT, "random, für Prüfungen")
    return Cartridge(keys, values, None, 3, dataclasses.replace(provenance, training_tokens=12, training_flops=3.5e9))
