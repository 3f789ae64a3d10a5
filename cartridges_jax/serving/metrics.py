"""What a server counts and measures, for Prometheus: under vLLM's names where they mean the same, else under our own.

vLLM's names: https://docs.vllm.ai/en/stable/usage/metrics. A dashboard or an autoscaler made for them works here too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import prometheus_client as prometheus

if TYPE_CHECKING:
    from cartridges_jax.serving.answers import Answer

TYPE = prometheus.CONTENT_TYPE_PLAIN_0_0_4
SECONDS = tuple(step * 10.0**power for power in range(-3, 3) for step in (1, 2, 5))  # bounds of buckets: 1 ms to 500 s


class Metrics:
    """The counters, histograms and gauges of one server of `model`. Only the event loop's thread calls it."""

    def __init__(self, model: str):
        self._model, self._registry = model, prometheus.CollectorRegistry()
        self._requests = prometheus.Counter(
            "cartridges_jax_requests",
            "HTTP requests that ended, by route and status",
            ["route", "status"],
            registry=self._registry,
        )
        self._cartridge_tokens = self._counter(
            "cartridges_jax_cartridge_tokens", "cartridge slots that stood before prompts"
        )
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "tokens of prompts")
        self._answer_tokens = self._counter("vllm:generation_tokens", "tokens of answers")
        self._queries = self._counter("vllm:prefix_cache_queries", "tokens of prompts that were looked for in memory")
        self._hits = self._counter(
            "vllm:prefix_cache_hits", "tokens of prompts whose keys and values an earlier request had left"
        )
        self._endings = prometheus.Counter(
            "vllm:request_success",
            "answers that ended, by reason; abort: its client was gone; error: time was up, or the numbers not finite",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self.first_token = self._histogram("vllm:time_to_first_token_seconds", "from a request to its first token")
        self.next_token = self._histogram("vllm:inter_token_latency_seconds", "from a token of an answer to its next")
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "from a request to the end of an answer")

    def add_gauge(self, name: str, help: str, value: Callable[[], float]) -> None:
        """Has `value` called whenever Prometheus asks."""
        gauge = prometheus.Gauge(name, help, ["model_name"], registry=self._registry)
        gauge.labels(self._model).set_function(value)

    def request(self, route: str, status: int) -> None:
        """Counts an HTTP request that has ended."""
        self._requests.labels(route, str(status)).inc()

    def answer(self, answer: Answer, start: float) -> None:
        """Counts an answer that has ended, or that nobody waits for any more; `start` is when it was asked for."""
        self._prompt_tokens.inc(answer.prompt_tokens)
        self._queries.inc(answer.prompt_tokens)
        self._hits.inc(answer.cached_tokens)
        self._cartridge_tokens.inc(answer.cartridge_tokens)
        self._answer_tokens.inc(answer.num_tokens)
        for choice in answer.choices:
            if choice.ended is None:
                self._ended("error" if answer.failed else "abort")
            else:
                self._ended(str(choice.finish_reason))
                self._whole.observe(choice.ended - start)

    def aborted(self, num_choices: int) -> None:
        """Counts the answers of a request whose client was gone before it was accepted."""
        self._ended("abort", num_choices)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return prometheus.generate_latest(self._registry)

    def _ended(self, reason: str, count: int = 1) -> None:
        self._endings.labels(self._model, reason).inc(count)

    def _counter(self, name: str, help: str) -> prometheus.Counter:
        return prometheus.Counter(name, help, ["model_name"], registry=self._registry).labels(self._model)

    def _histogram(self, name: str, help: str) -> prometheus.Histogram:
        made = prometheus.Histogram(name, help, ["model_name"], registry=self._registry, buckets=SECONDS)
        return made.labels(self._model)


class TokenTimer:
    """Observes when the tokens of one request come, which was asked for at `start`, on `time.monotonic`'s clock."""

    def __init__(self, metrics: Metrics, start: float):
        self.start = start
        self._metrics = metrics
        self._last: dict[int, float] = {}

    def token(self, index: int) -> None:
        """The next token of the answer with this index is here."""
        now = time.monotonic()
        before = self._last.get(index)
        if before is None:
            self._metrics.first_token.observe(now - self.start)
        else:
            self._metrics.next_token.observe(now - before)
        self._last[index] = now
