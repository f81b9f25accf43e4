"""Whole runs on shards: every method sees what it sees in a folder; a run on pipes survives kills."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from data.digits import write_digits
from data.pack import PackSettings, pack
from engine import cli
from engine.faults import EXIT_REQUEUE
from engine.log import read_log
from finetune.__main__ import PROGRAM as FINETUNE
from finetune.config import FinetuneData
from finetune.sets import find_val
from models.dvae import DVAE, save_tokenizer
from pretrain.__main__ import PROGRAM as PRETRAIN
from tests.data.images import serve
from tests.launch import kill, run, start
from tests.pretrain.test_curves import CURVES


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as a folder, and packed in the same order and in another one."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder / "digits")
    for split in ("train", "val"):
        pack(str(folder / "digits" / split), folder / f"packed/{split}", PackSettings(shard_size=200, shuffle=False))
    pack(str(folder / "digits/train"), folder / "mixed", PackSettings(shard_size=100))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.safetensors"
    torch.manual_seed(0)
    save_tokenizer(DVAE(vocab_size=16, width=8, blocks_per_group=1, groups=3, decoder_init_width=8), path)
    return path


def _losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder / "log.jsonl") if line["event"] == "train"]


CONVMAE = ["digits_convmae", "train.warmup_epochs=0", "train.warmup_steps=2"]


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    "name", ["dvae", "cim_respix", "spark", "convmae", pytest.param("fcmae", marks=pytest.mark.nightly)]
)
def test_every_method_pre_trains_on_shards_as_on_the_folder(
    name: str, digits: Path, tokenizer: Path, tmp_path: Path
) -> None:
    words = [*CURVES.get(name, CONVMAE), "train.steps=3", "train.batch_size=8", "train.log_steps=1"]
    words += ["train.picture_epochs=0", "data.workers=0", "train.eval_epochs=0"]
    words += ["train.warmup_steps=2"] if name != "dvae" else []
    words += [f"cim.tokenizer={tokenizer}"] if name.startswith("cim") else []
    found: list[list[float]] = []
    for path in (digits / "digits/train", digits / "packed/train"):
        folder = tmp_path / str(len(found))
        assert cli.main(PRETRAIN, [*words, f"data.path={path}", f"output_dir={folder}"]) == 0
        found.append(_losses(folder))
    assert len(found[0]) == 3 and found[0] == found[1]


@pytest.mark.usefixtures("world")
def test_labelled_shards(digits: Path, tmp_path: Path) -> None:
    """k-NN on train/ and val/ of shards, and on shards by their names and from a server, as on the folders."""
    words = [
        "digits_knn",
        "init=scratch",
        "data.workers=0",
        "data.labels=0.1",
        "encoder.name=test_vit3",
        "encoder.kwargs={}",
    ]
    with serve(digits / "packed/val") as server:
        places = [
            [f"data.path={digits}/digits"],
            [f"data.path={digits}/packed"],
            [
                f"data.path={digits}/packed/train/train-{{000000..000007}}.tar",
                f"data.val_path={server.address}/val-{{000000..000001}}.tar",
            ],
        ]
        found: list[list[dict[str, Any]]] = []
        for place in places:
            folder = tmp_path / str(len(found))
            assert cli.main(FINETUNE, [*words, *place, f"output_dir={folder}"]) == 0
            found.append(json.loads((folder / "results.json").read_text()))
    numbers = [[{key: one[key] for key in one if "seconds" not in key} for one in result] for result in found]
    assert numbers[0] == numbers[1] == numbers[2]


def test_the_classes_of_a_stream_number_what_is_evaluated(digits: Path) -> None:
    with serve(digits / "packed/train") as server:
        path = server.address + "/train-{000000..000007}.tar"
        data = FinetuneData(path=path, val_path=f"{digits}/digits/val")
        assert find_val(data, None).class_names == [str(number) for number in range(10)]
        assert {name for name, _ in server.asked} == {"index.npz"}


def worker_pids(pid: int) -> list[int]:
    """Forked children of a process that run its own program."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == pid and command == Path(f"/proc/{pid}/cmdline").read_bytes():
            found.append(int(stat.parent.name))
    return found


@pytest.mark.nightly
def test_a_run_on_pipes_that_is_killed_goes_on(digits: Path, tmp_path: Path) -> None:
    """Two processes; a data worker is killed, later both processes, in mid-epoch: the losses of a run without a break."""
    shards = digits / "mixed"
    words = ["-m", "pretrain", *CURVES["spark"], "train.steps=24", "train.batch_size=16", "train.log_steps=1"]
    words += ["train.save_steps=5", "train.picture_epochs=0", "data.workers=1", "data.shuffle_block=50"]
    words += [f"data.path={shards}/index.npz,pipe:sleep 0.3; cat {shards}/mixed-{{000000..000014}}.tar"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run([*words, f"output_dir={whole}"], 2, tmp_path / "whole.log")
    ranks = start([*words, f"output_dir={parts}"], 2, tmp_path / "killed.log")
    try:
        killed = False
        deadline = time.monotonic() + 240
        while len(_losses(parts)) < 12 if (parts / "log.jsonl").is_file() else True:
            assert all(rank.poll() is None for rank in ranks), (tmp_path / "killed.log0").read_text()[-3000:]
            assert time.monotonic() < deadline
            if not killed and (parts / "log.jsonl").is_file() and len(_losses(parts)) >= 4:
                os.kill(worker_pids(ranks[0].pid)[0], signal.SIGKILL)
                killed = True
            time.sleep(0.02)
    finally:
        kill(ranks)
    assert "loader worker 0 (pid" in (tmp_path / "killed.log0").read_text()
    assert len(_losses(parts)) < 24, "killed too late to show anything"
    run([*words, f"output_dir={parts}"], 2, tmp_path / "continued.log")
    assert "continuing from" in (tmp_path / "continued.log0").read_text()
    assert _losses(parts) == _losses(whole) and len(_losses(whole)) == 24


def test_a_run_on_pipes_goes_on_with_another_number_of_processes(digits: Path, tmp_path: Path) -> None:
    """Begun with one process, which is told to stop in mid-epoch, continued with two: the losses of one process all along.

    Nothing of the network depends on the process, so that equal losses are equal images in every step.
    """
    shards, steps = digits / "named/train", 40
    pack(str(digits / "digits/train"), shards, PackSettings(shard_size=100))
    words = ["-m", "finetune", "digits_vit", f"train.steps={steps}", "train.warmup_epochs=0", "train.warmup_steps=2"]
    words += [
        "train.log_steps=1",
        "train.eval_epochs=0",
        "train.picture_epochs=0",
        "data.labels=1",
        "data.shuffle_block=50",
    ]
    words += ["encoder.drop_path_rate=0", f"data.val_path={digits}/digits/val"]
    words += [f"data.path={shards}/index.npz,pipe:cat {shards}/train-{{000000..000014}}.tar"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run([*words, f"output_dir={whole}"], 1, tmp_path / "whole.log")
    (alone,) = start([*words, f"output_dir={parts}"], 1, tmp_path / "stopped.log")
    try:
        deadline = time.monotonic() + 240
        while not (parts / "log.jsonl").is_file() or len(_losses(parts)) < 4:
            assert alone.poll() is None and time.monotonic() < deadline, (tmp_path / "stopped.log0").read_text()[-3000:]
            time.sleep(0.01)
        alone.send_signal(signal.SIGTERM)
        assert alone.wait(60) == EXIT_REQUEUE
    finally:
        kill([alone])
    assert 4 <= len(_losses(parts)) < steps, "stopped too late to show anything"
    run([*words, f"output_dir={parts}"], 2, tmp_path / "continued.log")
    assert "streams: 1\n" in (parts / "config.yaml").read_text()
    assert _losses(parts) == pytest.approx(_losses(whole), rel=1e-5) and len(_losses(parts)) == steps
