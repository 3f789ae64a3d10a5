"""Plans of virtual CPU devices against sums by hand; those of TPUs and GPUs, with their compilers (`make test-aot`)."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import plan_programs
import pytest

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.params import abstract_params
from cartridges_jax.models.shapes import SHAPES, shape_of
from cartridges_jax.planning import chips
from cartridges_jax.planning.costs import decode_costs, expected_traffic, least_memory, received, train_costs
from cartridges_jax.planning.economics import Query, economics
from cartridges_jax.planning.hlo import Traffic
from cartridges_jax.planning.programs import Requests
from cartridges_jax.training.config import TrainConfig

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "tests" / "plan_programs.py"
# data, fsdp, tensor, layers; of one layer, XLA drops the loop and gathers its weights once
CASES = ((2, 2, 2, 2), (2, 2, 2, 3), (2, 2, 2, 4), (2, 4, 1, 2))
NUMBERS = 64  # bytes of loss, count, norm and of the devices' agreement on a loop's length: in no sum by hand
PARAMETERS = {"smollm2-135m": 135e6, "llama-3.1-8b": 8.03e9, "llama-3.3-70b": 70.6e9}
PARAMETERS |= {"qwen3-4b": 4.02e9, "qwen3-32b": 32.8e9}


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    known = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=known, capture_output=True, text=True, timeout=280
    )


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Of a small model, with its weights on every device unless told otherwise."""
    settings = {"model": "smollm2-135m", "dtype": "float32", "seq_len": 256, "batch_size": 4, "num_steps": 10}
    settings |= {"init.num_slots": 256, "mesh.fsdp": 1}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return run(["-m", "cartridges_jax.plan", "--config=configs/large.py:train", *flags, *arguments])


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """What `plan_programs.py` found, of every mesh and number of layers."""
    done = run(["-W", "error", str(PROGRAM), "cpu:8", json.dumps(CASES)])
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def case(found: dict[str, Any]) -> tuple[TrainConfig, ModelConfig, tuple[int, int, int]]:
    data, fsdp, tensor = found["mesh"]
    config = dataclasses.replace(plan_programs.CONFIG, dtype=found["dtype"])
    return config, plan_programs.model(found["layers"]), (data, fsdp, tensor)


def agree(found: dict[str, Any], expected: dict[str, float]) -> None:
    for kind in ("all-gather", "all-reduce"):
        difference = found["collectives"].get(kind, 0) - expected[kind]
        assert 0 <= difference <= NUMBERS, (found["mesh"], found["layers"], kind, difference)
    assert set(found["collectives"]) <= {"all-gather", "all-reduce"}


def test_what_a_device_holds_is_its_share(compiled: list[dict[str, Any]]):
    for found in compiled:
        config, model, (data, fsdp, tensor) = case(found)
        leaves = abstract_params(model)
        norms = sum(a.size for name, a in leaves["blocks"].items() if "norm" in name) + leaves["final_norm"].size
        whole = sum(a.size for a in jax.tree.leaves(leaves))
        assert found["arguments"]["weights"] == 4 * ((whole - norms) // (fsdp * tensor) + norms)
        biased = 2 * model.head_dim + 1  # attention matching gives a slot a bias
        slots = model.num_layers * config.init.num_slots * model.num_kv_heads * biased // tensor * 4
        assert found["arguments"]["cartridge"] == slots
        assert found["arguments"]["optimizer"] == 2 * slots + 4 * 2  # moments, and the two counts of Adam and schedule
        rows = config.accumulation * config.batch_size // (data * fsdp)
        assert found["arguments"]["batch"] == rows * config.seq_len * (3 * 4 + 20 * (4 + 4 + 1))
        held = sum(found["arguments"].values())
        assert found["peak"] >= held + found["activations"] - 64


def test_collectives_are_those_that_the_design_implies(compiled: list[dict[str, Any]]):
    """The same sums by hand rank the plans of a sweep."""
    for found in compiled:
        config, model, mesh = case(found)
        expected = expected_traffic(config, model, mesh, "cpu")
        # here embedding and head are gathered before the loop over micro-batches
        expected["all-gather"] -= (config.accumulation - 1) * 2 * model.vocab_size * model.embed_dim * 4 / mesh[2]
        agree(found, expected)


def test_bytes_and_flops_are_linear_in_layers(compiled: list[dict[str, Any]]):
    three = [f for f in compiled if f["mesh"] == [2, 2, 2]]
    assert [f["layers"] for f in three] == [2, 3, 4]
    for kind in ("all-gather", "all-reduce"):
        sizes = [f["collectives"][kind] for f in three]
        assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0, kind
    flops = [train_costs(*case(f), "cpu").flops for f in three]
    assert flops[2] - flops[1] == pytest.approx(flops[1] - flops[0])


def test_flops_by_hand_are_those_of_the_program(compiled: list[dict[str, Any]]):
    """XLA counts a loop's body once: of one layer, micro-batch and chunk of targets that is all, but for attention.

    Of one layer it also sees that the backward pass need not multiply again what the forward pass has at hand.
    """
    config, model = plan_programs.SINGLE, plan_programs.model(1)
    [counted] = {found["xla_flops"] for found in compiled}
    weights, t = model.layer_weights + model.vocab_size * model.embed_dim, config.seq_len
    keys = config.init.num_slots + t
    assert 4 * weights * t < counted < 4 * weights * t + 3.5 * 4 * model.num_heads * model.head_dim * keys * t
    costs = train_costs(dataclasses.replace(config, remat="elementwise"), model, (1, 1, 1), "cpu")
    assert costs.parts[0].flops + 2 * costs.parts[1].flops == pytest.approx(counted, rel=0.2)


def test_shapes_have_the_parameters_that_their_names_say():
    for name in SHAPES:
        found = sum(a.size for a in jax.tree.leaves(abstract_params(shape_of(name))))
        assert found == pytest.approx(PARAMETERS[name], rel=0.005), name
    assert shape_of("meta-llama/Llama-3.1-8B-Instruct") == shape_of("llama-3.1-8b")
    assert len(shape_of("llama-3.3-70b").rope_factors) == 64


def test_a_shape_may_come_from_a_config_json(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["qwen3-4b"]))
    assert shape_of(str(tmp_path)) == shape_of(str(tmp_path / "config.json")) == shape_of("Qwen/Qwen3-4B")
    (tmp_path / "config.json").write_text("GGUF")
    with pytest.raises(UserError, match=r"is no config\.json: planning reads shapes, not weights"):
        shape_of(str(tmp_path))
    with pytest.raises(UserError, match="the shape of model 'gpt-2' is unknown: planning needs one of smollm2-135m"):
        shape_of("gpt-2")


@pytest.mark.parametrize(
    ("topology", "name", "sides"),
    [
        ("v4-32", "v4", (2, 2, 4)),
        ("v5p-8", "v5p", (2, 2, 1)),
        ("v5p-64", "v5p", (2, 4, 4)),
        ("v5p-128", "v5p", (4, 4, 4)),
        ("v5litepod-8", "v5e", (2, 4)),
        ("v6e-256", "v6e", (16, 16)),
        ("tpu7x:2x2x2", "tpu7x", (2, 2, 2)),
        ("H100:8", "h100", (8,)),
        ("cpu:3", "cpu", (3,)),
    ],
)
def test_names_of_slices(topology: str, name: str, sides: tuple[int, ...]):
    assert chips.parse(topology) == (name, sides)


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ("v5p", "expected v5p-64 or another slice's name"),
        ("b9000:8", "chips are v4, v5e, v5p"),
        ("v5p-96", "which has 48 chips: give its torus, as in v5p:4x4x12"),
        ("v5e:2x2x2", "the sides of a v5e are 2 numbers"),
        ("tpu7x-16", "the sides of a tpu7x are 3 numbers"),
        ("h100:16", "within one host, expected at most 8"),
        ("h100:0", "the sides of a h100 are 1 numbers"),
    ],
)
def test_other_topologies_are_refused(topology: str, said: str):
    with pytest.raises(UserError, match=said):
        chips.parse(topology)


def test_every_chip_has_a_source():
    for chip in chips.CHIPS.values():
        assert chip.source.startswith("https://") or chip.platform == "cpu"
        assert min(chip.flops, chip.memory, chip.bandwidth, chip.ring) > 0


def test_the_command_prints_a_plan_and_a_sweep_one_that_fits():
    done = plan("--topology=cpu:4")
    assert done.returncode == 0, done.stderr
    assert "mesh data=4 fsdp=1 tensor=1" in done.stdout and "the run: 10 steps, 10,240 tokens" in done.stdout
    assert "paid for after" in done.stdout and "8.000 GiB: fits" in done.stdout
    done = plan("--topology=cpu:2", "--what=sweep", "--config.batch_size=2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rows = [line.split(" | ") for line in lines[2:-1]]
    times = [float(row[4].replace(",", "")) for row in rows]
    assert times == sorted(times) and all(float(row[3]) < 7.5 for row in rows)
    assert lines[-1].startswith("best: --config.mesh.fsdp=")


def test_the_step_of_decoding_is_planned():
    done = plan("--topology=cpu:4", "--what=decode", "--requests=8", "--length=256", "--attention=xla", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    model = shape_of("smollm2-135m")
    # four engines, two requests each; every position has a log-weight beside its key and value
    caches = model.num_layers * 2 * 256 * model.num_kv_heads * (2 * model.head_dim + 1) * 4
    weights = sum(a.size for a in jax.tree.leaves(abstract_params(model))) * 4
    assert found["memory"]["caches"] == caches and found["memory"]["weights"] == weights
    assert found["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1} and found["attention"] == "xla"
    assert found["tokens_per_second"] == pytest.approx(8 / found["seconds"])
    # for the cartridge that both requests see, XLA's attention has a loop of a length that the data decide
    assert found["host_waits"] == 2 * model.num_layers
    assert found["kernels_per_step"] > model.num_layers * found["kernels_per_layer"] > 0
    assert found["bytes_per_step"] > found["least_bytes_per_step"] > weights


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology=cpu:8"], "config.batch_size is 4, which 8 devices"),
        (["--topology=cpu:4", "--what=decode", "--requests=6"], "--requests is 6, which 4 engines"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(arguments: list[str], said: str):
    done = plan(*arguments)
    assert done.returncode == 2 and done.stdout.count("\n") <= 1
    [sentence] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said in sentence and done.stderr.rstrip().endswith(sentence)


def test_numbers_below_one_are_refused():
    with pytest.raises(UserError, match="a document of 0 tokens, a question of 64"):
        Query(document=0)
    with pytest.raises(UserError, match="64 requests of 0 tokens for 1 cartridges: expected at least 1"):
        Requests(length=0)


def test_a_missing_compiler_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise chips.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(chips.importlib.metadata, "distribution", missing)
    for topology in ("v5p-64", "h100:8"):
        with pytest.raises(ImportError, match=r"is not installed: run `pip install '\.\[aot\]'`"):
            chips.devices_of(topology)


def test_a_cartridge_pays_later_against_a_cache_and_the_sooner_the_longer_the_document():
    model, chip = shape_of("llama-3.1-8b"), chips.CHIPS["v5p"]

    def of(document: int, trained: float = 1e4) -> Any:
        return economics(model, chip, "bfloat16", 2048, Query(document), trained, 10**7, 64)

    long, short = of(100_000), of(10_000)
    assert 0 < long.queries_uncached < long.queries_cached < short.queries_cached
    assert long.with_cartridge == short.with_cartridge < short.cached < short.uncached < long.uncached
    assert of(2048).queries_cached == of(1000).queries_cached == math.inf  # nothing is saved
    assert of(100_000, 2e4).queries_uncached > long.queries_uncached
    # by hand: reading 100,000 tokens takes at least two FLOPs for each of the layers' weights
    assert long.uncached - long.cached > 2 * 7e9 * 100_000 / chip.flops


def test_costs_fall_with_devices_and_rise_with_work():
    model = shape_of("llama-3.1-8b")
    config = TrainConfig("-", "-", "-", dtype="bfloat16", seq_len=2048, batch_size=32)
    whole = train_costs(config, model, (1, 1, 1), "tpu")
    assert whole.flops == pytest.approx(8 * train_costs(config, model, (2, 2, 2), "tpu").flops)
    # a forward pass and the activations' gradients: four FLOPs for each weight and token, the head's at targets only
    weights = model.num_layers * model.layer_weights * 65_536
    assert 4 * weights < whole.needed < 4.9 * weights < whole.flops
    elementwise = train_costs(dataclasses.replace(config, remat="elementwise"), model, (1, 1, 1), "tpu")
    assert elementwise.needed == whole.needed and elementwise.flops < whole.flops
    assert least_memory(config, model, (1, 8, 1)) < least_memory(config, model, (8, 1, 1))
    chip = chips.CHIPS["v5e"]
    assert whole.mfu(chip, whole.seconds(chip, 0)) < 1
    # one request: the weights are read once a token, and hardly anything else happens
    alone = decode_costs(config, model, (1, 1, 1), Requests(1, 1, 1))
    assert alone.seconds(chip, 0) == pytest.approx(2 * 7.5e9 / chip.bandwidth, rel=0.05)
    assert received({"all-reduce": Traffic(1, 3), "all-gather": Traffic(1, 5)}) == 11


AOT = [("v4-16", (8, 1, 1), "tpu_custom_call"), ("v5e:2x4", (2, 2, 2), "tpu_custom_call")]
AOT += [("v5p-16", (1, 4, 2), "tpu_custom_call")]
AOT += [("h100:8", (2, 2, 2), "__gpu$xla.gpu.triton"), ("a100:8", (1, 8, 1), "__gpu$xla.gpu.triton")]


@pytest.mark.aot
@pytest.mark.parametrize(("topology", "mesh", "kernel"), AOT)
def test_compilers_without_devices_agree_with_the_sums_by_hand(topology: str, mesh: tuple[int, int, int], kernel: str):
    """That loops are counted as often as they turn, which TPU programs say otherwise than those of CPUs."""
    done = run([str(PROGRAM), topology, json.dumps([[*mesh, 3]])])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kernels"][kernel] > 0
    agree(found, expected_traffic(*case(found), "gpu" if "gpu" in kernel else "tpu"))


EIGHT_BILLION = ["--config=configs/large.py:train", "--config.mesh.fsdp=1", "--what=decode", "--cartridges=1"]
STEPS = {"h200:1": "gpu", "v6e:1x1": "tpu", "v5e:2x4": "tpu"}


@pytest.mark.aot
@pytest.mark.parametrize("topology", STEPS)
def test_a_step_of_an_accelerator_moves_what_it_must_and_waits_for_nobody(topology: str):
    """Of Llama-3.1-8B, 64 requests behind one cartridge; on eight chips, their sums are kernels as well."""
    flags = [f"--topology={topology}", f"--attention={STEPS[topology]}", "--requests=64", "--length=1024", "--json"]
    flags += ["--config.mesh.tensor=8"] * (topology == "v5e:2x4")
    done = run(["-m", "cartridges_jax.plan", *EIGHT_BILLION, *flags])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["host_waits"] == 0
    assert found["kernels_per_layer"] <= 14
    assert found["bytes_per_step"] <= 1.3 * found["least_bytes_per_step"]
