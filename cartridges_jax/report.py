"""The evaluation for people: `report.md` with its table and plot, and `report.json` for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from command_line import files

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
    """The report's rows as a Markdown table."""
    lines = [[title for _, title, _ in COLUMNS], ["---"] * len(COLUMNS)]
    lines += [[_cell(row, key, style) for key, _, style in COLUMNS] for row in report["rows"]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def samples(report: Mapping[str, Any], count: int) -> str:
    """The first questions with the answer of every condition; questions are spread evenly over the set."""
    total = report["num_questions"]
    picked = [i * total // count for i in range(min(count, total))]
    blocks = []
    for i in picked:
        first = report["rows"][0]["answers"][i]
        lines = [f"Q: {first['question']}", f"   reference: {first['reference']}"]
        for row in report["rows"]:
            lines.append(f"   {row['condition']}: {' '.join(row['answers'][i]['answer'].split())}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def write_report(directory: Path, report: Mapping[str, Any], metrics: Path) -> None:
    """Writes `report.png`, `report.md` and, last, `report.json`; the training loss is drawn if `metrics` exists."""
    _plot(directory / "report.png", report, metrics)
    provenance = report["provenance"]
    gap = report["gap_closed"]
    text = [
        f"# Cartridge of {report['num_slots']} slots for {report['model']}",
        f"{provenance['recipe']}; {provenance['training_tokens']:,} training tokens, "
        f"{provenance['training_flops']:.2g} training FLOPs. {report['num_questions']} questions.",
        table(report),
        "Gap closed = (NLL nothing - NLL) / (NLL nothing - NLL full document)"
        + ("." if gap is None else f"; of the cartridge **{gap:.2f}**."),
        "![NLL of each condition, and the loss of training](report.png)",
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


def _plot(path: Path, report: Mapping[str, Any], metrics: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    history = []
    if metrics.is_file():
        history = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(1, 2 if history else 1, figsize=(10 if history else 5, 3.5), squeeze=False)
    bars, names = axes[0][0], [row["condition"] for row in report["rows"]]
    colors = ["#1f5fa8" if name == "cartridge" else "#b8c4d2" for name in names]
    drawn = bars.barh(names, [row["nll"] for row in report["rows"]], color=colors)
    bars.bar_label(drawn, fmt="%.2f", padding=3)
    bars.margins(x=0.15)
    bars.invert_yaxis()
    bars.set_xlabel("NLL per answer token, nats (less is better)")
    if history:
        loss = axes[0][1]
        loss.plot([h["step"] + 1 for h in history], [h["loss"] for h in history], color="#1f5fa8", linewidth=1)
        loss.set_xlabel("step")
        loss.set_ylabel("distillation loss, nats per target")
        loss.set_title(f"{history[-1]['tokens']:,} tokens", fontsize=10)
    for row in axes[0]:
        row.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with files.atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)
