"""Sums up in a few lines what a dataset holds and what the filters found and dropped."""

from __future__ import annotations

import dataclasses
from collections import Counter

from synth.config import FilterConfig
from synth.conversation import Conversation


class Summary:
    """Counts of conversations, filled one by one; its text is the summary."""

    def __init__(self, filters: FilterConfig):
        self._filters = filters
        self.total = self.kept = 0
        self._kinds: Counter[str] = Counter()
        self._resources: Counter[str] = Counter()
        self._findings: Counter[str] = Counter()
        self._messages: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    def add(self, conversation: Conversation, found: set[str], stays: bool) -> None:
        self.total += 1
        self._findings.update(found)
        if not stays:
            return
        self.kept += 1
        self._kinds[str(conversation.metadata.get("seed_prompt_type"))] += 1
        if resource := conversation.metadata.get("resource"):
            self._resources[resource] += 1
        for message, tokens in zip(conversation.messages, conversation.metadata["completion_tokens"], strict=True):
            self._messages[message.role] += 1
            self._tokens[message.role] += tokens

    @property
    def findings(self) -> str:
        """Each filter with the number of conversations it found, and whether they were dropped."""
        names = [field.name for field in dataclasses.fields(self._filters)]
        counts = [(name, self._findings[name], getattr(self._filters, name)) for name in names]
        return ", ".join(
            f"{name} {count}" + (f" ({'dropped' if drops else 'kept'})" if count else "")
            for name, count, drops in counts
        )

    def __str__(self) -> str:
        tokens = sum(self._tokens.values())
        return (
            f"{self.kept} of {self.total} conversations: {_list(self._kinds)}\n"
            f"resources: {_list(self._resources) or 'none'}\n"
            f"tokens written: {tokens}, a question has {self._mean('user')} and an answer {self._mean('assistant')}\n"
            f"found: {self.findings}"
        )

    def _mean(self, role: str) -> str:
        return f"{self._tokens[role] / max(self._messages[role], 1):.1f}"


def _list(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
