"""The benchmark of checkpointed blocks, on a small network."""

import json

import pytest
import torch
from torch import nn

from benchmarks import blocks


def test_one_json_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(blocks, "ENCODERS", (("convnext_atto", "tiles"), ("resnet50", "")))
    monkeypatch.setattr(blocks, "ROUNDS", 1)
    assert blocks.main(["images=1", "encoder=convnext_atto"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["encoder"] == "convnext_atto" and found["blocks"] == 12
    assert 0 < found["kept_mb_per_image"]["again"] < 0.5 * found["kept_mb_per_image"]["plain"]
    assert all(seconds > 0 for seconds in found["seconds_per_step"].values())


def test_bytes_that_are_kept_are_counted_once() -> None:
    layer, x = nn.Linear(4, 4), torch.ones(8, 4, requires_grad=True)
    kept = blocks.kept_bytes(lambda: layer(x).exp() * x, layer)[1]
    assert kept == 2 * 8 * 4 * 4  # x, for the layer and the product, and the result of exp; not the weights


def test_a_wrong_call_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["pictures=3"], ["images=0"], ["images=1", "encoder=resnet51"]):
        assert blocks.main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[0] == "usage: python -m benchmarks.blocks [images=2] [encoder=NAME]"
    assert all(line.startswith("error: ") and "images=N" in line for line in lines[1:])
