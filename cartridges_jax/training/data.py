"""From self-study conversations to packed rows of one length, which depend on nothing but the seed and the step.

An answer is laid out behind the very ids with which a server would be asked for it (`Tokenizer.turn_ids`). The context
is never part of them, since the cartridge stands where a system message would. Answers keep the ids that the teacher
sampled, to which its log-probabilities belong. Rows are addressed by their index, so that the number of its step is all
that a run has to remember of its data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import grain
import numpy as np
import pyarrow.parquet as pq

from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.interop.sources import dataset_files
from cartridges_jax.models.tokenizer import Tokenizer
from cartridges_jax.training.batch import Batch
from synth.conversation import Conversation, iterate, read, write

Targets = Literal["logprobs", "tokens"]  # the teacher's distribution, or the answer's next token for certain
OPEN_ROWS = 64  # rows that packing may still add to: more of them waste less room and cost more comparisons

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MixConfig:
    dataset: str
    weight: float  # its share of the answers of an epoch; it has at least one of them

    def __post_init__(self) -> None:
        if not 0 < self.weight < 1:
            raise UserError(
                f"the weight of {self.dataset} in config.mix is {self.weight}, expected above 0 and below 1"
            )


@dataclasses.dataclass(frozen=True)
class Example:
    """One answer, with the tokens before it and the teacher's targets.

    Entry e says that behind position `target_index[e]` the token `target_ids[e]` comes next with the log-probability
    `target_logprobs[e]`. So a position is that of the token which predicts, one before the token that is predicted.
    """

    tokens: np.ndarray  # [t] int32
    target_index: np.ndarray  # [e] int32, ascending
    target_ids: np.ndarray  # [e] int32
    target_logprobs: np.ndarray  # [e] float32


def read_corpus(path: str | Path) -> str:
    """Reads the text that a cartridge stands in for.

    Raises:
      FileNotFoundError, UserError: there is no such file, it is empty, or it is not UTF-8.
    """
    return files.read_text(path, "the text that the cartridge stands in for")


def read_examples(
    path: str | Path, tokenizer: Tokenizer, targets: Targets = "logprobs", vocab_size: int | None = None
) -> list[Example]:
    """Reads a dataset, made by `synth` or by upstream, and lays every answer out as an example.

    Args:
      vocab_size: how many ids the model has, which is how many rows its embedding has; by default the tokenizer's.

    Raises:
      FileNotFoundError, UserError: there is no such file, it is damaged, it holds no target, or a row of it cannot be
        true.
    """
    return [example for _, example in typed_examples(path, tokenizer, targets, vocab_size)]


def typed_examples(
    path: str | Path, tokenizer: Tokenizer, targets: Targets = "logprobs", vocab_size: int | None = None
) -> list[tuple[str, Example]]:
    """Reads a dataset as `read_examples` does, and pairs every example with the type of its seed prompt."""
    found = []
    for file in dataset_files(path):
        for row, conversation in enumerate(iterate(file, vocab_size or tokenizer.vocab_size)):
            kind = conversation.metadata.get("seed_prompt_type") or conversation.type or "none"
            try:
                examples = example_of(conversation, tokenizer, targets)
            except UserError as error:
                raise UserError(f"{file}, row {row} (counted from 0): {error}") from error
            found += [(str(kind), example) for example in examples if len(example.target_index)]
    if not found and targets == "logprobs":
        raise UserError(
            f"{path} holds no teacher log-probabilities: synthesize with top_logprobs above 0, or train on "
            "targets='tokens'"
        )
    if not found:
        raise UserError(f"{path} holds no answer: expected conversations with messages of an assistant")
    return found


def check_lengths(examples: Sequence[Example], seq_len: int) -> None:
    """Warns of conversations that are longer than a row of `seq_len` tokens and will be cut.

    Raises:
      UserError: every conversation is cut before its first target.
    """
    if examples and not any((example.target_index < seq_len).any() for example in examples):
        raise UserError(f"seq_len is {seq_len}, which cuts every conversation before its first answer: raise it")
    cut = sum(len(example.tokens) > seq_len for example in examples)
    if cut:
        log.warning("%d of %d conversations are longer than seq_len %d and are cut there", cut, len(examples), seq_len)


def dataset_hash(*sources: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 over the bytes of all files of these datasets."""
    digest = hashlib.sha256()
    for path in (path for source in sources for path in dataset_files(source)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def example_of(conversation: Conversation, tokenizer: Tokenizer, targets: Targets = "logprobs") -> list[Example]:
    """Makes an example of every answer: the ids with which a server is asked for it, then the answer's own ids.

    What stands before an answer is rendered as for a request, earlier answers included, so that the ids are those that
    the teacher saw: a template may render an earlier answer otherwise than the one it asks for.
    """
    thinking = _thinking(conversation.metadata)
    turns = [{"role": message.role, "content": message.content} for message in conversation.messages]
    examples = []
    for i, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue
        sampled, top = message.token_ids, message.top_logprobs
        if sampled is None:
            prompt, answer = tokenizer.answered_ids(turns[:i], message.content, thinking=thinking)
        else:
            prompt = tokenizer.turn_ids(turns[:i], add_generation_prompt=True, thinking=thinking)
            answer = list(sampled)
        index, ids, logprobs = [], [], []
        if targets == "tokens":
            index, ids, logprobs = np.arange(len(answer)), answer, np.zeros(len(answer))
        elif sampled is not None and top is not None:
            index, ids, logprobs = top.token_idx, top.token_id, top.logprobs
        examples.append(
            Example(
                np.asarray(prompt + answer, np.int32),
                np.asarray(index, np.int32) + np.int32(len(prompt) - 1),
                np.asarray(ids, np.int32),
                np.asarray(logprobs, np.float32),
            )
        )
    return examples


def thinking_of(source: str | os.PathLike[str]) -> bool | None:
    """Returns the thinking mode of all answers of a dataset, or None if it differs or is the chat template's own."""
    columns = (pq.read_table(file, columns=["metadata"])["metadata"] for file in dataset_files(source))
    modes = {
        _thinking(json.loads(one) if isinstance(one, str) else one or {}) for c in columns for one in c.to_pylist()
    }
    return modes.pop() if len(modes) == 1 else None


def _thinking(metadata: Mapping[str, Any]) -> bool | None:
    mode = metadata.get("thinking")
    if mode is not None and not isinstance(mode, bool):
        raise UserError(f"a conversation's metadata has thinking {mode!r}, expected true, false or no such key")
    return mode


def pack(lengths: Sequence[int], seq_len: int, order: Sequence[int]) -> list[list[int]]:
    """Puts each example whole into the first row of `seq_len` tokens that has room; returns the rows' examples."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, list[int]]] = []  # the room that is left, and the examples
    for i in order:
        length = min(lengths[i], seq_len)
        for slot, (room, members) in enumerate(open_rows):
            if length <= room:
                members.append(i)
                open_rows[slot] = (room - length, members)
                break
        else:
            members = [i]
            rows.append(members)
            open_rows = [*open_rows[-(OPEN_ROWS - 1) :], (seq_len - length, members)]
    return rows


def _order(counts: Sequence[int], weights: Sequence[float], rng: np.random.Generator) -> list[int]:
    """Returns an epoch's examples in order: all of the first dataset, and so many of the others as weights say."""
    chosen, first = rng.permutation(counts[0]), counts[0]
    for count, weight in zip(counts[1:], weights, strict=True):
        wanted = max(1, round(counts[0] * weight / (1 - sum(weights))))
        rounds = [rng.permutation(count) for _ in range(-(-wanted // count))]
        chosen = np.concatenate([chosen, first + np.concatenate([*rounds, np.zeros(0, int)])[:wanted].astype(int)])
        first += count
    return (rng.permutation(chosen) if weights else chosen).tolist()


class PackedRows:
    """The rows of a whole run, epoch after epoch. Row i is the same whenever it is asked for.

    Args:
      examples: the run's own dataset, each of whose examples stands once in an epoch.
      mixed: other datasets, each with its share of an epoch's answers; `examples` are the rest.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        seq_len: int,
        batch_size: int,
        num_epochs: int,
        seed: int,
        mixed: Sequence[tuple[Sequence[Example], float]] = (),
    ):
        counts = [len(examples), *(len(others) for others, _ in mixed)]
        weights = [weight for _, weight in mixed]
        examples = [*examples, *(example for others, _ in mixed for example in others)]
        self._examples, self._seq_len = examples, seq_len
        self._width = max((int(np.bincount(e.target_index).max()) for e in examples if len(e.target_index)), default=1)
        lengths = [len(e.tokens) for e in examples]
        self._rows: list[list[int]] = []
        for epoch in range(num_epochs):
            self._rows += pack(lengths, seq_len, _order(counts, weights, np.random.default_rng((seed, epoch))))
        # the last batch is filled up with the first rows, so that every batch has one shape
        missing = -len(self._rows) % batch_size
        self._rows += [self._rows[i % len(self._rows)] for i in range(missing)]

    def __len__(self) -> int:
        return len(self._rows)

    def num_tokens(self, row: int) -> int:
        """Returns how many tokens of a row are not padding."""
        return sum(min(len(self._examples[i].tokens), self._seq_len) for i in self._rows[row])

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        t, j = self._seq_len, self._width
        out = {
            "tokens": np.zeros(t, np.int32),
            "segment_ids": np.zeros(t, np.int32),
            "positions": np.zeros(t, np.int32),
            "target_ids": np.zeros((t, j), np.int32),
            "target_logprobs": np.zeros((t, j), np.float32),
            "target_mask": np.zeros((t, j), bool),
        }
        start = 0
        for segment, i in enumerate(self._rows[row], start=1):
            example = self._examples[i]
            n = min(len(example.tokens), t - start)
            out["tokens"][start : start + n] = example.tokens[:n]
            out["segment_ids"][start : start + n] = segment
            out["positions"][start : start + n] = np.arange(n)
            kept = example.target_index < n
            index = example.target_index[kept]
            first = np.searchsorted(index, index)  # entries of one position lie side by side
            where = (start + index, np.arange(len(index)) - first)
            out["target_ids"][where] = example.target_ids[kept]
            out["target_logprobs"][where] = example.target_logprobs[kept]
            out["target_mask"][where] = True
            start += n
        return out


@dataclasses.dataclass(frozen=True)
class _Share:
    """The rows that one process reads, since its devices hold them: of every `batch_size` rows the `chosen` ones."""

    rows: PackedRows
    batch_size: int
    chosen: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows) // self.batch_size * len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step, i = divmod(index, len(self.chosen))
        return self.rows[step * self.batch_size + self.chosen[i]]


def batches(rows: PackedRows, batch_size: int, first_step: int, chosen: Sequence[int] | None = None) -> Iterator[Batch]:
    """Yields the batches from `first_step` on, of each the `chosen` rows or all. Threads prepare them ahead of time."""
    chosen = range(batch_size) if chosen is None else chosen
    dataset = grain.MapDataset.source(_Share(rows, batch_size, chosen))[first_step * len(chosen) :].batch(len(chosen))
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    for batch in dataset.to_iter_dataset(options):
        yield Batch(**batch)


def split_dataset(path: Path, num_held_out: int, directory: Path) -> tuple[Path, Path]:
    """Writes a dataset's two parts, to train on and held out, into `directory`, and returns their files.

    The conversations that are held out are spread evenly over the dataset.

    Raises:
      UserError: the dataset has less than twice as many conversations.
    """
    conversations = read(path)
    if not 1 <= num_held_out <= len(conversations) // 2:
        raise UserError(
            f"{path} has {len(conversations)} conversations, too few to keep {num_held_out} out of training: make more"
        )
    chosen = {i * len(conversations) // num_held_out for i in range(num_held_out)}
    paths = directory / "train.parquet", directory / "held_out.parquet"
    write(paths[0], [c for i, c in enumerate(conversations) if i not in chosen])
    write(paths[1], [c for i, c in enumerate(conversations) if i in chosen])
    return paths


def exchanges(path: str | Path) -> list[tuple[str, str]]:
    """Returns the first question of each conversation and the answer to it.

    Raises:
      FileNotFoundError, UserError: there is no such file, it is damaged, or a conversation does not begin with both.
    """
    found = []
    for row, conversation in enumerate(iterate(path)):
        if [message.role for message in conversation.messages[:2]] != ["user", "assistant"]:
            raise UserError(
                f"{path}, row {row} (counted from 0): expected a conversation that begins with a question of a user "
                "and the answer of an assistant"
            )
        found.append((conversation.messages[0].content, conversation.messages[1].content))
    if not found:
        raise UserError(f"{path} holds no conversation: expected some to ask about")
    return found
