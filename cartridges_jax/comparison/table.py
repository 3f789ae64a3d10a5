"""The table of a comparison, from its cells: `table.json`, `table.md`, and `table.png` with quality against memory."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cartridges_jax.command_line import files
from cartridges_jax.comparison.cells import Asked, Cell
from cartridges_jax.comparison.config import WITHOUT_BUDGET
from cartridges_jax.training.report import markdown_table

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # percentiles
ALL = "all"  # the column of all classes together
LEAST_BETWEEN_TICKS = 1.2  # of memory, as a factor, so that numbers do not overlap
Key = tuple[str, str]  # of a question: its document and its text
Estimate = tuple[float, float, float] | None  # a value and the bounds of its interval
COSTS: tuple[tuple[str, str, str], ...] = (
    ("seconds_to_make", "to make it, s", "{:.0f}"),
    ("tokens_to_make", "tokens to make it", "{:,.0f}"),
    ("seconds_to_first_token", "first token, s", "{:.2f}"),
    ("decode_tokens_per_second", "tokens/s", "{:.1f}"),
    ("off_topic", "loss off topic", "{:.3f}"),
)
EXPLAINED = f"""\
Gap closed is (loss with nothing - loss) / (loss with nothing - loss with the full document), of the expected answers.
Answers counts those of the model's own answers that contain the expected one; of a question that the document does not
answer, those that say so. In brackets: 95 % of {RESAMPLES:,} samples of the questions, drawn with replacement.
What it takes to make a method's context is for one document, once; for cartridges it includes self-study. Loss off
topic is that of general questions, in nats per token."""


def write_table(directory: Path, cells: Sequence[Cell]) -> Path:
    """Writes the table's three files and returns the path of `table.md`."""
    found = rows(cells)
    _draw(directory / "table.png", found)
    files.write_text(directory / "table.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    path = directory / "table.md"
    files.write_text(path, markdown(cells, found))
    return path


def rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Returns a row for each method and share: gap closed and answers by class, and means over documents and seeds."""
    groups: dict[tuple[str, int | None], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.method, cell.share), []).append(cell)
    nothing, full = (_nlls(groups.get((method, None), [])) for method in ("nothing", "full document"))
    result = []
    for (method, share), members in groups.items():
        kinds = {(cell.document, asked.question): asked.kind for cell in members for asked in cell.questions}
        nlls, scores = _nlls(members), _scores(members)
        classes = [ALL, *dict.fromkeys(kinds.values())]
        common = [key for key in nlls if key in nothing and key in full]
        triples = {key: (nothing[key], nlls[key], full[key]) for key in common}
        result.append(
            {
                "method": method,
                "share": share,
                "documents": sorted({cell.document for cell in members}),
                "seeds": len({cell.seed for cell in members}),
                "num_questions": len(nlls),
                "gap_closed": {kind: estimate(_of(kind, triples, kinds), gap_closed) for kind in classes},
                "answers": {kind: estimate(_of(kind, scores, kinds), _mean) for kind in classes},
                **{name: _average(members, name) for name in ("context_tokens", "kv_bytes", *(c[0] for c in COSTS))},
            }
        )
    return sorted(result, key=lambda row: (row["share"] or 0, row["kv_bytes"] > 0, row["gap_closed"][ALL] or (0,)))


def gap_closed(triples: np.ndarray) -> np.ndarray:
    """Returns the gap closed by losses `[..., question, 3]`: with nothing, with the method, with the full document."""
    nothing, nll, full = np.moveaxis(triples, -1, 0)
    gap = (nothing - full).sum(-1)
    return np.where(gap > 0, (nothing - nll).sum(-1) / np.where(gap > 0, gap, 1), np.nan)


def _mean(scores: np.ndarray) -> np.ndarray:
    return scores[..., 0].mean(-1)


def estimate(values: Sequence[Sequence[float]], statistic: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """Returns a statistic of questions with its bootstrap interval; None where it is not defined."""
    if not values:
        return None
    array = np.asarray(values)
    value = float(statistic(array))
    chosen = np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))
    samples = statistic(array[chosen])
    if not np.isfinite(value):
        return None
    low, high = np.nanpercentile(samples, INTERVAL)
    return value, float(low), float(high)


def _nlls(cells: Sequence[Cell]) -> dict[Key, float]:
    return _by_question(cells, lambda asked: asked.nll)


def _scores(cells: Sequence[Cell]) -> dict[Key, tuple[float]]:
    return {key: (score,) for key, score in _by_question(cells, lambda asked: asked.score).items()}


def _by_question(cells: Sequence[Cell], read: Callable[[Asked], float | None]) -> dict[Key, float]:
    """Returns a number of each question, its mean over seeds, without the questions that have none."""
    found: dict[Key, list[float]] = {}
    for cell in cells:
        for asked in cell.questions:
            if (value := read(asked)) is not None:
                found.setdefault((cell.document, asked.question), []).append(value)
    return {key: statistics.mean(values) for key, values in found.items()}


def _of(kind: str, values: Mapping[Key, Sequence[float]], kinds: Mapping[Key, str]) -> list[Sequence[float]]:
    return [value for key, value in values.items() if kind in (ALL, kinds[key])]


def _average(cells: Sequence[Cell], name: str) -> float | None:
    values = [value for cell in cells if (value := getattr(cell, name)) is not None]
    return statistics.mean(values) if values else None


def markdown(cells: Sequence[Cell], found: Sequence[Mapping[str, Any]]) -> str:
    """Returns the page with the tables."""
    classes = list(dict.fromkeys(kind for row in found for kind in row["gap_closed"]))
    documents = sorted({cell.document for cell in cells})
    most = max(row["num_questions"] for row in found)
    parts = [
        f"# Methods on the suite {cells[0].suite}, with {cells[0].model}",
        f"{most} questions about {len(documents)} documents: {', '.join(documents)}.",
        EXPLAINED.replace("\n", " "),
        "## Gap closed",
        _table(classes, found, lambda row, kind: _shown(row["gap_closed"].get(kind), "{:.2f}")),
        "![Gap closed against the memory of keys and values](table.png)",
        "## Answers",
        _table(classes, found, lambda row, kind: _shown(row["answers"].get(kind), "{:.0%}")),
        "## Costs",
        _table([title for _, title, _ in COSTS], found, _cost),
    ]
    return "\n\n".join(parts) + "\n"


def _table(
    columns: Sequence[str], found: Sequence[Mapping[str, Any]], cell: Callable[[Mapping[str, Any], str], str]
) -> str:
    lines = [["method", "share", "slots or tokens", "MB", *columns], ["---"] * (len(columns) + 4)]
    for row in found:
        share = "" if row["share"] is None else f"1/{row['share']}"
        name = row["method"] if row["seeds"] == 1 else f"{row['method']}, {row['seeds']} seeds"
        own = [name, share, f"{row['context_tokens']:.0f}", f"{row['kv_bytes'] / 1e6:.1f}"]
        lines.append([*own, *(cell(row, column) for column in columns)])
    return markdown_table(lines)


def _cost(row: Mapping[str, Any], title: str) -> str:
    [(name, style)] = [(name, style) for name, head, style in COSTS if head == title]
    return "-" if row[name] is None else style.format(row[name])


def _shown(value: Estimate, style: str) -> str:
    if value is None:
        return "-"
    middle, low, high = (style.format(number) for number in value)
    return f"{middle} [{low}, {high}]"


def _draw(path: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """Draws gap closed against memory, a panel for each class and a line for each method."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    classes = list(dict.fromkeys(kind for row in found for kind in row["gap_closed"]))
    columns = min(3, len(classes))
    methods = [method for method in dict.fromkeys(row["method"] for row in found) if method not in WITHOUT_BUDGET]
    colors = dict.fromkeys(WITHOUT_BUDGET, "black") | {method: f"C{i % 10}" for i, method in enumerate(methods)}
    memory: list[float] = []
    for megabytes in sorted(row["kv_bytes"] / 1e6 for row in found if row["kv_bytes"] > 0):
        if not memory or megabytes > LEAST_BETWEEN_TICKS * memory[-1]:
            memory.append(megabytes)
    figure, grid = plt.subplots(
        -(-len(classes) // columns), columns, figsize=(4.2 * columns, 3.6 * -(-len(classes) // columns)), squeeze=False
    )
    for axis, kind in zip(grid.flat, classes, strict=False):
        for method, points in _lines(found, kind):
            megabytes, gaps, below, above = zip(*points, strict=True)
            style = {
                "color": colors[method],
                "marker": "o",
                "markersize": 4,
                "capsize": 2,
                "linewidth": 1.2,
            }
            axis.errorbar(megabytes, gaps, (below, above), label=method, **style)
        axis.axhline(1, color="#b8c4d2", linewidth=0.8, zorder=0)
        axis.axhline(0, color="#b8c4d2", linewidth=0.8, zorder=0)
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(memory, [f"{megabytes:.1f}" for megabytes in memory], fontsize=8)
        axis.set_title(kind, fontsize=10)
        axis.set_xlabel("keys and values, MB")
        axis.set_ylabel("gap closed")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(grid.flat)[len(classes) :]:
        axis.remove()
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower right", fontsize=9, frameon=False)
    figure.tight_layout()
    with files.atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    plt.close(figure)


def _lines(
    found: Sequence[Mapping[str, Any]], kind: str
) -> Iterator[tuple[str, list[tuple[float, float, float, float]]]]:
    """Yields each method with its points: memory in MB, gap closed, and how far its interval reaches down and up."""
    for method in dict.fromkeys(row["method"] for row in found if row["kv_bytes"] > 0):
        points = []
        for row in found:
            if row["method"] == method and (value := row["gap_closed"].get(kind)) is not None:
                gap, low, high = value
                points.append((row["kv_bytes"] / 1e6, gap, max(gap - low, 0), max(high - gap, 0)))
        if points:
            yield method, sorted(points)
