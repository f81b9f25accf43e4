"""The loading benchmark: what it prints, and that both of its paths show the same pixels."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.loader import main
from tests.shared import SHARED, needs_shared


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The benchmark sets one thread for its process, which is ours here."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _result(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, float]:
    main(arguments)
    return json.loads(capsys.readouterr().out)


def test_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(5):
        pixels = np.add.outer(np.arange(60 + i) * 3, np.arange(90))[..., None] + np.array([0, 20, 40])
        Image.fromarray((pixels % 256).astype(np.uint8)).save(tmp_path / f"{i}.jpg", quality=95)
    result = _result(
        capsys, "--path", str(tmp_path), "--size", "24", "40", "--rounds", "2", "--workers", "1", "--shrink", "40"
    )
    assert result["images"] == 5 and result["image_size"] == [24, 40] and result["threads"] == 1
    rates = [f"{name}_images_per_second" for name in ("folder", "shards", "plain")]
    rates += [f"loader_{name}_images_per_second" for name in ("folder", "shards", "pipes", "shrunk")]
    for rate in (*rates, "folder_over_plain", "shards_over_plain", "shards_over_folder"):
        assert result[rate] > 0
    assert result["mean_abs_difference"] < 2


@needs_shared("data/photos")
def test_same_pixels_on_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Within 2 / 255 of Pillow on average, and each single image too (the ratio of speeds is for the benchmark itself)."""
    photos = sorted((SHARED / "data/photos").iterdir())[::6]
    (tmp_path / "list.txt").write_text("\n".join(map(str, photos)))
    result = _result(capsys, "--path", str(tmp_path / "list.txt"), "--rounds", "1")
    assert result["images"] == len(photos)
    assert result["mean_abs_difference"] < 2 and result["worst_image_difference"] < 2
