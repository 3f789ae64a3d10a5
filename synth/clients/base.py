"""What synthesis needs of an inference server, and the ways in which a call can fail.

A client makes one attempt per call, at one server. What is tried again, and at which server, is up to the fleet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import operator
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol, Self

from cartridges_jax.command_line.errors import UserError
from synth.columns import LARGEST_ID
from synth.config import SamplingConfig

ChatMessages = Sequence[dict[str, str]]
OWN_TOKENIZER = "set config.chunker.tokenizer to a tokenizer.json, a folder that holds one, or a Hub id"
ROUNDING = 1e-3  # what a log-probability of 0 may have become in bfloat16
TopRows = tuple[tuple[tuple[int, float], ...], ...]  # per token: (token id, log-probability) pairs


class Refused(UserError):
    """The server will not serve this request, now or later. The sentence quotes what the server says."""


class Rejected(Refused):
    """The server will not serve this request. If it has served others of the kind, it may serve others again."""


class Unsuited(Rejected):
    """A reply lacks what was asked for. Unless it is the only one that does, the server is set up that way."""


class Unavailable(OSError):
    """There was no usable answer this time. The same call may succeed later."""

    def __init__(self, message: str, kind: str = "connection"):
        super().__init__(message)
        self.kind = kind  # a few words to count by: "connection", "timeout", "http 500", "broken reply", "wrong tokens"


class Busy(Unavailable):
    """HTTP 429 or 503: the server wants fewer calls, and the next one after `retry_after` seconds (0: unsaid)."""

    def __init__(self, message: str, kind: str, retry_after: float = 0.0):
        super().__init__(message, kind)
        self.retry_after = retry_after


@dataclasses.dataclass(frozen=True)
class Completion:
    """A message that a model wrote, or one that it scored."""

    text: str
    token_ids: tuple[int, ...] | None
    top_logprobs: TopRows | None  # before temperature; one row a token, or none for a last end-of-turn token
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def __post_init__(self):
        """Raises: Unavailable, if a part is of a wrong type, or no token id or log-probability."""
        if not isinstance(self.text, str) or not isinstance(self.finish_reason, str):
            raise broken("a text that is none")
        counts = self.prompt_tokens, self.completion_tokens, self.cached_tokens
        if not all(type(count) is int and 0 <= count <= LARGEST_ID for count in counts):
            raise broken("a number of tokens that is none")
        if not are_token_ids(self.token_ids or ()):
            raise broken("a token id that is none")
        rows = self.top_logprobs or ()
        if any(rows):
            # all rows at once, since there are hundreds of alternatives an answer; a sum of NaN is NaN
            tokens, logprobs = zip(*itertools.chain.from_iterable(rows), strict=True)
            are_floats = all(issubclass(kind, float) for kind in set(map(type, logprobs)))
            if not (are_token_ids(tokens) and are_floats and max(logprobs) <= 0 and sum(logprobs) <= 0):
                raise broken("an alternative without a token id or a log-probability")
            if any(len(dict(row)) < len(row) for row in rows):
                raise broken("an alternative twice")


def completion_of(
    reply: dict[str, Any], text: str, token_ids: tuple[int, ...] | None = None, top_logprobs: TopRows | None = None
) -> Completion:
    """The completion of a reply in OpenAI's form, from which the client has read a text, ids and alternatives."""
    usage = reply.get("usage") or {}
    return Completion(
        text,
        token_ids,
        top_logprobs,
        finish_reason=reply["choices"][0].get("finish_reason") or "unknown",
        prompt_tokens=usage.get("prompt_tokens") or 0,
        completion_tokens=usage.get("completion_tokens") or 0,
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
    )


def are_token_ids(values: Sequence[Any]) -> bool:
    return set(map(type, values)) <= {int} and (not values or (min(values) >= 0 and max(values) <= LARGEST_ID))


def broken(what: str) -> Unavailable:
    """The error for a reply that holds something impossible."""
    return Unavailable(f"the server gave {what}", "broken reply")


def enough(rows: Iterable[Iterable[tuple[int, float]]], asked: int, setting: str) -> TopRows:
    """The `asked` likeliest alternatives of every token; `setting` tells how to make the server give as many.

    Raises: Unsuited, if there are fewer: training would not be what the config says.
    """
    made = tuple(tuple(sorted(row, key=operator.itemgetter(1), reverse=True)[:asked]) for row in rows)
    most = max(map(len, made), default=asked)
    if most < asked:
        raise Unsuited(
            f"the server gives {most} alternatives to a token and not the {asked} of config.top_logprobs: {setting}, "
            f"or set config.top_logprobs to {max(1, most)} in another config.output_dir"
        )
    if any(len(row) < asked for row in made):
        raise broken("alternatives to some tokens only")
    return made


def check_same_model(named: Any, model: str, aliases: Collection[str] = ()) -> None:
    """Raises: Refused, if the model that a reply names is not the config's.

    Names of one model may differ in case, in a folder or organisation before it, in a file's suffix, and in a revision
    or date behind it. A server that has several names for a model, `aliases`, answers with one of them.
    """
    if not named or not isinstance(named, str) or any(_same_name(named, known) for known in (model, *aliases)):
        return
    raise Refused(
        f"the server answers as {named[:100]!r}, but config.client.model is {model!r}: another model's answers would "
        "be mixed in; start the server with that model, or change config.client.model in another config.output_dir"
    )


_ADDED = re.compile(r"(\.gguf|@.*|:latest|-\d{4}-\d{2}-\d{2}|-\d{8})$")


def _same_name(one: str, other: str) -> bool:
    parts = [[part for part in _ADDED.sub("", name.casefold()).split("/") if part] for name in (one, other)]
    short, long = sorted(parts, key=len)
    return not short or long[-len(short) :] == short


@contextlib.contextmanager
def reading(url: str) -> Iterator[None]:
    """For code that takes a reply apart: an error inside is the reply's fault and becomes `Unavailable`."""
    try:
        yield
    except Refused:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        raise Unavailable(f"{url} gave a reply with a part missing or wrong ({reason})", "broken reply") from error


def as_logprobs(values: Sequence[Any]) -> list[float]:
    """Log-probabilities as floats of at most 0, above which rounding may have lifted them; -infinity is allowed."""
    return [value if type(value) is float and value <= 0 else _as_logprob(value) for value in values]


def _as_logprob(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value <= ROUNDING:
        raise broken("a log-probability that is none")
    return min(float(value), 0.0)


def answer_span(opened: list[int], empty: list[int], whole: list[int]) -> slice:
    """Where an answer's tokens, with its end-of-turn token, stand in those of the `whole` conversation that it ends.

    This follows from the same conversation `opened` for the answer, and with an `empty` answer. Raises: Rejected, if
    the chat template makes these differ in more than the answer.
    """
    first, tail = len(opened), empty[len(opened) :]
    end = len(whole) - len(tail)
    if not tail or end <= first or not empty[:first] == whole[:first] == opened or whole[end:] != tail:
        raise Rejected("the model's chat template alters what stands around an answer, so its tokens cannot be told")
    return slice(first, end + 1)


class Client(Protocol):
    """One server. Every method raises `Refused`, `Unavailable` or `Busy`; a call ends within its time-out."""

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *_: object) -> None: ...

    async def check(self) -> None:
        """Raises a sentence unless a server answers and serves the model. It is asked before any document is read."""

    async def complete(
        self, messages: ChatMessages, sampling: SamplingConfig, seed: int, top_logprobs: int = 0
    ) -> Completion: ...

    async def score(self, messages: ChatMessages, top_logprobs: int) -> Completion:
        """Scores the last message, an answer, as if the server had sampled it, with its end-of-turn token.

        A given answer has no thoughts before it, so thinking is off where the chat template has a switch.
        """

    async def tokenize(self, text: str) -> list[int]: ...

    async def detokenize(self, token_ids: Sequence[int]) -> str: ...
