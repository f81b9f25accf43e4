"""A long run that is killed again and again ends where one in peace does."""

import random
import time
from pathlib import Path

import pytest
import torch

from engine.log import read_log
from tests.engine import faulty
from tests.engine.test_faults import Place

STEPS, KILLS, EVERY = 100_000, 20, 1000


def marathon(place: Place, steps: int, kills: int, every: int, seed: int) -> int:
    """Run to the end, killed outright ``kills`` times at random steps -> how often it was killed."""
    draw = random.Random(seed)
    words = [f"train.steps={steps}", "train.epochs=null", f"train.save_steps={every}", f"train.log_steps={every // 10}"]
    words += ["train.eval_epochs=0", "train.timeout_minutes=5", "data.workers=0"]
    moments = sorted(draw.randrange(every, steps) for _ in range(kills))
    done = 0
    for moment in [*moments, steps]:
        [process] = faulty.start(place.words(*words), place.folder / "log", processes=1)
        log = place.output / "log.jsonl"
        while process.is_alive() and (not log.is_file() or last_step(log) < moment or moment == steps):
            time.sleep(0.02)
        if process.is_alive():
            time.sleep(draw.random() * 0.2)  # in the middle of whatever it does
            process.kill()
            done += process.is_alive()
        process.join()
    assert process.exitcode == 0, place.said(0)
    return done


def last_step(log: Path) -> int:
    """Of the last whole line of a log.jsonl, without reading all of it."""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - 2000, 0))
        lines = file.read().decode(errors="ignore").splitlines()
    steps = [line.split('"step": ')[1].split(",")[0] for line in lines if line.startswith("{") and line.endswith("}")]
    return int(steps[-1]) if steps else 0


def compare(folder: Path, steps: int, kills: int, every: int) -> None:
    calm, killed = Place(folder / "calm"), Place(folder / "killed")
    assert marathon(calm, steps, 0, every, 0) == 0
    assert marathon(killed, steps, kills, every, 1) == kills
    assert killed.losses() == calm.losses() and killed.losses()[-1][0] == steps
    times = [line["time"] for line in read_log(killed.output / "log.jsonl")]
    assert times == sorted(times)
    ends = [
        torch.load(place.output / f"checkpoints/step{steps:08d}/mp_rank_00_model_states.pt", weights_only=True)[
            "module"
        ]
        for place in (calm, killed)
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_two_thousand_steps_with_three_kills(tmp_path: Path) -> None:
    compare(tmp_path, 2000, 3, 100)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_a_hundred_thousand_steps_with_twenty_kills(tmp_path: Path) -> None:
    """About 20 minutes on one core."""
    compare(tmp_path, STEPS, KILLS, EVERY)
