"""The batch files on a real Slurm: what a person submits is watched, interrupted, queued again and finished."""

import contextlib
import json
import shutil
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from engine import slurm
from engine.log import read_log
from tests.launch import ROOT, run
from tests.slurm.cluster import SCRIPTS, Cluster, logs, missing

STEPS = 60
TINY = [
    *["train.warmup_epochs=0", "train.warmup_steps=5", "train.batch_size=16", "train.picture_epochs=0"],
    *["train.log_steps=1", "train.save_epochs=0", "train.eval_epochs=0", "fcmae.decoder_dim=16"],
    "encoder.kwargs={output_stride: 8, depths: [1, 1, 1, 1], dims: [8, 16, 16, 24]}",
]
RUN = ["digits_fcmae", "data.path=images.txt", *TINY, f"train.steps={STEPS}", "data.workers=1"]


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_log(folder / "log.jsonl") if line["event"] == "train"}


def steps_done(folder: Path) -> int:
    return max(losses(folder), default=0) if (folder / "log.jsonl").is_file() else 0


def ranks(desk: Path) -> int:
    """Processes of the run submitted from ``desk`` that have begun, be it with imports."""
    count = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            count += process.cmdline()[1:4] == ["-u", "-m", "pretrain"] and process.cwd() == str(desk)
    return count


def wait_for_step(cluster: Cluster, job: str, folder: Path, step: int, shown: Path) -> None:
    deadline = time.monotonic() + 300
    while steps_done(folder) < step:
        assert time.monotonic() < deadline and cluster.job(job)["JobState"] in ("PENDING", "RUNNING", "CONFIGURING"), (
            f"{cluster.job(job)}\n{logs(shown)}"
        )
        time.sleep(0.05)


@pytest.fixture
def desk(tmp_path: Path, images: Path) -> Path:
    """Where jobs are submitted, with the images beside: every path in them is relative."""
    shutil.copy(images, tmp_path / "images.txt")
    return tmp_path


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """The run that the interrupted ones must equal, without Slurm."""
    folder = tmp_path_factory.mktemp("unbroken")
    words = ["-m", "pretrain", *RUN, f"data.path={images}", f"output_dir={folder}"]
    run(words, 2, folder / "said")
    return folder


def assert_same(folder: Path, unbroken: Path) -> None:
    assert losses(folder) == losses(unbroken) and list(losses(folder)) == list(range(1, STEPS + 1))
    left, right = (load_file(place / "encoder.safetensors") for place in (folder, unbroken))
    assert left.keys() == right.keys() and all(left[key].equal(right[key]) for key in left)


def test_who_is_who(cluster: Cluster, desk: Path) -> None:
    """Tasks of a step find each other; batch scripts and shells are lone processes, wherever they were started."""
    program = (
        "import json, os; from engine import slurm; slurm.environment(); "
        "print(json.dumps({key: os.environ.get(key) for key in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')}))"
    )
    (desk / "ask.py").write_text(program)
    ask = f"env PYTHONPATH={ROOT} {ROOT}/.venv/bin/python {desk}/ask.py"
    script = desk / "who.sh"
    script.write_text(f"#!/bin/bash\n{ask}\nsrun {ask}\nsrun -N1 -n2 --overlap -w 127.0.0.2 {ask}\n")
    job = cluster.sbatch("-N2", "--ntasks-per-node=2", "-oasked", script, cwd=desk)
    assert cluster.end(job, desk)["JobState"] == "COMPLETED"
    batch, *tasks = [json.loads(line) for line in (desk / "asked").read_text().splitlines()]
    assert not any(batch.values())
    for step, (found, first) in enumerate(((tasks[:4], "127.0.0.1"), (tasks[4:], "127.0.0.2"))):
        assert sorted((found["RANK"], found["LOCAL_RANK"]) for found in found) == sorted(
            (str(rank), str(rank % 2)) for rank in range(len(found))
        )
        assert {task["WORLD_SIZE"] for task in found} == {str(len(found))}
        assert {task["MASTER_ADDR"] for task in found} == {first}
        assert {task["MASTER_PORT"] for task in found} == {str(slurm.port(int(job), step))}
    assert not any(json.loads(cluster.call("salloc", "-Q", "-N2", "-n2", *ask.split())).values())
    assert not any(json.loads(cluster.call("srun", "-Q", "-n1", *ask.split())).values())
    # Submitted from within a step, whose variables it inherits.
    submit = f"[ $SLURM_PROCID = 0 ] || exit 0; sbatch -W -n1 -oinherited --wrap '{ask}'"
    cluster.call("srun", "-Q", "-n3", "bash", "-c", submit, cwd=desk)
    assert not any(json.loads((desk / "inherited").read_text()).values())


def test_nothing_of_a_cluster_is_left(tmp_path: Path) -> None:
    if why := missing():
        pytest.skip(why)
    other = Cluster(Path(tempfile.mkdtemp(prefix="slurm")))
    other.start()
    job = other.sbatch("-N1", "--wrap", "echo $$ >job.pid; exec sleep 600", cwd=tmp_path)
    other.wait(job, lambda _: (tmp_path / "job.pid").is_file(), 30, tmp_path)
    pids = [int(path.read_text()) for path in (*other.folder.glob("*.pid"), tmp_path / "job.pid")]
    assert len(pids) == 5 and all(psutil.pid_exists(pid) for pid in pids)
    other.stop()
    left = [process for process in psutil.process_iter() if process.pid in pids]
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE], left
    shutil.rmtree(other.folder)


def test_the_first_host_is_slurms(cluster: Cluster) -> None:
    for nodes in ("gpu[007-009,12],old3", "old3,gpu[1-2]", "a", "r[0-1]n[3,5-7]", "127.0.0.[1-2]"):
        assert slurm.first_host(nodes) == cluster.call("scontrol", "show", "hostnames", nodes).split()[0]


def test_interrupted_run_equals_one_without_a_break(cluster: Cluster, desk: Path, unbroken: Path) -> None:
    """Warned of its time limit while it still starts, then preempted by an urgent job; each time it queues itself again."""
    folder = desk / "run"
    job = cluster.sbatch("-N2", "--ntasks-per-node=1", SCRIPTS / "pretrain.sbatch", *RUN, "output_dir=run", cwd=desk)
    cluster.wait(job, lambda _: ranks(desk) == 2, 300, desk)
    cluster.call("scancel", "--signal=USR1", job)
    cluster.wait(job, lambda job: job["Restarts"] == "1", 300, desk)
    assert 1 <= steps_done(folder) < 5, "the signal came too late to show anything"

    cluster.wait(job, lambda job: job["JobState"] == "RUNNING", 300, desk)
    wait_for_step(cluster, job, folder, steps_done(folder) + 6, desk)
    cluster.call("scontrol", "update", "PartitionName=test", "GraceTime=30")
    urgent = cluster.sbatch("-N2", "-n8", "-purgent", "-ourgent", "--wrap", "sleep 1", cwd=desk)
    cluster.wait(job, lambda job: job["Restarts"] == "2", 300, desk)
    assert steps_done(folder) < STEPS, "preempted too late to show anything"
    assert cluster.end(urgent, desk)["JobState"] == "COMPLETED"

    ended = cluster.end(job, desk)
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("COMPLETED", "2", "0:0"), logs(desk)
    assert_same(folder, unbroken)
    assert sorted(path.name for path in (desk / f"slurm-{job}").iterdir()) == ["rank0.log", "rank1.log"]
    said = (desk / f"slurm-{job}" / "rank0.log").read_text()
    assert said.count("continuing from") == 2
    told = (desk / f"slurm-{job}.out").read_text()
    assert [f"(restart {turn})" in told for turn in range(4)] == [True, True, True, False] and "finished" in told


def test_a_run_that_fails_is_not_repeated(cluster: Cluster, desk: Path) -> None:
    words = [*RUN, "data.path=nowhere", "output_dir=run"]
    job = cluster.sbatch("-N2", "--ntasks-per-node=1", SCRIPTS / "pretrain.sbatch", *words, cwd=desk)
    ended = cluster.end(job, desk)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    told = (desk / f"slurm-{job}.out").read_text()
    assert "failed with code" in told and "nowhere" in told


def test_a_cancelled_run_stays_cancelled(cluster: Cluster, desk: Path) -> None:
    words = [*RUN, "output_dir=run", "train.steps=5000"]
    job = cluster.sbatch("-N1", "--ntasks-per-node=1", SCRIPTS / "pretrain.sbatch", *words, cwd=desk)
    wait_for_step(cluster, job, desk / "run", 2, desk)
    cluster.call("scancel", job)
    cluster.wait(job, lambda job: job["JobState"] == "CANCELLED" and job["EndTime"] != "Unknown", 30, desk)
    time.sleep(3)
    assert cluster.job(job)["JobState"] == "CANCELLED" and cluster.job(job)["Restarts"] == "0"
    assert any((desk / "run" / "checkpoints").glob("step*"))


def test_sweep(cluster: Cluster, desk: Path) -> None:
    """A run for every line of the file; an index beyond it says so."""
    (desk / "settings.txt").write_text("# rates\nfcmae.mask_ratio=0.5\n\nfcmae.mask_ratio=0.7 optim.lr=1e-3\n")
    words = ["settings.txt", *RUN, "train.steps=2", "train.warmup_steps=0", "data.workers=0"]
    job = cluster.sbatch("--array=1-3", "-n1", SCRIPTS / "sweep.sbatch", *words, cwd=desk)
    ended = [cluster.end(f"{job}_{index}", desk) for index in (1, 2, 3)]
    assert [found["JobState"] for found in ended] == ["COMPLETED", "COMPLETED", "FAILED"], logs(desk)
    runs = [desk / "output/sweep" / name for name in ("fcmae.mask_ratio=0.5", "fcmae.mask_ratio=0.7_optim.lr=1e-3")]
    assert "asks for line 3 of settings.txt, which has 2: --array=1-2" in (desk / f"slurm-{job}_3.out").read_text()
    assert [path.name for path in sorted((desk / "output/sweep").iterdir())] == [path.name for path in runs]
    assert all(steps_done(path) == 2 and (desk / f"slurm-{job}_1" / "rank0.log").is_file() for path in runs)


def test_deepspeeds_launcher(cluster: Cluster, desk: Path, unbroken: Path) -> None:
    """A hostfile made from the allocation, no ssh; warned, it saves, queues itself again and finishes."""
    folder = desk / "run"
    script = SCRIPTS / "deepspeed.sbatch"
    job = cluster.sbatch("-N2", "--ntasks-per-node=1", script, *RUN, "output_dir=run", cwd=desk)
    wait_for_step(cluster, job, folder, 6, desk)
    cluster.call("scancel", "--signal=USR1", job)
    cluster.wait(job, lambda job: job["Restarts"] == "1", 300, desk)
    assert 6 <= steps_done(folder) < STEPS, "the signal came too late to show anything"
    ended = cluster.end(job, desk)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), logs(desk)
    assert_same(folder, unbroken)
    assert (desk / f"slurm-{job}" / "hostfile").read_text() == "127.0.0.1 slots=1\n127.0.0.2 slots=1\n"


@pytest.mark.nightly
def test_time_limit(cluster: Cluster, desk: Path) -> None:
    """Slurm itself warns the ranks; they queue the job again, and its next turn continues."""
    words = ["--time=3", "--signal=USR1@150", "-N2", "--ntasks-per-node=1", SCRIPTS / "pretrain.sbatch"]
    job = cluster.sbatch(*words, *RUN, "output_dir=run", "train.steps=2000", cwd=desk)
    cluster.wait(job, lambda job: job["Restarts"] == "1", 300, desk)
    before = steps_done(desk / "run")
    assert before >= 1
    cluster.wait(job, lambda job: job["JobState"] == "RUNNING", 300, desk)
    wait_for_step(cluster, job, desk / "run", before + 1, desk)
    assert "continuing from" in (desk / f"slurm-{job}" / "rank0.log").read_text()
    cluster.call("scancel", job)
