"""What the loaders accept, and the sentences with which they refuse the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_golden import FAMILIES, golden_config, weights

from cartridges_jax.models.config import ModelConfig, rope_factors
from cartridges_jax.models.hf import load_hf
from cartridges_jax.models.transformer import abstract_params
from command_line.errors import UserError

WriteModel = Callable[..., Path]


@pytest.fixture
def llama() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return golden_config("llama")[0], weights("llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_of_the_file_arrives(family: str, write_hf: WriteModel) -> None:
    config, tensors = golden_config(family)[0], weights(family)
    loaded, params, fingerprint = load_hf(write_hf(config, tensors), jnp.float32)
    _, sharded, same = load_hf(write_hf(config, tensors, shards=2), jnp.float32)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, abstract_params(loaded))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(array.size for array in tensors.values())
    mine = np.sort(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)]))
    assert (mine == np.sort(np.concatenate([array.ravel() for array in tensors.values()]))).all()
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, sharded))
    assert fingerprint == same
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.5
    assert load_hf(write_hf(config, tensors), jnp.float32)[2] != fingerprint


def test_bfloat16_is_kept_or_widened(write_hf: WriteModel) -> None:
    folder = write_hf(golden_config("llama")[0], weights("llama", "bfloat16"))
    expected = weights("llama", "bfloat16")["model.embed_tokens.weight"]
    for dtype in (jnp.bfloat16, jnp.float32):
        embed = load_hf(folder, dtype)[1]["embed"]
        assert embed.dtype == dtype
        assert (np.asarray(embed, np.float32) == expected.astype(np.float32)).all()


def test_a_tied_checkpoint_may_repeat_its_head(write_hf: WriteModel) -> None:
    config, tensors = golden_config("smollm2")[0], weights("smollm2")
    once = load_hf(write_hf(config, tensors), jnp.float32)
    twice = load_hf(write_hf(config, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}), jnp.float32)
    assert "head" not in twice[1] and once[2] == twice[2]


def test_old_buffers_are_no_weights(write_hf: WriteModel, llama: tuple[dict, dict]) -> None:
    llama[1]["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    load_hf(write_hf(*llama), jnp.float32)


def test_all_problems_come_in_one_sentence(write_hf: WriteModel, llama: tuple[dict, dict]) -> None:
    config, tensors = llama
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.o_proj.bias"] = np.ones(64, np.float32)
    tensors["model.layers.2.self_attn.k_proj.weight"] = np.ones((30, 64), np.float32)  # not whole heads
    tensors["model.layers.2.self_attn.v_proj.weight"] = np.ones((16, 64), np.float32)  # one head too few
    tensors["lm_head.weight"] = np.ones((127, 64), np.float32)
    with pytest.raises(UserError, match=r"do not fit a llama of 3 layers") as error:
        load_hf(write_hf(config, tensors), jnp.float32)
    text = str(error.value)
    for part in (
        "model.norm.weight is missing",
        "model.layers.1.mlp.up_proj.weight is missing",
        "model.layers.0.self_attn.o_proj.bias is unknown",
        "model.layers.2.self_attn.k_proj.weight is (30, 64)",
        "model.layers.2.self_attn.v_proj.weight is (16, 64)",
        "lm_head.weight is (127, 64), expected (128, 64)",
    ):
        assert part in text
    assert "\n" not in text


def test_many_problems_are_counted(write_hf: WriteModel, llama: tuple[dict, dict]) -> None:
    with pytest.raises(UserError, match=r"; and 8 more$"):  # of 9 in each of two layers, embedding and head
        kept = {name: array for name, array in llama[1].items() if "layers.0." in name or name == "model.norm.weight"}
        load_hf(write_hf(llama[0], kept), jnp.float32)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -1])
def test_truncated_safetensors(kept: float, shards: int, write_hf: WriteModel, llama: tuple[dict, dict]) -> None:
    folder = write_hf(*llama, shards)
    victim = sorted(folder.glob("*.safetensors"))[-1]
    whole = victim.read_bytes()
    victim.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match=rf"{victim.name} is not a whole safetensors file .*: download it again"):
        load_hf(folder, jnp.float32)


def test_index_that_names_a_shard_which_is_not_there(write_hf: WriteModel, llama: tuple[dict, dict]) -> None:
    folder = write_hf(*llama, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-00003.safetensors, which its index names"):
        load_hf(folder, jnp.float32)


def test_index_that_names_a_tensor_its_shard_lacks(write_hf: WriteModel, llama: tuple[dict, dict]) -> None:
    folder = write_hf(*llama, shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "model.norm.weight"
    other = next(shard for shard in content["weight_map"].values() if shard != content["weight_map"][name])
    content["weight_map"][name] = other
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{other} is not a whole safetensors file .*{name}"):
        load_hf(folder, jnp.float32)


def test_index_cannot_lead_out_of_its_folder(write_hf: WriteModel, llama: tuple[dict, dict]) -> None:
    folder = write_hf(*llama, shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    load_hf(folder, jnp.float32)  # the file of that name in the folder itself


def test_folders_that_hold_no_model(tmp_path: Path, write_hf: WriteModel, llama: tuple[dict, dict]) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        load_hf(tmp_path, jnp.float32)
    (tmp_path / "config.json").write_text(json.dumps(llama[0]))
    with pytest.raises(FileNotFoundError, match=r"holds no .safetensors file"):
        load_hf(tmp_path, jnp.float32)
    (tmp_path / "config.json").write_text(json.dumps(llama[0])[:50])
    with pytest.raises(UserError, match=r"config.json is not a whole JSON file"):
        load_hf(tmp_path, jnp.float32)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gemma3"}, "model_type is 'gemma3', expected one of llama, qwen2, qwen3"),
        ({"model_type": "mistral", "sliding_window": 4096}, "model_type is 'mistral'"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}, "this qwen2 config uses a sliding"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "this qwen3 config uses a"),
        ({"mlp_bias": True}, "an MLP bias"),
        ({"hidden_act": "gelu"}, "activation other than silu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaling is 'yarn', expected default, linear"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE scaling is 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "RoPE scaling is 'longrope'"),
        ({"num_key_value_heads": 3}, "4 query heads cannot be grouped over 3 kv heads"),
        ({"head_dim": 15}, "head size is 15, expected an even number"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ModelConfig.from_hf({**golden_config("llama")[0], **changes})


def test_config_that_lacks_sizes() -> None:
    with pytest.raises(UserError, match=r"this llama config lacks hidden_size, num_attention_heads: expected"):
        config = golden_config("llama")[0]
        ModelConfig.from_hf({k: v for k, v in config.items() if k not in ("hidden_size", "num_attention_heads")})


def test_sliding_window_that_is_switched_off() -> None:
    config = golden_config("qwen2")[0]
    off = {**config, "sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 70}
    assert ModelConfig.from_hf(off) == ModelConfig.from_hf(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_of_transformers_4(family: str) -> None:
    config = golden_config(family)[0]
    rope = dict(config["rope_parameters"])
    old = {k: v for k, v in config.items() if k != "rope_parameters"} | {"rope_theta": rope.pop("rope_theta")}
    old["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(config)


def test_config_defaults() -> None:
    config = golden_config("smollm2")[0]
    for key in ("head_dim", "num_key_value_heads", "tie_word_embeddings", "rms_norm_eps", "rope_parameters"):
        del config[key]
    parsed = ModelConfig.from_hf(config)
    assert (parsed.head_dim, parsed.num_kv_heads, parsed.tie_embeddings) == (16, 6, False)
    assert (parsed.norm_eps, parsed.rope_theta, parsed.rope_factors) == (1e-6, 10_000.0, ())


def test_rope_factors() -> None:
    assert rope_factors({"rope_type": "linear", "factor": 4.0}, 1e4, 8) == (4.0,) * 4
    llama3 = golden_config("llama")[0]["rope_parameters"]
    factors = rope_factors(llama3, llama3["rope_theta"], 16)
    assert factors[0] == 1.0 and 1.0 < factors[1] < 8.0 and factors[2:] == (8.0,) * 6  # all three of its ranges
