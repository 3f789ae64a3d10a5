"""The public API (docs/contributing.md) as it is written: the names, the shapes and a gradient."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import cartridges_jax as cj
from cartridges_jax.command_line.errors import UserError

NAMES = {
    "Batch",
    "Cartridge",
    "LanguageModel",
    "compose",
    "distillation_loss",
    "generate",
    "load_model",
    "prefix_attention",
}


def test_dir_lists_the_public_api():
    assert NAMES <= set(dir(cj)) == set(cj.__all__)
    for name in dir(cj):
        assert getattr(cj, name).__name__ == name
        assert getattr(cj, name) is getattr(importlib.import_module(getattr(cj, name).__module__), name)
    with pytest.raises(AttributeError, match="module 'cartridges_jax' has no attribute 'no_such_name'"):
        cj.no_such_name  # noqa: B018


def test_example_of_is_still_found_at_its_earlier_address():
    earlier, home = (importlib.import_module(f"cartridges_jax.{name}") for name in ("data", "training.data"))
    assert earlier.example_of is home.example_of


def test_the_code_of_the_design_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = tiny.TEXT
    model = cj.load_model(str(tiny.folder()), dtype="float32")
    l, p, k, h = tiny.LAYERS, 6, tiny.KV_HEADS, tiny.HEAD_DIM
    k_lpkh, v_lpkh = jax.random.normal(jax.random.key(0), (2, l, p, k, h))

    cart = cj.Cartridge(keys=k_lpkh, values=v_lpkh, num_frozen=1)
    assert cart.num_slots == p and cart.bias is None
    cart = cj.Cartridge.from_text(model, text, num_tokens=128)
    assert cart.keys.shape == cart.values.shape == (l, 128, k, h)
    cart.save("cartridge.safetensors")
    loaded = cj.Cartridge.load("cartridge.safetensors", model=model)
    np.testing.assert_array_equal(loaded.keys, cart.keys)
    cart = loaded

    tokens_bt = jnp.asarray([model.tokenizer.encode(tiny.TEXT)[300:340], model.tokenizer.encode(tiny.TEXT)[:40]])
    seg_bt = jnp.asarray([[1] * 25 + [2] * 15, [1] * 30 + [0] * 10])
    pos_bt = jnp.asarray([[*range(25), *range(15)], [*range(30), *range(10)]])
    logits_btv = model.logits(tokens_bt, segment_ids=seg_bt, positions=pos_bt, cartridge=cart)
    assert logits_btv.shape == (2, 40, model.config.vocab_size) and logits_btv.dtype == jnp.float32
    alone = model.logits(tokens_bt[:1, 25:], cartridge=cart)
    np.testing.assert_allclose(logits_btv[:1, 25:], alone, atol=2e-5)

    target_ids = jnp.stack([jnp.roll(tokens_bt, -1, axis=1), jnp.zeros_like(tokens_bt)], axis=-1)  # [b, t, j]
    target_logprobs = jnp.log(jnp.broadcast_to(jnp.asarray([0.7, 0.2]), target_ids.shape))
    target_mask = jnp.broadcast_to((pos_bt < 14)[..., None] & (seg_bt > 0)[..., None], target_ids.shape)
    batch = cj.Batch(tokens_bt, seg_bt, pos_bt, target_ids, target_logprobs, target_mask)
    loss = cj.distillation_loss(cart, model, batch, tail="drop")
    log_probs = jax.nn.log_softmax(logits_btv)
    picked = jnp.take_along_axis(log_probs, target_ids, axis=-1)
    by_hand = -jnp.where(target_mask, jnp.exp(target_logprobs) * picked, 0).sum() / target_mask.any(-1).sum()
    assert loss.shape == ()
    np.testing.assert_allclose(loss, by_hand, rtol=1e-5)

    gradient = jax.grad(cj.distillation_loss, argnums=0)(cart, model, batch)
    assert isinstance(gradient, cj.Cartridge) and gradient.keys.shape == cart.keys.shape
    step = 1e-2
    direction = jax.tree.map(
        lambda g: g / jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient))), gradient
    )
    loss_of = jax.jit(lambda c: cj.distillation_loss(c, model, batch))
    ahead, behind = (loss_of(jax.tree.map(lambda a, d, s=s: a + s * d, cart, direction)) for s in (step, -step))
    slope = sum(
        float((g * d).sum()) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )
    assert float(ahead - behind) / (2 * step) == pytest.approx(slope, rel=2e-2)

    texts = cj.generate(model, ["The cat"], cartridge=cart, max_tokens=8, temperature=0.0)
    assert len(texts) == 1 and isinstance(texts[0], str)


def test_the_code_of_the_readme_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)
    model = cj.load_model("smollm2-135m")
    text = "<|im_start|>system\nThe station was founded by Agnes Thorne.<|im_end|>\n"
    cj.Cartridge.from_text(model, text).save("cartridge.safetensors")
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert "Agnes Thorne" in capsys.readouterr().out


def test_a_target_mask_may_leave_out_j():
    model = cj.load_model(str(tiny.folder()))
    cart = cj.Cartridge.from_text(model, tiny.TEXT, num_tokens=4)
    tokens = jnp.asarray([model.tokenizer.encode(tiny.TEXT)[:12]])
    ids = jnp.roll(tokens, -1, axis=1)[..., None]
    mask = jnp.arange(12)[None] < 11
    ones, places = jnp.ones_like(tokens), jnp.arange(12)[None]
    losses = [
        cj.distillation_loss(cart, model, cj.Batch(tokens, ones, places, ids, jnp.zeros(ids.shape), m))
        for m in (mask, mask[..., None])
    ]
    np.testing.assert_array_equal(losses[0], losses[1])


def test_an_unknown_dtype_or_model_is_one_sentence():
    with pytest.raises(UserError, match="dtype is 'float16', expected one of float32, bfloat16"):
        cj.load_model(str(tiny.folder()), dtype="float16")
    with pytest.raises(UserError, match="unknown model 'no-such-model': give"):
        cj.load_model("no-such-model")
