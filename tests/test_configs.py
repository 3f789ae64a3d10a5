"""Every config in configs/ can be built, stage by stage, and a stage reads the files that an earlier one writes."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from cartridges_jax.command_line.config import build
from cartridges_jax.comparison.config import CompareConfig
from cartridges_jax.evaluate import EvalConfig
from cartridges_jax.serving.self_study import ServerConfig
from cartridges_jax.suites import load_suite
from cartridges_jax.training.config import TrainConfig
from synth.config import SynthConfig

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.py"))


def stage(name: str, kind: type, part: str) -> Any:
    return build(kind, importlib.import_module(f"configs.{name}").get_config(part).to_dict())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_stage_builds(name: str):
    made = stage(name, SynthConfig, "synth")
    trained, evaluated = stage(name, TrainConfig, "train"), stage(name, EvalConfig, "evaluate")
    assert trained.dataset == f"{made.output_dir}/dataset.parquet"
    assert evaluated.cartridge == f"{trained.output_dir}/cartridge.safetensors"
    # A text file is the corpus itself. Synthesis writes down the text that it has read of anything else.
    corpus = made.resource.path if made.resource.found_kind() == "text" else f"{made.output_dir}/corpus.txt"
    assert trained.corpus == evaluated.corpus == corpus


@pytest.mark.parametrize("name", sorted(path.stem for path in (FOLDER / "compare").glob("*.py")))
def test_every_comparison_builds_and_has_a_suite(name: str):
    config = stage(f"compare.{name}", CompareConfig, "compare")
    assert load_suite(config.suite, config.suite_options).questions()
    made, trained = stage(f"compare.{name}", SynthConfig, "synth"), stage(f"compare.{name}", TrainConfig, "train")
    assert made.client.model == trained.model == config.model and trained.dtype == config.dtype
    stage(f"compare.{name}", ServerConfig, "server")


def test_longer_is_the_quickstart_with_more_of_it():
    made, more = (stage(name, SynthConfig, "synth") for name in ("quickstart", "longer"))
    trained, longer = (stage(name, TrainConfig, "train") for name in ("quickstart", "longer"))
    assert more.num_conversations > made.num_conversations and longer.num_epochs > trained.num_epochs
    assert more.seed_prompts == made.seed_prompts and longer.init == trained.init and longer.tail == trained.tail


def test_the_manifest_gives_every_host_a_process_and_the_mesh_its_devices():
    manifest = yaml.safe_load((FOLDER / "deploy" / "jobset.yaml").read_text())
    assert manifest["kind"] == "JobSet" and manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    chips = container["resources"]["limits"]["google.com/tpu"] * job["completions"]
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert job["parallelism"] == job["completions"] and math.prod(map(int, sides)) == chips
    assert f"--config.mesh.fsdp={chips}" in container["command"]
    assert "--config.distributed=True" in container["command"]
