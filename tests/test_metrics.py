"""What a run wrote of itself comes back whole, whatever characters an answer holds and wherever a crash cut it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cartridges_jax.training.evals.questions import questions_of
from cartridges_jax.training.metrics import MetricsLog, history

BREAKS = "\u2028\u2029\x85\x0b\x0c\x1c"


def test_a_resumed_run_keeps_every_record_before_its_first_step(tmp_path: Path):
    path = tmp_path / "samples.jsonl"
    log = MetricsLog(path, 0)
    for step in range(4):
        log.write(step, {"answer": f"one{BREAKS}two é \ufffd {step}"})
    log.close()
    before = history(path)
    assert [line["answer"] for line in before] == [f"one{BREAKS}two é \ufffd {step}" for step in range(4)]
    MetricsLog(path, 3).close()
    assert history(path) == before[:3]


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_crash_inside_of_a_character_costs_its_line_only(tmp_path: Path, cut: int):
    path = tmp_path / "samples.jsonl"
    log = MetricsLog(path, 0)
    for step in range(2):
        log.write(step, {"answer": "中文"})
    log.close()
    path.write_bytes(path.read_bytes()[:-cut])
    MetricsLog(path, 9).close()
    assert [line["step"] for line in history(path)] == ([0, 1] if cut == 1 else [0])


def test_questions_with_every_character(tmp_path: Path):
    path = tmp_path / "q.jsonl"
    entry = {"question": f"Who{BREAKS}wrote it?", "answer": f"Ada{BREAKS}L"}
    lines = [json.dumps(entry, ensure_ascii=False), r'{"question": "a\ud800", "answer": "\ud83d\ude00"}']
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    first, second = questions_of(path)
    assert (first.question, first.answer) == (entry["question"], entry["answer"])
    assert (second.question, second.answer) == ("a\ufffd", "😀")
