"""The table of a sweep says what was measured, and the script that fills it runs what it says."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from run.sweep_table import knn_words, main, row
from tests.run.test_scripts import ROOT, bash


def make_run(folder: Path, trained: list[dict[str, Any]], judged: list[dict[str, Any]]) -> Path:
    (folder / "knn").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(trained))
    (folder / "knn" / "results.json").write_text(json.dumps(judged))
    card = {"name": "x", "image_size": [48, 32], "in_chans": 1, "mean": [0.5], "std": [0.25]}
    (folder / "encoder.json").write_text(json.dumps(card))
    return folder


def test_rows_show_the_last_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = make_run(
        tmp_path / "mask_ratio=0.6",
        [
            {"task": "pretrain", "steps": 5, "reconstruction_loss": 9.0, "reconstruction_mse": 9.0},
            {"task": "pretrain", "steps": 10, "reconstruction_loss": 0.51239, "reconstruction_mse": 0.0123},
        ],
        [
            {"task": "knn", "k": 10, "top1": 1.0},
            {"task": "knn", "k": 20, "top1": 81.0648},
            {"task": "knn", "k": 200, "top1": 2.0},
        ],
    )
    assert row(whole) == {
        "setting": "mask_ratio=0.6",
        "steps": 10,
        "reconstruction_loss": "0.5124",
        "reconstruction_mse": "0.0123",
        "20-NN top-1 %": "81.06",
    }
    (tmp_path / "nothing").mkdir()
    assert row(tmp_path / "nothing") == {"setting": "nothing"}
    main([str(whole), str(tmp_path / "nothing")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "81.06" in lines[2] and lines[3].split() == ["nothing"]


def test_knn_sees_images_as_the_run_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", [], [])
    words = ["data.image_size=[48, 32]", "data.in_chans=1", "data.mean=[0.5]", "data.std=[0.25]"]
    assert knn_words(folder) == words
    main(["--knn", str(folder)])
    assert capsys.readouterr().out.splitlines() == words


def test_sweep_runs_every_setting_and_judges_it(tmp_path: Path) -> None:
    """What is launched, shown by stand-ins for deepspeed and python."""
    checkout, log = tmp_path / "checkout", tmp_path / "log"
    tools = checkout / ".venv" / "bin"
    tools.mkdir(parents=True)
    (checkout / "run").mkdir()
    for name in ("launch.sh", "fcmae_mask_sweep.sh"):
        (checkout / "run" / name).write_text((ROOT / "run" / name).read_text())
    (tools / "deepspeed").write_text(f'#!/bin/sh\nprintf "%s\\n" "${{*#*--module }}" >>{log}\n')
    (tools / "python").write_text(
        f'#!/bin/sh\ncase "$*" in *torch*) echo 0;; *socket*) echo 12345;; *--knn*) echo "data.image_size=[48, 48]";; '
        f'*) printf "%s\\n" "$*" >>{log};; esac\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = {
        "TRAIN": "a b/train",
        "VAL": "a b/val",
        "OUT": str(tmp_path / "out"),
        "HOSTFILE": "",
        "PATH": os.environ["PATH"],
    }
    script = checkout / "run" / "fcmae_mask_sweep.sh"
    settings = ["fcmae.mask_ratio=0.3", "fcmae.mask_patch=16 encoder.kwargs.output_stride=16"]
    result = bash(script, "digits_fcmae", "train.epochs=1", "--", *settings, cwd=tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    out, images = tmp_path / "out", "data.path=a b/train data.val_path=a b/val"
    folders = [out / "fcmae.mask_ratio=0.3", out / "fcmae.mask_patch=16_encoder.kwargs.output_stride=16"]
    expected = []
    for folder, setting in zip(folders, settings, strict=True):
        expected.append(f"pretrain digits_fcmae {images} output_dir={folder} train.epochs=1 {setting}")
        expected.append(
            f"finetune knn {images} data.image_size=[48, 48] data.eval_crop_ratio=1.0 encoder.pretrained={folder} "
            f"output_dir={folder}/knn"
        )
    expected.append(f"-m run.sweep_table {folders[0]} {folders[1]}")
    assert log.read_text().splitlines() == expected
    log.unlink()
    assert bash(script, "digits_fcmae", cwd=tmp_path, **environment).returncode == 0
    said = log.read_text().splitlines()
    assert len(said) == 11 and said[8].endswith("fcmae.mask_ratio=0.8")
    assert "TRAIN" in bash(script, cwd=tmp_path, **{**environment, "TRAIN": ""}).stderr
