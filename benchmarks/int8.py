"""What an int8 base costs and saves: memory of weights and of a compiled training step, its time, and likelihoods.

    python benchmarks/int8.py [--document=examples/document.txt --questions=examples/questions.jsonl]

A step is that of configs/quickstart.py: four rows of 256 tokens, 500 slots. The likelihood is that of the questions'
answers behind the full document, in nats per token.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ablations import INSTRUCTION, MODEL

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.models.language_model import LanguageModel, load_model
from cartridges_jax.models.weights import quantized
from cartridges_jax.training.batch import Batch
from cartridges_jax.training.data import read_corpus
from cartridges_jax.training.evals.loss import answer_loss
from cartridges_jax.training.evals.questions import answer_examples, questions_of
from cartridges_jax.training.optim import OptimConfig, optimizer
from cartridges_jax.training.step import TrainState, train_step

ROWS, TOKENS, SLOTS, TOP_K, STEPS = 4, 256, 500, 20, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", type=Path, default=Path("examples/document.txt"))
    parser.add_argument("--questions", type=Path, default=Path("examples/questions.jsonl"))
    args = parser.parse_args()
    print("| weights | MB | temporary MB of a step | seconds a step | NLL with the full document |")
    print("| --- | --- | --- | --- | --- |")
    for dtype in ("float32", "bfloat16"):
        model = load_model(MODEL, dtype)
        for name, one in ((dtype, model), (f"int8, multiplied in {dtype}", quantized(model, "int8"))):
            held = sum(leaf.nbytes for leaf in jax.tree.leaves(one.params))
            temporary, seconds = step(one)
            nll = likelihood(one, args.document, args.questions)
            print(f"| {name} | {held / 1e6:.0f} | {temporary / 1e6:.0f} | {seconds:.2f} | {nll:.4f} |", flush=True)


def step(model: LanguageModel) -> tuple[int, float]:
    """Bytes that a compiled step takes beside its arguments, and the median of its seconds."""
    rng, v = np.random.default_rng(0), model.config.vocab_size
    tokens = rng.integers(v, size=(1, ROWS, TOKENS)).astype(np.int32)
    positions = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), tokens.shape)
    entries = (*tokens.shape, TOP_K)
    targets = rng.integers(v, size=entries).astype(np.int32), np.full(entries, np.log(0.04), np.float32)
    batch = Batch(tokens, np.ones_like(tokens), positions, *targets, rng.random(entries[:3]) < 0.5)
    tx = optimizer(OptimConfig(), STEPS, 1)
    cartridge = Cartridge.from_tokens(model, tokens.ravel()[:SLOTS].tolist())
    state = TrainState(cartridge.slots, tx.init(cartridge.slots), jnp.zeros((), jnp.int32))
    options: Any = {"tail": "bucket", "reduction": "token", "remat": "layers"}
    given = model.params, batch, cartridge.placement
    compiled = train_step.lower(state, *given, config=model.config, tx=tx, **options).compile()
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        state, metrics = compiled(state, *given)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    return compiled.memory_analysis().temp_size_in_bytes, median(seconds)


def likelihood(model: LanguageModel, document: Path, questions: Path) -> float:
    tokenizer, asked = model.tokenizer, questions_of(questions)
    system = [{"role": "system", "content": read_corpus(document)}]
    prefix = Cartridge.from_tokens(model, tokenizer.chat_ids(system, add_generation_prompt=False))
    messages = [[{"role": "user", "content": question.asked(INSTRUCTION)}] for question in asked]
    prompts = [tokenizer.turn_ids(one, add_generation_prompt=True) for one in messages]
    total, count = answer_loss(model, prefix, answer_examples(prompts, [tokenizer.encode(q.answer) for q in asked]))
    return total / count


if __name__ == "__main__":
    main()
