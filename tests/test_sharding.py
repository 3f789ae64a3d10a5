"""One program on one device and on many: the same numbers, and no communication that the design does not name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import mesh_programs
import numpy as np
import pytest
import tiny

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.params import abstract_params, weight_specs
from cartridges_jax.parallel import sharding
from cartridges_jax.parallel.sharding import MeshConfig, mesh_shape
from cartridges_jax.planning.hlo import Traffic, traffic

ROOT = Path(__file__).parent.parent
BOUND = 2e-6  # of float32 sums in another order; gradients here reach 0.1, logits 2


def run(program: str, devices: int, output: Path) -> None:
    """In a process of its own: how many virtual devices there are is settled before the first is used."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", str(ROOT / "tests" / "mesh_programs.py"), program, str(output)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    path = tmp_path_factory.mktemp("mesh") / "results.npz"
    run("equality", 8, path)
    return dict(np.load(path))


@pytest.mark.parametrize(
    ("mesh", "reference"),
    [(name, "1x1x1") for name in mesh_programs.MESHES] + [("uneven 1x1x2", "uneven 1x1x1")],
)
@pytest.mark.parametrize("what", ["logits", "loss", "targets", "grad_norm", "keys", "values", "bias"])
def test_one_device_and_many_agree(results: dict[str, np.ndarray], mesh: str, reference: str, what: str):
    """The update is the gradient itself, so that the cartridges' difference is the gradients'."""
    np.testing.assert_allclose(results[f"{mesh}/{what}"], results[f"{reference}/{what}"], rtol=2e-6, atol=BOUND)


def test_every_slot_has_a_gradient_that_could_be_wrong(results: dict[str, np.ndarray]):
    _, start, _ = mesh_programs.inputs(mesh_programs.CONFIG)
    for name in ("keys", "values", "bias"):
        moved = np.abs(results[f"1x1x1/{name}"] - getattr(start, name))
        assert np.median(moved) > 100 * BOUND, name


def test_devices_of_a_cpu_share_the_memory_of_a_weight(tmp_path: Path):
    tiny.write_model(tmp_path / "model", vocab_size=320)
    run("sharing", 2, tmp_path)
    for addresses in json.loads((tmp_path / "addresses.json").read_text()):
        assert len(addresses) == 2 and len(set(addresses)) == 1


def test_attention_matching_on_many_devices_is_that_on_one(tmp_path: Path):
    tiny.write_model(tmp_path / "model", vocab_size=324)
    run("matching", 8, tmp_path)
    results = np.load(tmp_path / "results.npz")
    for keys in ("keys of tokens", "keys fitted"):
        # solving for a head's slots enlarges what sums in another order differ by; logits reach 5
        np.testing.assert_allclose(results[f"2x2x2/{keys}"], results[f"1x1x1/{keys}"], rtol=0, atol=5e-5)
    assert np.abs(results["1x1x1/keys fitted"] - results["1x1x1/keys of tokens"]).max() > 0.1, "keys were moved"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Traffic]]:
    folder = tmp_path_factory.mktemp("programs")
    run("compiled", 32, folder)
    return {path.stem: traffic(path.read_text()) for path in folder.glob("*.txt")}


def test_one_device_communicates_nothing(programs: dict[str, dict[str, Traffic]]):
    assert programs["1x1x1"] == {}


def test_the_step_gathers_weights_and_adds_up_and_does_nothing_else(programs: dict[str, dict[str, Traffic]]):
    found = programs["4x4x2"]
    assert set(found) == {"all-gather", "all-reduce"}
    # a layer's weights in the forward and again in the backward pass of every micro-batch; embedding and head once a
    # step, since XLA takes them out of the loop
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract_params(mesh_programs.CONFIG))
    blocks = sum(
        4 * int(np.prod(shapes["blocks"][name][1:])) // 2 for name in ("q", "k", "v", "o", "gate", "up", "down")
    )
    ends = sum(4 * int(np.prod(shapes[name])) // 2 for name in ("embed", "head"))
    layers = 3
    assert found["all-gather"].num_bytes == mesh_programs.ACCUMULATION * 2 * layers * blocks + ends
    assert found["all-gather"].count == mesh_programs.ACCUMULATION * 2 * layers * 7 + 2
    b, d = 16 // 16, mesh_programs.CONFIG.embed_dim
    states = 4 * b * mesh_programs.T * d  # of a micro-batch, on one device
    # two sums of a layer's forward pass, one of them again in its backward pass, and two of gradients; the embedding
    sums = mesh_programs.ACCUMULATION * (5 * layers + 1) * states
    # a chunk of targets: its gradient, three numbers of each target and of its entries; how many chunks there are
    chunk = mesh_programs.ACCUMULATION * 4 * (b * mesh_programs.T * (d + 2 + mesh_programs.J) + 1)
    config = mesh_programs.CONFIG
    cartridge = layers * mesh_programs.SLOTS * config.num_kv_heads // 2 * (2 * config.head_dim + 1) * 4
    scalars = 4 * (3 + 3)  # loss, its divisor and targets; the norm of keys', values' and bias' gradients
    assert found["all-reduce"].num_bytes == sums + chunk + cartridge + scalars


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    run("serving", 8, folder)
    return folder


@pytest.mark.parametrize(("mesh", "reference"), [("2x2x2", "1x1x1"), ("uneven 1x1x2", "uneven 1x1x1")])
def test_the_engine_answers_and_scores_alike_on_one_device_and_on_many(served: Path, mesh: str, reference: str):
    results = np.load(served / "results.npz")
    np.testing.assert_array_equal(results[f"{mesh}/tokens"], results[f"{reference}/tokens"])
    found, expected = results[f"{mesh}/logprobs"], results[f"{reference}/logprobs"]
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=BOUND)


def test_decoding_adds_up_what_heads_and_mlp_give_and_gathers_logits(served: Path):
    found = traffic((served / "decode.txt").read_text())
    config, rows = mesh_programs.CONFIG, 3
    assert set(found) == {"all-gather", "all-reduce"}
    assert found["all-reduce"].num_bytes == (2 * config.num_layers + 1) * rows * config.embed_dim * 4
    assert found["all-gather"].num_bytes == rows * config.vocab_size * 4


def test_sizes_that_do_not_go_together_are_refused():
    assert mesh_shape(MeshConfig(fsdp=4, tensor=2), 32) == (4, 4, 2)
    with pytest.raises(UserError, match="data=None, fsdp=3, tensor=1, which does not come to the 8 devices here"):
        mesh_shape(MeshConfig(fsdp=3), 8)
    with pytest.raises(UserError, match="fsdp=0, tensor=1: expected 1 or more"):
        MeshConfig(fsdp=0)
    abstract = jax.sharding.AbstractMesh((1, 3, 1), sharding.AXES)
    with pytest.raises(UserError, match="fsdp is 3, which does not divide this model's width, 32"):
        sharding.check(mesh_programs.CONFIG, abstract)
    abstract = jax.sharding.AbstractMesh((1, 1, 16), sharding.AXES)
    with pytest.raises(UserError, match="tensor is 16, which does not divide this model's number of query heads, 8"):
        sharding.check(mesh_programs.CONFIG, abstract)
    with pytest.raises(UserError, match=r"batch_size is 6, which 4 devices .* cannot share evenly"):
        sharding.check_rows(6, jax.sharding.AbstractMesh((2, 2, 2), sharding.AXES))


def test_every_parameter_has_a_place_in_the_table():
    for config in (mesh_programs.CONFIG, mesh_programs.UNEVEN):
        mesh = jax.sharding.AbstractMesh((2, 2, 2), sharding.AXES)
        specs = sharding.fitted(abstract_params(config), weight_specs(config), mesh)
        tensor = specs["blocks"]["k"] == jax.P(None, "fsdp", "tensor", None)
        assert tensor == (config.num_kv_heads % 2 == 0)
        assert specs["blocks"]["q"] == jax.P(None, "fsdp", "tensor", None)
