"""What `benchmarks/ablations.py` makes of its results: one clock for all of them, and each seed against its own."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ABLATIONS = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "ablations.py"))


def result(seed: int, kind: str, init: float, step: float, *gaps: float) -> dict[str, Any]:
    curve = [(5 * i, gap) for i, gap in enumerate(gaps)]
    start = "document", kind, 100
    return dict(seed=seed, curve=curve, init_seconds=init, step_seconds=step, start=start, step=(None, 100))


def test_time_is_that_of_the_fastest_start_and_step_of_a_kind():
    results = [result(0, "text", 2.0, 3.0, 0.1, 0.2), result(1, "text", 1.0, 4.0, 0.1, 0.2)]
    results += [result(0, "attention_matching", 9.0, 2.0, 0.8, 0.9)]
    ABLATIONS["_put_on_one_clock"](results)
    assert [one["seconds"] for one in results] == [[1.0, 11.0], [1.0, 11.0], [9.0, 19.0]]


def test_upstreams_recipe_is_compared_within_a_seed():
    ours = [result(1, "attention_matching", 10.0, 2.0, 0.5, 0.9)]
    theirs = [result(0, "text", 1.0, 2.0, 0.0, 0.1, 0.2), result(1, "text", 1.0, 2.0, 0.0, 0.4, 0.8)]
    ABLATIONS["_put_on_one_clock"]([*ours, *theirs])
    (found,) = ABLATIONS["_against_upstream"]({"attention_matching": ours, ABLATIONS["RECIPE"]: theirs})
    assert found.startswith("upstream's recipe ends at 0.800 after 21 s; attention matching reaches that after 20 s")


def test_a_composition_is_the_mean_of_its_seeds():
    trial, document = ABLATIONS["Trial"], ABLATIONS["Document"]
    pair = [trial("composition", name, document(name, *map(Path, "tdq")), 4) for name in ("a", "b")]
    composed = [{"a": [0.8, 0.0, 0.6, 0.5], "b": [0.1, 0.9, 0.5, 0.6]}, {"a": [1.0, 0.0, 0.6, 0.5], "b": [0.1] * 4}]
    lines = ABLATIONS["_composition"](pair, composed).splitlines()
    assert lines[0] == "| gap of the questions about | a | b | a + b | b + a | seeds |"
    assert lines[2].startswith("| a | 0.900 ± 0.141 | 0.000 ± 0.000 |") and lines[3].endswith(" | 2 |")
    assert pytest.approx(0.5) == float(lines[3].split(" | ")[2].split(" ± ")[0])


def test_two_documents_of_one_file_name_are_told_apart():
    """Every run's text is corpus.txt."""
    document, trial = ABLATIONS["Document"], ABLATIONS["Trial"]
    texts = [document(name, Path(name, "corpus.txt"), Path("d"), Path("q")) for name in ("owls", "hens")]
    assert len({trial("sizes", "x", text, 4).run_name(0) for text in texts}) == 2
