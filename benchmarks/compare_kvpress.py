"""What NVIDIA's kvpress keeps of a document, as cells of a comparison: `make bench-compression`.

    XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= .venv-kvpress/bin/python benchmarks/compare_kvpress.py
        --config=configs/compare/embedded.py [--presses=KVgrad,KVzip] [--config.compare.documents="('manual',)"]

The presses' own code, in torch, chooses which tokens every head keeps, the average over heads being a method's budget.
The model answers behind the document's keys and values with the others masked, by this repository's evaluation, at the
positions where they stood. That both programs mean the same is checked on one question for every choice: the logits
are those of kvpress's own masking. A cell's memory is that of what is kept, and speed is not measured: nothing here
serves heads of different lengths.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from engine_transformers import write_model
from kvpress import ExpectedAttentionPress, KVComposePress, KVgradPress, KVzipPress
from kvpress.utils import compute_n_kept
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line.config import build, load
from cartridges_jax.command_line.progress import Progress
from cartridges_jax.comparison.cells import Cell, cell_name, write_cell
from cartridges_jax.comparison.config import CompareConfig
from cartridges_jax.comparison.measure import measure
from cartridges_jax.comparison.methods import Context
from cartridges_jax.comparison.run import CELLS, QuestionGroup, question_groups
from cartridges_jax.models import hub
from cartridges_jax.models.language_model import LanguageModel, load_model
from cartridges_jax.serving.self_study import ServerConfig
from cartridges_jax.suites import Suite, load_suite
from cartridges_jax.training.config import TrainConfig

PRESSES: dict[str, Callable[[float], Any]] = {
    "KVgrad": lambda ratio: KVgradPress(compression_ratio=ratio),
    "KVzip": lambda ratio: KVzipPress(compression_ratio=ratio),
    "KVCompose": lambda ratio: KVComposePress(compression_ratio=ratio, structured=False),
    "ExpectedAttention": lambda ratio: ExpectedAttentionPress(compression_ratio=ratio),
}
EVICTED = -1e9  # of a bias
LARGEST_DIFFERENCE = 1e-4  # of logits, between the two programs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/compare/embedded.py")
    parser.add_argument("--presses", default=",".join(PRESSES), help="default: %(default)s")
    args, overrides = parser.parse_known_args()
    stages = {"compare": CompareConfig, "server": ServerConfig, "train": TrainConfig}
    loaded = load([f"--config={args.config}", *overrides], stages)
    config = build(CompareConfig, loaded.compare, "config.compare")
    suite, model = load_suite(config.suite, config.suite_options), load_model(config.model, config.dtype)
    groups = question_groups(suite, config)
    presses = args.presses.split(",")
    cells = Path(config.output_dir) / CELLS

    def is_missing(group: QuestionGroup, press: str, share: int) -> bool:
        return not (cells / cell_name(group.name, press, share, 0)).is_file()

    missing = [cell for cell in itertools.product(groups, presses, config.shares) if is_missing(*cell)]
    progress = Progress("compressing", len(missing), "cells")
    with tempfile.TemporaryDirectory() as folder:
        theirs = torch_model(model, Path(folder))
        exact = copy.deepcopy(theirs).double()
        for group, of_group in itertools.groupby(missing, key=lambda cell: cell[0]):
            document = Document(model, theirs, exact, group)
            for _, press, share in of_group:
                cell = document.cell(press, share, suite, config)
                write_cell(cells, cell)
                progress.advance(note=f"{group.name}: {press}, {cell.context_tokens} slots a head")
    progress.close()


def torch_model(model: LanguageModel, folder: Path) -> Any:
    """Loads the model's weights in torch. The presses look for a tokenizer in the folder."""
    files = hub.resolve(model.name)
    path = files.directory
    if files.gguf is not None:
        write_model(files.gguf, folder)
        path = folder
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = _template(model)
    tokenizer.save_pretrained(folder)
    theirs.config.name_or_path = str(folder)
    return theirs


def _template(model: LanguageModel) -> str:
    """Returns a chat template that puts its one message where the document stands: into the system message.

    KVzip and its kind ask the template of a user's message what stands before the document, and score none of that. A
    system message that the model's own template adds there would take the place of the document's first tokens.
    """
    mark = "\N{SYMBOL FOR NULL}"
    render = model.tokenizer.render_chat
    before = render([{"role": "system", "content": mark}], add_generation_prompt=False).partition(mark)[0]
    after = render([{"role": "user", "content": mark}], add_generation_prompt=True).partition(mark)[2]
    return f"{{{{ {json.dumps(before)} + messages[0]['content'] + {json.dumps(after)} }}}}"


class Document:
    """A document in both programs, in a system message as every method has it.

    Args:
      exact: their model in float64, which says what logits are right. The document stands where a cartridge's does, at
        the positions -p to -1: angles of other positions are rounded otherwise, by up to 1e-4.
    """

    def __init__(self, model: LanguageModel, theirs: Any, exact: Any, group: QuestionGroup):
        self._model, self._theirs, self._exact, self._group = model, theirs, exact, group
        message = {"role": "system", "content": group.text}
        self._ids = model.tokenizer.chat_ids([message], add_generation_prompt=False)
        self._whole = Cartridge.from_tokens(model, self._ids)
        self._exact_cache = DynamicCache()
        with torch.no_grad():
            positions = torch.arange(-len(self._ids), 0)[None]
            exact.model(input_ids=torch.tensor([self._ids]), past_key_values=self._exact_cache, position_ids=positions)

    def cell(self, press: str, share: int, suite: Suite, config: CompareConfig) -> Cell:
        num_tokens = len(self._model.tokenizer.encode(self._group.text)) // share
        begun = time.monotonic()
        kept_lpk = self._kept(PRESSES[press](1 - num_tokens / len(self._ids)))
        seconds = time.monotonic() - begun
        bias_lpk = jnp.where(jnp.asarray(kept_lpk), 0.0, EVICTED)
        cartridge: Cartridge = self._whole.replace(bias=bias_lpk)  # type: ignore[attr-defined]
        self._check(kept_lpk, cartridge, f"{self._group.name}, {press}, 1/{share}")
        c = self._model.config
        average = kept_lpk.sum() / (c.num_layers * c.num_kv_heads)
        context = Context(cartridge, None, round(average), round(average * self._model.kv_bytes_per_token))
        measured = measure(self._model, context, suite, self._group.questions, config, num_tokens, timed=False)
        return Cell(
            suite=config.suite,
            model=self._model.name,
            document=self._group.name,
            method=press,
            share=share,
            seed=0,
            context_tokens=context.num_tokens,
            kv_bytes=context.kv_bytes,
            seconds_to_make=seconds,
            tokens_to_make=len(self._ids),
            **measured,
        )

    def _kept(self, press: Any) -> np.ndarray:
        """Returns which tokens `[l, p, k]` a press keeps."""
        c = self._theirs.config
        kept = np.ones((c.num_hidden_layers, c.num_key_value_heads, len(self._ids)), bool)
        chosen: dict[int, np.ndarray] = {}
        if isinstance(press, ExpectedAttentionPress):  # which cuts the cache, and says of no token where it stood
            score = press.score

            def recorded(module: Any, *rest: Any) -> torch.Tensor:
                scores = score(module, *rest)
                count = compute_n_kept(scores.shape[-1], press.compression_ratio)
                chosen[module.layer_idx] = scores.topk(count, dim=-1).indices[0].numpy()
                return scores

            press.score = recorded
        with torch.no_grad(), press(self._theirs):
            self._theirs.model(input_ids=torch.tensor([self._ids]), past_key_values=DynamicCache())
        for i, layer in enumerate(self._theirs.model.layers):
            if i in chosen:
                kept[i] = False
                np.put_along_axis(kept[i], chosen[i], True, axis=-1)
            else:
                _, heads, places = (index.numpy() for index in layer.self_attn.masked_key_indices)
                kept[i, heads, places] = False
        return kept.transpose(0, 2, 1)

    def _check(self, kept_lpk: np.ndarray, cartridge: Cartridge, what: str) -> None:
        """Ends the program if the logits of a question differ from those of kvpress's masking in torch, in float64."""
        question = [{"role": "user", "content": self._group.questions[0].question}]
        ids = self._model.tokenizer.turn_ids(question, add_generation_prompt=True)
        ours_tv = np.asarray(self._model.logits(np.array([ids]), cartridge=cartridge)[0])
        cache = copy.deepcopy(self._exact_cache)
        with torch.no_grad():
            for layer, kept_pk in zip(self._exact.model.layers, kept_lpk, strict=True):
                places, heads = map(torch.from_numpy, np.nonzero(~kept_pk))
                layer.self_attn.masked_key_indices = torch.zeros_like(heads), heads, places
            positions = torch.arange(len(ids))[None]
            theirs = self._exact(input_ids=torch.tensor([ids]), past_key_values=cache, position_ids=positions)
        difference = float(np.abs(ours_tv - theirs.logits[0].numpy()).max())
        print(f"{what}: logits differ by at most {difference:.1e}", file=sys.stderr, flush=True)
        if not difference < LARGEST_DIFFERENCE:
            raise SystemExit(f"{what}: the two programs do not mean the same")


if __name__ == "__main__":
    main()
