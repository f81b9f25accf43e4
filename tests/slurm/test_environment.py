"""What a process concludes from the variables that Slurm gives it, and what it asks Slurm for."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import slurm
from engine.config import ConfigError
from engine.faults import EXIT_REQUEUE
from run.slurm.rank import STOPPED
from tests.launch import ROOT

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

Concluded = Callable[[dict[str, str]], dict[str, str]]

# As Slurm 22.05 sets them, reduced to what tells one kind of process from another.
JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "gpu[07-09]", "SLURM_NTASKS": "6", "SLURM_NPROCS": "6"}
BATCH = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_TASKS_PER_NODE": "2(x3)"}
STEP = BATCH | {
    "SLURM_STEP_ID": "1",
    "SLURM_STEPID": "1",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}
INTERACTIVE = STEP | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
LONE_STEP = INTERACTIVE | {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}
BATCH_FROM_STEP = STEP | {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.fixture
def concluded(monkeypatch: pytest.MonkeyPatch) -> Concluded:
    """Call :func:`environment` with these variables -> what it set."""

    def call(variables: dict[str, str]) -> dict[str, str]:
        monkeypatch.setattr(os, "environ", dict(variables))
        slurm.environment()
        return {key: os.environ[key] for key in os.environ if variables.get(key) != os.environ[key]}

    return call


def test_a_task_of_a_step_knows_its_place(concluded: Concluded) -> None:
    port = str(slurm.port(4711, 1))
    assert concluded(STEP) == dict(zip(NAMES, ("5", "6", "1", "gpu08", port), strict=True))
    without_list = {key: value for key, value in STEP.items() if key != "SLURM_STEP_NODELIST"}
    assert concluded(without_list)["MASTER_ADDR"] == "gpu07"


@pytest.mark.parametrize(
    "variables",
    [{}, JOB, BATCH, INTERACTIVE, LONE_STEP, BATCH_FROM_STEP, STEP | {"RANK": "3"}],
    ids=["outside", "salloc", "batch", "interactive", "one task", "batch from a step", "launcher"],
)
def test_others_are_left_alone(variables: dict[str, str], concluded: Concluded) -> None:
    assert concluded(variables) == {}


def test_an_address_that_was_given_stays(concluded: Concluded) -> None:
    found = concluded(STEP | {"MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "29500"})
    assert found == {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1"}


def test_contradicting_counts_are_refused(concluded: Concluded) -> None:
    with pytest.raises(ConfigError, match=r"SLURM_NTASKS=6 and SLURM_STEP_NUM_TASKS=2 .* --preserve-env"):
        concluded(STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"})


def test_gpus_of_a_task(concluded: Concluded) -> None:
    assert concluded(STEP | {"CUDA_VISIBLE_DEVICES": "0,1"})["LOCAL_RANK"] == "1"
    assert concluded(STEP | {"CUDA_VISIBLE_DEVICES": ""})["LOCAL_RANK"] == "1"  # none: a run on CPUs
    assert concluded(STEP | {"CUDA_VISIBLE_DEVICES": "3"})["LOCAL_RANK"] == "0"  # its own: --gpus-per-task=1
    with pytest.raises(ConfigError, match=r"process 3 of this node sees 2 GPUs .* --gpus-per-node"):
        concluded(STEP | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_LOCALID": "3"})


def rank(*command: str, marker: Path) -> subprocess.CompletedProcess[str]:
    """What run/slurm/rank.py makes of a command."""
    words = [sys.executable, str(ROOT / "run/slurm/rank.py"), str(marker), *command]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


def test_exit_code_of_a_rank(tmp_path: Path) -> None:
    """A run that was stopped and has saved is no failure; whatever else ends a run keeps its code."""
    marker = tmp_path / "stopped"
    codes = {command: rank("bash", "-c", command, marker=marker).returncode for command in ("exit 0", "exit 3")}
    codes |= {"killed": rank("bash", "-c", "kill -9 $$", marker=marker).returncode}
    assert codes == {"exit 0": 0, "exit 3": 3, "killed": 137} and not marker.exists()
    assert rank("bash", "-c", "exit 75", marker=marker).returncode == 0 and marker.exists()
    assert STOPPED == EXIT_REQUEUE


def test_signals_wait_for_who_listens(tmp_path: Path) -> None:
    """A program started by rank.py does not die of an early signal, and hears it once it asks for its place."""
    program = (
        "import os, signal; [os.kill(os.getpid(), number) for number in (signal.SIGTERM, signal.SIGUSR1)]; "
        "from engine import slurm; slurm.environment(); heard = []; "
        "[signal.signal(number, lambda number, _: heard.append(number)) for number in (signal.SIGTERM, signal.SIGUSR1)]; "
        "before = list(heard); slurm.environment(); print(before, sorted(heard))"
    )
    done = rank(sys.executable, "-c", program, marker=tmp_path / "stopped")
    assert done.stdout == f"[] {sorted([int(signal.SIGTERM), int(signal.SIGUSR1)])}\n", done.stderr


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[007-009,12],old3", "gpu007"),
        ("old3,gpu[1-2]", "old3"),
        ("a", "a"),
        ("r[0-1]n[3,5-7]", "r0n3"),
        ("gpu-a[10-12].site.org,b", "gpu-a10.site.org"),
        ("127.0.0.[1-2]", "127.0.0.1"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert slurm.first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", "[", "(null)"])
def test_no_list_of_nodes(nodes: str) -> None:
    with pytest.raises(ConfigError, match="set MASTER_ADDR"):
        slurm.first_host(nodes)


def test_jobs_of_a_node_meet_at_different_ports() -> None:
    near = {slurm.port(job, step) for job in range(123_456, 124_456) for step in range(16)}
    assert len(near) == 16_000
    assert all(1024 < port < 32768 for port in near)  # not a system's, nor one that Linux gives to connections
    assert slurm.port(1, 4_294_967_290) in range(12_000, 28_000)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that notes what it is asked and ends with the code in the file ``code``."""
    tool = tmp_path / "scontrol"
    tool.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\n[ ! -e {tmp_path}/code ] || {{ echo "slurm error: Not allowed" >&2; exit 1; }}\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return tmp_path


def test_requeue(scontrol: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert slurm.requeue() is False and not (scontrol / "asked").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert slurm.requeue() is True
    assert (scontrol / "asked").read_text() == "requeue 12\n"
    (scontrol / "code").touch()
    with caplog.at_level(logging.WARNING):
        assert slurm.requeue() is False
    assert "job 12" in caplog.text and "Not allowed" in caplog.text and "submit the same command" in caplog.text
    (scontrol / "scontrol").unlink()
    monkeypatch.setenv("PATH", str(scontrol))
    assert slurm.requeue() is False
