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

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.gguf import load_gguf
from cartridges_jax.models.hf import load_hf
from cartridges_jax.models.hub import resolve

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
    split: int = 0,
    **settings: object,
) -> None:
    """`settings` are keys behind the architecture's name, `__` for a dot; `split` is how many tensors a part has."""
    family, rope = config["model_type"], config["rope_parameters"]
    writer = gguf.GGUFWriter(str(path), family, split_max_tensors=split)
    for key, value in settings.items():
        add: dict[type, Callable[[str, Any], None]] = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[type(value)](f"{family}.{key.replace('__', '.')}", value)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    if leave_out != "feed_forward_length":
        writer.add_feed_forward_length(config["intermediate_size"])
    if "attention__head_count" not in settings:
        writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_key_length(config["head_dim"])
    if "attention__value_length" not in settings:
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


def test_rope_scaling_without_a_type_is_linear(tmp_path: Path) -> None:
    """As llama.cpp reads it; before it had types, the factor was called scale_linear, and 0 stands for none."""
    config, tensors = golden_config("qwen3")[0], weights("qwen3")
    for settings, expected in (
        ({"rope__scaling__factor": 4.0}, (4.0,) * 8),
        ({"rope__scale_linear": 2.0}, (2.0,) * 8),
        ({"rope__scale_linear": 2.0, "rope__scaling__factor": 4.0}, (4.0,) * 8),
        ({"rope__scaling__factor": 0.0}, ()),
        ({"rope__scaling__factor": 4.0, "rope__scaling__type": "none"}, ()),
    ):
        write_gguf(tmp_path / "m.gguf", config, tensors, **settings)
        assert load_gguf(tmp_path / "m.gguf", jnp.float32)[0].rope_factors == expected


def test_divisors_and_a_factor_act_together(tmp_path: Path) -> None:
    config, tensors = golden_config("llama")[0], weights("llama")
    write_gguf(tmp_path / "m.gguf", config, tensors)
    once = np.asarray(load_gguf(tmp_path / "m.gguf", jnp.float32)[0].rope_factors)
    write_gguf(tmp_path / "m.gguf", config, tensors, scaling=(gguf.RopeScalingType.LINEAR, 2.0))
    np.testing.assert_array_equal(load_gguf(tmp_path / "m.gguf", jnp.float32)[0].rope_factors, 2 * once)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rope__dimension_count": 8}, "rope.dimension_count is 8, expected 16"),
        ({"attention__value_length": 8}, "attention.value_length is 8, expected 16"),
        ({"attention__causal": False}, "attention.causal is False, expected True"),
        ({"attention__scale": 0.5}, "attention.scale is 0.5, expected 0.0 or 0.25"),
        ({"attention__sliding_window": 128}, "attention.sliding_window is 128, which is unknown here"),
        ({"attention__layer_norm_epsilon": 1e-5}, "attention.layer_norm_epsilon is"),
        ({"attention__clamp_kqv": 8.0}, "attention.clamp_kqv is 8.0"),
        ({"attention__head_count": [4, 2]}, "attention.head_count is .4, 2., expected a whole number"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"logit_scale": 8.0}, "logit_scale is 8.0, expected 0.0 or 1.0"),
        ({"residual_scale": 0.5}, "residual_scale is 0.5, expected 0.0 or 1.0"),
        ({"embedding_scale": 12.0}, "embedding_scale is 12.0, expected 0.0 or 1.0"),
        ({"expert_count": 8, "expert_used_count": 2}, "expert_count is 8.*; expert_used_count is 2"),
        ({"use_parallel_residual": True}, "use_parallel_residual is True"),
        ({"rope__scaling__attn_factor": 1.5}, "rope.scaling.attn_factor is 1.5, expected 1.0"),
        ({"rope__scaling__factor": -2.0}, "factor is -2.0, expected a positive number"),
        ({"rope__dimension_sections": [16, 24, 24, 0]}, "rope.dimension_sections is"),
        ({"rope__freq_base_swa": 1e4}, "rope.freq_base_swa is"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", golden_config("qwen3")[0], weights("qwen3"), **settings)
    with pytest.raises(UserError, match=sentence):
        load_gguf(tmp_path / "m.gguf", jnp.float32)


def test_settings_that_change_nothing(tmp_path: Path) -> None:
    config, tensors = golden_config("qwen3")[0], weights("qwen3")
    write_gguf(tmp_path / "m.gguf", config, tensors)
    expected = load_gguf(tmp_path / "m.gguf", jnp.float32)[0]
    settings = {"rope__dimension_count": 16, "attention__causal": True, "attention__scale": 0.25, "expert_count": 0}
    settings |= {"attention__sliding_window": 0, "logit_scale": 1.0, "vocab_size": 128, "pooling_type": 3}
    settings |= {"rope__scaling__original_context_length": 64, "attention__head_count": [4, 4]}
    write_gguf(tmp_path / "m.gguf", config, tensors, **settings)
    assert load_gguf(tmp_path / "m.gguf", jnp.float32)[0] == expected


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_split_files(family: str, tmp_path: Path) -> None:
    config, tensors = golden_config(family)[0], weights(family)
    write_gguf(tmp_path / "whole.gguf", config, tensors)
    expected = load_gguf(tmp_path / "whole.gguf", jnp.float32)
    write_gguf(tmp_path / "m.gguf", config, tensors, split=10)
    parts = sorted(tmp_path.glob("m-*"))
    assert [part.name for part in parts] == [f"m-{i + 1:05}-of-{len(parts):05}.gguf" for i in range(len(parts))]
    assert len(parts) > 2
    for part in parts:  # any of them stands for all
        assert resolve(str(part)).gguf == parts[0]
        config, params, fingerprint = load_gguf(part, jnp.float32)
        assert (config, fingerprint) == (expected[0], expected[2])
        jax.tree.map(np.testing.assert_array_equal, params, expected[1])

    renamed = parts[1].rename(tmp_path / "other.gguf")
    with pytest.raises(UserError, match=rf"other.gguf is part 1 .from 0. of {len(parts)} by its contents, and 0 of 1"):
        load_gguf(renamed, jnp.float32)
    for read in (lambda: load_gguf(parts[0], jnp.float32), lambda: resolve(str(parts[0]))):
        with pytest.raises(FileNotFoundError, match=rf"lacks m-00002-of-{len(parts):05}.gguf, parts of the same model"):
            read()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(UserError, match=r"is part 2 .from 0. of . by its contents, and 1 of"):
        load_gguf(parts[0], jnp.float32)


def test_parts_of_two_models(tmp_path: Path) -> None:
    for folder, split in (("one", 20), ("two", 24)):
        (tmp_path / folder).mkdir()
        write_gguf(tmp_path / folder / "m.gguf", golden_config("qwen2")[0], weights("qwen2"), split=split)
    first, second = sorted((tmp_path / "one").glob("*"))
    second.write_bytes(sorted((tmp_path / "two").glob("*"))[1].read_bytes())
    with pytest.raises(UserError, match=r"do not hold the tensors of one model: download them again"):
        load_gguf(first, jnp.float32)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0])
def test_numbers_that_are_none(kind: Kind, tmp_path: Path) -> None:
    config, tensors = golden_config("qwen3")[0], weights("qwen3")
    write_gguf(tmp_path / "m.gguf", config, tensors, kind)
    reader = gguf.GGUFReader(tmp_path / "m.gguf", "r+")
    (tensor,) = (t for t in reader.tensors if t.name == "blk.1.ffn_up.weight")
    # infinite, or NaN: all ones are so as float16 (which a Q8_0 block begins with), as bfloat16 and as float32
    tensor.data.reshape(-1).view(np.uint8)[:4] = 0xFF
    reader.data.flush()
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight holds numbers that are NaN or infinite"):
        load_gguf(tmp_path / "m.gguf", jnp.float32)


def test_divisors_that_are_no_numbers(tmp_path: Path) -> None:
    config = {**golden_config("llama")[0]}
    config["rope_parameters"] = {**config["rope_parameters"], "factor": np.nan}
    write_gguf(tmp_path / "m.gguf", config, weights("llama"))
    with pytest.raises(UserError, match=r"a RoPE factor is not a positive number"):
        load_gguf(tmp_path / "m.gguf", jnp.float32)


def test_divisors_for_another_head(tmp_path: Path) -> None:
    config, tensors = golden_config("llama")[0], weights("llama")
    write_gguf(tmp_path / "m.gguf", config, tensors)
    whole, name = (tmp_path / "m.gguf").read_bytes(), b"rope_freqs.weight"
    at = whole.index(name) + len(name) + 4
    (tmp_path / "m.gguf").write_bytes(whole[:at] + (4).to_bytes(8, "little") + whole[at + 8 :])
    with pytest.raises(UserError, match=r"rope_freqs.weight is .4,., expected .8,."):
        load_gguf(tmp_path / "m.gguf", jnp.float32)


@pytest.mark.parametrize(
    ("at", "count"),
    [(8, 2**62), (16, 2**62), (8, 10**9), (16, 10**9)],
    ids=["tensors", "keys", "many tensors", "many keys"],
)
@pytest.mark.timeout(20)
def test_counts_that_no_file_holds(at: int, count: int, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, golden_config("qwen3")[0], weights("qwen3"))
    whole = bytearray(path.read_bytes())
    whole[at : at + 8] = count.to_bytes(8, "little")
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"is not a whole GGUF file"):
        load_gguf(path, jnp.float32)


@pytest.mark.parametrize("item", [0, 4, 7, 8, 9])  # numbers, flags, texts, arrays
def test_arrays_that_no_file_holds(item: int, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, golden_config("qwen3")[0], weights("qwen3"), tags=["a", "b"])
    whole, name = path.read_bytes(), b"qwen3.tags"
    at = whole.index(name) + len(name) + 4
    path.write_bytes(whole[:at] + item.to_bytes(4, "little") + (2**60).to_bytes(8, "little") + whole[at + 12 :])
    with pytest.raises(UserError, match=r"is not a whole GGUF file"):
        load_gguf(path, jnp.float32)


@pytest.mark.parametrize("shape", [(2**40, 2**40), (2**62, 4), (0, 2**50), (2**32, 2**32)])
def test_shapes_that_no_file_holds(shape: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, golden_config("llama")[0], weights("llama"))
    whole, name = path.read_bytes(), b"blk.1.attn_q.weight"
    at = whole.index(name) + len(name) + 4
    path.write_bytes(whole[:at] + b"".join(size.to_bytes(8, "little") for size in shape) + whole[at + 16 :])
    with pytest.raises(UserError, match=r"is not a whole GGUF file|self_attn.q_proj.weight is \(1125899906842624, 0\)"):
        load_gguf(path, jnp.float32)


def test_a_layer_count_that_no_machine_holds(tmp_path: Path) -> None:
    config = {**golden_config("qwen3")[0], "num_hidden_layers": 10**9}
    write_gguf(tmp_path / "m.gguf", config, weights("qwen3"))
    with pytest.raises(UserError, match=r"block_count is 1000000000, expected a whole number from 1 to 10,000"):
        load_gguf(tmp_path / "m.gguf", jnp.float32)


def test_a_tensor_type_that_holds_no_weights(tmp_path: Path) -> None:
    config, tensors = golden_config("qwen3")[0], weights("qwen3")
    write_gguf(tmp_path / "m.gguf", config, tensors)
    whole, name = (tmp_path / "m.gguf").read_bytes(), b"blk.1.ffn_up.weight"
    at = whole.index(name) + len(name) + 4 + 16
    (tmp_path / "m.gguf").write_bytes(whole[:at] + int(Kind.I32).to_bytes(4, "little") + whole[at + 4 :])
    with pytest.raises(UserError, match=r"blk.1.ffn_up.weight is of type I32, which no weights are"):
        load_gguf(tmp_path / "m.gguf", jnp.float32)


def test_what_is_no_model(tmp_path: Path) -> None:
    for key, value, sentence in (
        ("type", "adapter", "'adapter', expected 'model'"),
        ("quantization_version", 1, "1, ex"),
    ):
        writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"general.{key}", value)  # type: ignore
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(UserError, match=rf"general.{key} of the GGUF file is {sentence}"):
            load_gguf(tmp_path / "m.gguf", jnp.float32)


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
