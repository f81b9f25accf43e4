"""log.jsonl: one object per line, nothing twice after a resume, nothing lost but the line a kill tore."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from engine.log import RunLog, read_log, setup
from engine.world import World

MAIN = World(0, 1, torch.device("cpu"))


def write(folder: Path, first_step: int, steps: Iterable[int], event: str = "train") -> None:
    log = RunLog(folder, MAIN, first_step)
    for step in steps:
        log.write(step, {"loss": 1 / step}, event)
    log.close()


def test_a_line_per_write(tmp_path: Path) -> None:
    log = RunLog(tmp_path, MAIN, 0)
    log.write(1, {"loss": 0.5, "name": "x"})
    log.write(1, {"top1": 2}, event="evaluate")
    # A run that is killed now has lost nothing.
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    log.close()
    assert [line.pop("time") > 0 for line in lines] == [True, True]
    assert lines == [
        {"event": "train", "step": 1, "loss": 0.5, "name": "x"},
        {"event": "evaluate", "step": 1, "top1": 2},
    ]
    assert list((tmp_path / "events").glob("events.out.tfevents.*"))


def test_steps_after_the_checkpoint_are_taken_again(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 8))
    before = (tmp_path / "log.jsonl").read_text().splitlines()
    write(tmp_path, 4, range(5, 7))
    after = (tmp_path / "log.jsonl").read_text().splitlines()
    assert after[:4] == before[:4]
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_what_was_written_last_is_known_and_a_rollback_never_forgotten(tmp_path: Path) -> None:
    """Also where the run goes on from before the checkpoint that it went back to: that one was damaged."""
    write(tmp_path, 0, range(1, 8))
    write(tmp_path, 7, (5,), event="rollback")
    run_log = RunLog(tmp_path, MAIN, 3)
    assert run_log.last("train")["step"] == 3 and run_log.last("rollback")["step"] == 5 and run_log.last("skip") == {}
    run_log.close()
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 5]


def test_a_new_run_in_an_old_folder_starts_its_log_again(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 4))
    write(tmp_path, 3, (2,), event="rollback")
    write(tmp_path, 0, range(1, 2))
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1]


@pytest.mark.parametrize("kept", [1, 10, 25])
def test_a_torn_last_line_is_left_out(tmp_path: Path, kept: int) -> None:
    write(tmp_path, 0, range(1, 4))
    path = tmp_path / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:kept])
    assert [line["step"] for line in read_log(path)] == [1, 2]
    write(tmp_path, 2, range(3, 5))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_values_survive_exactly_and_non_finite_ones_are_read(tmp_path: Path) -> None:
    log = RunLog(tmp_path, MAIN, 0)
    log.write(1, {"loss": 0.1 + 0.2, "grad_norm": float("inf")})
    log.close()
    line = read_log(tmp_path / "log.jsonl")[0]
    assert line["loss"] == 0.1 + 0.2 and line["grad_norm"] == float("inf")


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    log = RunLog(tmp_path, World(1, 2, torch.device("cpu")), 0)
    log.write(1, {"loss": 0.5})
    log.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rank", "said"), [(0, ["information", "warning"]), (3, ["rank 3: warning"])])
def test_only_the_first_process_tells_everything(rank: int, said: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        setup(rank)
        logging.getLogger("a").info("information")
        logging.getLogger("a").warning("warning")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(False)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(said) and all(line.endswith(end) for line, end in zip(lines, said, strict=True))
