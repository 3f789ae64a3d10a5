"""The command: from any format to any other, with one sentence for what it cannot do."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from make_golden_formats import FORMATS as GOLDEN
from tiny_runs import config_of, settings_in, write_inputs

from cartridges_jax import convert
from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.interop import formats
from cartridges_jax.training.run import fit_uniform, train


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = tiny.model()
    Cartridge.from_text(model, tiny.TEXT, 13).at_offset(13, model.config).save(tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


def test_the_formats_told_to_argparse_are_those_there_are():
    assert set(convert.FORMATS) == set(formats.FORMATS)
    assert set(convert.DTYPES) == {dtype for f in formats.FORMATS.values() for dtype in f.dtypes}


def test_a_cartridge_travels_through_every_format_and_comes_home(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    stations = [("a.pt", None), ("b", "peft"), ("c", "prefix-tuning"), ("home.safetensors", None)]
    here = source
    for name, format in stations:
        assert convert.main([str(here), str(tmp_path / name), *([f"--to={format}"] if format else [])]) == 0
        here = tmp_path / name
    assert here.read_bytes() == source.read_bytes()
    said = capsys.readouterr().out.splitlines()
    assert (
        said[2] == f"{tmp_path / 'b'}: a PEFT CARTRIDGE adapter, 13 slots, 0.0 MB, 2 layers, 2 heads of size 8, float32"
    )
    assert set(said[1::2]) == {f"made for {tiny.model().name}"}


def test_what_the_source_does_not_know_is_said_and_may_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    golden = GOLDEN / "cache-step512.pt"
    convert.main([str(golden), str(tmp_path / "c.safetensors"), "--dtype=bfloat16"])
    assert "made for an unknown model (its weights are unknown)" in capsys.readouterr().out
    assert (
        Cartridge.load(tmp_path / "c.safetensors").provenance.recipe
        == "read from upstream's .pt; its making is unknown"
    )
    with pytest.raises(UserError, match=r"expected \(2, 7, 2, 8\) as \[layers"):
        convert.main([str(golden), str(tmp_path / "d.pt"), f"--model={tiny.folder()}"])
    assert not (tmp_path / "d.pt").exists()
    fits = Cartridge(jnp.ones((2, 3, 2, 8)), jnp.ones((2, 3, 2, 8)))
    formats.write(fits, tmp_path / "cache-step1.pt", "upstream")
    bare = tmp_path / "bare.safetensors"
    convert.main([str(tmp_path / "cache-step1.pt"), str(bare), f"--model={tiny.folder()}"])
    found = Cartridge.load(bare, model=tiny.model()).provenance
    assert found.weights_hash == tiny.model().fingerprint and found.corpus_hash == ""
    assert found.recipe.endswith("its model as given to convert")


def test_padding_and_folding_are_done_when_asked(source: Path, tmp_path: Path):
    cartridge = Cartridge.load(source)
    bias = jnp.asarray(np.random.default_rng(0).standard_normal(cartridge.keys.shape[:3]), jnp.float32)
    cartridge.replace(bias=bias).save(source)
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    to = [str(source), str(tmp_path / "t"), "--to=tokasaurus"]
    with pytest.raises(UserError, match="say which with --model"):
        convert.main([*to, "--pad"])
    with pytest.raises(UserError, match=r"has a bias .*\(--fold-bias=TEXT\)"):
        convert.main([*to, "--pad", f"--model={tiny.folder()}"])
    convert.main([*to, "--pad", f"--fold-bias={tmp_path / 'text.txt'}", f"--model={tiny.folder()}"])
    found = Cartridge.load(tmp_path / "t", model=tiny.model())
    assert (found.num_slots, found.bias) == (16, None)


def test_a_target_of_no_known_format_is_refused(source: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"says no format: end it in \.safetensors or \.pt, or give --to="):
        convert.main([str(source), str(tmp_path / "folder")])
    with pytest.raises(UserError, match=r"dtype is 'int8', and upstream's \.pt holds float32"):
        convert.main([str(source), str(tmp_path / "c.pt"), "--dtype=int8"])
    with pytest.raises(UserError, match=r"is pushed as cartridge\.safetensors"):
        convert.main([str(source), "hf:a/b", "--to=peft"])
    with pytest.raises(FileNotFoundError, match="does not exist: expected a cartridge's file or folder"):
        convert.main([str(tmp_path / "none"), str(tmp_path / "c.pt")])


def test_a_run_gives_a_cartridge_whose_heads_are_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Heads of different lengths travel in our own file only; a run's inputs make one that other formats hold."""
    monkeypatch.setenv("CARTRIDGES_JAX_CACHE", str(tmp_path / "cache"))
    inputs = write_inputs(tmp_path)
    settings = settings_in(tmp_path / "run", inputs)
    settings |= {"init": {"kind": "attention_matching", "num_slots": 12, "budget": "profile"}, "num_steps": 1}
    path = train(config_of(settings), tiny.model())
    assert np.ptp(Cartridge.load(path).all_lengths) > 0
    with pytest.raises(UserError, match="make one whose heads are alike, with `convert --uniform`"):
        convert.main([str(path), str(tmp_path / "a.pt")])
    model = f"--model={tiny.folder()}"
    text = f"--fold-bias={inputs / 'corpus.txt'}"
    assert convert.main([str(path.parent), str(tmp_path / "a.pt"), model, "--uniform", text]) == 0
    made = Cartridge.load(tmp_path / "a.pt")
    assert (made.num_slots, made.lengths, made.bias) == (12, None, None)
    assert "keys: fitted" in str(fit_uniform(path.parent, tiny.model()).provenance)
    with pytest.raises(UserError, match="holds no run"):
        convert.main([str(tmp_path), str(tmp_path / "b.pt"), model, "--uniform"])
