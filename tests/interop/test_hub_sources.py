"""Cartridges and datasets pushed to a Hub and fetched from it, by its real client over HTTP on loopback."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from hub_stub import TOKEN, Hub, run_hub

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.interop.publish import card
from cartridges_jax.interop.sources import dataset_files
from cartridges_jax.training.data import read_examples
from synth import conversation

CLOSED = "http://127.0.0.1:9"  # the discard port: nothing listens there


@pytest.fixture
def hub() -> Iterator[Hub]:
    with run_hub() as hub:
        yield hub


def on_hub(hub: Hub, home: Path, code: str, *arguments: object, token: str = TOKEN, url: str = "") -> str:
    # The client reads its endpoint when it is imported, hence a process of its own.
    imports = "import sys\nfrom cartridges_jax import Cartridge, convert, interop\n"
    environment = os.environ | {"HF_ENDPOINT": url or hub.url, "HF_HOME": str(home), "HF_TOKEN": token}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", imports + code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_cartridge_goes_to_the_hub_and_comes_back(cartridge: Cartridge, hub: Hub, tmp_path: Path):
    cartridge.save(tmp_path / "c.safetensors")
    (tmp_path / "report.md").write_text("gap closed 0.85")
    push = "convert.main([sys.argv[1], 'hf:me/manual', '--dtype=bfloat16', '--report=' + sys.argv[2]])"
    said = on_hub(hub, tmp_path / "a", push, tmp_path / "c.safetensors", tmp_path / "report.md")
    assert said.startswith(f"{hub.url}/me/manual: cartridge.safetensors, 16 slots")
    files = hub.repos["models", "me/manual"]
    assert set(files) - {".gitattributes"} == {"cartridge.safetensors", "README.md"}
    readme = files["README.md"].decode()
    assert "gap closed 0.85" in readme and 'Cartridge.load("hf:me/manual", model=model)' in readme

    fetch = "c = interop.from_hub('me/manual'); c.save(sys.argv[1]); Cartridge.load('hf:me/manual@main')"
    on_hub(hub, tmp_path / "b", fetch, tmp_path / "back.safetensors")
    found = Cartridge.load(tmp_path / "back.safetensors", model=tiny.model())
    assert (found.num_frozen, found.provenance) == (3, cartridge.provenance)
    np.testing.assert_allclose(found.keys, cartridge.keys, rtol=2**-8)


def test_a_dataset_goes_to_the_hub_and_trains_from_there(hub: Hub, tmp_path: Path):
    tiny.write_dataset(tmp_path / "dataset.parquet", tiny.model(), count=3)
    (tmp_path / "config.json").write_text("{}")
    said = on_hub(
        hub, tmp_path / "a", "print(interop.push_dataset(sys.argv[1], 'me/data'))", tmp_path / "dataset.parquet"
    )
    assert said == f"{hub.url}/datasets/me/data"
    assert set(hub.repos["datasets", "me/data"]) - {".gitattributes"} == {
        "data/train-00000-of-00001.parquet",
        "config.json",
    }
    code = "from cartridges_jax.interop.sources import dataset_files\nprint(*dataset_files('hf:me/data'))"
    (path,) = map(Path, on_hub(hub, tmp_path / "b", code).split())
    assert path.read_bytes() == (tmp_path / "dataset.parquet").read_bytes()


def test_what_is_too_large_is_not_fetched_and_what_is_here_needs_no_hub(cartridge: Cartridge, hub: Hub, tmp_path: Path):
    cartridge.save(tmp_path / "c.safetensors")
    content = (tmp_path / "c.safetensors").read_bytes()
    hub.repos["models", "me/c"] = {"cartridge.safetensors": content, "weights.bin": b"0" * 10_000_000}
    limit = f"from cartridges_jax.interop import sources\nsources.CARTRIDGE_BYTES = {len(content)}"
    load = "\nCartridge.load('hf:me/c')"
    refuse = f"{limit} - 1\ntry: Cartridge.load('hf:me/c')\nexcept ValueError as error: print(error)\n"
    listing = "from pathlib import Path\nprint(len(list(Path(sys.argv[1]).rglob('snapshots/*/*'))))\n"
    # other files do not count
    refused, fetched = on_hub(hub, tmp_path, refuse + listing + limit + load, tmp_path).splitlines()
    assert refused.startswith("the files of hf:me/c have 0.0 GB, and at most") and "is it the right name?" in refused
    assert fetched == "0"
    on_hub(hub, tmp_path, limit + load, url=CLOSED)


def test_each_failure_of_the_hub_is_a_sentence(cartridge: Cartridge, hub: Hub, tmp_path: Path):
    cartridge.save(tmp_path / "c.safetensors")
    code = (
        "for source in ('hf:me/none', 'hf:no', 'hf:a/../b'):\n"
        "  try: Cartridge.load(source)\n"
        "  except Exception as error: print(f'{type(error).__name__}: {error}')\n"
        "try: interop.push_to_hub(Cartridge.load(sys.argv[1]), 'me/c')\n"
        "except Exception as error: print(f'{type(error).__name__}: {error}')"
    )
    missing, no, path, push = on_hub(hub, tmp_path, code, tmp_path / "c.safetensors", token="hf_wrong").splitlines()
    assert missing.startswith("FileNotFoundError: there is no cartridge 'me/none' on the Hugging Face Hub")
    for refused in (no, path):
        assert refused.startswith("UserError: ") and "is no Hub source: expected hf:org/name" in refused
    assert push.startswith(
        ("ConnectionError: cartridge 'me/c' cannot be pushed to", "PermissionError", "FileNotFoundError")
    )
    *_, away, push = on_hub(hub, tmp_path, code, tmp_path / "c.safetensors", url=CLOSED).splitlines()[-4:]
    assert push.startswith("ConnectionError: cartridge 'me/c' cannot be pushed to the Hugging Face Hub")
    assert away.startswith("UserError")


def test_the_card_says_only_what_is_known(cartridge: Cartridge):
    bare = cartridge.replace(provenance=dataclasses.replace(cartridge.provenance, model="a/b", training_tokens=0))
    text = card(bare, "me/manual")
    assert 'base_model: "a/b"' in text and "| training | unknown |" in text and "Not measured" in text
    local = card(cartridge, "me/manual")  # the name of a folder on this machine is no model of the Hub's
    assert "base_model" not in local and "12 tokens, 3.5e+09 FLOPs" in local


def upstream_table(tokens: list[int]) -> pa.Table:
    """As pyarrow infers it from upstream's rows: metadata is a struct, and lists that are always empty have no type."""
    top = {"token_idx": [0, 0, 1], "token_id": [5, 6, 7], "logprobs": [-0.1, -2.5, -0.01], "shape": [2, 20]}
    messages = [
        {"content": "What sleeps in box 3?", "role": "user", "token_ids": [4, 5], "top_logprobs": None},
        {"content": "The cat.", "role": "assistant", "token_ids": tokens, "top_logprobs": top},
    ]
    metadata = {"tool_calls": [], "seed_prompt": "Ask.", "initial_system_prompt": "SECRET"}
    return pa.Table.from_pylist(
        [{"messages": messages, "system_prompt": "SECRET", "metadata": metadata, "type": "todo"}]
    )


def test_a_dataset_of_upstream_is_a_folder_of_shards(tmp_path: Path):
    """Their public layout: data/train-0000x-of-0000y.parquet and config.yaml."""
    (tmp_path / "data").mkdir()
    for i, tokens in enumerate(([5, 7], [8, 9])):
        pq.write_table(upstream_table(tokens), tmp_path / f"data/train-0000{i}-of-00002.parquet")
    (tmp_path / "config.yaml").write_text("synthesizer: {client: {model_name: Qwen/Qwen3-4b}}")
    assert [path.name for path in dataset_files(tmp_path)] == [f"train-0000{i}-of-00002.parquet" for i in (0, 1)]
    examples = read_examples(tmp_path, tiny.model().tokenizer)
    assert [example.tokens[example.target_index[0] + 1] for example in examples] == [5, 8]
    assert examples[0].target_ids.tolist() == [5, 6, 7]
    assert next(conversation.iterate(dataset_files(tmp_path)[0])).metadata["seed_prompt"] == "Ask."


def test_a_dataset_that_is_none_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="holds no Parquet file"):
        dataset_files(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist: make it with python -m synth"):
        dataset_files(tmp_path / "none.parquet")
    (tmp_path / "data.parquet").write_text(json.dumps({}))
    with pytest.raises(UserError, match="is not a whole Parquet file"):
        read_examples(tmp_path, tiny.model().tokenizer)
