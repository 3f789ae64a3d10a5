"""Evaluation: its measures against their definitions, and a whole run on a tiny model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors import safe_open

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.cartridge.file import record_evaluation
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.evaluate import EvalConfig, evaluate
from cartridges_jax.training.data import exchanges, split_dataset
from cartridges_jax.training.evals.conditions import gap_closed
from cartridges_jax.training.evals.loss import answer_nll
from cartridges_jax.training.evals.questions import questions_of
from cartridges_jax.training.evals.scorers import contains, normalized, token_f1
from cartridges_jax.training.report import class_table, samples, table


def test_answer_nll_is_the_mean_over_answer_tokens_of_minus_log_softmax():
    model = tiny.model()
    cartridge = Cartridge.from_text(model, tiny.TEXT, 32)
    prompts = [model.tokenizer.encode(text) for text in ("the cat ", "box 3 of the house weighs ", "owl")]
    answers = [model.tokenizer.encode(text) for text in ("number 5", "35 grams and sleeps", "s")]
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model.logits(np.array([prompt + answer]), cartridge=cartridge)
        logprobs = jax.nn.log_softmax(logits[0, len(prompt) - 1 : -1])
        expected += [-float(logprobs[i, token]) for i, token in enumerate(answer)]
    assert answer_nll(model, cartridge, prompts, answers) == pytest.approx(np.mean(expected), abs=1e-4)
    alone = [answer_nll(model, cartridge, [p], [a]) * len(a) for p, a in zip(prompts, answers, strict=True)]
    assert sum(alone) / len(expected) == pytest.approx(np.mean(expected), abs=1e-4)


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("The tower is 41 metres tall.", "41 metres", True),
        ("It is 7.8 metres.", "7.8 metres", True),
        ("It is 17.8 metres.", "7.8 metres", False),
        ("615,000 crowns", "615000", True),
        ("A white heron flies.", "the white heron", True),
        ("heron, white", "white heron", False),
        ("", "x", False),
    ],
)
def test_contained_means_whole_words_in_order(text: str, answer: str, found: bool):
    assert contains(text, answer) is found


def test_word_f1():
    assert token_f1("The white heron.", "a white heron") == 1.0
    assert token_f1("white bird", "white heron") == pytest.approx(0.5)
    assert token_f1("nothing", "white heron") == 0.0
    assert normalized("  The  END. ") == "end"


def test_gap_closed():
    rows = [{"condition": c, "nll": n} for c, n in (("nothing", 6.0), ("cartridge", 3.5), ("full document", 3.0))]
    assert gap_closed(rows, "cartridge") == pytest.approx(2.5 / 3)
    assert gap_closed(rows[:2], "cartridge") is None
    assert gap_closed([rows[0], rows[1], {"condition": "full document", "nll": 6.5}], "cartridge") is None


def test_questions_say_what_is_wrong_with_them(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        questions_of(tmp_path / "none.jsonl")
    for text, message in (
        ("", "holds no question"),
        ('{"question": 3}\n', "line 1"),
        ("\nx\n", "line 2"),
        ('{"question": "Who?", "answer": " "}\n', "line 1: a question or an answer is empty"),
    ):
        (tmp_path / "q.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            questions_of(tmp_path / "q.jsonl")


def test_held_out_conversations_are_not_trained_on(tmp_path: Path):
    path = tiny.write_dataset(tmp_path / "dataset.parquet", tiny.model(), count=20)
    train, held_out = split_dataset(path, 4, tmp_path)
    everything, kept, apart = exchanges(path), exchanges(train), exchanges(held_out)
    assert len(apart) == 4 and len(kept) == 16
    assert sorted(kept + apart) == sorted(everything)
    with pytest.raises(UserError, match="too few"):
        split_dataset(path, 11, tmp_path)


def test_a_whole_evaluation(tmp_path: Path):
    model = tiny.model()
    text = tiny.TEXT[:1500]
    document = model.tokenizer.encode(text)
    (tmp_path / "document.txt").write_text(text, encoding="utf-8")
    lines = [
        {
            "question": f"What does the cat number {i} weigh?",
            "answer": f"{i * 7} grams",
            "class": "heavy" if i else "light",
        }
        for i in range(5)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    cartridge = Cartridge.from_text(model, text)
    cartridge.save(tmp_path / "run" / "cartridge.safetensors")
    config = EvalConfig(
        cartridge=str(tmp_path / "run" / "cartridge.safetensors"),
        corpus=str(tmp_path / "document.txt"),
        output_dir=str(tmp_path / "run"),
        questions=str(tmp_path / "questions.jsonl"),
        model=str(tiny.folder()),
        max_answer_tokens=4,
    )
    report = evaluate(config, model)
    rows = {row["condition"]: row for row in report["rows"]}
    assert list(rows) == ["nothing", "first p tokens", "cartridge", "full document"]
    # this cartridge is the first p = all tokens, so two rows agree to the last digit
    assert rows["cartridge"]["nll"] == rows["first p tokens"]["nll"]
    assert rows["cartridge"]["answers"] == rows["first p tokens"]["answers"]
    assert rows["cartridge"]["kv_bytes"] == len(document) * 2 * tiny.LAYERS * tiny.KV_HEADS * tiny.HEAD_DIM * 4
    assert rows["nothing"]["gap_closed"] in (0.0, None)
    assert all(row["seconds_to_first_token"] > 0 and row["decode_tokens_per_second"] > 0 for row in rows.values())
    assert json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8")) == report
    assert report["off_topic"]["alone"] != report["off_topic"]["cartridge"]
    marked = Cartridge.load(config.cartridge)
    found = json.loads(marked.provenance.evaluation)
    assert {row["condition"]: row["nll"] for row in found["rows"]} == {name: row["nll"] for name, row in rows.items()}
    assert marked.provenance.recipe == cartridge.provenance.recipe
    page = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert table(report) in page and samples(report, 3) in page
    assert class_table(report) in page and "| full document | 1.00, 0%" in class_table(report)
    of_classes = [row["classes"] for row in report["rows"]]
    assert [list(classes) for classes in of_classes] == [["light", "heavy"]] * 4
    sizes = [len(model.tokenizer.encode(line["answer"])) for line in lines]
    for row, classes in zip(report["rows"], of_classes, strict=True):  # a mean over tokens, like that of all questions
        total = classes["light"]["nll"] * sizes[0] + classes["heavy"]["nll"] * sum(sizes[1:])
        assert total == pytest.approx(row["nll"] * sum(sizes), abs=1e-3)
    assert (tmp_path / "run" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert jnp.isfinite(jnp.array([row["nll"] for row in rows.values()])).all()


def test_exactly_one_source_of_questions():
    fields = {"cartridge": "c", "corpus": "d", "output_dir": "o"}
    with pytest.raises(UserError, match="exactly one"):
        EvalConfig(**fields)
    with pytest.raises(UserError, match="exactly one"):
        dataclasses.replace(EvalConfig(**fields, questions="q"), held_out="h")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_an_evaluation_is_recorded_beside_the_same_bytes(tmp_path: Path, dtype: str):
    path = tmp_path / "cartridge.safetensors"
    Cartridge.from_text(tiny.model(), tiny.TEXT, 8).save(path, dtype)
    with safe_open(path, framework="numpy") as reader:
        before = {name: reader.get_tensor(name).tobytes() for name in reader.keys()}  # noqa: SIM118
    record_evaluation(path, '{"rows": []}')
    with safe_open(path, framework="numpy") as reader:
        assert {name: reader.get_tensor(name).tobytes() for name in reader.keys()} == before  # noqa: SIM118
    assert Cartridge.load(path, model=tiny.model()).provenance.evaluation == '{"rows": []}'
