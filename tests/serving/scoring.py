"""The score of a prompt, as a request that asks for nothing else gets it."""

from __future__ import annotations

from collections.abc import Sequence

from cartridges_jax.serving.engine import Engine
from cartridges_jax.serving.generate import run
from cartridges_jax.serving.scheduler import Finished, Prefix, PromptScored, Request, Scheduler, Scored


def score(engine: Engine, prompt: Sequence[int], prefix: Prefix | None, num_top: int) -> list[Scored]:
    """Scores every token but the first; nothing, if the numbers behind the cartridge are not finite."""
    asked = Request("scored", tuple(prompt), prefix, max_tokens=0, prompt_logprobs=num_top)
    events = list(run(Scheduler(engine, 1), [asked]))
    scored = [one for event in events if isinstance(event, PromptScored) for one in event.scored]
    assert events[-1] == Finished("scored", "length" if scored else "not_finite")
    return scored
