"""Comparisons: cells, the table's numbers against their definitions, retrieval, and whole runs on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bm25s
import jax
import numpy as np
import pytest
import tiny

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.comparison.cells import Asked, Cell, read_cells, write_cell
from cartridges_jax.comparison.config import CompareConfig
from cartridges_jax.comparison.likelihood import answer_nlls
from cartridges_jax.comparison.retrieval import bm25_ranking, bm25_retriever
from cartridges_jax.comparison.run import compare
from cartridges_jax.comparison.table import estimate, gap_closed, rows, write_table
from cartridges_jax.serving.self_study import ServerConfig
from cartridges_jax.training.config import TrainConfig
from cartridges_jax.training.evals.loss import answer_nll
from synth.tools.search import Search

ROOT = Path(__file__).parents[1]
SMALL = {"words": 60, "questions_a_class": 1}
UNTRAINED = ("nothing", "full document", "first tokens", "summary", "BM25")
UNUSED = TrainConfig("corpus.txt", "run", num_steps=0)  # of methods that train nothing


def cell(method: str, nlls: list[float], seed: int = 0, share: int | None = None, **changes: Any) -> Cell:
    kinds = ("fact", "fact", "paraphrase", "paraphrase")
    asked = tuple(Asked(f"q{i}", kind, nll, 2) for i, (kind, nll) in enumerate(zip(kinds, nlls, strict=True)))
    made = Cell("embedded", "tiny", "manual", method, share, seed, 10, 1000, 1.5, 20, asked)
    return dataclasses.replace(made, **changes)


def test_each_nll_is_that_of_the_answer_alone_and_their_sum_is_the_evaluation_s():
    model = tiny.model()
    cartridge = Cartridge.from_text(model, tiny.TEXT, 32)
    prompts = [model.tokenizer.encode(text) for text in ("the cat ", "box 3 of the house weighs ", "owl", "hen " * 60)]
    answers = [model.tokenizer.encode(text) for text in ("number 5", "35 grams and sleeps", "s", "grams")]
    found = answer_nlls(model, cartridge, prompts, answers)
    alone = [answer_nll(model, cartridge, [p], [a]) * len(a) for p, a in zip(prompts, answers, strict=True)]
    assert found == pytest.approx(alone, abs=1e-3)
    assert sum(found) == pytest.approx(
        answer_nll(model, cartridge, prompts, answers) * sum(map(len, answers)), abs=1e-3
    )


def test_gaps_are_by_class_over_seeds_and_relative_to_nothing_and_the_full_document():
    cells = [cell("nothing", [6.0, 8.0, 5.0, 9.0]), cell("full document", [2.0, 4.0, 3.0, 5.0])]
    cells += [cell("cartridge", [4.0, 5.0, 3.0, 5.0], 0, 10), cell("cartridge", [2.0, 5.0, 4.0, 6.0], 1, 10)]
    by_method = {row["method"]: row for row in rows(cells)}
    gaps = by_method["cartridge"]["gap_closed"]
    assert gaps["fact"][0] == pytest.approx((14 - (3 + 5)) / 8)
    assert gaps["paraphrase"][0] == pytest.approx((14 - (3.5 + 5.5)) / 6)
    assert gaps["all"][0] == pytest.approx((28 - 17) / 14)
    assert gaps["fact"][1] <= gaps["fact"][0] <= gaps["fact"][2]
    assert by_method["nothing"]["gap_closed"]["all"] == (0, 0, 0)
    assert by_method["full document"]["gap_closed"]["fact"] == (1, 1, 1)
    assert by_method["cartridge"]["seeds"] == 2 and by_method["cartridge"]["answers"]["all"] is None


def test_an_interval_is_that_of_the_mean_over_many_questions():
    """Of so many draws from a normal distribution, the mean's interval has 1.96 standard errors on both sides."""
    drawn = np.random.default_rng(1).normal(size=400)
    found = estimate([(value,) for value in drawn], lambda scores: scores[..., 0].mean(-1))
    assert found is not None
    error = drawn.std() / 20
    assert found[0] == pytest.approx(drawn.mean())
    assert found[2] - found[1] == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_no_gap_is_told_where_the_document_is_no_help():
    assert estimate([(1.0, 0.5, 2.0)], gap_closed) is None


def test_a_cell_of_another_program_is_in_the_table(tmp_path: Path):
    for one in (cell("nothing", [6.0] * 4), cell("full document", [2.0] * 4)):
        write_cell(tmp_path / "cells", one)
    other = dataclasses.asdict(cell("KVzip", [3.0] * 4, share=10))
    (tmp_path / "cells" / "anything.json").write_text(json.dumps(other), encoding="utf-8")
    page = write_table(tmp_path, read_cells(tmp_path / "cells")).read_text(encoding="utf-8")
    assert "| KVzip | 1/10 | 10 | 0.0 | 0.75 [0.75, 0.75] |" in page
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "cells" / "anything.json").write_text(json.dumps(other | {"kv_byte": 3}), encoding="utf-8")
    with pytest.raises(UserError, match=r"kv_byte: did you mean 'kv_bytes'"):
        read_cells(tmp_path / "cells")


PASSAGES = [
    "The lamp of the tower is orange and burns oil.",
    "Nora keeps the yellow books in an iron chest.",
    "The chest stands in the tower, and the key of the chest hangs from a tooth.",
    "A goat ate the key.",
]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Where does the key of the chest hang?", [2, 3]),  # "hang" is not "hangs" to either
        ("Who keeps the yellow books?", [1]),
        ("orange lamp oil", [0]),
        ("iron tower", [1, 0]),  # a rare word before a frequent one, and the short passage before the long one
    ],
)
def test_bm25s_chooses_what_our_own_search_chooses(question: str, expected: list[int], monkeypatch: pytest.MonkeyPatch):
    """Ours is that of self-study's tool. The one difference, bm25s's list of stop words, plays no part here."""
    assert bm25_ranking(PASSAGES, len(expected))(question) == expected
    monkeypatch.setattr("synth.tools.search.PASSAGE_CHARACTERS", max(map(len, PASSAGES)))
    words = " ".join(word for word in question.split() if word.lower() not in bm25s.stopwords.STOPWORDS_EN)
    assert Search("\n\n".join(PASSAGES)).rank(words)[: len(expected)] == expected


@pytest.mark.parametrize("num_tokens", [40, 128, 300])
def test_passages_of_a_question_have_as_many_tokens_as_the_budget(num_tokens: int):
    tokenizer = tiny.model().tokenizer
    found = bm25_retriever(tiny.TEXT, num_tokens, tokenizer)("What does the owl number 17 weigh?")
    assert "number 17" in found
    assert sum(len(tokenizer.encode(part)) for part in found.split("\n\n")) <= num_tokens
    assert all(part in tiny.TEXT for part in found.split("\n\n"))


def config(folder: Path, **changes: Any) -> CompareConfig:
    settings: dict[str, Any] = {"suite": "needles", "suite_options": SMALL, "model": str(tiny.folder())}
    settings |= {"methods": UNTRAINED, "shares": (4,), "seeds": (1,), "answers_a_class": 1, "timed_questions": 1}
    return CompareConfig(str(folder), **(settings | changes))


def run(settings: CompareConfig) -> Path:
    return compare(settings, UNUSED, ServerConfig(), "", [])


def test_programs_of_a_document_do_not_outlive_it(tmp_path: Path):
    """Those of three documents would be more than a process can have."""
    alive = jax.devices()[0].client.live_executables
    before = len(alive())
    run(config(tmp_path, methods=UNTRAINED[:2]))
    assert len(alive()) <= before


def test_a_run_goes_on_where_it_was_and_fills_one_table(tmp_path: Path):
    table = run(config(tmp_path, methods=UNTRAINED[:3]))
    before = {path: path.read_bytes() for path in (tmp_path / "cells").iterdir()}
    assert len(before) == 3
    first = next(path for path in before if "first" in path.name)
    first.unlink()
    run(config(tmp_path))
    after = {path: path.read_bytes() for path in (tmp_path / "cells").iterdir()}
    assert len(after) == 5 and all(after[path] == made for path, made in before.items() if path != first)
    assert json.loads(after[first])["questions"] == json.loads(before[first])["questions"]
    found = {row["method"]: row for row in json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))}
    assert set(found) == set(UNTRAINED)
    assert set(found["BM25"]["gap_closed"]) == {"all", "multi-key", "multi-value", "several places"}
    assert all(row["seconds_to_first_token"] > 0 and row["off_topic"] > 0 for row in found.values())
    assert (
        found["full document"]["kv_bytes"] > 3 * found["first tokens"]["kv_bytes"] > found["nothing"]["kv_bytes"] == 0
    )
    assert table.read_text(encoding="utf-8").count("| full document |") == 3  # gap closed, answers, costs


def test_one_table_does_not_mix_settings(tmp_path: Path):
    run(config(tmp_path, methods=("nothing",)))
    with pytest.raises(UserError, match=r"another compare\.suite_options: choose another"):
        run(config(tmp_path, methods=("nothing",), suite_options=SMALL | {"seed": 1}))
    with pytest.raises(UserError, match="no document 'x'"):
        run(config(tmp_path, documents=("x",)))
    with pytest.raises(UserError, match="as many seeds as shares"):
        config(tmp_path, shares=(4, 10))


@pytest.mark.slow
def test_the_command_is_killed_and_goes_on_to_a_trained_cartridge(tmp_path: Path):
    settings = {
        "compare.output_dir": tmp_path / "out",
        "compare.model": tiny.folder(),
        "compare.methods": "('nothing','full document','attention matching','cartridge')",
        "compare.shares": "(4,)",
        "compare.seeds": "(2,)",
        "compare.suite_options": None,
        "synth.client.model": tiny.folder(),
        "synth.num_conversations": 24,
        "synth.answer.max_tokens": 8,
        "server.max_num_seqs": 8,
    }
    options = [f"--config.{key}={value}" for key, value in settings.items() if value is not None]
    options += [f"--config.compare.suite_options.{key}={value}" for key, value in SMALL.items()]
    options += ["--config.compare.suite_options.num_documents=1", "--config.train.seq_len=256"]
    command = [sys.executable, "-m", "cartridges_jax.compare", "--config=configs/compare/needles.py", *options]
    cells = tmp_path / "out" / "cells"
    with subprocess.Popen(command, cwd=ROOT, env=os.environ, start_new_session=True) as process:
        while process.poll() is None and not list(cells.glob("*.json")):
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    kept = {path: path.read_bytes() for path in cells.glob("*.json")}
    assert 1 <= len(kept) < 5
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"table: {tmp_path / 'out' / 'table.md'}\n"
    found = {(one.method, one.seed): one for one in read_cells(cells)}
    assert len(found) == 5 and all(path.read_bytes() == made for path, made in kept.items())
    first, second = found["cartridge", 0], found["cartridge", 1]
    assert first.kv_bytes == second.kv_bytes == found["attention matching", 0].kv_bytes
    assert first.questions != second.questions
    assert first.tokens_to_make > found["attention matching", 0].tokens_to_make > first.context_tokens
