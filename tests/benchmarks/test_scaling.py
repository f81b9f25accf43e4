"""The benchmarks of scaling and of checkpoints: one JSON object each, and one line for a wrong call."""

import json
import os
from pathlib import Path

import pytest

from benchmarks import checkpoint, scaling


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_every_stage_alone_apart_and_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "ROUNDS", 1)
    assert scaling.main(["digits_fcmae", "train.batch_size=4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["stages"]) == ["zero0_fp32", "zero1_fp32", "zero2_fp32", "zero3_fp32"]
    for stage in found["stages"].values():
        assert stage["images_per_second"].keys() == {"alone", "apart", "together"}
        assert stage["waiting"] == pytest.approx(1 - stage["efficiency"], abs=2e-3)
    assert found["images_per_process"] == 4


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("stage", ["zero0_fp32", "zero3_bf16"])
def test_what_a_checkpoint_costs(stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "digits_fcmae",
        "train.batch_size=4",
        "train.ema_decay=0.9",
        f"deepspeed={stage}",
        f"output_dir={tmp_path}",
    ]
    assert checkpoint.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    # Weights, two moments and the average, of four bytes each; the generator of the benchmark adds little.
    assert found["bytes"] == pytest.approx(16 * found["parameters"], rel=0.1)
    assert found["share"] == pytest.approx(found["seconds"] / (600 + found["seconds"]), abs=1e-4)
    assert list(tmp_path.iterdir()) == []  # it takes its checkpoints with it


def test_a_wrong_call_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for program in (scaling, checkpoint):
        assert program.main([]) == 2
        assert program.main(["digits_fcmae", "fcmae.nothing=1"]) == 2
    assert scaling.main(["digits_spark"]) == 2  # its LAMB needs whole tensors
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and "fcmae.nothing" in lines[1] and "trust ratios" in lines[4]
