"""Reports of training and of evaluation: `report.md` with tables and plots for people, `report.json` for programs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cartridges_jax.command_line import files
from cartridges_jax.training.metrics import METRICS, SAMPLES, evaluation_behind, history
from cartridges_jax.training.trackers import answers_table

BLUE = "#1f5fa8"
DRAWN = ("/loss", "/score")  # how the keys of evaluations that are drawn end
SHOWN_ANSWERS = 20
COLUMNS = (
    ("condition", "condition", "{}"),
    ("context_tokens", "slots or tokens", "{}"),
    ("kv_bytes", "KV cache MB", "{:.1f}"),
    ("nll", "NLL per answer token", "{:.3f}"),
    ("gap_closed", "gap closed", "{:.2f}"),
    ("accuracy", "answer contained", "{:.0%}"),
    ("f1", "word F1", "{:.2f}"),
    ("seconds_to_first_token", "first token, s", "{:.2f}"),
    ("decode_tokens_per_second", "decode, tokens/s", "{:.1f}"),
)


def table(report: Mapping[str, Any]) -> str:
    """Returns the report's rows, one for each condition, as a Markdown table."""
    lines = [[title for _, title, _ in COLUMNS], ["---"] * len(COLUMNS)]
    lines += [[_cell(row, key, style) for key, _, style in COLUMNS] for row in report["rows"]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return markdown_table([[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines])


def class_table(report: Mapping[str, Any]) -> str:
    """Returns gap closed and contained answers by class of question as a Markdown table; "" if there are no classes."""
    classes = list(report["rows"][0].get("classes", ()))  # which reports of earlier versions do not have
    if not classes:
        return ""
    lines = [["gap closed, answer contained", *classes], ["---"] * (len(classes) + 1)]
    for row in report["rows"]:
        of_class = [row["classes"][kind] for kind in classes]
        cells = [f"{_cell(one, 'gap_closed', '{:.2f}')}, {one['accuracy']:.0%}" for one in of_class]
        lines.append([row["condition"], *cells])
    return markdown_table(lines)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table of its lines' cells, the titles and the rule beneath them included."""
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def samples(report: Mapping[str, Any], count: int) -> str:
    """Returns `count` questions, spread evenly over all of them, with the answer of every condition."""
    total = report["num_questions"]
    blocks = []
    for i in (i * total // count for i in range(min(count, total))):
        first = report["rows"][0]["answers"][i]
        lines = [f"Q: {first['question']}", f"   reference: {first['reference']}"]
        for row in report["rows"]:
            lines.append(f"   {row['condition']}: {' '.join(row['answers'][i]['answer'].split())}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def write_report(directory: Path, report: Mapping[str, Any], metrics: Path) -> None:
    """Writes `report.png` (with the training, if its log `metrics` exists), `report.md` and, last, `report.json`."""
    lines = history(metrics)
    trained = any("loss" in line for line in lines)
    with _figure(directory / "report.png", 3 if trained else 1, 2 if trained else 1) as axes:
        _draw_conditions(axes[0], report)
        if trained:
            _draw_training(axes[1:], lines)
    provenance = report["provenance"]
    gap = report["gap_closed"]
    text = [
        f"# Cartridge for {report['model']}: {report['described']}",
        f"{provenance['recipe']}; {provenance['training_tokens']:,} training tokens, "
        f"{provenance['training_flops']:.2g} training FLOPs. {report['num_questions']} questions.",
        table(report),
        *filter(None, [class_table(report)]),
        "Gap closed = (NLL nothing - NLL) / (NLL nothing - NLL full document)"
        + ("." if gap is None else f"; of the cartridge **{gap:.2f}**."),
        f"Off the topic, on general questions: {report['off_topic']['alone']:.3f} nats per answer token alone, "
        f"{report['off_topic']['cartridge']:.3f} with the cartridge.",
        "![NLL of each condition, and how training went](report.png)",
        "## Answers",
        "```\n" + samples(report, report["config"]["num_samples"]) + "\n```",
    ]
    files.write_text(directory / "report.md", "\n\n".join(text) + "\n")
    # last: its presence says that the evaluation is whole
    files.write_text(directory / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def _cell(row: Mapping[str, Any], key: str, style: str) -> str:
    value = row[key]
    if value is None:
        return "-"
    return style.format(value / 1e6 if key == "kv_bytes" else value)


def write_training_report(directory: Path, kept: int) -> None:
    """Writes `report.png` and `report.md` of a run that has made a step and keeps the cartridge of step `kept`."""
    lines = history(directory / METRICS)
    steps = [line for line in lines if "loss" in line]
    if not steps:
        return
    with _figure(directory / "report.png", 2, 2) as axes:
        _draw_training(axes, lines)
    last, before, after = steps[-1], evaluation_behind(0, lines), evaluation_behind(kept, lines)
    text = [
        "# Training",
        f"{last['step'] + 1:,} steps, {last['tokens']:,} tokens, {last['seconds']:.0f} s: loss {steps[0]['loss']:.3f} "
        f"to {last['loss']:.3f}.",
        "![Loss, learning rate, throughput and evaluations](report.png)",
    ]
    if before and after:
        rows = [f"| {key} | {before[key]:.4g} | {after[key]:.4g} |" for key in after if key != "step"]
        title = f"| evaluation | before | behind {kept} steps, kept |"
        text.append("\n".join([title, "| --- | --- | --- |", *rows]))
    answers = [answer for answer in history(directory / SAMPLES) if answer["step"] == kept - 1][:SHOWN_ANSWERS]
    if answers:
        text += ["## Answers", answers_table(answers)]
    files.write_text(directory / "report.md", "\n\n".join(text) + "\n")


@contextlib.contextmanager
def _figure(path: Path, rows: int, columns: int) -> Iterator[list[Any]]:
    """Yields axes to draw on, and writes the figure afterwards, without the axes that nothing was drawn on."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(rows, columns, figsize=(5 * columns, 3.5 * rows), squeeze=False)
    axes = list(grid.flat)
    yield axes
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        if not one.has_data():
            one.remove()
    figure.tight_layout()
    with files.atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def _draw_conditions(axis: Any, report: Mapping[str, Any]) -> None:
    names = [row["condition"] for row in report["rows"]]
    colors = [BLUE if name == "cartridge" else "#b8c4d2" for name in names]
    drawn = axis.barh(names, [row["nll"] for row in report["rows"]], color=colors)
    axis.bar_label(drawn, fmt="%.2f", padding=3)
    axis.margins(x=0.15)
    axis.invert_yaxis()
    axis.set_xlabel("NLL per answer token, nats (less is better)")


def _draw_training(axes: Sequence[Any], lines: Sequence[Mapping[str, Any]]) -> None:
    """Draws loss, learning rate and throughput on three axes, and what was evaluated on a fourth."""
    steps = [line for line in lines if "loss" in line]
    drawn = ("loss", "loss, nats per target"), ("lr", "learning rate"), ("tokens_per_second", "tokens/s")
    for axis, (key, label) in zip(axes, drawn, strict=False):
        axis.plot([line["step"] + 1 for line in steps], [line[key] for line in steps], color=BLUE, linewidth=1)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
    axes[0].set_title(f"{steps[-1]['tokens']:,} tokens", fontsize=10)
    evaluated = [line for line in lines if "loss" not in line]
    keys = sorted({key for line in evaluated for key in line if key.count("/") == 1 and key.endswith(DRAWN)})
    for key in keys:
        points = [(line["step"] + 1, line[key]) for line in evaluated if key in line]
        axes[3].plot(*zip(*points, strict=True), marker=".", label=key)
    if keys:
        axes[3].set_xlabel("step")
        axes[3].legend(fontsize=7, frameon=False)
