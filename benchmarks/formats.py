"""What a smaller or poorer format costs: the answers' likelihood behind the same cartridge, written and read back.

    python benchmarks/formats.py [--cartridge=runs/train/cartridge.safetensors]

Without a cartridge, attention matching makes one of examples/document.txt, with a bias. The questions are those of the
quickstart, none of which any training sees.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cartridges_jax as cj
from cartridges_jax import interop
from cartridges_jax.initial.attention_matching import attention_matching
from cartridges_jax.interop import formats, tokasaurus
from cartridges_jax.training.data import read_corpus
from cartridges_jax.training.evals.loss import answer_nll
from cartridges_jax.training.evals.questions import questions_of

SLOTS = 500
INSTRUCTION = "{question} Answer with a short phrase only."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cartridge")
    parser.add_argument("--document", default="examples/document.txt")
    parser.add_argument("--questions", default="examples/questions.jsonl")
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    model, corpus = cj.load_model(args.model), read_corpus(args.document)
    cartridge = cj.Cartridge.load(args.cartridge, model=model) if args.cartridge else None
    cartridge = cartridge or attention_matching(model, corpus, [], SLOTS)
    questions = questions_of(args.questions)
    messages = [[{"role": "user", "content": INSTRUCTION.replace("{question}", q.question)}] for q in questions]
    prompts = [model.tokenizer.turn_ids(m, add_generation_prompt=True) for m in messages]
    answers = [model.tokenizer.encode(q.answer) for q in questions]
    print(f"{model.name}, {cartridge.num_slots} slots: {cartridge.provenance.recipe}\n")
    print("| what is written | MB | NLL per answer token | loss |\n|---|---|---|---|")
    whole = answer_nll(model, cartridge, prompts, answers)
    for name, megabytes, found in variants(cartridge, model, corpus):
        nll = answer_nll(model, found, prompts, answers)
        print(f"| {name} | {megabytes:.1f} | {nll:.4f} | {nll - whole:+.4f} |", flush=True)


def variants(
    cartridge: cj.Cartridge, model: cj.LanguageModel, corpus: str
) -> Iterator[tuple[str, float, cj.Cartridge]]:
    """Name, size of what was written, and the cartridge as it is read back."""
    with tempfile.TemporaryDirectory() as folder:
        for dtype in formats.FORMATS["safetensors"].dtypes:
            yield f"`cartridge.safetensors`, {dtype}", *_round_trip(cartridge, Path(folder) / "c", "safetensors", dtype)
        plain = cartridge
        if cartridge.bias is not None:
            yield "the bias left out", 0.0, cartridge.replace(bias=None)  # type: ignore[attr-defined]
            plain = interop.fold_bias(cartridge, model, corpus)
        for dtype in ("float32", "bfloat16"):
            path = Path(folder) / f"{dtype}.pt"
            yield f"upstream, PEFT (bias folded), {dtype}", *_round_trip(plain, path, "upstream", dtype)
        padded = interop.pad_slots(plain, tokasaurus.PAGE, model.config)
        path = Path(folder) / "toka"
        yield f"Tokasaurus (folded, {padded.num_slots} slots)", *_round_trip(padded, path, "tokasaurus", "float32")


def _round_trip(cartridge: cj.Cartridge, path: Path, format: str, dtype: str) -> tuple[float, cj.Cartridge]:
    formats.write(cartridge, path, format, dtype)
    files = [path] if path.is_file() else list(path.iterdir())
    return sum(file.stat().st_size for file in files) / 1e6, cj.Cartridge.load(path)


if __name__ == "__main__":
    main()
