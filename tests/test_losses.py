"""The chunked loss against a dense one in float64, written here from the definitions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_golden import golden_config, weights
from numpy.testing import assert_allclose

import cartridges_jax as cj
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.kernels.block_sizes import of_device
from cartridges_jax.models.config import ModelConfig, rope_factors
from cartridges_jax.models.params import init_params
from cartridges_jax.models.transformer import Remat
from cartridges_jax.training.losses import Reduction, Tail, loss_sum, top_k_cross_entropy

CHUNK = of_device("cpu").loss_chunk
TAILS: tuple[Tail, ...] = ("drop", "bucket")
REDUCTIONS: tuple[Reduction, ...] = ("token", "entry", "row")
BOTH = [(tail, reduction) for tail in TAILS for reduction in REDUCTIONS]
LossAndGradient = Callable[..., tuple[jax.Array, cj.Cartridge]]


def random_cartridge(config: ModelConfig, p: int = 6, with_bias: bool = True, seed: int = 0) -> cj.Cartridge:
    rng = np.random.default_rng(seed)
    shape = (config.num_layers, p, config.num_kv_heads, config.head_dim)
    keys, values = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    bias = jnp.asarray(rng.standard_normal(shape[:3]), jnp.float32) if with_bias else None
    return cj.Cartridge(keys, values, bias, num_frozen=1)


def random_batch(b: int, t: int, v: int, j: int, segments: tuple[int, ...], seed: int = 0) -> cj.Batch:
    """Ragged targets at two positions of three, none in the first row; what is masked holds garbage."""
    rng = np.random.default_rng(seed)
    segment_ids, positions = np.zeros((b, t), np.int32), np.zeros((b, t), np.int32)
    segment_ids[:, : sum(segments)] = np.repeat(np.arange(1, len(segments) + 1), segments)
    positions[:, : sum(segments)] = np.concatenate([np.arange(length) for length in segments])
    ids = np.argsort(rng.random((b, t, v)), axis=-1)[..., :j].astype(np.int32)
    logprobs = np.log(rng.dirichlet([0.5] * (j + 1), (b, t))[..., :j]).astype(np.float32)
    mask = (rng.random((b, t, j)) < 0.8) & (rng.random((b, t, 1)) < 0.67) & (segment_ids > 0)[..., None]
    mask[0] = False
    ids = np.where(mask, ids, ids[..., :1])  # padding that repeats a real id
    logprobs = np.where(mask, logprobs, np.where(rng.random(mask.shape) < 0.5, np.nan, -np.inf)).astype(np.float32)
    return cj.Batch(rng.integers(0, v, (b, t)).astype(np.int32), segment_ids, positions, ids, logprobs, mask)


def dense_logits(slots: dict[str, Any], batch: cj.Batch) -> Any:
    """The tiny Llama from its Hugging Face tensors, with no code of the library but its RoPE factors."""
    raw = golden_config("llama")[0]
    w = {name: jnp.asarray(array, jnp.float64) for name, array in weights("llama").items()}
    n, kv, h, eps = raw["num_attention_heads"], raw["num_key_value_heads"], raw["head_dim"], raw["rms_norm_eps"]
    b, t = batch.tokens.shape
    p = slots["keys"].shape[1]
    theta = raw["rope_parameters"]["rope_theta"]
    divisors = np.asarray(rope_factors(raw["rope_parameters"], theta, h))
    angles = (batch.positions + p)[..., None] * (theta ** (-np.arange(0, h, 2) / h) / divisors)
    rotation = jnp.exp(1j * angles)[:, :, None]

    def norm(x: Any, scale: Any) -> Any:
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale

    def rotate(x: Any) -> Any:
        turned = (x[..., : h // 2] + 1j * x[..., h // 2 :]) * rotation
        return jnp.concatenate([turned.real, turned.imag], -1)

    seen = (batch.segment_ids[:, :, None] == batch.segment_ids[:, None]) & np.tri(t, dtype=bool)
    seen = np.concatenate([np.ones((b, t, p), bool), seen], -1)[:, None]
    x = w["model.embed_tokens.weight"][batch.tokens]
    for layer in range(raw["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        y = norm(x, w[at + "input_layernorm.weight"])
        q, k, v = ((y @ w[f"{at}self_attn.{c}_proj.weight"].T).reshape(b, t, -1, h) for c in "qkv")
        slot_k, slot_v = (jnp.broadcast_to(slots[s][layer], (b, p, kv, h)) for s in ("keys", "values"))
        keys = jnp.repeat(jnp.concatenate([slot_k, rotate(k)], 1), n // kv, axis=2)
        values = jnp.repeat(jnp.concatenate([slot_v, v], 1), n // kv, axis=2)
        bias = jnp.concatenate([slots["bias"][layer], jnp.zeros((t, kv))])
        scores = (
            jnp.einsum("btnh,bsnh->bnts", rotate(q), keys) / np.sqrt(h) + jnp.repeat(bias.T, n // kv, 0)[None, :, None]
        )
        shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1)
        x += jnp.einsum("bnts,bsnh->btnh", shares, values).reshape(b, t, -1) @ w[at + "self_attn.o_proj.weight"].T
        y = norm(x, w[at + "post_attention_layernorm.weight"])
        gate, up = (y @ w[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x += (jax.nn.silu(gate) * up) @ w[at + "mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def dense_loss(slots: dict[str, Any], batch: cj.Batch, tail: Tail, reduction: Reduction) -> Any:
    """The teacher's entries against the student's log-probabilities, then what is left over on both sides."""
    if reduction == "row":  # upstream: each packed row's mean over its entries, and the mean of those
        rows = [jax.tree.map(lambda a, i=i: a[i : i + 1], batch) for i in range(batch.tokens.shape[0])]
        return sum(dense_loss(slots, row, tail, "entry") for row in rows if row.target_mask.any()) / sum(
            bool(row.target_mask.any()) for row in rows
        )
    logprobs = jax.nn.log_softmax(dense_logits(slots, batch), -1)
    v = logprobs.shape[-1]
    teacher = np.where(batch.target_mask, np.exp(batch.target_logprobs.astype(float)), 0)
    named = np.eye(v)[batch.target_ids] * batch.target_mask[..., None]  # [b, t, j, v]
    total = -(np.einsum("btj,btjv->btv", teacher, named) * logprobs).sum()
    is_target = batch.target_mask.any(-1)
    if tail == "bucket":
        left = jnp.log((jnp.exp(logprobs) * (1 - named.sum(2))).sum(-1))
        total -= jnp.where(is_target, (1 - teacher.sum(-1)) * left, 0).sum()
    return total / (is_target if reduction == "token" else batch.target_mask).sum()


@pytest.fixture(scope="module")
def loss_and_gradient(tiny_llama: cj.LanguageModel) -> LossAndGradient:
    """`distillation_loss` of the tiny Llama and its gradient; compiled once for all tests of one shape."""

    @functools.partial(jax.jit, static_argnums=(2, 3))
    def run(cartridge: cj.Cartridge, batch: cj.Batch, tail: Tail = "drop", reduction: Reduction = "token") -> Any:
        return jax.value_and_grad(cj.distillation_loss)(cartridge, tiny_llama, batch, tail, reduction)

    return run


@functools.cache
def small_case() -> tuple[cj.Batch, cj.Cartridge]:
    config = ModelConfig.from_hf(golden_config("llama")[0])
    return random_batch(b=4, t=90, v=128, j=5, segments=(40, 1, 45)), random_cartridge(config)


@pytest.mark.parametrize(("tail", "reduction"), BOTH)
def test_loss_and_gradient_are_the_dense_ones(
    tail: Tail, reduction: Reduction, loss_and_gradient: LossAndGradient
) -> None:
    batch, cartridge = small_case()
    assert batch.target_mask.any(-1).sum() > CHUNK  # several chunks, the last not full
    loss, gradient = loss_and_gradient(cartridge, batch, tail, reduction)
    with jax.enable_x64(True):
        slots = {name: np.asarray(getattr(cartridge, name), np.float64) for name in ("keys", "values", "bias")}
        dense = jax.jit(jax.value_and_grad(functools.partial(dense_loss, batch=batch, tail=tail, reduction=reduction)))
        expected, expected_gradient = jax.tree.map(np.asarray, dense(slots))
    assert expected.dtype == np.float64
    assert_allclose(loss, expected, rtol=1e-6)
    for name, array in expected_gradient.items():
        assert_allclose(getattr(gradient, name), array, rtol=0, atol=5e-6 * np.abs(array).max(), err_msg=name)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("targets", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77])
def test_any_number_of_targets(targets: int, tail: Tail) -> None:
    """The chunked sum and its gradient against all logits at once, on hidden states of our own; none is left out."""
    rng = np.random.default_rng(targets)
    t, v, j, d = 3 * CHUNK + 5, 40, 4, 8
    hidden = jnp.asarray(rng.standard_normal((t, d)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((v, d)), jnp.float32)
    ids = jnp.asarray(np.argsort(rng.random((t, v)), -1)[:, :j])
    logprobs = jnp.log(jnp.asarray(rng.dirichlet([1.0] * (j + 1), t)[:, :j], jnp.float32))
    mask = np.zeros((t, j), bool)
    mask[rng.permutation(t)[:targets]] = True

    def dense(hidden: Any) -> Any:
        student = jax.nn.softmax(hidden @ head.T, -1)
        kept = jnp.take_along_axis(student, ids, -1)
        teacher = jnp.exp(logprobs)
        each = -(teacher * jnp.log(kept)).sum(-1)
        if tail == "bucket":
            each -= (1 - teacher.sum(-1)) * jnp.log(1 - kept.sum(-1))
        return (each * mask[:, 0]).sum()

    expected, expected_gradient = jax.value_and_grad(dense)(hidden)
    loss, gradient = jax.value_and_grad(top_k_cross_entropy)(hidden, head, ids, logprobs, jnp.asarray(mask), tail)
    assert_allclose(loss, expected, rtol=1e-5)
    assert_allclose(top_k_cross_entropy(hidden, head, ids, logprobs, jnp.asarray(mask), tail), expected, rtol=1e-5)
    assert_allclose(gradient, expected_gradient, rtol=0, atol=1e-5)
    assert not np.asarray(gradient)[~mask.any(-1)].any()


@pytest.mark.parametrize(("tail", "reduction"), [("drop", "entry"), ("bucket", "token")])
def test_a_mask_per_token_masks_all_its_entries(
    tail: Tail, reduction: Reduction, loss_and_gradient: LossAndGradient
) -> None:
    batch, cartridge = small_case()
    per_token = batch.target_mask.any(-1)
    whole = np.repeat(per_token[..., None], batch.target_ids.shape[-1], -1)
    ids = np.argsort(np.random.default_rng(0).random((*per_token.shape, 128)), -1)[..., :5].astype(np.int32)
    batch = batch.replace(target_ids=ids, target_logprobs=np.full(ids.shape, np.log(0.15), np.float32))
    found, expected = (
        loss_and_gradient(cartridge, batch.replace(target_mask=m), tail, reduction) for m in (per_token, whole)
    )
    jax.tree.map(functools.partial(assert_allclose, rtol=1e-6, atol=1e-7), found, expected)


@pytest.mark.parametrize(("tail", "reduction"), BOTH)
def test_no_targets_cost_nothing(tail: Tail, reduction: Reduction, loss_and_gradient: LossAndGradient) -> None:
    batch, cartridge = small_case()
    batch = batch.replace(target_mask=np.zeros_like(batch.target_mask))
    loss, gradient = loss_and_gradient(cartridge, batch, tail, reduction)
    assert loss == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))  # NaN would count as any


def test_reductions_differ_by_what_they_count(loss_and_gradient: LossAndGradient) -> None:
    batch, cartridge = small_case()
    token, entry, row = (loss_and_gradient(cartridge, batch, "drop", r)[0] for r in REDUCTIONS)
    assert_allclose(token * batch.target_mask.any(-1).sum(), entry * batch.target_mask.sum(), rtol=1e-6)
    assert abs(row - entry) > 1e-3 * entry


def own_targets(model: cj.LanguageModel, cartridge: cj.Cartridge, j: int) -> tuple[cj.Batch, np.ndarray]:
    """A batch whose teacher is the student itself, and the student's log-probabilities [b, t, v]."""
    batch = small_case()[0]
    logits = model.logits(batch.tokens, batch.segment_ids, batch.positions, cartridge)
    logprobs = np.asarray(jax.nn.log_softmax(logits, -1))
    ids = np.argsort(-logprobs, -1)[..., :j].astype(np.int32)
    mask = np.repeat((batch.segment_ids > 0)[..., None], j, -1)
    targets = {"target_ids": ids, "target_logprobs": np.take_along_axis(logprobs, ids, -1), "target_mask": mask}
    return batch.replace(**targets), logprobs


def test_a_perfect_student_pays_the_teachers_entropy_and_stays(
    tiny_llama: cj.LanguageModel, loss_and_gradient: LossAndGradient
) -> None:
    cartridge = small_case()[1]
    batch, _ = own_targets(tiny_llama, cartridge, j=5)
    loss, gradient = loss_and_gradient(cartridge, batch, "bucket", "token")
    kept = np.exp(batch.target_logprobs.astype(np.float64))
    rest = 1 - kept.sum(-1)
    entropy = (-(kept * np.log(kept)).sum(-1) - rest * np.log(rest))[batch.segment_ids > 0].mean()
    assert_allclose(loss, entropy, rtol=1e-6)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) < 1e-7
    dropped = loss_and_gradient(cartridge, batch, "drop", "token")[1]
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(dropped)) > 1e-4  # it would push the rest down to zero


def test_a_teacher_that_names_the_whole_vocabulary(
    tiny_llama: cj.LanguageModel, loss_and_gradient: LossAndGradient
) -> None:
    """Nothing is left for the bucket: the full cross-entropy."""
    cartridge = small_case()[1]
    batch, logprobs = own_targets(tiny_llama, cartridge, j=128)
    loss, gradient = loss_and_gradient(cartridge, batch, "bucket", "token")
    entropy = -(np.exp(logprobs) * logprobs).sum(-1)[batch.segment_ids > 0].mean()
    assert_allclose(loss, entropy, rtol=1e-6)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) < 1e-7


def test_a_teacher_without_doubt(loss_and_gradient: LossAndGradient) -> None:
    """Log-probability zero, or rounded to slightly more than a whole: the bucket is empty, not negative."""
    batch, cartridge = small_case()
    only_first = batch.target_mask & (np.arange(batch.target_mask.shape[-1]) == 0)
    sure = batch.replace(target_logprobs=np.full_like(batch.target_logprobs, 1e-3), target_mask=only_first)
    drop, bucket = (loss_and_gradient(cartridge, sure, tail, "token")[0] for tail in TAILS)
    assert_allclose(bucket, drop, rtol=1e-6)


def test_gradient_is_a_cartridge_with_and_without_jit(
    tiny_llama: cj.LanguageModel, loss_and_gradient: LossAndGradient
) -> None:
    """As the public API has it: numpy or jax batches, `argnums=0`, bias or none."""
    batch, _ = small_case()
    cartridge = random_cartridge(tiny_llama.config, with_bias=False)
    value, gradient = jax.value_and_grad(cj.distillation_loss, argnums=0)(cartridge, tiny_llama, batch, tail="drop")
    assert isinstance(gradient, cj.Cartridge) and gradient.bias is None
    assert jax.tree.structure(gradient) == jax.tree.structure(cartridge)
    loss, same = loss_and_gradient(cartridge, jax.tree.map(jnp.asarray, batch))
    assert_allclose(loss, value, rtol=1e-6)
    jax.tree.map(functools.partial(assert_allclose, rtol=0, atol=1e-6), same, gradient)


def test_the_model_gets_no_gradient(tiny_llama: cj.LanguageModel) -> None:
    batch, cartridge = small_case()
    sums = functools.partial(loss_sum, batch=batch, config=tiny_llama.config, tail="bucket", reduction="token")
    of_head = jax.jit(jax.grad(lambda head: sums(cartridge, {**tiny_llama.params, "head": head})[0]))
    gradient = of_head(tiny_llama.params["head"])
    assert not np.asarray(gradient).any()


def test_rematerialised_layers_give_the_same(tiny_llama: cj.LanguageModel) -> None:
    batch, cartridge = small_case()

    def total(cartridge: cj.Cartridge, remat: Remat) -> Any:
        given = {"config": tiny_llama.config, "tail": "drop", "reduction": "token"}
        return loss_sum(cartridge, tiny_llama.params, batch, remat=remat, **given)[0]

    run = jax.jit(jax.value_and_grad(total), static_argnums=1)
    plain, again = (run(cartridge, remat) for remat in ("elementwise", "layers"))
    jax.tree.map(functools.partial(assert_allclose, rtol=1e-5, atol=1e-5), again, plain)


def array_sizes(jaxpr: Any) -> Iterator[int]:
    """Of every array that a program makes, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from array_sizes(inner)


@pytest.mark.parametrize("tail", TAILS)
def test_logits_of_all_positions_never_exist(tail: Tail) -> None:
    t, v, j = 16 * CHUNK, 4096, 3
    sizes = {"embed_dim": 8, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8, "mlp_dim": 8, "num_layers": 1}
    sizes["max_position_embeddings"] = 2 * t
    config = ModelConfig("llama", v, **sizes, norm_eps=1e-5, rope_theta=1e4, tie_embeddings=True)
    params = init_params(config, jax.random.key(0))
    zeros = np.zeros((1, t), np.int32)
    targets = np.zeros((1, t, j), np.int32)
    batch = cj.Batch(zeros, zeros, zeros, targets, targets.astype(np.float32), targets == 0)
    given = {"config": config, "tail": tail, "reduction": "token"}

    def loss(cartridge: cj.Cartridge) -> Any:
        return loss_sum(cartridge, params, batch, **given)[0]

    cartridge = random_cartridge(config)
    for program in (loss, jax.grad(loss), jax.jit(jax.value_and_grad(loss))):
        largest = max(array_sizes(jax.make_jaxpr(program)(cartridge).jaxpr))
        assert CHUNK * v <= largest < t * v / 4  # the walk did reach the logits of one chunk


def test_choices_that_do_not_exist(tiny_llama: cj.LanguageModel) -> None:
    batch, cartridge = small_case()
    with pytest.raises(UserError, match="tail is 'keep' and reduction 'token', expected drop or bucket and token, "):
        cj.distillation_loss(cartridge, tiny_llama, batch, tail="keep")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="reduction 'mean'"):
        cj.distillation_loss(cartridge, tiny_llama, batch, reduction="mean")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"the cartridge's keys are \(2, 6, 2, 16\)"):
        fewer = cartridge.replace(keys=cartridge.keys[:2], values=cartridge.values[:2])
        cj.distillation_loss(fewer, tiny_llama, batch)
