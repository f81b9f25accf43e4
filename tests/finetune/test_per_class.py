"""The table per class and the confusion picture against slow loops and scikit-learn."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix

from finetune import per_class
from finetune.evaluate import Outcome


def draw(images: int, classes: int, seed: int = 0) -> Outcome:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, images)
    predicted = np.where(generator.random(images) < 0.6, labels, generator.integers(0, classes, images))
    return Outcome(
        np.arange(images), labels, predicted, (predicted == labels) | (generator.random(images) < 0.3), loss=1.0
    )


@pytest.mark.parametrize(("images", "classes"), [(97, 7), (40, 60), (1, 2)])
def test_table_equals_a_slow_loop(images: int, classes: int) -> None:
    outcome, names = draw(images, classes), [f"class {i}" for i in range(classes)]
    rows = per_class.table(outcome, names)
    found = per_class.confusion(outcome.labels, outcome.predicted, classes)
    assert np.array_equal(found, confusion_matrix(outcome.labels, outcome.predicted, labels=range(classes)))
    for i, row in enumerate(rows):
        own = [n for n in range(images) if outcome.labels[n] == i]
        assert row["class"] == names[i] and row["images"] == len(own)
        if not own:
            assert row["top1"] is None and row["top5"] is None and row["confused_with"] == "" and row["times"] == 0
            continue
        assert row["top1"] == 100 * sum(outcome.predicted[n] == i for n in own) / len(own)
        assert row["top5"] == 100 * sum(bool(outcome.in_top5[n]) for n in own) / len(own)
        wrong = [int(outcome.predicted[n]) for n in own if outcome.predicted[n] != i]
        most = max((wrong.count(other) for other in wrong), default=0)
        first = next((other for other in range(classes) if most and wrong.count(other) == most), None)
        assert row["times"] == most and row["confused_with"] == ("" if first is None else names[first])
    numbers = outcome.numbers()
    assert numbers["top1"] == pytest.approx(100 * np.trace(found) / images)
    assert sum((row["top1"] or 0) * row["images"] for row in rows) == pytest.approx(numbers["top1"] * images)


@pytest.mark.parametrize("classes", [2, 10, 45, 1000])
def test_everything_is_written_and_the_picture_is_large_enough(tmp_path: Path, classes: int) -> None:
    names = [f'a, "quoted" <name> of class {i}' for i in range(classes)]
    per_class.save(draw(5 * classes, classes), names, tmp_path)
    rows = json.loads((tmp_path / "per_class.json").read_text())
    assert [row["class"] for row in rows] == names
    with (tmp_path / "tables" / "per_class.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["class"] for row in read] == names and [int(row["images"]) for row in read] == [
        row["images"] for row in rows
    ]
    with Image.open(tmp_path / "plots" / "confusion.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert min(pixels.shape) >= 400 and max(pixels.shape) <= 1700
    if classes == 1000:  # the diagonal is seen: dark cells on a light ground
        assert (pixels < 140).mean() > 0.001


def test_many_classes_of_which_few_occur_stay_small(tmp_path: Path) -> None:
    outcome = draw(30, 5)
    far = Outcome(outcome.indices, outcome.labels + 21_000, outcome.predicted + 21_000, outcome.in_top5, 1.0)
    per_class.save(far, [str(i) for i in range(21_841)], tmp_path)
    assert (tmp_path / "plots" / "confusion.png").is_file()
    assert json.loads((tmp_path / "per_class.json").read_text())[21_000]["images"] == int((outcome.labels == 0).sum())
