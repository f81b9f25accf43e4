"""What an evaluation says of each class: a table, and a picture of what is taken for what."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from finetune.evaluate import Outcome
from formats.files import write_atomically, write_json, write_text

NAMED = 40
"""Classes up to which the picture names them, and up to 20 writes its numbers."""


def confusion(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """How many images of each class (row) were taken for each class (column); (N,), (N,) -> (K, K) int64."""
    found = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return found.reshape(num_classes, num_classes)


def table(outcome: Outcome, class_names: list[str]) -> list[dict[str, Any]]:
    """One row per class: images, top-1 and top-5 in per cent (None without images), and what it is mostly taken for.

    ``confused_with`` is the wrong class predicted most often, the first of equal ones, empty where none was.
    """
    count = len(class_names)
    images = np.bincount(outcome.labels, minlength=count)
    top5 = np.bincount(outcome.labels[outcome.in_top5], minlength=count)
    right = outcome.predicted == outcome.labels
    top1 = np.bincount(outcome.labels[right], minlength=count)
    # Only the pairs that occur: a matrix of 22,000 classes would fill 4 GB.
    pairs, times = np.unique(outcome.labels[~right] * count + outcome.predicted[~right], return_counts=True)
    worst: dict[int, tuple[int, int]] = {}
    for pair, often in zip(pairs.tolist(), times.tolist(), strict=True):
        label, wrong = divmod(pair, count)
        if often > worst.get(label, (0, 0))[0]:
            worst[label] = (often, wrong)
    rows = []
    for i, name in enumerate(class_names):
        often, wrong = worst.get(i, (0, -1))
        row = {"class": name, "images": int(images[i])}
        row |= {
            key: 100 * int(hits[i]) / int(images[i]) if images[i] else None
            for key, hits in (("top1", top1), ("top5", top5))
        }
        rows.append(row | {"confused_with": class_names[wrong] if often else "", "times": often})
    return rows


def save(outcome: Outcome, class_names: list[str], folder: Path) -> None:
    """Write ``tables/per_class.csv``, ``per_class.json`` and ``plots/confusion.png`` into a run folder."""
    rows = table(outcome, class_names)
    write_json(folder / "per_class.json", rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "tables" / "per_class.csv", text.getvalue())
    present = sorted({*outcome.labels.tolist(), *outcome.predicted.tolist()})
    if len(present) <= 2000:
        place = np.full(len(class_names), -1)
        place[present] = np.arange(len(present))
        found = confusion(place[outcome.labels], place[outcome.predicted], len(present))
        draw(found, [class_names[i] for i in present], folder / "plots" / "confusion.png")


def draw(found: np.ndarray, class_names: list[str], path: Path) -> None:
    """A picture of a confusion matrix (K, K): each row's shares, so that rare classes are seen too.

    Up to :data:`NAMED` classes have their names; with more, a class is one pixel or more and the axes count classes.
    """
    from matplotlib.figure import Figure

    count = len(class_names)
    shares = found / np.maximum(found.sum(axis=1, keepdims=True), 1)
    side = min(max(4.5, 0.42 * count + 2.5), 14) if count <= NAMED else 11
    figure = Figure(figsize=(side, side * 0.92), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    # The square root shows the few mistakes beside the many hits; nearest keeps single pixels of many classes.
    image = axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(
        xlabel="predicted",
        ylabel="true",
        title=f"{count} classes, {int(found.sum())} images, {100 * _right(found):.2f} % right",
    )
    bar = figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    bar.set_ticks([0, 0.1**0.5, 0.25**0.5, 0.5**0.5, 1], labels=["0", "0.1", "0.25", "0.5", "1"])
    if count <= NAMED:
        names = [name if len(name) <= 18 else f"{name[:17]}…" for name in class_names]
        axes.set_xticks(range(count), names, rotation=90)
        axes.set_yticks(range(count), names)
    if count <= 20:
        for row, column in zip(*np.nonzero(found), strict=True):
            colour = "white" if shares[row, column] > 0.36 else "black"
            axes.text(column, row, str(found[row, column]), ha="center", va="center", color=colour, fontsize=8)
    write_atomically(path, lambda draft: figure.savefig(draft, format="png"))


def _right(found: np.ndarray) -> float:
    return float(np.trace(found) / max(found.sum(), 1))
