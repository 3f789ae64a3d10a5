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
import tiny
from make_golden import FAMILIES, golden_config, weights
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer as Backend

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.config import ModelConfig, rope_factors
from cartridges_jax.models.hf import load_hf
from cartridges_jax.models.language_model import load_model
from cartridges_jax.models.params import abstract_params
from cartridges_jax.parallel.sharding import MeshConfig, make_mesh

WriteModel = Callable[..., Path]
LLAMA3 = golden_config("llama")[0]["rope_parameters"]


@pytest.fixture
def llama() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return golden_config("llama")[0], weights("llama")


def assert_same(loaded: tuple[Any, Any, str], expected: tuple[Any, Any, str]) -> None:
    assert (loaded[0], loaded[2]) == (expected[0], expected[2])
    jax.tree.map(np.testing.assert_array_equal, loaded[1], expected[1])


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


def test_a_tied_head_of_its_own_is_refused(write_hf: WriteModel) -> None:
    config, tensors = golden_config("smollm2")[0], weights("smollm2")
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    with pytest.raises(UserError, match=r"lm_head.weight differs from model.embed_tokens.weight, and the config ties"):
        load_hf(write_hf(config, {**tensors, "lm_head.weight": head}), jnp.float32)
    with pytest.raises(UserError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_hf(write_hf(config, {**tensors, "lm_head.weight": head[1:]}), jnp.float32)


def test_a_tied_checkpoint_may_hold_its_head_alone(write_hf: WriteModel) -> None:
    config, tensors = golden_config("smollm2")[0], weights("smollm2")
    expected = load_hf(write_hf(config, tensors), jnp.float32)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    assert_same(load_hf(write_hf(config, tensors), jnp.float32), expected)


@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_numbers_that_are_none(number: float, stored: str, dtype: Any, write_hf: WriteModel) -> None:
    config, tensors = golden_config("llama")[0], weights("llama", stored)
    bad = ["lm_head.weight", "model.layers.2.mlp.down_proj.weight", "model.norm.weight"]
    for name in bad:
        tensors[name].reshape(-1)[-1] = number
    with pytest.raises(UserError, match=r"; ".join(f"{name} holds numbers that are NaN or infinite" for name in bad)):
        load_hf(write_hf(config, tensors), dtype)


def test_numbers_that_are_none_in_a_part_of_an_array(write_hf: WriteModel, llama: tuple[dict, dict]) -> None:
    llama[1]["model.layers.1.mlp.up_proj.weight"][-1, -1] = np.nan
    with pytest.raises(
        UserError, match=r"3 layers: model.layers.1.mlp.up_proj.weight holds numbers that are NaN or inf"
    ):
        load_hf(write_hf(*llama), jnp.float32, make_mesh(MeshConfig(), jax.devices()[:1]))


def test_numbers_that_the_asked_dtype_cannot_hold(write_hf: WriteModel, llama: tuple[dict, dict]) -> None:
    llama[1]["model.norm.weight"] = llama[1]["model.norm.weight"].astype(np.float64)
    llama[1]["model.norm.weight"][3] = 1e300
    with pytest.raises(UserError, match=r"model.norm.weight holds numbers that are NaN or infinite"):
        load_hf(write_hf(*llama), jnp.float32)


def test_the_largest_numbers_are_numbers(write_hf: WriteModel, llama: tuple[dict, dict]) -> None:
    llama[1]["model.norm.weight"][:4] = [3.4e38, -3.4e38, 1e-45, -0.0]
    load_hf(write_hf(*llama), jnp.float32)


@pytest.mark.parametrize("shards", [1, 3])
def test_names_of_a_model_without_its_head(shards: int, write_hf: WriteModel, llama: tuple[dict, dict]) -> None:
    config, tensors = llama
    expected = load_hf(write_hf(config, tensors), jnp.float32)
    bare = {name.removeprefix("model."): array for name, array in tensors.items()}
    assert_same(load_hf(write_hf(config, bare, shards), jnp.float32), expected)
    with pytest.raises(UserError, match=r"with model. before their names and without"):
        load_hf(write_hf(config, tensors | bare), jnp.float32)


@pytest.mark.parametrize("shards", [1, 2])
def test_what_lies_beside_a_model_is_none_of_it(shards: int, write_hf: WriteModel, llama: tuple[dict, dict]) -> None:
    expected, folder = load_hf(write_hf(*llama), jnp.float32), write_hf(*llama, shards)
    update = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({update: np.ones((4, 64), np.float32)}, folder / "adapter_model.safetensors")
    slots = np.ones((3, 5, 2, 16), np.float32)
    save_file({"keys": slots, "values": slots}, folder / "cartridge.safetensors")
    save_file({"norm.weight": np.ones(9, np.float32)}, folder / "consolidated.safetensors")
    assert_same(load_hf(folder, jnp.float32), expected)
    if shards == 1:
        (folder / "model.safetensors").rename(folder / "weights.safetensors")  # told by its tensors then
        assert_same(load_hf(folder, jnp.float32), expected)


def test_shards_without_an_index(write_hf: WriteModel, llama: tuple[dict, dict]) -> None:
    folder = write_hf(*llama, shards=3)
    expected = load_hf(folder, jnp.float32)
    (folder / "model.safetensors.index.json").unlink()
    assert_same(load_hf(folder, jnp.float32), expected)
    bias = {"model.layers.0.self_attn.o_proj.bias": np.ones(64, np.float32)}
    save_file(bias, folder / "model-00004-of-00004.safetensors")  # it is the model's, if not of ours
    with pytest.raises(UserError, match=r"self_attn.o_proj.bias is unknown"):
        load_hf(folder, jnp.float32)


@pytest.mark.parametrize(
    ("shards", "other", "sentence"),
    [
        (2, "model.safetensors", "holds model.safetensors and model.safetensors.index.json, which names other files"),
        (2, "model.fp16.safetensors", "in model-0000.-of-00002.safetensors and in model.fp16.safetensors: leave the"),
        (1, "model.fp16.safetensors", "in model.safetensors and in model.fp16.safetensors: leave the files of one"),
        (1, "a.safetensors", "in model.safetensors and in a.safetensors"),
    ],
)
def test_two_models_in_a_folder(
    shards: int, other: str, sentence: str, write_hf: WriteModel, llama: tuple[dict, dict]
) -> None:
    folder = write_hf(*llama, shards)
    save_file({name: array * 2 for name, array in llama[1].items()}, folder / other)
    with pytest.raises(UserError, match=sentence):
        load_hf(folder, jnp.float32)


def test_a_tensor_in_two_shards(write_hf: WriteModel, llama: tuple[dict, dict]) -> None:
    folder = write_hf(*llama, shards=2)
    for shard in folder.glob("model-*"):
        save_file({**load_file(shard), "model.norm.weight": np.ones(64, np.float32)}, shard)
    with pytest.raises(
        UserError, match=r"holds model.norm.weight in model-00001-of-00002.safetensors and in model-00002"
    ):
        load_hf(folder, jnp.float32)


def test_a_tensor_that_its_index_does_not_name_is_unknown_all_the_same(
    write_hf: WriteModel, llama: tuple[dict, dict]
) -> None:
    folder = write_hf(*llama, shards=2)
    shard = folder / "model-00001-of-00002.safetensors"
    save_file({**load_file(shard), "model.layers.0.self_attn.o_proj.bias": np.ones(64, np.float32)}, shard)
    with pytest.raises(UserError, match=r"self_attn.o_proj.bias is unknown"):
        load_hf(folder, jnp.float32)


@pytest.mark.parametrize(
    "content", ["[]", "[" * 100_000, "null", '{"weight_map": {"a": 3}}', '{"weight_map": []}', "{}"]
)
def test_json_of_another_kind(content: str, write_hf: WriteModel, llama: tuple[dict, dict]) -> None:
    folder = write_hf(*llama, shards=2)
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"index.json (has no weight_map|holds|is not a whole JSON file)"):
        load_hf(folder, jnp.float32)
    if "{" not in content:
        (folder / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config.json (holds|is not a whole JSON file)"):
            load_hf(folder, jnp.float32)


def test_sizes_of_the_config_are_not_made_for_other_weights(write_hf: WriteModel, llama: tuple[dict, dict]) -> None:
    """A hundred terabytes are named by what is missing, before any of them is allocated."""
    config, tensors = llama
    config |= {"num_hidden_layers": 10_000, "intermediate_size": 4_000_000}
    with pytest.raises(
        UserError, match=r"do not fit a llama of 10000 layers: model.layers.10.input_layernorm.weight is"
    ):
        load_hf(write_hf(config, tensors), jnp.float32)


@pytest.mark.parametrize("shape", [[10**9, 10**9], [2**40, 0], [2**62, 4]])
def test_a_header_that_claims_huge_shapes(shape: list[int], write_hf: WriteModel, llama: tuple[dict, dict]) -> None:
    folder = write_hf(*llama)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    last = max(header, key=lambda name: header[name].get("data_offsets", [0])[0])
    header[last] |= {"shape": shape}
    if 0 in shape:
        header[last]["data_offsets"][1] = header[last]["data_offsets"][0]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    with pytest.raises(UserError, match=r"model.safetensors is not a whole safetensors file"):
        load_hf(folder, jnp.float32)


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path)
    load_model(str(folder))
    path = folder / "tokenizer.json"
    backend = Backend.from_file(str(path))
    backend.add_tokens(["<one more>"])
    backend.save(str(path))
    rows = backend.get_vocab_size() - 1
    sentence = rf"its tokenizer has ids up to {rows} and the embedding rows for {rows} ids"
    with pytest.raises(UserError, match=sentence):
        load_model(str(folder))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=sentence):  # before a number is read
        load_model(str(folder))


def test_an_id_that_ends_answers_and_no_row_has(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 1000]}')
    with pytest.raises(UserError, match=r"its tokenizer has ids up to 1000 and the embedding rows for \d+ ids"):
        load_model(str(folder))


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
        ({"model_type": ["llama"]}, "model_type is .'llama'., expected one of"),
        (
            {"architectures": ["LlamaEncoderModel"]},
            "architectures is .'LlamaEncoderModel'., expected 'LlamaForCausalLM'",
        ),
        ({"architectures": ["Qwen2ForCausalLM"]}, "expected 'LlamaForCausalLM'"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, "auto_map is "),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}, "use_sliding_window is True"),
        ({"sliding_window": 511}, "sliding_window is 511"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .* expected 'full_attention'"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types is"),
        ({"no_rope_layers": [1, 1, 0]}, "no_rope_layers is .1, 1, 0., expected 1"),
        ({"attention_chunk_size": 8192}, "attention_chunk_size is 8192, which is unknown here"),
        ({"is_causal": False}, "is_causal is False, expected True"),
        ({"is_causal": None}, "is_causal is None, expected True"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True, which is unknown"),
        ({"mlp_bias": True}, "this llama config asks for what this decoder does not compute: mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu' or 'swish'"),
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ({"use_qk_norm": True}, "use_qk_norm is True, expected False"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected False or True"),
        ({"attention_bias": "no"}, "attention_bias is 'no'"),
        ({"attention_multiplier": 0.125}, "attention_multiplier is 0.125, expected 0.25"),
        ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar is 256, expected 16"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0, expected 1.0"),
        ({"residual_multiplier": 0.22}, "residual_multiplier is 0.22, expected 1.0"),
        ({"logits_scaling": 8.0}, "logits_scaling is 8.0, expected 1.0"),
        ({"logit_scale": 0.0}, "logit_scale is 0.0, expected 1.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ({"num_experts": 8}, "num_experts is 8"),
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, "num_local_experts is 8.*; num_experts_per_tok is 2"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config is"),
        ({"per_layer_config": {"0": {"num_attention_heads": 2}}}, "per_layer_config is"),
        ({"dual_chunk_attention_config": {"chunk_size": 8192}}, "dual_chunk_attention_config is"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05, which is unknown here"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', expected a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a positive number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1.0"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"rope_theta": 10_000.0}, "gives rope_theta as 10000.0 and 500000.0: expected one of them"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0, expected a positive number"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta is '1e6', expected a positive number"),
        ({"rope_parameters": ["default"]}, "rope_parameters is .'default'., expected an object"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_scaling and rope_parameters .* contradict"),
        ({"rope_scaling": {"rope_type": "default"}}, "rope_scaling and rope_parameters .* contradict"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "factor": 8.0}},
            "RoPE scaling asks for .* factor is 8.0, expected 1.0",
        ),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section is"),
        (
            {"rope_parameters": {"rope_type": "linear", "type": "yarn", "factor": 2.0}},
            "RoPE scaling is 'linear' and 'yarn'",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is None, expected a positive number"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -1}}, "factor is -1, expected a positive number"),
        ({"rope_parameters": {"rope_type": "linear", "factor": float("inf")}}, "factor is inf, expected a positive"),
        (
            {"rope_parameters": {**LLAMA3, "low_freq_factor": None}},
            "low_freq_factor is None, expected a positive number",
        ),
        ({"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, "low_freq_factor is 1.0, expected less than"),
        ({"original_max_position_embeddings": 4096}, "gives original_max_position_embeddings as 4096 and 64"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention is .* expected none"),
        (
            {
                "model_type": "qwen3",
                "layer_types": ["full_attention"] * 3,
                "rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}},
            },
            "full_attention is",
        ),
        ({"rope_parameters": {"full_attention": None, "rope_theta": 1e4}}, "full_attention is None, expected none"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaling is 'yarn', expected default, linear"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE scaling is 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "RoPE scaling is 'longrope'"),
        ({"num_key_value_heads": 3}, "4 query heads cannot be grouped over 3 kv heads"),
        ({"head_dim": 15}, "head size is 15, expected an even number"),
        ({"head_dim": 0}, "head_dim is 0, expected a whole number from 1"),
        ({"head_dim": None, "num_attention_heads": 128}, "head_dim is 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected a whole number from 1 to 10,000"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000, expected a whole number from 1 to 2,147,483,647"),
        ({"hidden_size": 2**31 - 1, "intermediate_size": 2**31 - 1}, "the config asks for .* weights, more than any"),
        ({"head_dim": 10**9}, "head_dim is 1000000000"),
        ({"max_position_embeddings": 10**15}, "max_position_embeddings is"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected a whole number"),
        ({"hidden_size": 64.5}, "hidden_size is 64.5, expected a whole number"),
        ({"num_attention_heads": -4}, "num_attention_heads is -4, expected a whole number"),
        ({"num_key_value_heads": True}, "num_key_value_heads is True, expected a whole number"),
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


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "swish"},
        {"sliding_window": 512, "attention_chunk_size": None},  # as long as the window: no token is hidden
        {"layer_types": ["full_attention"] * 3, "no_rope_layers": [1, 1, 1]},
        {"is_causal": True, "is_decoder": True, "use_rope": True, "tie_word_embeddings": None},
        {"attention_multiplier": 0.25, "logits_scaling": 1.0, "final_logit_softcapping": None, "clip_qkv": None},
        {"quantization_config": None, "num_experts": 0, "rope_interleaved": False, "use_mrope": False},
        {"partial_rotary_factor": 1.0, "rope_theta": 500_000, "original_max_position_embeddings": 64},
        {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},  # said twice, and the same
        {"auto_map": {"AutoTokenizer": ["tokenization.Tokenizer", None]}, "architectures": ["LlamaForCausalLM"]},
        {"unsloth_fixed": True, "unsloth_version": "2025.1", "transformers.js_config": {"dtype": "q4"}},
        {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "max_length": 4096, "pretraining_tp": 2},
        {"_attn_implementation_autoset": True, "torch_dtype": "bfloat16", "pad_token_id": -1},
    ],
)
def test_settings_that_change_nothing(changes: dict[str, Any]) -> None:
    config = golden_config("llama")[0]
    assert ModelConfig.from_hf({**config, **changes}) == ModelConfig.from_hf(config)


def test_llama3_scaling_without_its_original_window_has_the_models() -> None:
    """As in transformers 5, whose llama3 scaling takes max_position_embeddings then."""
    config, rope = golden_config("llama")[0], dict(LLAMA3)
    rope["original_max_position_embeddings"] = config["max_position_embeddings"]
    whole = ModelConfig.from_hf({**config, "rope_parameters": rope})
    del rope["original_max_position_embeddings"]
    assert ModelConfig.from_hf({**config, "rope_parameters": rope}) == whole
    given = {**config, "rope_parameters": rope, "original_max_position_embeddings": 64}
    assert ModelConfig.from_hf(given) == ModelConfig.from_hf(config)


def test_head_size_that_a_qwen3_config_leaves_out() -> None:
    config = {key: value for key, value in golden_config("qwen3")[0].items() if key != "head_dim"}
    assert ModelConfig.from_hf(config).head_dim == 128  # the family's, not width over heads


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


def test_keys_of_every_config_that_transformers_writes() -> None:
    """One of transformers 4 holds the base class's keys too; vLLM hands them all to us."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    for kind in (LlamaConfig, Qwen2Config, Qwen3Config):
        raw = kind(num_attention_heads=32, eos_token_id=[1, 2], dtype="bfloat16").to_dict()
        assert ModelConfig.from_hf(raw) == ModelConfig.from_hf(json.loads(json.dumps(raw)))
    generation = {
        "temperature": 0.6,
        "top_k": 20,
        "num_beams": 2,
        "typical_p": 0.5,
        "bad_words_ids": [[3]],
        "prefix": "x",
    }
    assert ModelConfig.from_hf({**raw, **generation, "pruned_heads": {}}) == ModelConfig.from_hf(raw)
