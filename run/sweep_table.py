"""What a sweep of pre-trainings measured: ``python -m run.sweep_table FOLDER ...``, a run folder with its ``knn/`` per line.

``python -m run.sweep_table --knn FOLDER`` prints the settings with which k-NN sees the images as that run did.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from run.demo_table import text_table

REPORTED_K = 20
"""Neighbours of the k-NN that is shown (DINO reports the same)."""


def row(folder: Path) -> dict[str, Any]:
    """One line: the last results of a run and of its k-NN; what was not measured is left out."""
    trained = _last(folder / "results.json", "pretrain")
    judged = _last(folder / "knn" / "results.json", "knn")
    shown: dict[str, Any] = {"setting": folder.name}
    if "steps" in trained:
        shown["steps"] = trained["steps"]
    for key in ("reconstruction_loss", "reconstruction_mse"):
        if key in trained:
            shown[key] = f"{trained[key]:.4f}"
    if "top1" in judged:
        shown[f"{REPORTED_K}-NN top-1 %"] = f"{judged['top1']:.2f}"
    return shown


def _last(path: Path, task: str) -> dict[str, Any]:
    results = json.loads(path.read_text()) if path.is_file() else []
    found = [line for line in results if line.get("task") == task and line.get("k", REPORTED_K) == REPORTED_K]
    return found[-1] if found else {}


def knn_words(folder: Path) -> list[str]:
    """``data.*`` settings of the run whose encoder is in ``folder``."""
    card = json.loads((folder / "encoder.json").read_text())
    return [f"data.{key}={json.dumps(card[key])}" for key in ("image_size", "in_chans", "mean", "std")]


def main(words: Sequence[str]) -> None:
    """Print the table, or the words for k-NN, one a line."""
    if words and words[0] == "--knn":
        lines = knn_words(Path(words[1]))
    else:
        lines = [text_table([row(Path(word)) for word in words])]
    sys.stdout.write("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    if len(sys.argv) < 2 or (sys.argv[1] == "--knn" and len(sys.argv) != 3):
        sys.exit("usage: python -m run.sweep_table FOLDER ... | --knn FOLDER")
    main(sys.argv[1:])
