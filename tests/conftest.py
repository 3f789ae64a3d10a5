"""Tiny random models of every family, read from files by the library's own loader."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import make_golden
import numpy as np
import pytest
from safetensors.numpy import save_file

from cartridges_jax.models.hf import load_hf
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.models.tokenizer import Tokenizer

WriteModel = Callable[..., Path]
MOST_MAPS = 20_000  # regions of memory that compiled programs may take; Linux ends a process that maps 65,530


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Drops what was compiled when it has become too much for one process: every program maps memory of its own."""
    yield
    maps = Path("/proc/self/maps")
    if maps.is_file() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def write_hf(tmp_path_factory: pytest.TempPathFactory) -> WriteModel:
    """`write_hf(config, tensors, shards=1)` writes a Hugging Face folder; several shards bring an index."""

    def write(config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
        folder = tmp_path_factory.mktemp("hf")
        (folder / "config.json").write_text(json.dumps(config))
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        weight_map = {name: names[i % shards] for i, name in enumerate(tensors)}
        for shard in names:
            save_file({n: a for n, a in tensors.items() if weight_map[n] == shard}, folder / shard)
        index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return write


@pytest.fixture(scope="session")
def load_tiny(write_hf: WriteModel) -> Callable[[str], LanguageModel]:
    """A family's tiny model in float32. It has no tokenizer: these tests speak in ids."""

    def load(family: str) -> LanguageModel:
        folder = write_hf(make_golden.golden_config(family)[0], make_golden.weights(family))
        config, params, fingerprint = load_hf(folder, jnp.float32)
        return LanguageModel(
            f"tiny {family}", config, params, cast(Tokenizer, SimpleNamespace(fingerprint="")), fingerprint
        )

    return load


@pytest.fixture(scope="session", params=list(make_golden.FAMILIES))
def tiny_model(request: pytest.FixtureRequest, load_tiny: Callable[[str], LanguageModel]) -> LanguageModel:
    return load_tiny(request.param)


@pytest.fixture(scope="session")
def tiny_llama(load_tiny: Callable[[str], LanguageModel]) -> LanguageModel:
    return load_tiny("llama")
