"""Three invented documents, each with forty questions in four classes that tell methods apart.

- `fact`: in the document's own words, which a search for words finds.
- `paraphrase`: without any word that is rare in the document, so that such a search has nothing to go by.
- `several places`: a sum, a comparison or a link between places that lie apart.
- `unanswerable`: the document does not say, and the right answer is to say so.

The documents and questions lie in `examples/embedded/`; a test holds them to these rules.
"""

from __future__ import annotations

import dataclasses

from cartridges_jax.command_line import files
from cartridges_jax.suites import SuiteQuestion
from cartridges_jax.training.evals.questions import questions_of
from cartridges_jax.training.evals.scorers import contains, words

FOLDER = files.PACKAGE / "examples" / "embedded"
NAMES = ("manual", "minutes", "ledger")
UNANSWERABLE = "unanswerable"
ABSTAINING = ("not say", "not mention", "not mentioned", "not stated", "not known", "not know", "no information")


@dataclasses.dataclass(frozen=True)
class Suite:
    instruction: str = "{question} Answer with a short phrase only."
    max_answer_tokens: int = 24

    def documents(self) -> dict[str, str]:
        return {name: files.read_text(FOLDER / f"{name}.txt", "a document of the suite") for name in NAMES}

    def questions(self) -> list[SuiteQuestion]:
        return [
            SuiteQuestion(**dataclasses.asdict(question), documents=(name,))
            for name in NAMES
            for question in questions_of(FOLDER / f"{name}.jsonl")
        ]

    def score(self, question: SuiteQuestion, text: str) -> float:
        """Returns 1 if the text contains the answer or, where there is none, says that it does not know it."""
        if question.kind != UNANSWERABLE:
            return float(contains(text, question.answer))
        said = words(text.replace("n't", " not"))
        return float(any(f" {phrase} " in f" {said} " for phrase in ABSTAINING))
