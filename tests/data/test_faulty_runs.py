"""Runs of two processes whose data fails them: the losses are those of a run that nothing happens to."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data.digits import write_digits
from engine.log import read_log
from tests.data.test_training_on_shards import worker_pids
from tests.launch import kill, run, start
from tests.pretrain.test_curves import CURVES

STEPS = 40


def _losses(folder: Path) -> list[float]:
    log = folder / "log.jsonl"
    return [line["loss"] for line in read_log(log) if line["event"] == "train"] if log.is_file() else []


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, of which every tenth file is broken."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder / "all")
    images = folder / "images"
    images.mkdir()
    for number, path in enumerate(sorted((folder / "all/train").rglob("*.png"))[::3]):
        content = path.read_bytes()
        (images / f"{number}.png").write_bytes(content if number % 10 else content[: len(content) // 2])
    return images


def _words(images: Path, output: Path) -> list[str]:
    words = ["-m", "pretrain", *CURVES["spark"], f"train.steps={STEPS}", "train.batch_size=16", "train.log_steps=1"]
    words += ["train.picture_epochs=0", "data.workers=1", "data.max_broken=0.2", "data.retry_seconds=120"]
    return [*words, f"data.path={images}", f"output_dir={output}"]


@pytest.fixture(scope="module")
def calm(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a run that only its broken images trouble."""
    folder = tmp_path_factory.mktemp("calm")
    run(_words(images, folder / "run"), 2, folder / "log")
    lines = [line for line in read_log(folder / "run/log.jsonl") if line["event"] == "train"]
    broken = len(list(images.iterdir())) // 10 + 1
    assert 0 < lines[-1]["broken_images"] <= broken
    named = re.findall(r"(\d+)\.png", "".join((folder / "log0").read_text().split("broken")[1:]))
    assert named and all(int(number) % 10 == 0 for number in named), "named on rank 0, whichever process met them"
    return [line["loss"] for line in lines]


def _kill_worker(images: Path, pid: int) -> None:
    os.kill(worker_pids(pid)[0], signal.SIGKILL)


def _take_folder_away(seconds: float) -> Callable[[Path, int], None]:
    """For so long, of the 120 seconds that it is waited for."""

    def strike(images: Path, pid: int) -> None:
        images.rename(images.with_name("elsewhere"))
        try:
            time.sleep(seconds)
        finally:
            images.with_name("elsewhere").rename(images)

    return strike


@pytest.mark.parametrize(
    ("strike", "told"),
    [
        pytest.param(_kill_worker, r"loader worker 0 \(pid \d+\) died", id="dead worker"),
        pytest.param(_take_folder_away(4), r"images is back after \d", id="folder gone"),
        pytest.param(
            _take_folder_away(60), r"images is back after [56]\d", id="gone for a minute", marks=pytest.mark.nightly
        ),
    ],
)
def test_nothing_is_lost(
    strike: Callable[[Path, int], None], told: str, images: Path, calm: list[float], tmp_path: Path
) -> None:
    ranks = start(_words(images, tmp_path / "run"), 2, tmp_path / "log")
    try:
        deadline = time.monotonic() + 240
        while len(_losses(tmp_path / "run")) < 4:
            assert all(rank.poll() is None for rank in ranks), (tmp_path / "log0").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        before = len(_losses(tmp_path / "run"))
        strike(images, ranks[1].pid)
        assert before < STEPS, "too late to show anything"
        assert [rank.wait(240) for rank in ranks] == [0, 0]
    finally:
        kill(ranks)
    assert re.search(told, (tmp_path / "log1").read_text())
    assert _losses(tmp_path / "run") == calm
