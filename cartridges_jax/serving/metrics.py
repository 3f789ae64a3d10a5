"""Counters of a server in Prometheus' text format; https://prometheus.io/docs/instrumenting/exposition_formats."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from cartridges_jax.serving.answers import Answer

HELP = {
    "requests_total": ("counter", "HTTP requests that ended, by route and status"),
    "prompt_tokens_total": ("counter", "tokens of prompts"),
    "cached_tokens_total": ("counter", "tokens of prompts whose keys and values an earlier request had left"),
    "cartridge_tokens_total": ("counter", "cartridge slots that stood before prompts"),
    "completion_tokens_total": ("counter", "tokens of answers"),
    "first_token_seconds_sum": ("counter", "seconds from requests to their first tokens"),
    "first_token_seconds_count": ("counter", "answers that began"),
    "answers_live": ("gauge", "answers that are being written or wait for their turn"),
    "max_num_seqs": ("gauge", "answers that can be written at the same time"),
    "slots": ("gauge", "max_num_seqs by its earlier name"),
    "cartridges_loaded": ("gauge", "cartridges and compositions in memory"),
}


class Metrics:
    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._counts: defaultdict[str, float] = defaultdict(float)

    def request(self, route: str, status: int) -> None:
        self._requests[route, status] += 1

    def answer(self, answer: Answer, start: float) -> None:
        """Counts an answer that has ended, or that nobody waits for any more; `start` is when it was asked for."""
        counts = self._counts
        counts["prompt_tokens_total"] += answer.prompt_tokens
        counts["cached_tokens_total"] += answer.cached_tokens
        counts["cartridge_tokens_total"] += answer.cartridge_tokens
        counts["completion_tokens_total"] += answer.num_tokens
        if answer.began is not None:
            counts["first_token_seconds_sum"] += answer.began - start
            counts["first_token_seconds_count"] += 1

    def text(self, gauges: Mapping[str, int]) -> str:
        requests = {
            f'{{route="{route}",status="{status}"}}': count for (route, status), count in sorted(self._requests.items())
        }
        lines = []
        for name, (kind, help) in HELP.items():
            values = requests if name == "requests_total" else {"": gauges.get(name, self._counts[name])}
            if values:
                lines += [f"# HELP cartridges_jax_{name} {help}", f"# TYPE cartridges_jax_{name} {kind}"]
            lines += [f"cartridges_jax_{name}{labels} {value}" for labels, value in values.items()]
        return "\n".join(lines) + "\n"
