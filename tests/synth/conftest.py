from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stub_server import MODEL, StubServer

from synth import endpoint, fleet
from synth.config import ChunkerConfig, ClientConfig, ResourceConfig, SynthConfig

TEXT = "".join(
    f"Line {i} tells that item {i} weighs {i * 7} grams — no more. It is kept in box {i % 9}.\n" for i in range(60)
)


@pytest.fixture
def server() -> Iterator[StubServer]:
    stub = StubServer().start()
    yield stub
    stub.stop()


@pytest.fixture
def servers() -> Iterator[list[StubServer]]:
    stubs = [StubServer().start() for _ in range(3)]
    yield stubs
    for stub in stubs:
        stub.stop()


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "FIRST_BACKOFF_SECONDS", 0.02)
    monkeypatch.setattr(endpoint, "FIRST_OPEN_SECONDS", 0.05)
    monkeypatch.setattr(endpoint, "LONGEST_OPEN_SECONDS", 0.2)


@pytest.fixture
def make_config(server: StubServer, tmp_path: Path) -> Callable[..., SynthConfig]:
    document = tmp_path / "document.txt"
    document.write_text(TEXT, encoding="utf-8")

    def make(**changes: Any) -> SynthConfig:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "num_conversations": 10,
            "resource": ResourceConfig(str(document)),
            "client": ClientConfig(server.url, MODEL, timeout_seconds=20.0, max_retries=3),
            "chunker": ChunkerConfig(min_tokens=100, max_tokens=300),
            "conversations_per_chunk": 4,
            "top_logprobs": 5,
        }
        return SynthConfig(**settings | changes)

    return make
