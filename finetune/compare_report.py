"""What a comparison says: a table of means and spreads, their plot, and a page that holds both.

``entries`` are the runs: {"labels", "init", "seed", "folder", "state", and "top1" in per cent or "reason"}.
"""

import csv
import functools
import html
import io
import statistics
from pathlib import Path
from typing import Any

from engine.report import page, table
from formats.files import write_atomically, write_json, write_text

Entries = list[dict[str, Any]]


def summarise(entries: Entries) -> Entries:
    """One row per share and starting point, in order of appearance, shares rising.

    ``mean`` and ``std`` (n - 1) are over the ``n`` seeds that finished; ``difference`` is the mean, and
    ``difference_std`` the standard deviation, of what each seed gains over the first starting point with the same seed
    and so the same images. What is not known is None.
    """
    inits = list(dict.fromkeys(entry["init"] for entry in entries))
    seeds = list(dict.fromkeys(entry["seed"] for entry in entries))
    top1 = {(e["labels"], e["init"], e["seed"]): e.get("top1") for e in entries if e["state"] == "finished"}
    rows = []
    for share in sorted({entry["labels"] for entry in entries}):
        for init in inits:
            each = {seed: top1.get((share, init, seed)) for seed in seeds}
            mean, std, n = _spread([value for value in each.values() if value is not None])
            row = {"labels": share, "init": init, "mean": mean, "std": std, "n": n, "top1": each}
            first = {seed: top1.get((share, inits[0], seed)) for seed in seeds}
            gains = [each[s] - first[s] for s in seeds if each[s] is not None and first[s] is not None]  # type: ignore[operator]
            gain, gain_std, _ = _spread(gains) if init != inits[0] else (None, None, 0)
            rows.append(row | {"difference": gain, "difference_std": gain_std})
    return rows


def _spread(values: list[float]) -> tuple[float | None, float | None, int]:
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None, len(values)


def text(entries: Entries) -> str:
    """The table for a terminal, and below it why runs failed."""
    rows = cells(entries)
    width = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    left = ("init",)
    lines = [
        "  ".join(value.ljust(width[key]) if key in left else value.rjust(width[key]) for key, value in row.items())
        for row in [{key: key for key in width}, *rows]
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in [*lines, *_failures(entries)])


def cells(entries: Entries) -> list[dict[str, str]]:
    """:func:`summarise` in words: top-1 in per cent with two digits."""
    first = entries[0]["init"]
    states = {(e["labels"], e["init"], e["seed"]): e["state"] for e in entries}
    shown = []
    for row in summarise(entries):
        cell = {"labels": f"{row['labels']:g}", "init": row["init"]}
        cell |= {"mean top-1 %": _number(row["mean"]), "std": _number(row["std"]), "n": str(row["n"])}
        for seed, value in row["top1"].items():
            state = states.get((row["labels"], row["init"], seed), "-")
            cell[f"seed {seed}"] = _number(value) if value is not None else state
        gain, spread = row["difference"], row["difference_std"]
        cell[f"to {first}"] = (
            "-" if gain is None else f"{gain:+.2f}" + (f" ± {spread:.2f}" if spread is not None else "")
        )
        shown.append(cell)
    return shown


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _failures(entries: Entries) -> list[str]:
    return [f"failed: {entry['folder']}: {entry['reason']}" for entry in entries if entry["state"] == "failed"]


def write(folder: Path, facts: dict[str, str], entries: Entries) -> None:
    """Write compare.json, compare.csv, compare.svg, compare.png and report.html of what is known so far."""
    rows = summarise(entries)
    write_json(folder / "compare.json", {"facts": facts, "rows": rows, "runs": entries})
    write_text(folder / "compare.csv", _csv(rows))
    svg = ""
    if any(row["n"] for row in rows):
        for kind in ("png", "svg"):
            write_atomically(folder / f"compare.{kind}", functools.partial(plot, rows, kind=kind))
        svg = (folder / "compare.svg").read_text()
    write_text(folder / "report.html", page(f"Comparison: {facts['recipe']}", _body(facts, entries, svg)))


def _csv(rows: Entries) -> str:
    """Numbers in full, one column per seed."""
    out = io.StringIO()
    flat = [
        {
            **{key: value for key, value in row.items() if key != "top1"},
            **{f"seed_{s}": v for s, v in row["top1"].items()},
        }
        for row in rows
    ]
    writer = csv.DictWriter(out, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def plot(rows: Entries, file: Path, kind: str) -> None:
    """Mean top-1 against the labelled share, one line per starting point, bars of one standard deviation."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    shares = sorted({row["labels"] for row in rows})
    for init in dict.fromkeys(row["init"] for row in rows):
        own = [row for row in rows if row["init"] == init and row["n"]]
        bars = [row["std"] or 0.0 for row in own]
        axes.errorbar(
            [row["labels"] for row in own], [row["mean"] for row in own], bars, marker="o", capsize=3, label=init
        )
    axes.set_xscale("log")
    axes.set_xticks(shares, [f"{100 * share:g} %" for share in shares])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="labelled share of the training images", ylabel="top-1 (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    # The same picture for the same numbers, with letters that can be searched.
    with matplotlib.rc_context({"svg.hashsalt": "compare", "svg.fonttype": "none"}):
        figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)


def _body(facts: dict[str, str], entries: Entries, svg: str) -> str:
    items = "".join(
        f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd></div>" for key, value in facts.items()
    )
    picture = svg[svg.find("<svg") :]
    parts = [f'<dl class="facts">{items}</dl>', f"<h2>Top-1</h2>{table(cells(entries))}"]
    parts += [f"<p>{html.escape(line)}</p>" for line in _failures(entries)]
    if picture:
        parts.append(
            f"<h2>Against the labelled share</h2><figure>{picture}<figcaption>{_CAPTION}</figcaption></figure>"
        )
    runs = [{key: entry.get(key, "") for key in dict.fromkeys(k for e in entries for k in e)} for entry in entries]
    return "\n".join([*parts, f"<h2>Runs</h2>{table(runs)}"])


_CAPTION = "Mean over the seeds, with bars of one standard deviation (n - 1)."
