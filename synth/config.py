"""Every setting of a synthesis run. Each is checked before any work starts."""

from __future__ import annotations

import dataclasses
import urllib.parse
from typing import Literal

from cartridges_jax.command_line.addresses import without_credentials
from cartridges_jax.command_line.errors import UserError
from synth import seed_prompts
from synth.resources.config import ResourceConfig

SYSTEM_PROMPT = """You know this text well:

<text>
{chunk}
</text>

Talk about what it says. Use full sentences that stand alone: name the people, things, dates and numbers you mean, \
since the other side cannot see the text. Do not write "the text" or "the passage"."""


ClientKind = Literal["openai", "sglang", "tokasaurus", "openai_api", "together"]
TEXT_ONLY = ("openai_api", "together")
AFTER_TEMPERATURE = ("sglang", "tokasaurus")

Side = Literal["question", "answer"]


def _at_least(name: str, value: float, low: float) -> None:
    if value < low:
        raise UserError(f"config.{name} is {value}, expected at least {low}")


@dataclasses.dataclass(frozen=True)
class ClientConfig:
    """The server, or several equal ones, that a model is asked at, and how they are called.

    The kind `openai` is any OpenAI-compatible server that gives token ids (vLLM, llama-server, cartridges_jax.serve);
    `sglang` is its native /generate; `tokasaurus` is itself; `openai_api` and `together` are hosts that give texts
    only, so they can ask questions, but not be the teacher.
    """

    base_url: str | tuple[str, ...] = dataclasses.field(repr=False)  # ends in /v1; may hold user:password@
    model: str
    kind: ClientKind = "openai"
    api_key: str | None = dataclasses.field(default=None, repr=False)
    timeout_seconds: float = 120.0  # for a whole request and its reply
    max_retries: int = 5
    tokenizer: str | None = None  # the model's, a folder or Hub id: sglang needs it, others check their texts by it
    raw_logprobs: bool | None = None  # whether the server gives those before temperature; None: what its kind does
    batch_size: int = 1  # tokasaurus: calls that go into one synchronous batch
    deadline_seconds: float = 1800.0  # for a call, all its attempts together

    def __post_init__(self):
        if not self.urls:
            raise UserError("config.client.base_url names no server, expected something like http://127.0.0.1:8000/v1")
        for url in self.urls:
            shown = without_credentials(url)
            if "@" in shown:  # a part of a password would be taken for another part of the address, and shown
                raise UserError(
                    "config.client.base_url has an @ where none is expected: write what is special in a password as "
                    "%40 for @, %2F for /, %3F for ?, %23 for #"
                )
            if not url.startswith(("http://", "https://")):
                raise UserError(
                    f"config.client.base_url is {shown!r}, expected something like http://127.0.0.1:8000/v1"
                )
            try:
                urllib.parse.urlsplit(url).port  # noqa: B018
            except ValueError as error:
                raise UserError(f"config.client.base_url is {shown!r}, which is no address: {error}") from None
            if self.api_key and shown != url:
                raise UserError("config.client has an api_key, and a password in its base_url: set one of them")
        _at_least("client.timeout_seconds", self.timeout_seconds, 0.001)
        _at_least("client.max_retries", self.max_retries, 0)
        _at_least("client.batch_size", self.batch_size, 1)
        if self.kind == "sglang" and not self.tokenizer:
            raise UserError(
                "config.client.tokenizer is missing: SGLang's /generate takes token ids, so name the folder or the Hub "
                "id of the model's tokenizer"
            )
        if self.batch_size > 1 and self.kind != "tokasaurus":
            raise UserError(f"config.client.batch_size is {self.batch_size}, but only kind='tokasaurus' knows batches")
        _at_least("client.deadline_seconds", self.deadline_seconds, 0.001)

    @property
    def urls(self) -> tuple[str, ...]:
        return (self.base_url,) if isinstance(self.base_url, str) else tuple(self.base_url)

    def check_teacher(self, answer: SamplingConfig) -> None:
        """Refuses to learn from log-probabilities that are not there, or not the model's own."""
        if self.kind in TEXT_ONLY:
            raise UserError(
                f"config.client.kind is {self.kind!r}, which gives no token ids with its log-probabilities: use it as "
                "config.question_client and let another server answer"
            )
        is_raw = self.kind not in AFTER_TEMPERATURE if self.raw_logprobs is None else self.raw_logprobs
        # servers that divide by the temperature first take 0, which means the best token, for 1
        if not is_raw and answer.temperature not in (0.0, 1.0):
            raise UserError(
                f"config.answer.temperature is {answer.temperature}, but this server's log-probabilities are those "
                "after temperature, from which the model's own cannot be recovered: set it to 0 or 1 (or, if SGLang "
                "was started with SGLANG_RETURN_ORIGINAL_LOGPROB=1, set config.client.raw_logprobs)"
            )


@dataclasses.dataclass(frozen=True)
class ChunkerConfig:
    min_tokens: int = 512
    max_tokens: int = 1024
    tokenizer: str | None = None  # None asks the server; else a tokenizer.json, a folder that holds one, or a Hub id
    # Windows at random places; or pieces from one heading, function or message to the next; or so many characters.
    kind: Literal["tokens", "structure", "characters"] = "tokens"
    characters: int = 4000  # of a chunk of that kind
    overlap: int = 0  # tokens or characters that a chunk repeats of the one before; not for windows at random places

    def __post_init__(self):
        _at_least("chunker.min_tokens", self.min_tokens, 1)
        _at_least("chunker.characters", self.characters, 1)
        _at_least("chunker.overlap", self.overlap, 0)
        if self.min_tokens > self.max_tokens:
            raise UserError(
                f"config.chunker.min_tokens is {self.min_tokens}, "
                f"more than config.chunker.max_tokens, {self.max_tokens}"
            )
        longest = {"tokens": 0, "structure": self.max_tokens // 2, "characters": self.characters // 2}[self.kind]
        if self.overlap > longest:
            raise UserError(
                f"config.chunker.overlap is {self.overlap}, expected at most {longest}"
                + (": windows at random places overlap as they fall" if self.kind == "tokens" else ", half a chunk")
            )


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    temperature: float = 0.6
    top_p: float = 1.0
    max_tokens: int = 512
    stop: tuple[str, ...] = ()  # the message ends before any of these
    # How likely a side thinks before it writes, drawn once for a conversation; None leaves that to the chat template.
    # The instruction is added to the message that a thinking side answers, for templates that have no switch.
    thinking: float | None = None
    thinking_instruction: str = ""

    def check(self, name: str) -> None:
        _at_least(f"{name}.temperature", self.temperature, 0)
        _at_least(f"{name}.max_tokens", self.max_tokens, 1)
        if not 0 < self.top_p <= 1:
            raise UserError(f"config.{name}.top_p is {self.top_p}, expected more than 0 and at most 1")
        if self.thinking is not None and not 0 <= self.thinking <= 1:
            raise UserError(f"config.{name}.thinking is {self.thinking}, expected a probability from 0 to 1")


@dataclasses.dataclass(frozen=True)
class McpConfig:
    """An MCP server that is started for the run and spoken to over stdio."""

    command: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()  # NAME=value, beside the few variables that such servers inherit

    def __post_init__(self):
        for entry in self.env:
            if "=" not in entry:
                raise UserError(f"config.tools.mcp[].env has {entry!r}, expected NAME=value")


@dataclasses.dataclass(frozen=True)
class ToolsConfig:
    mcp: tuple[McpConfig, ...] = ()
    search: bool = False  # a BM25 search over the whole resource
    sides: tuple[Side, ...] = ("answer",)  # who may use them
    max_tokens: int = 128  # of the message that calls them
    timeout_seconds: float = 30.0  # of one call

    def __post_init__(self):
        _at_least("tools.max_tokens", self.max_tokens, 1)
        _at_least("tools.timeout_seconds", self.timeout_seconds, 0.001)


@dataclasses.dataclass(frozen=True)
class ExistingConfig:
    """Conversations that exist already: the teacher only scores their answers.

    With a `share` of 1 they are the whole dataset; with one of 0.02, say, they are mixed into self-study. `context`
    says whether the teacher sees the resource, or answers as it would without.
    """

    path: str  # JSONL: {"messages": [{"role", "content"}, ...]}, and "context" where a line brings its own
    share: float = 1.0
    context: bool = True

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise UserError(f"config.distill_existing.share is {self.share}, expected more than 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class GivenConfig:
    """Questions that exist already, each about a chunk that is given with it.

    With a `share` of 1 all conversations begin with them; with less they are mixed into self-study. Where an answer is
    given, too, the teacher scores it, as in `distill_existing`, and does not answer itself.
    """

    path: str  # a folder: chunks/*.md, and questions/*.jsonl of {"question", "chunk": "NAME.md"}, maybe with "answer"
    share: float = 1.0

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise UserError(f"config.given_questions.share is {self.share}, expected more than 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """Which conversations are dropped from the dataset. They stay in the run's parts, so a switch may change later."""

    empty: bool = True  # a message without words
    truncated: bool = False  # a message that reached its token limit
    repetition: bool = False  # an answer that says the same again and again
    text_talk: bool = False  # an answer that talks about "the text" or "the context"
    refusal: bool = False  # an answer that begins by declining
    unsupported: bool = False  # an answer with numbers, dates or names that neither its chunk nor a question holds
    near_duplicate: bool = False  # a first question much like that of an earlier conversation


@dataclasses.dataclass(frozen=True)
class SynthConfig:
    output_dir: str
    num_conversations: int
    resource: ResourceConfig
    client: ClientConfig  # the model that answers, the teacher
    chunker: ChunkerConfig = ChunkerConfig()
    seed_prompts: tuple[str, ...] = tuple(seed_prompts.SEED_PROMPTS)  # one named twice is drawn twice as often
    conversations_per_chunk: int = 8  # they share a system prompt, so a server computes it once
    max_chunks_in_flight: int = 4
    instructions: tuple[str, ...] = ("{question}",)  # how the first question is put to side B; one is drawn
    rounds: int = 1
    question: SamplingConfig = SamplingConfig()
    answer: SamplingConfig = SamplingConfig(temperature=0.0, max_tokens=1024)
    top_logprobs: int = 20
    min_prob_mass: float = 0.99
    system_prompt: str = SYSTEM_PROMPT
    filters: FilterConfig = FilterConfig()
    seed: int = 0
    dry_run: bool = False  # show sample prompts and an estimate, and call nobody
    question_client: ClientConfig | None = None  # the model that asks; None: the one that answers
    description: str = ""  # one sentence that stands before each chunk: what the whole text is
    chunks_per_context: int = 1
    questions_per_call: int = 1  # so many conversations begin with questions of one list that side A writes
    seed_prompt_weights: tuple[float, ...] = ()  # one for each of seed_prompts; none: all alike
    tools: ToolsConfig = ToolsConfig()
    distill_existing: ExistingConfig | None = None
    given_questions: GivenConfig | None = None

    def __post_init__(self):
        for name in ("num_conversations", "conversations_per_chunk", "max_chunks_in_flight", "rounds", "top_logprobs"):
            _at_least(name, getattr(self, name), 1)
        _at_least("chunks_per_context", self.chunks_per_context, 1)
        _at_least("questions_per_call", self.questions_per_call, 1)
        self.question.check("question")
        self.answer.check("answer")
        if not 0 < self.min_prob_mass <= 1:
            raise UserError(f"config.min_prob_mass is {self.min_prob_mass}, expected more than 0 and at most 1")
        if "{chunk}" not in self.system_prompt:
            raise UserError("config.system_prompt has no {chunk}: the text of the chunk takes its place")
        if not self.instructions or not all("{question}" in instruction for instruction in self.instructions):
            raise UserError("config.instructions needs at least one text, each with {question} in it")
        self.client.check_teacher(self.answer)
        if self.questions_per_call > 1 and any("\n" in stop for stop in self.question.stop):
            raise UserError(
                "config.question.stop ends a message at a line break, but config.questions_per_call asks for a list"
            )
        if self.distill_existing and self.given_questions:
            raise UserError(
                "config.distill_existing and config.given_questions are both set, and a run takes conversations from "
                "one of them: make two datasets, training takes several"
            )
        seed_prompts.check(self.seed_prompts, self.seed_prompt_weights)
