"""The table of families: what is derived from it, that nothing else knows it, and that a row of it is a new family."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from safetensors.numpy import save_file

import cartridges_jax as cj
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.kernels.decode_attention import IMPLEMENTATIONS, KERNELS
from cartridges_jax.models import spec
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.hf import load_hf
from cartridges_jax.models.params import init_params
from cartridges_jax.models.shapes import SHAPES, shape_of
from cartridges_jax.models.spec import MATRICES, ArraySpec, Family, Setting
from cartridges_jax.models.tokenizer import Tokenizer
from cartridges_jax.parallel.sharding import mesh_of
from cartridges_jax.serving.decoder import to_decode_layout
from cartridges_jax.serving.engine import Engine
from cartridges_jax.serving.scheduler import BlockTable, Chunk, Prefix, SequenceInput
from cartridges_jax.training.losses import distillation_loss

ROOT = Path(__file__).parents[2]
# where the names of a layer's arrays may stand
KNOWING = ("cartridges_jax/models/spec.py", "cartridges_jax/models/block.py")
COMMON = {"q", "k", "v", "o", "up", "down", "gate"}  # which are words for other things, too, unless they are keys

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCABULARY = 4, 24, 4, 2, 8, 40, 96
WINDOW, SCALAR, CAP, THETA, LOCAL_THETA = 5, 20.0, 3.0, 10_000.0, 100.0
TOY = Family(
    (
        ArraySpec("attention_norm", "d", "input_layernorm.weight", "attn_norm.weight", init="ones"),
        ArraySpec(
            "attention_post_norm", "d", "post_attention_layernorm.weight", "post_attention_norm.weight", init="ones"
        ),
        ArraySpec("mlp_norm", "d", "pre_feedforward_layernorm.weight", "ffn_norm.weight", init="ones"),
        ArraySpec("mlp_post_norm", "d", "post_feedforward_layernorm.weight", "post_ffw_norm.weight", init="ones"),
        ArraySpec("sinks", "n", "self_attn.sinks", "attn_sinks.weight"),
        *MATRICES,
    ),
    activation="gelu_tanh",
    norm_offset=1.0,
    scales_embedding=True,
    windowed=(True, False),
    settings=(
        Setting("window", "sliding_window", is_whole=True),
        Setting("local_rope_theta", "rope_local_base_freq"),
        Setting("scale", "query_pre_attn_scalar", -0.5),
        Setting("soft_cap", "attn_logit_softcapping"),
    ),
)
CONFIG = {
    "model_type": "toy",
    "architectures": ["ToyForCausalLM"],
    "vocab_size": VOCABULARY,
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": MLP,
    "rms_norm_eps": 1e-5,
    "rope_theta": THETA,
    "rope_local_base_freq": LOCAL_THETA,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": SCALAR,
    "attn_logit_softcapping": CAP,
}
Tensors = dict[str, np.ndarray]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[cj.LanguageModel, Tensors]]:
    """A model of the family, read from a folder, and the tensors there."""
    monkeypatch.setitem(spec.FAMILIES, "toy", TOY)
    config, rng = ModelConfig.from_hf(CONFIG), np.random.default_rng(0)
    tensors = {}
    for name, array, _ in spec.file_names(config):
        shape = array.file_shape(config)
        spread = 0.3 if array.init == "ones" or not array.summed else 1.5 * shape[-1] ** -0.5
        tensors[name] = (spread * rng.standard_normal(shape)).astype(np.float32)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, tmp_path / "model.safetensors")
    config, params, fingerprint = load_hf(tmp_path, jnp.float32)
    nobody = cast(Tokenizer, SimpleNamespace(fingerprint=""))
    yield cj.LanguageModel("toy", config, params, nobody, fingerprint), tensors


def toy_logits(tensors: Tensors, ids: np.ndarray) -> np.ndarray:
    """The family's mathematics, written from its description alone: one text, in numpy and float64."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    t = len(ids)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * (1 + w[f"{name}.weight"])

    def rotated(x_tnh: np.ndarray, theta: float) -> np.ndarray:
        angles = np.arange(t)[:, None] * theta ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
        turned = (x_tnh[..., : HEAD_DIM // 2] + 1j * x_tnh[..., HEAD_DIM // 2 :]) * np.exp(1j * angles)[:, None]
        return np.concatenate([turned.real, turned.imag], -1)

    def gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    x = w["model.embed_tokens.weight"][ids] * WIDTH**0.5
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        is_local = layer % 2 == 0
        y = norm(x, f"{at}.input_layernorm")
        q, k, v = ((y @ w[f"{at}.self_attn.{name}_proj.weight"].T).reshape(t, -1, HEAD_DIM) for name in "qkv")
        q, k = (rotated(a, LOCAL_THETA if is_local else THETA) for a in (q, k))
        k, v = (np.repeat(a, HEADS // KV_HEADS, axis=1) for a in (k, v))
        scores = CAP * np.tanh(np.einsum("tnh,snh->nts", q, k) / SCALAR**0.5 / CAP)
        distance = np.arange(t)[:, None] - np.arange(t)
        seen = (distance >= 0) & (distance < (WINDOW if is_local else t))
        weights = np.where(seen, np.exp(scores), 0)
        sinks = np.exp(w[f"{at}.self_attn.sinks"])[:, None, None]
        o = np.einsum("nts,snh->tnh", weights / (weights.sum(-1, keepdims=True) + sinks), v).reshape(t, -1)
        x = x + norm(o @ w[f"{at}.self_attn.o_proj.weight"].T, f"{at}.post_attention_layernorm")
        y = norm(x, f"{at}.pre_feedforward_layernorm")
        gate, up = (y @ w[f"{at}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + norm((gelu(gate) * up) @ w[f"{at}.mlp.down_proj.weight"].T, f"{at}.post_feedforward_layernorm")
    return norm(x, "model.norm") @ w["model.embed_tokens.weight"].T


IDS = np.random.default_rng(1).integers(0, VOCABULARY, 26)


def test_a_row_is_a_family_that_loads_and_computes(toy: tuple[cj.LanguageModel, Tensors]):
    model, tensors = toy
    assert_allclose(model.logits(IDS[None])[0], toy_logits(tensors, IDS), rtol=0, atol=1e-4)


def test_its_slots_of_real_tokens_are_the_text_and_its_packed_rows_are_their_conversations(
    toy: tuple[cj.LanguageModel, Tensors],
):
    """With a window, a query sees all slots, so that the text's equal the text's tokens where no window cuts."""
    model, _ = toy
    short = WINDOW
    cartridge = cj.Cartridge.from_tokens(model, IDS[: short - 2].tolist())
    whole = model.logits(IDS[None, :short])[0, short - 2 :]
    assert_allclose(model.logits(IDS[None, short - 2 : short], cartridge=cartridge)[0], whole, rtol=0, atol=3e-5)
    lengths = (15, 11)
    segment_ids = np.repeat([1, 2], lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    packed = model.logits(IDS[None], segment_ids, positions, cartridge)[0]
    for rows in (slice(0, 15), slice(15, 26)):
        assert_allclose(model.logits(IDS[None, rows], cartridge=cartridge)[0], packed[rows], rtol=0, atol=3e-5)


def test_it_trains(toy: tuple[cj.LanguageModel, Tensors]):
    """Along a direction, the gradient is the difference of the loss."""
    model, _ = toy
    cartridge = cj.Cartridge.from_tokens(model, IDS[:6].tolist())
    targets = np.random.default_rng(2).integers(0, VOCABULARY, (1, len(IDS), 3))
    ones, positions = np.ones((1, len(IDS)), np.int32), np.arange(len(IDS))[None]
    batch = cj.Batch(IDS[None], ones, positions, targets, np.full(targets.shape, -1.5), np.ones(targets.shape, bool))

    def loss(keys: jax.Array) -> jax.Array:
        return distillation_loss(cartridge.replace(keys=keys), model, batch)  # type: ignore[attr-defined]

    gradient = jax.grad(loss)(cartridge.keys)
    assert np.isfinite(gradient).all()
    direction = np.sign(gradient) / math.sqrt(gradient.size)
    ahead, behind = (float(loss(cartridge.keys + sign * 1e-2 * direction)) for sign in (1, -1))
    assert float((gradient * direction).sum()) == pytest.approx((ahead - behind) / 2e-2, rel=2e-2)


def test_what_a_config_says_otherwise_is_refused(toy: tuple[cj.LanguageModel, Tensors]):
    for key, value in {"hidden_act": "silu", "layer_types": ["full_attention", "sliding_attention"] * 2}.items():
        with pytest.raises(UserError, match=key):
            ModelConfig.from_hf(CONFIG | {key: value})
    assert [layer.window for layer in ModelConfig.from_hf(CONFIG).layers] == [WINDOW, None] * 2


@pytest.mark.parametrize("attention", [name for name in IMPLEMENTATIONS if name not in KERNELS])
def test_it_decodes_as_its_forward_pass(toy: tuple[cj.LanguageModel, Tensors], attention: str):
    """A prompt in chunks, then token by token, behind a cartridge and behind none."""
    model, _ = toy
    engine = Engine(model, 1, 64, max_top_logprobs=VOCABULARY, batch_sizes=[1], attention=attention)
    cartridge = cj.Cartridge.from_tokens(model, IDS[:7].tolist())
    for prefix in (None, Prefix("slots", cartridge.num_slots, cartridge)):
        logits = model.logits(IDS[None, 7:], cartridge=prefix and cartridge)[0]
        wanted, tokens = np.asarray(jax.nn.log_softmax(logits)), IDS[7:].tolist()
        block_table = BlockTable(range(1, engine.num_pages), [0] if prefix else [])
        if prefix:
            engine.load(prefix, [0])
        engine.prefill([Chunk(tokens[:5], 0, block_table)])
        engine.prefill([Chunk(tokens[5:9], 5, block_table)])
        for i in range(9, len(tokens)):
            engine.begin(SequenceInput(0, tokens[i], i, block_table, 0.0, 1.0, 0, 0, 0, VOCABULARY))
            (said,) = engine.harvest(engine.decode([0]))
            assert_allclose(said.top_logprobs, wanted[i][list(said.top_ids)], rtol=0, atol=1e-5)


def test_a_bias_stays_a_bias_where_a_matrix_of_as_many_rows_would_be_packed():
    sizes = {"embed_dim": 32, "num_heads": 12, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 48, "num_layers": 1}
    numbers = {"norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 64}
    config = ModelConfig("qwen2", 64, **sizes, **numbers, tie_embeddings=True, qkv_bias=True)
    params = init_params(config, jax.random.key(0))
    layers = to_decode_layout(params, config, mesh_of(params))["layers"]
    for name in ("q_bias", "k_bias", "v_bias"):
        np.testing.assert_array_equal(layers[name], params["blocks"][name])


@pytest.mark.parametrize("path", sorted((ROOT / "cartridges_jax").rglob("*.py")), ids=lambda path: path.stem)
def test_only_the_table_and_the_block_name_the_arrays_of_a_layer(path: Path):
    if str(path.relative_to(ROOT)) in KNOWING:
        return
    names = {array.name for family in spec.FAMILIES.values() for array in family.arrays}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} & (names - COMMON)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            found |= {node.slice.value} & names
    assert not found


@pytest.mark.parametrize("name", SHAPES)
def test_counts_are_those_of_the_arrays(name: str):
    config = shape_of(name)
    d, f, heads = config.embed_dim, config.mlp_dim, config.num_heads + config.num_kv_heads
    assert config.layer_weights == d * (2 * config.head_dim * heads + 3 * f)
    assert config.end_weights == (1 if config.tie_embeddings else 2) * config.vocab_size * d
    assert config.attention_flops(7) == 4 * config.num_layers * config.num_heads * config.head_dim * 7


def test_every_array_that_the_table_names_has_a_place_and_a_layout():
    for family in (*spec.FAMILIES.values(), TOY):
        arrays: list[Any] = [*spec.ENDS, *family.arrays]
        assert len({array.name for array in arrays}) == len({array.hf for array in arrays}) == len(arrays)
        assert all(set(array.summed.split()) <= set(array.axes.split()) for array in arrays)
