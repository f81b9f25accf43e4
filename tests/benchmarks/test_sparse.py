"""The benchmark of sparse encoding: what it prints, and the memory it counts, which is the same on any machine."""

import functools
import json
from pathlib import Path

import pytest
import timm
import torch

from benchmarks.sparse import main, saved_bytes, step
from models.masking import random_mask


def test_prints_one_object_and_draws_the_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--model",
        "resnet10t",
        "--batch",
        "2",
        "--image_size",
        "64",
        "96",
        "--rounds",
        "1",
        "--profile",
        "--device",
        "cpu",
    ]
    main([*words, "--backends", "tiles", "masked", "dense", "dense_channels_last"])
    found = json.loads(capsys.readouterr().out)
    assert found["visible"] == [2, 6]
    assert set(found["seconds"]) == {"tiles", "masked", "dense", "dense_channels_last"}
    assert all(value > 0 for value in found["seconds"].values())
    assert found["dense_gflops"] > 0
    assert sum(row["share"] for row in found["profile"]) <= 1.001
    main(
        [*words[:-3], "--backends", "tiles", "dense", "--mask_ratio", "0", "0.6", "--plot", str(tmp_path / "curve.png")]
    )
    both = json.loads(capsys.readouterr().out)
    assert [result["visible"][0] for result in both] == [6, 2]
    assert both[1]["saved_mib"]["tiles"] < both[0]["saved_mib"]["tiles"]
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_a_transformer_hides_patches_of_its_stride(capsys: pytest.CaptureFixture[str]) -> None:
    """ConvMAE's encoder at the image size asked for: 16 px patches, by default as wide as its stride."""
    words = ["--model", "convvit_small", "--mask_ratio", "0.75", "--image_size", "64", "96", "--batch", "1"]
    main([*words, "--rounds", "1", "--device", "cpu", "--backends", "tiles", "masked"])
    found = json.loads(capsys.readouterr().out)
    assert (found["mask_patch"], found["visible"], found["model"]) == (16, [6, 24], "convvit_small")
    assert found["tiles_memory_share_of"]["masked"] < 0.6


@pytest.mark.parametrize("name", ["resnet26", "convnext_atto", "convnextv2_atto"])
def test_tiles_keep_less_than_half_of_what_masked_keeps(name: str) -> None:
    """Bytes that autograd holds for the backward pass at 20 of 49 visible patches."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).train()
    images, mask = torch.randn(1, 3, 224, 224), random_mask(1, (7, 7), 29)
    kept = {
        backend: saved_bytes(model, functools.partial(step, model, images, mask, backend))
        for backend in ("tiles", "masked", "dense")
    }
    assert kept["tiles"] < 0.5 * kept["masked"]
    assert kept["tiles"] < 0.5 * kept["dense"]
