"""lm-eval scores a model over the API, with and without a cartridge, as the model itself does: `make test-clients`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from clients import PYTHON  # pyrefly: ignore[missing-import] (pytest puts this folder on the path)
from running import running  # pyrefly: ignore[missing-import]

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.serving.engine import Engine
from cartridges_jax.serving.server import Server
from cartridges_jax.serving.store import CartridgeStore

pytestmark = pytest.mark.clients
TASK = """
task: boxes
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
DOCUMENTS = [
    {
        "question": f"The {animal} number {i} weighs",
        "choices": [f" {i * 7} grams", " two 👍 grams", " nothing"],
        "label": 0,
    }
    for i, animal in enumerate(["cat", "owl", "fox", "hen", "cat"])
]
PROGRAM = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

url, folder, model = sys.argv[1:]
told = lm_eval.simple_evaluate(
    model="local-completions",
    model_args={"model": model, "base_url": f"{url}/v1/completions", "tokenizer_backend": "remote", "max_length": 400},
    tasks=["boxes"], task_manager=TaskManager(include_path=folder), log_samples=True, batch_size=4, bootstrap_iters=0,
)
samples = told["samples"]["boxes"]
print(json.dumps([[sample["doc_id"], sample["filtered_resps"]] for sample in samples]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    data = folder / "boxes.jsonl"
    data.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    (folder / "boxes.yaml").write_text(TASK % data)
    return folder


@pytest.fixture(scope="module")
def cartridge() -> Cartridge:
    model = tiny.model()
    return Cartridge.from_tokens(model, tuple(model.tokenizer.encode(tiny.TEXT))[:90])


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, cartridge: Cartridge) -> Iterator[str]:
    cartridges = tmp_path_factory.mktemp("cartridges")
    cartridge.save(cartridges / "manual.safetensors")
    model = tiny.model()
    store = CartridgeStore(cartridges, lambda path: Cartridge.load(path, model=model))
    engine = Engine(model, max_num_seqs=4, max_length=512)
    with running(Server(engine, model.tokenizer, store, "tiny")) as root:
        yield root


def log_likelihood(question: str, choice: str, cartridge: Cartridge | None) -> tuple[float, bool]:
    """The log-probability of a choice behind its question, and whether each token is the most likely one."""
    model = tiny.model()
    context, whole = model.tokenizer.encode(question), model.tokenizer.encode(question + choice)
    logprobs = np.asarray(jax.nn.log_softmax(model.logits(np.array([whole]), cartridge=cartridge)[0]))
    predicted = logprobs[len(context) - 1 : -1]
    tokens = np.array(whole[len(context) :])
    return float(predicted[np.arange(len(tokens)), tokens].sum()), bool((predicted.argmax(-1) == tokens).all())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["tiny", "tiny:manual"])
def test_log_likelihoods_are_those_in_process(url: str, folder: Path, cartridge: Cartridge, name: str):
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "NO_PROXY": "127.0.0.1"}
    command = [PYTHON, "-c", PROGRAM, url, str(folder), name]
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    told: list[Any] = json.loads(done.stdout.splitlines()[-1])
    assert len(told) == len(DOCUMENTS)
    for number, answers in told:
        document = DOCUMENTS[number]
        for choice, (found, is_greedy) in zip(document["choices"], answers, strict=True):
            wanted = log_likelihood(document["question"], choice, cartridge if ":" in name else None)
            assert abs(float(found) - wanted[0]) < 1e-4 and str(is_greedy) == str(wanted[1])
