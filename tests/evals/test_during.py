"""Evaluations of a run: their numbers against the definitions, and where they stand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from tiny_runs import config_of, metrics_of, settings_in

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.training.batch import Batch
from cartridges_jax.training.data import typed_examples
from cartridges_jax.training.evals.during import Evals, EvalsConfig, GenerationEval, LossEval
from cartridges_jax.training.evals.questions import general_questions, questions_of
from cartridges_jax.training.evals.scorers import score
from cartridges_jax.training.losses import distillation_loss
from cartridges_jax.training.run import train
from synth import conversation

QUESTIONS = [{"question": f"What does the cat number {4 * i} weigh?", "answer": f"{28 * i} grams"} for i in range(3)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    made = conversation.read(tiny.write_dataset(folder / "dataset.parquet", tiny.model()))
    kinds = [dataclasses.replace(c, metadata={"seed_prompt_type": "ab"[i % 2]}) for i, c in enumerate(made[:7])]
    conversation.write(folder / "held_out.parquet", kinds)
    (folder / "corpus.txt").write_text(tiny.TEXT, encoding="utf-8")
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS), encoding="utf-8")
    return folder


def run(config: EvalsConfig, cartridge: Cartridge) -> tuple[dict[str, float], list[dict[str, Any]]]:
    return Evals(config, tiny.model(), "logprobs", "bucket").run(cartridge)


@pytest.fixture(scope="module")
def cartridge() -> Cartridge:
    return Cartridge.from_text(tiny.model(), tiny.TEXT, 16)


def test_the_loss_is_the_mean_over_targets_and_over_those_of_each_type(inputs: Path, cartridge: Cartridge):
    metrics, answers = run(EvalsConfig(loss=(LossEval("held_out", str(inputs / "held_out.parquet")),)), cartridge)
    totals, counts = {"a": 0.0, "b": 0.0}, {"a": 0, "b": 0}
    for kind, example in typed_examples(inputs / "held_out.parquet", tiny.model().tokenizer):
        t, j = len(example.tokens), int(np.bincount(example.target_index).max())
        ids, logprobs, mask = np.zeros((1, t, j), int), np.zeros((1, t, j)), np.zeros((1, t, j), bool)
        for i in set(example.target_index.tolist()):
            own = example.target_index == i
            where = 0, i, slice(own.sum())
            ids[where], logprobs[where], mask[where] = example.target_ids[own], example.target_logprobs[own], True
        batch = Batch(example.tokens[None], np.ones((1, t), int), np.arange(t)[None], ids, logprobs, mask)
        count = int(mask.any(-1).sum())
        totals[kind] += float(distillation_loss(cartridge, tiny.model(), batch, "bucket")) * count
        counts[kind] += count
    expected = sum(totals.values()) / sum(counts.values())
    assert metrics["eval_held_out/loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_held_out/perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    for kind, conversations in (("a", 4), ("b", 3)):
        assert metrics[f"eval_held_out/seed_prompt_{kind}/loss"] == pytest.approx(totals[kind] / counts[kind], rel=1e-5)
        assert metrics[f"eval_held_out/seed_prompt_{kind}/count"] == conversations
    assert answers == []


def test_answers_are_scored_and_kept(inputs: Path, cartridge: Cartridge, tmp_path: Path):
    """Three prompts whatever is asked, so that the engine compiles once."""
    one = GenerationEval("facts", str(inputs / "questions.jsonl"), "chrf", max_tokens=4)

    def ask(**changes: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
        return run(EvalsConfig(generation=(dataclasses.replace(one, **changes),)), cartridge)

    metrics, answers = ask()
    assert [row["prompt"] for row in answers] == [q["question"] for q in QUESTIONS]
    scores = [row["score"] for row in answers]
    assert scores == [score("chrf", row["pred"], row["answer"]) for row in answers] and max(scores) > 0
    assert metrics["generate_facts/score"] == pytest.approx(np.mean(scores))
    assert ask()[1] == answers
    assert ask(instruction="Say it: {question}")[1] != answers
    assert ask(max_tokens=1)[0]["generate_facts/num_assistant_tokens"] <= 3
    assert metrics["generate_facts/num_assistant_tokens"] > 3
    (tmp_path / "one.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n")
    several = {"questions": str(tmp_path / "one.jsonl"), "num_samples": 3, "temperature": 2.0}
    drawn = ask(**several)[1]
    assert [row["sample_idx"] for row in drawn] == [0, 1, 2]
    assert len({row["pred"] for row in drawn}) > 1
    assert ask(**several)[1] == drawn


def test_a_loss_is_that_of_the_question_as_it_is_asked(inputs: Path, cartridge: Cartridge):
    plain, longer = (
        run(EvalsConfig(loss=(LossEval("x", None, str(inputs / "questions.jsonl"), asked),)), cartridge)[0]
        for asked in ("{question}", "{question} Answer briefly.")
    )
    assert plain["eval_x/loss"] != longer["eval_x/loss"]


def test_damage_off_the_topic_is_the_loss_with_less_that_without(cartridge: Cartridge):
    metrics, _ = run(EvalsConfig(off_topic=True), cartridge)
    with_it, without = metrics["eval_off_topic/loss"], metrics["eval_off_topic/loss_without_cartridge"]
    assert metrics["eval_off_topic/damage"] == pytest.approx(with_it - without) and with_it != without
    nothing = Cartridge(cartridge.keys[:, :0], cartridge.values[:, :0], None, 0)
    assert abs(run(EvalsConfig(off_topic=True), nothing)[0]["eval_off_topic/damage"]) < 1e-5  # no system message here


def test_the_general_questions_are_a_fixed_set():
    questions = general_questions()
    assert len(questions) == len({q.question for q in questions}) == 32


def test_an_evaluation_that_fills_the_window_says_so():
    cartridge = Cartridge.from_text(tiny.model(), tiny.TEXT, 8).at_offset(tiny.WINDOW - 8, tiny.model().config)
    with pytest.raises(UserError, match=f"an offset of {tiny.WINDOW - 8} and a conversation of"):
        run(EvalsConfig(off_topic=True), cartridge)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"question": "a", "answer": "b", "choices": ["c"]}', "line 1: the answer 'b' is none of its choices"),
        ('{"question": "a", "answer": "b", "choices": 3}', "line 1: expected"),
    ],
)
def test_choices_have_to_fit(tmp_path: Path, line: str, sentence: str):
    (tmp_path / "q.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=sentence):
        questions_of(tmp_path / "q.jsonl")


def test_what_cannot_be_evaluated_is_refused_before_training(inputs: Path, tmp_path: Path):
    for change, sentence in (
        ({"generation": (GenerationEval("x", str(tmp_path / "none.jsonl")),)}, "none.jsonl does not exist"),
        ({"generation": (GenerationEval("x", str(inputs / "questions.jsonl"), "choice"),)}, "without choices"),
        ({"loss": (LossEval("x", questions=str(tmp_path / "none.jsonl")),)}, "none.jsonl does not exist"),
        (
            {"generation": (GenerationEval("x", str(inputs / "questions.jsonl"), max_tokens=tiny.WINDOW),)},
            r"the evaluation x needs \d+ tokens behind an offset of 0, more than",
        ),
    ):
        config = config_of(settings_in(tmp_path, inputs), evals=EvalsConfig(**change))
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            train(config, tiny.model())
        assert not Path(config.output_dir).exists()
    with pytest.raises(UserError, match="expected each once"):
        EvalsConfig(loss=(LossEval("x", "a"), LossEval("x", "b")))
    with pytest.raises(UserError, match="has the name off_topic, under which"):
        EvalsConfig(loss=(LossEval("off_topic", "a"),), off_topic=True)
    with pytest.raises(UserError, match=r"the instruction 'Answer\.', expected a \{question\} in it"):
        LossEval("x", "a", instruction="Answer.")
    with pytest.raises(UserError, match="exactly one of dataset and questions"):
        LossEval("x")


def test_a_run_is_evaluated_before_during_and_after(inputs: Path, tmp_path: Path):
    questions = str(inputs / "questions.jsonl")
    evals = EvalsConfig(
        every=2,
        loss=(LossEval("held_out", str(inputs / "held_out.parquet")), LossEval("facts", questions=questions)),
        generation=(GenerationEval("facts", questions, max_tokens=3),),
        off_topic=True,
    )
    config = config_of(settings_in(tmp_path, inputs), num_steps=3, evals=evals)
    cartridge = Cartridge.load(train(config, tiny.model()))
    lines = metrics_of(config.output_dir)
    assert [(line["step"], "loss" in line) for line in lines] == [
        (-1, False),
        (0, True),
        (1, True),
        (1, False),
        (2, True),
        (2, False),
    ]
    assert len({line["eval_facts/loss"] for line in lines if "loss" not in line}) == 3
    found = json.loads(cartridge.provenance.evaluation)
    assert found == lines[-1]
    samples = [json.loads(line) for line in (Path(config.output_dir) / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [-1] * 3 + [1] * 3 + [2] * 3
    page = (Path(config.output_dir) / "report.md").read_text(encoding="utf-8")
    assert "| eval_off_topic/damage |" in page and QUESTIONS[0]["question"] in page
