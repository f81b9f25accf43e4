"""torchrun and DeepSpeed's launcher, as the scripts start them: a run that a signal stops is continued, with nothing lost."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from data.digits import write_digits
from engine.log import read_log
from tests.launch import ROOT, run

STEPS = 40
RUN = [
    *["digits_fcmae", f"train.steps={STEPS}", "train.warmup_epochs=0", "train.warmup_steps=5", "train.batch_size=16"],
    *["train.picture_epochs=0", "train.log_steps=1", "train.save_epochs=0", "train.eval_epochs=0"],
    *["fcmae.decoder_dim=16", "encoder.kwargs={output_stride: 8, depths: [1, 1, 1, 1], dims: [8, 16, 16, 24]}"],
]
SCRIPTS = {"torchrun": ["run/torchrun.sh", "pretrain"], "deepspeed": ["run/pretrain.sh"]}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of 40 digits."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    chosen = sorted((folder / "train").rglob("*.png"))[::35][:40]
    (folder / "images.txt").write_text("".join(f"{path}\n" for path in chosen))
    return folder / "images.txt"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, images: Path) -> dict[int, float]:
    """Losses of the run that nothing stops."""
    folder = tmp_path_factory.mktemp("unbroken")
    run(["-m", "pretrain", *RUN, f"data.path={images}", f"output_dir={folder}"], 2, folder / "said")
    return losses(folder)


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_log(folder / "log.jsonl") if line["event"] == "train"}


def start(script: list[str], images: Path, folder: Path) -> subprocess.Popen[bytes]:
    """The script in a session of its own, as a terminal or a batch system gives it; what it says goes to ``said``."""
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"NPROC": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = ["bash", str(ROOT / script[0]), *script[1:], *RUN, f"data.path={images}", f"output_dir={folder}/run"]
    with (folder / "said").open("ab") as said:
        return subprocess.Popen(words, cwd=folder, env=env, stdout=said, stderr=said, start_new_session=True)


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ("torchrun", signal.SIGUSR1),
        ("deepspeed", signal.SIGUSR1),
        pytest.param("torchrun", signal.SIGTERM, marks=pytest.mark.nightly),
        pytest.param("deepspeed", signal.SIGTERM, marks=pytest.mark.nightly),
    ],
)
def test_stopped_and_continued(
    launcher: str, number: signal.Signals, images: Path, unbroken: dict[int, float], tmp_path: Path
) -> None:
    """torchrun hands a signal on to its ranks; with DeepSpeed's launcher it goes to all processes of the session."""
    started = start(SCRIPTS[launcher], images, tmp_path)
    said, log = tmp_path / "said", tmp_path / "run/log.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not log.is_file() or len(losses(tmp_path / "run")) < 4:
            assert started.poll() is None and time.monotonic() < deadline, said.read_text()[-3000:]
            time.sleep(0.05)
        if launcher == "torchrun":
            started.send_signal(number)
        else:
            os.killpg(started.pid, number)
        code = started.wait(60)
        if number == signal.SIGTERM:  # the script itself ends at once, its ranks a step later
            wait_for_the_end_of(started.pid)
    finally:
        end(started)
    before = losses(tmp_path / "run")
    assert 4 <= len(before) < STEPS, "the signal came too late to show anything"
    kept = list((tmp_path / "run/checkpoints").glob("step*"))
    assert [path.name for path in kept] == [f"step{max(before):08d}"], said.read_text()[-3000:]
    assert code == {"torchrun": 1, "deepspeed": 75}[launcher] or number == signal.SIGTERM

    again = start(SCRIPTS[launcher], images, tmp_path)
    try:
        assert again.wait(180) == 0, said.read_text()[-3000:]
    finally:
        end(again)
    assert losses(tmp_path / "run") == unbroken


def wait_for_the_end_of(group: int) -> None:
    """Until no process of the group is left."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("ranks outlive their launcher")


def end(started: subprocess.Popen[bytes]) -> None:
    """SIGKILL whatever is left of a session."""
    try:
        os.killpg(started.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        started.wait()
