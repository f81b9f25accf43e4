"""What the demo measured: ``python -m run.demo_table FOLDER`` prints the table and writes FOLDER/report.html."""

import html
import json
import math
import sys
from pathlib import Path
from typing import Any

from engine.report import curves_section, page, pictures_section, table
from formats.files import write_json, write_text

STAGES = {
    "digits": "write the digits as an image folder",
    "tokenizer": "train the tokenizer (discrete VAE)",
    "knn_before": "k-NN, encoder not trained",
    "cim": "pre-train with CIM, no labels",
    "knn_after": "k-NN, encoder pre-trained",
    "scratch": "train on few labels from scratch",
    "finetuned": "fine-tune on few labels, pre-trained",
}
"""Folder of each stage, in the order of run/demo.sh, and what it does."""

METRIC = "top1"
NOISE = 1.0
"""Points of top-1 below which a difference is called none; the demo is one run on 360 test images."""


def read_stages(folder: Path) -> dict[str, dict[str, Any]]:
    """Stage -> {"seconds", "top1" (per cent, where there is one)} of the stages that have run."""
    seconds = {}
    for line in (folder / "seconds.tsv").read_text().splitlines():
        name, spent = line.split("\t")
        seconds[name] = int(spent)
    return {name: {"seconds": seconds[name], METRIC: _metric(folder / name)} for name in STAGES if name in seconds}


def verdict(stages: dict[str, dict[str, Any]]) -> list[str]:
    """One plain sentence per comparison: did the pre-training help in this run?"""
    said = []
    for words, without, after in (
        ("fine-tuned on few labels", "scratch", "finetuned"),
        ("judged by k-NN", "knn_before", "knn_after"),
    ):
        low, high = (stages.get(name, {}).get(METRIC) for name in (without, after))
        if low is None or high is None:
            said.append(f"Pre-training, {words}: not measured.")
            continue
        gain = high - low
        shown = f"{low:.1f} % without, {high:.1f} % with it ({gain:+.1f} points)"
        if math.isclose(gain, 0, abs_tol=NOISE):
            said.append(f"Pre-training made no difference worth the name in this run, {words}: {shown}.")
        elif gain > 0:
            said.append(f"Pre-training helped in this run, {words}: {shown}.")
        else:
            said.append(f"Pre-training DID NOT HELP in this run, {words}: {shown}.")
    return said


def text_table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned columns; the first to the left, the others to the right."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    rows = [{column: str(row.get(column, "")) for column in columns} for row in rows]
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in columns}
    lines = []
    for row in ({column: column for column in columns}, *rows):
        cells = [
            row[column].ljust(widths[column]) if i == 0 else row[column].rjust(widths[column])
            for i, column in enumerate(columns)
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def main(folder: Path) -> None:
    """Print the table, write it as demo.json, and the report."""
    stages = read_stages(folder)
    total = sum(stage["seconds"] for stage in stages.values())
    rows = [_row(STAGES[name], stage["seconds"], stage[METRIC]) for name, stage in stages.items()]
    rows.append(_row("all together", total, None))
    said = verdict(stages)
    write_json(folder / "demo.json", {"stages": stages, "seconds": total, "verdict": said})
    write_text(folder / "report.html", page("Palimpsest: the demo", _body(folder, rows, said)))
    sys.stdout.write("\n".join(["", text_table(rows), "", *said, "", f"report: {folder / 'report.html'}", ""]))


def _row(words: str, seconds: int, top1: float | None) -> dict[str, Any]:
    return {"stage": words, "seconds": seconds} | ({} if top1 is None else {"top-1 %": round(top1, 1)})


def _metric(folder: Path) -> float | None:
    """Top-1 of the last line of a stage's results.json, in per cent; None where there is none."""
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else []
    found = [result[METRIC] for result in results if METRIC in result]
    return float(found[-1]) if found else None


def _body(folder: Path, rows: list[dict[str, Any]], said: list[str]) -> str:
    parts = [f"<p>{html.escape(sentence)}</p>" for sentence in said]
    parts.append(table(rows))
    for name, words in STAGES.items():
        parts.append(pictures_section(folder / name, f"Pictures: {words}"))
        parts.append(curves_section(folder / name, f"Curves: {words}"))
    return "\n".join(part for part in parts if part)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m run.demo_table FOLDER")
    main(Path(sys.argv[1]))
