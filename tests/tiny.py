"""A tiny random model on disk, as a Hugging Face folder, and a tiny dataset for it: no download, no torch."""

from __future__ import annotations

import atexit
import functools
import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from cartridges_jax.models.language_model import LanguageModel, load_model
from synth import conversation
from synth.conversation import Conversation, Message, TopLogprobs

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, MLP, WINDOW = 2, 32, 4, 2, 8, 48, 1024
START, END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEXT = "".join(
    f"Line {i}: the {animal} number {i} weighs {i * 7} grams and sleeps in box {i % 9} of the {place}.\n"
    for i, (animal, place) in enumerate([("cat", "house"), ("owl", "barn"), ("fox", "wood"), ("hen", "yard")] * 12)
)


def write_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Writes config.json, model.safetensors, tokenizer.json and what belongs to them; `changes` go into config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = _train_tokenizer()
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": backend.get_vocab_size(),
        "num_hidden_layers": LAYERS,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": MLP,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": WINDOW,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    } | changes
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "chat_template": TEMPLATE},
    )
    ids = [backend.token_to_id(END), backend.token_to_id(TEXT_END)]
    _write_json(folder / "generation_config.json", {"eos_token_id": ids})
    save_file(_weights(config, np.random.default_rng(seed)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_dataset(path: Path, model: LanguageModel, count: int = 24, seed: int = 0, top_k: int = 4) -> Path:
    """Conversations about `TEXT` whose answers carry the log-probabilities of a made-up teacher, ragged in k."""
    rng = random.Random(seed)
    conversation.write(path, [_conversation(model, rng, top_k) for _ in range(count)])
    return path


@functools.cache
def folder() -> Path:
    """The tiny model's folder, one for the whole test run."""
    path = Path(tempfile.mkdtemp(prefix="tiny-model-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return write_model(path)


@functools.cache
def model() -> LanguageModel:
    return load_model(str(folder()))


def top_logprobs(rows: Sequence[Sequence[tuple[int, float]]]) -> TopLogprobs:
    """Row i holds the (token id, log-probability) pairs of position i; rows may differ in length."""
    entries = [(i, token, logprob) for i, row in enumerate(rows) for token, logprob in row]
    index, ids, logprobs = ([entry[column] for entry in entries] for column in range(3))
    return TopLogprobs(index, ids, logprobs, (len(rows), max(map(len, rows), default=0)))


def _conversation(model: LanguageModel, rng: random.Random, top_k: int) -> Conversation:
    lines = TEXT.splitlines()
    line = rng.choice(lines)
    end = model.tokenizer.encode(END)
    answer = tuple(model.tokenizer.encode(line) + (end if rng.random() < 0.7 else []))
    rows = []
    for token in answer:
        others = rng.sample(sorted(set(range(model.config.vocab_size)) - {token}), rng.randrange(top_k))
        rest = [0.4 * 0.5**i for i in range(len(others))]
        rows.append(
            [(token, float(np.log(0.55)))] + [(i, float(np.log(p * 0.5))) for i, p in zip(others, rest, strict=True)]
        )
    question = f"What is in box {rng.randrange(9)}? Tell me about the {rng.choice(['cat', 'owl', 'fox', 'hen'])}."
    return Conversation(
        (Message(question, "user"), Message(line, "assistant", answer, top_logprobs(rows))),
        "SECRET CONTEXT: " + TEXT[:80],
        {"seed": rng.random()},
    )


def _weights(config: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    d, h, f, v = config["hidden_size"], config["head_dim"], config["intermediate_size"], config["vocab_size"]
    n, k = config["num_attention_heads"], config["num_key_value_heads"]

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 1.2 / np.sqrt(shape[-1])).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": rng.standard_normal((v, d)).astype(np.float32),
        "model.norm.weight": np.ones(d, np.float32),
        "lm_head.weight": draw(v, d),
    }
    for layer in range(config["num_hidden_layers"]):
        shapes = {
            "self_attn.q_proj": (n * h, d),
            "self_attn.k_proj": (k * h, d),
            "self_attn.v_proj": (k * h, d),
            "self_attn.o_proj": (d, n * h),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
        }
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = draw(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = rng.uniform(0.8, 1.2, d).astype(np.float32)
    return weights


def _train_tokenizer() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in (TEXT_END, START, END)])
    return backend


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
