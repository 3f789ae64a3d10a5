"""GGUF files as llama.cpp's converters write them: the same model as the Hugging Face folder they come from."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from make_golden import FAMILIES, golden_config, weights

from cartridges_jax.models.gguf import load_gguf
from cartridges_jax.models.hf import load_hf
from command_line.errors import UserError

NAMES = {  # Hugging Face's name of a layer's tensor -> llama.cpp's
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem):
        return f"blk.{match[1]}.{NAMES[match[2]]}.{kind}"
    return f"{TOP[stem]}.{kind}"


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """What `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py does to q and k."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def llama3_divisors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """The `rope_freqs` tensor, as the converter spells it."""
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    divisors = []
    for frequency in 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * np.pi / frequency
        if wavelength < high:
            divisors.append(1.0)
        elif wavelength > low:
            divisors.append(rope["factor"])
        else:
            span = rope["high_freq_factor"] - rope["low_freq_factor"]
            smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / span
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.asarray(divisors, np.float32)


def write_gguf(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    kind: Kind = Kind.F32,
    scaling: tuple[gguf.RopeScalingType, float] | None = None,
    leave_out: str = "",
) -> None:
    family, rope = config["model_type"], config["rope_parameters"]
    writer = gguf.GGUFWriter(str(path), family)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    if leave_out != "feed_forward_length":
        writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    if scaling is not None:
        writer.add_rope_scaling_type(scaling[0])
        writer.add_rope_scaling_factor(scaling[1])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(rope, config["head_dim"]))
    for name, array in tensors.items():
        if family == "llama" and ".q_proj." in name:
            array = permuted(array, config["num_attention_heads"])
        if family == "llama" and ".k_proj." in name:
            array = permuted(array, config["num_key_value_heads"])
        stored = Kind.F32 if array.ndim == 1 else kind
        if gguf_name(name) != leave_out:
            writer.add_tensor(gguf_name(name), gguf.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rounded(tensors: dict[str, np.ndarray], kind: Kind) -> dict[str, np.ndarray]:
    """What is left of the matrices after quantisation; it acts row by row, so the order of rows does not matter."""
    return {n: a if a.ndim == 1 else gguf.dequantize(gguf.quantize(a, kind), kind) for n, a in tensors.items()}


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_model_as_the_folder(family: str, kind: Kind, tmp_path: Path, write_hf: Callable[..., Path]) -> None:
    config, tensors = golden_config(family)[0], weights(family)
    write_gguf(tmp_path / "model.gguf", config, tensors, kind)
    found, params, fingerprint = load_gguf(tmp_path / "model.gguf", jnp.float32)
    expected, expected_params, expected_fingerprint = load_hf(write_hf(config, rounded(tensors, kind)), jnp.float32)
    np.testing.assert_allclose(found.rope_factors, expected.rope_factors, rtol=1e-6)
    assert found.norm_eps == pytest.approx(expected.norm_eps, rel=1e-6)  # float32 in the file
    same = {"rope_factors": expected.rope_factors, "norm_eps": expected.norm_eps}
    assert dataclasses.replace(found, **same) == expected
    jax.tree.map(np.testing.assert_array_equal, params, expected_params)
    assert fingerprint == expected_fingerprint


def test_linear_rope_scaling(tmp_path: Path) -> None:
    config, tensors = golden_config("qwen3")[0], weights("qwen3")
    for kind, factor, expected in (("LINEAR", 4.0, (4.0,) * 8), ("NONE", 1.0, ())):
        write_gguf(tmp_path / "m.gguf", config, tensors, scaling=(gguf.RopeScalingType[kind], factor))
        assert load_gguf(tmp_path / "m.gguf", jnp.float32)[0].rope_factors == expected


def test_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(FileNotFoundError, match=r"does not exist: expected a .gguf file"):
        load_gguf(path, jnp.float32)
    config, tensors = golden_config("qwen3")[0], weights("qwen3")
    write_gguf(path, config, tensors, scaling=(gguf.RopeScalingType.YARN, 4.0))
    with pytest.raises(UserError, match=r"RoPE scaling is 'yarn'"):
        load_gguf(path, jnp.float32)
    write_gguf(path, config, tensors, leave_out="feed_forward_length")
    with pytest.raises(UserError, match=r"the GGUF file lacks qwen3.feed_forward_length"):
        load_gguf(path, jnp.float32)
    write_gguf(path, config, tensors, leave_out="token_embd.weight")
    with pytest.raises(UserError, match=r"the GGUF file lacks token_embd.weight"):
        load_gguf(path, jnp.float32)
    write_gguf(path, config, tensors, leave_out="blk.1.attn_k_norm.weight")
    with pytest.raises(UserError, match=r"model.layers.1.self_attn.k_norm.weight is missing"):
        load_gguf(path, jnp.float32)
    write_gguf(path, {**config, "model_type": "gemma3"}, tensors)
    with pytest.raises(UserError, match=r"architecture is 'gemma3', expected one of llama, qwen2, qwen3"):
        load_gguf(path, jnp.float32)


def test_truncated_files(tmp_path: Path) -> None:
    path, cut = tmp_path / "model.gguf", tmp_path / "cut.gguf"
    write_gguf(path, golden_config("qwen2")[0], weights("qwen2"))
    whole = path.read_bytes()
    for size in (0, 3, 10, 24, 60, 500, 2500, len(whole) // 2, len(whole) - 40_000):
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"is not a whole GGUF file .*: download it again"):
            load_gguf(cut, jnp.float32)
    cut.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(UserError, match=r"is not a whole GGUF file"):
        load_gguf(cut, jnp.float32)
