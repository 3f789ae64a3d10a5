"""Measures a context: the likelihood of every expected answer, some answers in the model's words, and speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.comparison.cells import Asked
from cartridges_jax.comparison.config import CompareConfig
from cartridges_jax.comparison.likelihood import answer_nlls
from cartridges_jax.comparison.methods import Context
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.serving.generate import engine_for, generate_ids
from cartridges_jax.suites import Suite, SuiteQuestion
from cartridges_jax.training.evals.questions import Question, general_questions, shared_length
from cartridges_jax.training.evals.timing import TIMED_TOKENS, time_answers

SHARED = 256  # tokens that all prompts begin with, from which on they are read once for all


def measure(
    model: LanguageModel,
    context: Context,
    suite: Suite,
    questions: Sequence[SuiteQuestion],
    config: CompareConfig,
    most_tokens: int,
    timed: bool = True,
) -> dict[str, Any]:
    """Returns what a cell says of a context's answers and speed.

    Args:
      most_tokens: of the largest budget; contexts within it share their compiled programs.
      timed: whether the engine serves the context as its method would, so that its speed says something.
    """
    prompts, references = _laid_out(model, context, questions, suite.instruction)
    prefix, tails = _shared_beginning(model, context, prompts)
    nlls = answer_nlls(model, prefix, tails, references)
    behind = (0 if context.prefix is None else context.prefix.average_slots) + max(map(len, prompts))
    longest = max(most_tokens, behind) + max(suite.max_answer_tokens, TIMED_TOKENS)
    engine = engine_for(model, [(0, -(-longest // 256) * 256)])
    chosen = _first_of_each_class(questions, config.answers_a_class)
    asked = [tuple(tails[i]) for i in chosen]
    answers = generate_ids(model, asked, prefix, suite.max_answer_tokens, engine=engine)
    texts = {i: model.tokenizer.decode(ids).strip() for i, ids in zip(chosen, answers, strict=True)}
    return {
        "questions": tuple(
            Asked(q.question, q.kind, nll, len(ids), texts.get(i), suite.score(q, texts[i]) if i in texts else None)
            for i, (q, nll, ids) in enumerate(zip(questions, nlls, references, strict=True))
        ),
        **(time_answers(engine, context.prefix, prompts[: config.timed_questions]) if timed else {}),
        "off_topic": _off_topic(model, context),
    }


def _laid_out(
    model: LanguageModel, context: Context, questions: Sequence[Question], instruction: str
) -> tuple[list[list[int]], list[list[int]]]:
    """Returns the ids of the questions as they are put behind the context, and those of the expected answers."""
    prompts, references = [], []
    for question in questions:
        messages = [{"role": "user", "content": question.asked(instruction)}]
        if context.system is not None:
            messages.insert(0, {"role": "system", "content": context.system(question.question)})
        behind = context.prefix is not None
        prompt, reference = model.tokenizer.answered_ids(messages, question.answer, behind_cartridge=behind)
        prompts.append(prompt)
        references.append(reference)
    return prompts, references


def _shared_beginning(
    model: LanguageModel, context: Context, prompts: list[list[int]]
) -> tuple[Cartridge | None, list[list[int]]]:
    """Returns the slots behind which all prompts stand and their rests; a long system message becomes slots, too."""
    shared = shared_length(prompts)
    if context.prefix is not None or shared < SHARED:
        return context.prefix, prompts
    return Cartridge.from_tokens(model, prompts[0][:shared]), [prompt[shared:] for prompt in prompts]


def _first_of_each_class(questions: Sequence[SuiteQuestion], count: int) -> list[int]:
    """Returns the places of the first so many questions of each class."""
    seen: Counter[str] = Counter()
    chosen = []
    for i, question in enumerate(questions):
        seen[question.kind] += 1
        if seen[question.kind] <= count:
            chosen.append(i)
    return chosen


def _off_topic(model: LanguageModel, context: Context) -> float:
    """Returns the loss of answers to general questions behind the context, in nats per token."""
    prompts, references = _laid_out(model, context, general_questions(), "{question}")
    prefix, tails = _shared_beginning(model, context, prompts)
    return sum(answer_nlls(model, prefix, tails, references)) / sum(map(len, references))
