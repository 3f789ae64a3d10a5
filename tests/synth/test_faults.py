"""A fleet that fails in every way, and a run that is killed again and again: nothing lost, nothing twice."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from stub_server import MODEL, StubServer

from synth import conversation
from synth.config import ChunkerConfig, ClientConfig, FilterConfig, ResourceConfig, SynthConfig

FAULTS = ("drop", "hang", 429, 500, 503, (429, {"Retry-After": "0.05"}), "broken", "empty", "short", "wrong tokens")
PROGRAM = """
import asyncio, sys
from cartridges_jax.command_line import config
from synth import endpoint, fleet, pipeline
from synth.config import SynthConfig
fleet.FIRST_BACKOFF_SECONDS, endpoint.LONGEST_SHUT_SECONDS, pipeline.SECONDS_TO_DISK = 0.05, 0.2, 0.2
{prelude}
asyncio.run(pipeline.synthesize(config.build(SynthConfig, {settings})))
"""
# Audit hooks see every socket, whoever opens it, and cannot be taken off again.
DENY = """
allowed, seen = {allowed}, set()

def deny(event, args):
    if event == "socket.connect" or event == "socket.sendto":
        seen.add(tuple(args[1][:2]))
        assert tuple(args[1][:2]) in allowed, f"{{event}} to {{args[1]}}"
    elif event == "socket.getaddrinfo":
        assert args[0] in {{host for host, _ in allowed}}, f"{{args[0]}} is looked up"
    elif event == "socket.bind":
        raise AssertionError(f"a socket is bound to {{args[1]}}")

sys.addaudithook(deny)
"""


def settings(folder: Path, name: str, servers: list[StubServer], **changes: Any) -> SynthConfig:
    document = folder / "document.txt"
    document.write_text("".join(f"Item {i} weighs {i * 7} grams. It is kept in box {i % 9}.\n" for i in range(300)))
    urls = tuple(server.url for server in servers)
    defaults: dict[str, Any] = {
        "num_conversations": 240,
        "chunker": ChunkerConfig(100, 300),
        "client": ClientConfig(urls, MODEL, timeout_seconds=0.5, max_retries=50),
        "top_logprobs": 5,
        "max_chunks_in_flight": 12,
    }
    return SynthConfig(output_dir=str(folder / name), resource=ResourceConfig(str(document)), **defaults | changes)


def start(config: SynthConfig, prelude: str = "") -> subprocess.Popen[str]:
    program = PROGRAM.format(prelude=prelude, settings=repr(dataclasses.asdict(config)))
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, error = process.communicate()
    assert process.returncode == 0, error
    return output


def on_disk(config: SynthConfig) -> int:
    there: set[int] = set()
    for path in Path(config.output_dir).glob("parts/part-*.parquet"):
        with contextlib.suppress(FileNotFoundError):  # parts are joined meanwhile
            there |= set(json.loads(conversation.read_notes(path)[1]["indices"]))
    return len(there)


def break_at_random(servers: list[StubServer], share: float) -> Counter[str]:
    counts: Counter[str] = Counter()
    rng = random.Random(0)

    def fault() -> Any:
        if rng.random() >= share:
            return None
        fault = rng.choice(FAULTS)
        counts[str(fault)] += 1
        return fault

    for server in servers:
        server.next_fault = fault
    return counts


def digest(made: list[conversation.Conversation]) -> str:
    """Of the set of conversations, whatever their order; every field of each."""
    ones = []
    for one in made:
        fields = [one.system_prompt, one.metadata, one.type]
        for message in one.messages:
            top = message.top_logprobs
            arrays = top and [top.token_idx.tolist(), top.token_id.tolist(), top.logprobs.tolist(), top.shape]
            fields.append([message.content, message.role, message.token_ids, arrays])
        ones.append(hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest())
    return hashlib.sha256("".join(sorted(ones)).encode()).hexdigest()


def kill_three_times(config: SynthConfig) -> list[int]:
    """How many conversations were there after each kill: more and more, and never all."""
    there = []
    rng = random.Random(0)
    for i in range(1, 4):
        goal = max(i * config.num_conversations // 5, max(there, default=0) + 1)
        process = start(config)
        while on_disk(config) < goal and process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        there.append(on_disk(config))
    assert 0 < there[0] < there[1] < there[2] < config.num_conversations
    return there


def check_faults_and_kills(folder: Path, servers: list[StubServer], count: int, share: float) -> str:
    clean = settings(folder, "clean", servers, num_conversations=count)
    finish(start(clean))
    counts = break_at_random(servers, share)
    config = dataclasses.replace(clean, output_dir=str(folder / "broken"))
    began = time.monotonic()
    there = kill_three_times(config)
    assert "going on from there" in finish(start(config))
    seconds = time.monotonic() - began
    datasets = [Path(c.output_dir) / "dataset.parquet" for c in (clean, config)]
    expected, made = map(conversation.read, datasets)
    assert [one.metadata["conversation_index"] for one in made] == list(range(count))
    for one in made:
        question, answer = one.messages
        assert (question.role, answer.role) == ("user", "assistant")
        for message in one.messages:
            assert message.token_ids and message.content == " ".join(f"w{i - 256}" for i in message.token_ids)
        assert answer.top_logprobs and answer.top_logprobs.shape == (len(answer.token_ids or ()), 5)
    assert digest(made) == digest(expected)
    assert made == expected, "in the same order too"
    assert len(counts) == len({str(fault) for fault in FAULTS})
    requests = sum(len(server.requests) for server in servers)
    return (
        f"{count} conversations in {seconds:.0f} s, on disk after each kill: {there}; {sum(counts.values())} faults in "
        f"{requests} requests, clean run's included: {dict(counts)}; digest {digest(made)[:16]}"
    )


def test_faults_and_kills(tmp_path: Path, servers: list[StubServer]):
    check_faults_and_kills(tmp_path, servers, 240, 0.25)


@pytest.mark.slow
def test_five_thousand_conversations_with_faults_and_kills(tmp_path: Path, servers: list[StubServer]):
    print(check_faults_and_kills(tmp_path, servers, 5000, 0.2))


def test_no_host_but_those_configured_is_contacted(tmp_path: Path, servers: list[StubServer]):
    config = settings(
        tmp_path,
        "out",
        servers[:2],
        question_client=ClientConfig(servers[2].url, MODEL),
        filters=FilterConfig(near_duplicate=True),
    )
    allowed = {("127.0.0.1", int(server.root.rpartition(":")[2])) for server in servers}
    report = f"import atexit; atexit.register(lambda: print(sorted(seen)))\n{DENY.format(allowed=allowed)}"
    assert finish(start(config, report)).splitlines()[-1] == str(sorted(allowed))
    one_less = set(sorted(allowed)[:-1])
    process = start(dataclasses.replace(config, output_dir=str(tmp_path / "denied")), DENY.format(allowed=one_less))
    assert "socket.connect to" in process.communicate()[1], "the hook does deny"
    assert process.returncode


def test_filters_keep_the_same_whatever_ends_first(tmp_path: Path, servers: list[StubServer]):
    few_words = [f"w{i} " * 9 for i in range(25)]
    for server in servers:
        answer = server._answer

        def repeat(body: dict[str, Any], answer: Any = answer) -> dict[str, Any]:
            reply = answer(body)
            if not body.get("logprobs"):
                reply["choices"][0]["message"]["content"] = few_words[body["seed"] % 25]
            return reply

        server._answer = repeat  # type: ignore[method-assign]
    filters = FilterConfig(near_duplicate=True)
    calm = settings(tmp_path, "calm", servers[:1], max_chunks_in_flight=1, filters=filters)
    finish(start(calm))
    break_at_random(servers, 0.2)
    wild = settings(tmp_path, "wild", servers, filters=filters)
    finish(start(wild))
    made = [conversation.read(Path(c.output_dir) / "dataset.parquet") for c in (calm, wild)]
    assert made[0] == made[1] and len(made[0]) == 25


def test_a_run_that_loses_its_network_goes_on_later(tmp_path: Path, servers: list[StubServer]):
    client = ClientConfig(tuple(server.url for server in servers), MODEL, timeout_seconds=10.0, max_retries=1)
    config = settings(tmp_path, "out", servers, client=client)
    gone_after = iter([None] * 200)
    for server in servers:
        server.next_fault = lambda: next(gone_after, "drop")
    _, error = (process := start(config)).communicate()
    assert process.returncode and "conversations are missing" in error and "the same command makes only those" in error
    assert 0 < on_disk(config) < 240
    for server in servers:
        server.next_fault = lambda: None
    before = sum(len(server.requests) for server in servers)
    had = on_disk(config)
    patient = dataclasses.replace(client, timeout_seconds=60.0)
    finish(start(dataclasses.replace(config, client=patient)))
    chat = sum(len(server.requests) for server in servers) - before
    assert chat == 2 * (240 - had)
    assert len(conversation.read(Path(config.output_dir) / "dataset.parquet")) == 240
