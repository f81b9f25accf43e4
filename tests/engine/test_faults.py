"""Runs of two processes that something really happens to: each ends with the losses and weights of one left in peace."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.faults import EXIT_REQUEUE
from engine.log import read_log
from models.interop.zero import read_zero
from tests.engine import faulty
from tests.engine.faulty import STEPS
from tests.launch import ROOT
from tests.tables import replace_table

PATIENCE = 120
"""Seconds that a run may take on a busy machine."""


def later(*values: Any) -> Any:
    """A case that the nightly tests have."""
    return pytest.param(*values, marks=pytest.mark.nightly)


def wait(processes: list[BaseProcess]) -> list[int | None]:
    """Exit codes; a run that hangs is killed, and fails."""
    until = time.monotonic() + PATIENCE
    try:
        for process in processes:
            process.join(max(until - time.monotonic(), 0))
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


class Place:
    """A folder for one run, started as often as asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "faulty.yaml").write_text(faulty.RECIPE)

    def words(self, *settings: str) -> list[str]:
        return [str(self.folder / "faulty.yaml"), f"output_dir={self.output}", *settings]

    def __call__(self, *settings: str, processes: int = 2) -> list[int | None]:
        """Exit codes of a run."""
        self.before, self.began = len(self.losses()), time.time()
        return wait(faulty.start(self.words(*settings), self.folder / "log", processes))

    def recovery(self) -> tuple[int, float]:
        """Of the last leg: steps that were taken again, and seconds from its start to its first step."""
        lines = [line for line in read_log(self.output / "log.jsonl") if line["event"] == "train"]
        again = [line for line in lines if line["time"] > self.began]
        return self.before - (again[0]["step"] - 1), again[0]["time"] - self.began

    def said(self, rank: int) -> str:
        return Path(f"{self.folder}/log{rank}").read_text()

    def losses(self) -> list[tuple[int, float]]:
        path = self.output / "log.jsonl"
        lines = read_log(path) if path.is_file() else []
        return [(line["step"], line["loss"]) for line in lines if line["event"] == "train"]

    def wait_for(self, steps: int) -> None:
        """Until the run that goes on has logged so many steps."""
        until = time.monotonic() + PATIENCE
        while len(self.losses()) < steps:
            assert time.monotonic() < until, f"{len(self.losses())} of {steps} steps"
            time.sleep(0.05)

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.output / "checkpoints").iterdir() if path.is_dir())

    def end(self) -> dict[str, torch.Tensor]:
        last = self.output / f"checkpoints/step{STEPS:08d}"
        weights, _ = read_zero(last)
        average = torch.load(last / "ema.pt", weights_only=True)
        return weights | {f"average.{name}": value for name, value in average.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Place]:
    """Runs that nothing happens to, by their DeepSpeed configuration."""
    made: dict[str, Place] = {}

    def run(deepspeed: str) -> Place:
        if deepspeed not in made:
            made[deepspeed] = Place(tmp_path_factory.mktemp(deepspeed))
            assert made[deepspeed](f"deepspeed={deepspeed}") == [0, 0], made[deepspeed].said(0)
        return made[deepspeed]

    return run


ROWS: dict[str, tuple[int, float]] = {}


@pytest.fixture(scope="module", autouse=True)
def _table() -> Iterator[None]:
    """With WRITE_DOCS=1, the table in docs/faults.md is what this run measured."""
    yield
    if os.environ.get("WRITE_DOCS"):
        rows = [f"| {fault} | nothing | {again} | {seconds:.1f} |" for fault, (again, seconds) in ROWS.items()]
        replace_table(
            ROOT / "docs/faults.md", "| what happened | lost | steps taken again | seconds until the next step |", rows
        )


def assert_same(place: Place, whole: Place, fault: str) -> None:
    """Nothing was lost: every step's loss, the weights and their average, bit for bit."""
    ROWS[fault] = place.recovery()
    assert place.losses() == whole.losses() and len(place.losses()) == STEPS
    ours, theirs = place.end(), whole.end()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(
    "deepspeed", ["zero0_fp32", later("zero1_bf16"), later("zero2_fp32"), "zero3_fp32", "zero3_bf16_offload"]
)
def test_a_killed_process_ends_the_other_and_the_run_continues(
    deepspeed: str, tmp_path: Path, whole: Callable[[str], Place]
) -> None:
    place = Place(tmp_path)
    assert place(f"deepspeed={deepspeed}", "fault.kind=SIGKILL") == [1, -signal.SIGKILL]
    last = [line for line in place.said(0).splitlines() if "error: " in line]
    assert len(last) == 1 and "lost the connection to another process" in last[0] and "step00000010" in last[0]
    assert place(f"deepspeed={deepspeed}") == [0, 0]
    assert_same(place, whole(deepspeed), f"SIGKILL of one process, {deepspeed}")


WRITES = [
    ("zero0_fp32", 0, "mp_rank_00_model_states.pt"),
    ("zero1_bf16", 1, "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    later("zero2_fp32", 0, "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    ("zero3_fp32", 1, "zero_pp_rank_1_mp_rank_00_model_states.pt"),
    later("zero0_fp32", 1, "rank1.pt"),
    ("zero0_fp32", 0, "ema.pt"),
    later("zero0_fp32", 0, "progress.json"),
    ("zero3_fp32", 0, "hashes.json"),
    ("zero0_fp32", 0, "rename step"),
    later("zero1_bf16", 0, "latest"),
    ("zero0_fp32", 0, "rename removing_"),
    later("zero2_fp32", 0, "remove removing_"),
]


@pytest.mark.parametrize(("deepspeed", "rank", "part"), WRITES)
def test_killed_while_a_checkpoint_is_written(
    deepspeed: str, rank: int, part: str, tmp_path: Path, whole: Callable[[str], Place]
) -> None:
    place, settings = Place(tmp_path), (f"deepspeed={deepspeed}", "train.keep_checkpoints=1")
    codes = place(*settings, f"fault.kind=write {part}", f"fault.rank={rank}")
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1, place.said(0)
    assert place(*settings) == [0, 0], place.said(0)
    assert " is damaged: " not in place.said(
        0
    )  # what was half written or half removed was never taken for a checkpoint
    assert "continuing from" in place.said(0)
    assert place.checkpoints() == [f"step{STEPS:08d}"]
    assert_same(place, whole(deepspeed), f"SIGKILL of rank {rank} at `{part}` of a checkpoint, {deepspeed}")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("deepspeed", ["zero0_fp32", "zero3_fp32"])
def test_a_signal_to_one_process_stops_all_with_a_checkpoint(
    name: str, deepspeed: str, tmp_path: Path, whole: Callable[[str], Place]
) -> None:
    place = Place(tmp_path)
    assert place(f"deepspeed={deepspeed}", f"fault.kind={name}") == [EXIT_REQUEUE, EXIT_REQUEUE]
    assert place.checkpoints()[-1] == "step00000013"  # the step in which it came, between two that were due
    assert "stopped by a signal after step 13; the same command continues from" in place.said(0)
    assert place(f"deepspeed={deepspeed}") == [0, 0]
    assert_same(place, whole(deepspeed), f"{name} to one process, {deepspeed}")


@pytest.mark.parametrize(
    ("name", "deepspeed", "step"),
    [("SIGTERM", "zero0_fp32", 12), ("SIGUSR1", "zero3_fp32", 24), ("SIGKILL", "zero0_fp32", 24)],
)
def test_an_evaluation_that_is_cut_short_is_done_again(
    name: str, deepspeed: str, step: int, tmp_path: Path, whole: Callable[[str], Place]
) -> None:
    """A signal does not wait for the end of an evaluation, which takes 100 seconds on the process it did not come to."""

    def evaluations(place: Place) -> list[tuple[int, float, float]]:
        lines = [line for line in read_log(place.output / "log.jsonl") if line["event"] == "evaluate"]
        return [(line["step"], line["bias"], line["bias_without_ema"]) for line in lines]

    place, words = Place(tmp_path), (f"deepspeed={deepspeed}", "train.eval_epochs=2", "train.timeout_minutes=0.5")
    began = time.monotonic()
    codes = place(*words, f"fault.kind=evaluation {name}", f"fault.step={step}")
    assert time.monotonic() - began < 60
    assert codes == ([1, -signal.SIGKILL] if name == "SIGKILL" else [EXIT_REQUEUE] * 2), place.said(0)
    assert [line[0] for line in evaluations(place)] == list(range(12, step, 12))
    last = 10 if name == "SIGKILL" and step < STEPS else step
    assert place.checkpoints()[-1] == f"step{last:08d}"
    assert place(*words) == [0, 0], place.said(0)
    assert [line[0] for line in evaluations(place)] == [12, 24]
    assert place.losses() == whole(deepspeed).losses()
    assert evaluations(place)[-1] == evaluations(whole(deepspeed))[-1]


@pytest.mark.parametrize("kind", ["hang", "SIGSTOP"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_hangs_is_named(kind: str, rank: int, tmp_path: Path, whole: Callable[[str], Place]) -> None:
    """Rank 0 keeps the meeting point: stopped, it cannot be asked, which is what the other says."""
    place = Place(tmp_path)
    words = place.words(f"fault.kind={kind}", f"fault.rank={rank}", "train.timeout_minutes=0.05")
    processes = faulty.start(words, tmp_path / "log")
    processes[1 - rank].join(PATIENCE)
    if kind == "SIGSTOP":
        processes[rank].kill()
    assert wait(processes)[1 - rank] == 1
    said = place.said(1 - rank)
    told = next((line for line in said.splitlines() if line.startswith(f"error: rank {1 - rank} has been ")), said)
    assert "in the backward pass in step 13 for " in told or "agreeing on the step in step 13 for " in told
    if (kind, rank) == ("SIGSTOP", 0):
        assert "the other processes cannot be asked (their meeting point, on rank 0, does not answer)" in told
    elif kind == "SIGSTOP":
        assert "it waits for rank 1, which is" in told and "shows no sign of life" in told
    else:
        assert f"it waits for rank {rank}, which is in the forward pass in step 13" in told
        assert f"error: rank {rank} has been in the forward pass in step 13" in place.said(rank)
        assert "in forward" in place.said(rank)  # where its threads stand
    assert place() == [0, 0]
    assert_same(place, whole("zero0_fp32"), f"rank {rank} {'stopped' if kind == 'SIGSTOP' else 'hangs'}")


@pytest.mark.parametrize(
    ("kind", "deepspeed"),
    [
        *[("nan_loss", "zero0_fp32"), ("inf_gradient", "zero0_fp32"), later("nan_loss", "zero1_fp32")],
        *[("inf_gradient", "zero1_fp32"), ("nan_loss", "zero2_fp32"), later("inf_gradient", "zero2_fp32")],
        *[later("nan_loss", "zero3_fp32"), ("inf_gradient", "zero3_fp32")],
    ],
)
def test_a_step_that_is_not_finite_is_left_out_and_counted(kind: str, deepspeed: str, tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert place(f"deepspeed={deepspeed}", f"fault.kind={kind}", "fault.times=2") == [0, 0], place.said(0)
    assert [step for step, _ in place.losses()] == [step for step in range(1, STEPS + 1) if step not in (13, 14)]
    lines = read_log(place.output / "log.jsonl")
    assert [(line["step"], line["skipped_steps"]) for line in lines if line["event"] == "skip"] == [(13, 1), (14, 2)]
    assert lines[-2]["skipped_steps"] == 2
    assert all(bool(torch.isfinite(value).all()) for value in place.end().values())
    what = "the loss is not finite on rank 1" if kind == "nan_loss" else "the gradient is not finite"
    assert f"{what} at step 13: the step is left out" in place.said(0)


@pytest.mark.parametrize("deepspeed", ["zero0_fp32", "zero2_fp32", "zero3_fp32"])
def test_too_many_such_steps_go_back_to_the_last_checkpoint_with_a_lower_rate(deepspeed: str, tmp_path: Path) -> None:
    place = Place(tmp_path)
    words = ("fault.kind=nan_loss", "train.max_skipped=2", "train.nonfinite=rollback", "train.rollback_lr=0.25")
    assert place(f"deepspeed={deepspeed}", *words, "fault.times=6") == [0, 0], place.said(0)
    lines = read_log(place.output / "log.jsonl")
    # Three steps twice: two rollbacks, each to step 10.
    assert [line["rollbacks"] for line in lines if line["event"] == "rollback"] == [1, 2]
    assert "the last of 3 such steps in a row" in place.said(0)
    train = {line["step"]: line for line in lines if line["event"] == "train"}
    assert sorted(train) == list(range(1, STEPS + 1))
    calm = Place(tmp_path / "calm")
    assert calm(f"deepspeed={deepspeed}") == [0, 0]
    rates = {line["step"]: line["lr"] for line in read_log(calm.output / "log.jsonl") if line["event"] == "train"}
    assert all(line["lr"] == pytest.approx(rates[step] * (1 if step <= 10 else 1 / 16)) for step, line in train.items())
    # A later leg keeps the lower rate.
    progress = json.loads((place.output / f"checkpoints/step{STEPS:08d}/progress.json").read_text())
    assert progress["rollbacks"] == 2 and progress["skipped"] == 6


def test_a_rollback_is_remembered_where_the_run_is_killed_before_its_next_checkpoint(tmp_path: Path) -> None:
    place, words = Place(tmp_path), ("train.nonfinite=rollback", "train.max_skipped=2")
    assert place(*words, "fault.kind=rollback SIGKILL", "fault.times=3") == [1, -signal.SIGKILL]
    assert place.checkpoints()[-1] == "step00000010", "none after the rollback"
    assert place(*words) == [0, 0], place.said(0)
    calm = Place(tmp_path / "calm")
    assert calm() == [0, 0]
    rates, usual = (
        {line["step"]: line["lr"] for line in read_log(one.output / "log.jsonl") if line["event"] == "train"}
        for one in (place, calm)
    )
    assert rates == {step: rate * (1 if step <= 10 else 0.5) for step, rate in usual.items()}
    assert len(rates) == STEPS
    assert read_log(place.output / "log.jsonl")[-2]["skipped_steps"] == 3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("train.max_skipped=2",), "at step 15, the last of 3 such steps in a row"),
        (("train.nonfinite=rollback", "train.max_rollbacks=2"), "after 2 rollbacks"),
        (("train.max_skipped=0", "train.save_steps=0"), "there is no checkpoint yet"),
    ],
)
def test_a_run_that_cannot_be_helped_stops_in_one_line(words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert place("fault.kind=nan_loss", "fault.times=1000", *words) == [1, 1]
    errors = [line for line in place.said(0).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and told in errors[0] and "Traceback" not in place.said(0) + place.said(1)


DAMAGES = [
    (file, how)
    for how in ("truncated", "changed", "missing")
    for file in ("mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt", "rank1.pt", "progress.json")
]


@pytest.mark.parametrize(("file", "how"), [*DAMAGES, ("hashes.json", "truncated"), ("hashes.json", "missing")])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    file: str, how: str, tmp_path: Path, whole: Callable[[str], Place]
) -> None:
    place = Place(tmp_path)
    assert place("deepspeed=zero1_bf16", "fault.kind=SIGKILL", "fault.step=12") == [1, -signal.SIGKILL]
    path = place.output / "checkpoints/step00000010" / file
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        changed = bytes([content[len(content) // 2] ^ 1])
        half = content[: len(content) // 2]
        path.write_bytes(half if how == "truncated" else half + changed + content[len(half) + 1 :])
    assert place("deepspeed=zero1_bf16") == [0, 0], place.said(0)
    [line] = [line for line in place.said(0).splitlines() if " is damaged: " in line]
    assert "step00000010" in line and file in line and "step00000005, the one before it, is used" in line
    assert "damaged_step00000010" in place.checkpoints()
    assert_same(place, whole("zero1_bf16"), f"`{file}` {how}")


LEGS = [
    (("zero1_fp32", 2, 1), ("zero3_fp32", 1, 2)),
    (("zero0_fp32", 1, 1), ("zero2_fp32", 2, 2)),
    (("zero3_bf16", 2, 1), ("zero0_fp32", 2, 1)),
]


@pytest.mark.parametrize(("first", "second"), LEGS)
def test_a_run_goes_on_in_another_layout_with_the_images_that_are_left(
    first: tuple[str, int, int], second: tuple[str, int, int], tmp_path: Path, whole: Callable[[str], Place]
) -> None:
    """Stopped in the middle of an epoch; other processes, ZeRO stage and accumulation after that."""
    place = Place(tmp_path)
    for (deepspeed, processes, parts), stop in ((first, "fault.kind=SIGTERM"), (second, "fault.kind=none")):
        words = (f"deepspeed={deepspeed}", f"train.accumulation={parts}", stop, "fault.rank=0", "fault.step=9")
        codes = place(*words, processes=processes)
    assert codes == [0] * processes, place.said(0)
    assert "it is shared out anew" in place.said(0)
    seen = [line for path in place.output.glob("seen*.txt") for line in path.read_text().splitlines()]
    assert sorted(seen) == sorted(f"{epoch} {i}" for epoch in range(4) for i in range(STEPS))
    # The noise of each process is its own, and small: a weight or a moment gone astray would be seen.
    losses, expected = dict(place.losses()), dict(whole("zero0_fp32").losses())
    assert sorted(losses) == sorted(expected)
    assert max(abs(losses[step] - expected[step]) for step in losses) < 0.2
    place.end()


def test_where_no_checkpoint_is_whole_nothing_is_begun_anew(tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert place("fault.kind=SIGKILL", "fault.step=7") == [1, -signal.SIGKILL]
    (place.output / "checkpoints/step00000005/rank0.pt").write_bytes(b"")
    assert place() == [2, 2]
    assert "error: no checkpoint in" in place.said(0) and "is whole: remove that folder" in place.said(0)
    assert "Traceback" not in place.said(0) + place.said(1)


def test_a_full_disk_costs_checkpoints_but_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one process meets it: the other must not wait for ever. With room again the same command continues."""
    place = Place(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(faulty, "_process", _second_without_room)
        codes = place("deepspeed=zero1_fp32")
    assert codes == [1, 1]
    said = place.said(0)
    assert said.count("cannot be written: [Errno 27] File too large (rank 1)") == 5, (
        said
    )  # at 5, 10, 15, 20 and the end
    assert "error: the checkpoint of step 24 could not be written" in said and "make room" in said
    assert place.checkpoints() == []  # no half of one
    assert len(place.losses()) == STEPS
    assert place("deepspeed=zero1_fp32") == [0, 0]
    assert len(place.losses()) == STEPS


_process = faulty._process


def _second_without_room(words: list[str], log: str, rank: int, size: int, port: int) -> None:
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    _process(words, log, rank, size, port)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    """A file stands in the place of the run folder: root may write into read-only ones."""
    place = Place(tmp_path)
    place.output.write_text("in the way")
    assert wait(faulty.start(place.words(), tmp_path / "log")) == [2, 2]
    assert "cannot be written" in place.said(0) and "Traceback" not in place.said(0) + place.said(1)


def test_a_folder_that_turns_unwritable_costs_checkpoints_but_not_the_run(
    tmp_path: Path, whole: Callable[[str], Place]
) -> None:
    """Nothing can be made in checkpoints/ in the middle of the run, which is a file by then."""
    place, go = Place(tmp_path), tmp_path / "go"
    processes = faulty.start(place.words(f"fault.kind=wait {go}"), tmp_path / "log")
    place.wait_for(12)
    checkpoints, aside = place.output / "checkpoints", place.output / "aside"
    checkpoints.rename(aside)
    checkpoints.write_text("in the way")
    go.touch()
    assert wait(processes) == [1, 1]
    said = place.said(0)
    assert said.count("cannot be written: [Errno 20] Not a directory") == 3, said  # at 15, 20 and the end
    assert "error: the checkpoint of step 24 could not be written" in said and "Traceback" not in said
    checkpoints.unlink()
    aside.rename(checkpoints)
    assert place() == [0, 0]
    assert_same(place, whole("zero0_fp32"), "`checkpoints/` cannot be written from step 13 on")


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, whole: Callable[[str], Place]) -> None:
    place = Place(tmp_path)
    go = tmp_path / "go"
    first = faulty.start(place.words(f"fault.kind=wait {go}"), tmp_path / "log")
    try:
        place.wait_for(12)
        code = "import sys, engine.lock as lock; lock.PATIENCE = 1; from tests.engine.faulty import PROGRAM, cli; "
        command = [sys.executable, "-c", f"{code} sys.exit(cli.main(PROGRAM, sys.argv[1:]))", *place.words()]
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    finally:
        go.touch()
        codes = wait(first)
    assert second.returncode == 2 and f"is in use by another run (process {first[0].pid} on " in second.stderr
    assert codes == [0, 0]
    assert place.losses() == whole("zero0_fp32").losses()


def test_a_killed_launcher_takes_its_processes_with_it_after_a_checkpoint(
    tmp_path: Path, whole: Callable[[str], Place]
) -> None:
    place = Place(tmp_path)
    go = tmp_path / "go"
    words = place.words(f"fault.kind=wait {go}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env: dict[str, Any] = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "launcher").open("w") as output:
        launcher = subprocess.Popen(
            [*command, "-m", "tests.engine.faulty", *words], cwd=ROOT, env=env, stdout=output, stderr=output
        )
    place.wait_for(12)
    launcher.kill()
    launcher.wait()
    go.touch()
    until = time.monotonic() + PATIENCE
    while "stopped by a signal after step" not in (tmp_path / "launcher").read_text():
        assert time.monotonic() < until, (tmp_path / "launcher").read_text()
        time.sleep(0.05)
    assert place() == [0, 0]
    assert_same(place, whole("zero0_fp32"), "SIGKILL of the launcher (torchrun)")
