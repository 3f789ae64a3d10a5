"""The planner's arithmetic and its names of slices; nothing here needs their compilers."""

from __future__ import annotations

import importlib.util
import math

import jax
import pytest

from cartridges_jax.models.transformer import abstract_params
from cartridges_jax.planning import roofline
from cartridges_jax.planning.hardware import CHIPS, Slice, devices_of, slice_of, torus
from cartridges_jax.planning.roofline import Workload, break_even, step_flops, step_seconds
from cartridges_jax.planning.shapes import SHAPES, shape_of

BILLIONS = {
    "meta-llama/Llama-3.1-8B-Instruct": 8.03,
    "meta-llama/Llama-3.3-70B-Instruct": 70.55,
    "Qwen/Qwen3-4B": 4.02,
    "Qwen/Qwen3-32B": 32.76,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_as_many_parameters_as_their_authors_say(name: str):
    sizes = [leaf.size for leaf in jax.tree.leaves(abstract_params(shape_of(name)))]
    assert round(sum(sizes) / 1e9, 2) == BILLIONS[name]


def test_products_are_those_of_the_weights():
    config = shape_of("Qwen/Qwen3-4B")
    blocks = abstract_params(config)["blocks"]
    products = sum(blocks[name].size for name in ("q", "k", "v", "o", "gate", "up", "down"))
    assert roofline.weights_per_layer(config) * config.num_layers == products
    nothing_seen = Workload(tokens=10, targets=0, own_keys=0, slots=0)
    assert step_flops(config, nothing_seen, recomputed=False) == 10 * 4 * products
    down = blocks["down"].size
    assert step_flops(config, nothing_seen) == 10 * (4 * products + 2 * (products - down))
    work = Workload(tokens=10, targets=3, own_keys=100, slots=28)
    seen = 14 * 10 * 128 * config.num_layers * config.num_heads * config.head_dim
    head = 3 * 4 * config.vocab_size * config.embed_dim
    assert step_flops(config, work) == step_flops(config, nothing_seen) + seen + head


def test_a_step_takes_the_longest_of_its_times():
    chip = CHIPS["v5p"]
    assert step_seconds(chip, 459e12, 2765e9 / 2, 600e9 / 4) == {"compute": 1, "memory": 0.5, "links": 0.25}


def test_a_cartridge_pays_for_itself_sooner_against_a_server_that_reads_the_document_each_time():
    config, chip = shape_of("meta-llama/Llama-3.1-8B-Instruct"), CHIPS["h100"]
    fresh, cached = (break_even(config, chip, 3600, 100_000, 2048, 256, cached=c) for c in (False, True))
    assert 0 < fresh < cached
    assert break_even(config, chip, 7200, 100_000, 2048, 256, cached=True) == pytest.approx(2 * cached)
    # reading 97,952 positions of 32 layers, 8 heads, 128 numbers, keys and values in bfloat16, 256 times, at 3.35 TB/s
    assert cached == pytest.approx(3600 / (256 * 97_952 * 32 * 8 * 128 * 2 * 2 / 3.35e12))
    assert break_even(config, chip, 3600, 2048, 2048, 256, cached=True) == math.inf


def test_slices_by_name():
    assert slice_of("v5p-64") == Slice("v5p", 32) and slice_of("v4-32") == Slice("v4", 16)
    assert slice_of("v5litepod-16") == slice_of("v5e-16") == Slice("v5e", 16)
    assert slice_of("h100:8") == Slice("h100", 8) and slice_of("h100:16").num_devices == 16
    sides = {(4, 3): (2, 2, 1), (8, 3): (2, 2, 2), (16, 3): (2, 2, 4), (32, 3): (2, 4, 4), (64, 3): (4, 4, 4)}
    sides |= {(4, 2): (2, 2), (8, 2): (2, 4), (256, 2): (16, 16)}
    for (count, dimensions), expected in sides.items():
        assert torus(count, dimensions) == expected
    for name in ("v5p", "v9-64", "v5p-63", "v5e-12", "v5p-4", "h100:12", "h100:0", ""):
        with pytest.raises(ValueError, match=f"topology is '{name}'"):
            slice_of(name)


@pytest.mark.parametrize(("name", "module"), [("v5p-64", "libtpu"), ("h100:8", "jax_cuda13_plugin")])
def test_a_missing_compiler_is_one_sentence(name: str, module: str, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == module else find(wanted))
    with pytest.raises(ImportError, match=r"needs (its|their) compiler: pip install"):
        devices_of(slice_of(name))
