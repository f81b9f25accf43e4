"""The scripts that a person types: they parse, and the environment is made once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BATCH = sorted((ROOT / "run/slurm").glob("*.sbatch"))
SOURCED = [ROOT / "run/launch.sh", ROOT / "run/slurm/common.sh"]
SCRIPTS = [*sorted((ROOT / "run").rglob("*.sh")), *BATCH, ROOT / "tests/slurm/cluster.sh", ROOT / ".ci/run"]


def bash(*words: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run bash with these words -> its exit code and text."""
    return subprocess.run(
        ["bash", *map(str, words)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script: Path) -> None:
    result = bash("-n", script)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_strict_and_says_how_it_is_called(script: Path) -> None:
    lines = script.read_text().splitlines()
    if script in SOURCED:
        return
    assert lines[0] == "#!/usr/bin/env bash" and lines[1].startswith("# ")
    assert "set -euo pipefail" in lines
    assert script.stat().st_mode & 0o111, f"chmod +x {script}"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck: apt-get install shellcheck")
def test_shellcheck() -> None:
    command = ["shellcheck", "-x", "--source-path=SCRIPTDIR", *map(str, SCRIPTS)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with nothing but set-up and an empty list of requirements, so that no network is needed."""
    (tmp_path / "run").mkdir()
    shutil.copy(ROOT / "run" / "setup.sh", tmp_path / "run")
    (tmp_path / "requirements.txt").write_text("# nothing\n")
    return tmp_path


def setup(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """run/setup.sh, called from another folder."""
    return bash(checkout / "run" / "setup.sh", cwd=checkout.parent, PYTHON=sys.executable, **environment)


def test_setup_installs_only_what_changed(checkout: Path) -> None:
    first = setup(checkout)
    assert first.returncode == 0, first.stderr
    assert "making" in first.stderr and "installing" in first.stderr
    kept = checkout / ".venv" / "kept"
    kept.touch()

    again = setup(checkout)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")

    (checkout / "requirements.txt").write_text("# still nothing\n")
    changed = setup(checkout)
    assert changed.returncode == 0 and "installing" in changed.stderr and "making" not in changed.stderr
    assert kept.exists()  # the environment was completed, not made again

    # An installation that failed is taken up again, and says where the whole story is.
    (checkout / "requirements.txt").write_text("./there-is-no-such-package\n")
    for _ in range(2):
        failed = setup(checkout)
        assert failed.returncode == 1 and "install.log" in failed.stderr
    (checkout / "requirements.txt").write_text("# nothing\n")
    assert "installing" in setup(checkout).stderr

    # Half an environment, as an interrupted set-up leaves it, is made again.
    (checkout / ".venv" / "bin" / "python").unlink()
    mended = setup(checkout)
    assert mended.returncode == 0 and "making" in mended.stderr and not kept.exists()


def test_setup_names_what_is_missing(checkout: Path, tmp_path: Path) -> None:
    unknown = bash(checkout / "run" / "setup.sh", PYTHON="no-such-python")
    assert unknown.returncode == 1 and "PYTHON=no-such-python" in unknown.stderr

    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")  # what `sys.exit(sys.version_info < (3, 11))` gives
    old.chmod(0o755)
    too_old = bash(checkout / "run" / "setup.sh", PYTHON=str(old))
    assert too_old.returncode == 1 and "at least 3.11" in too_old.stderr

    bare = tmp_path / "bare-python"
    bare.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexit 0\n')
    bare.chmod(0o755)
    without_venv = bash(checkout / "run" / "setup.sh", PYTHON=str(bare))
    assert without_venv.returncode == 1 and "python3-venv" in without_venv.stderr


def test_minkowski_names_what_is_missing(checkout: Path, tmp_path: Path) -> None:
    assert setup(checkout).returncode == 0
    shutil.copy(ROOT / "run" / "install_minkowski.sh", checkout / "run")
    tools = tmp_path / "tools"  # all that the script calls, but no compiler and no apt-get
    tools.mkdir()
    for name in ("bash", "cmp", "dirname", "id"):
        (tools / name).symlink_to(str(shutil.which(name)))
    result = bash(checkout / "run" / "install_minkowski.sh", PATH=str(tools))
    assert result.returncode == 1 and result.stdout == ""
    assert "apt-get install g++ libopenblas-dev" in result.stderr.replace("python3-dev ", "")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.name)
def test_batch_file(script: Path) -> None:
    """What a preempted or timed-out run needs is asked for before the first command; outside of Slurm the file says what to do."""
    text = script.read_text()
    options = [line for line in text.partition("set -euo pipefail")[0].splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --signal=USR1@120", "#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(options)
    alone = bash(script, "cim_vit_small", SLURM_JOB_ID="", SLURM_ARRAY_TASK_ID="")
    assert alone.returncode != 0 and "sbatch" in alone.stderr and f"run/slurm/{script.name}" in alone.stderr


def test_torchrun_script_says_how_it_is_called(checkout: Path) -> None:
    shutil.copy(ROOT / "run" / "torchrun.sh", checkout / "run")
    usage = bash(checkout / "run/torchrun.sh", "pretrain")
    assert usage.returncode == 2 and "pretrain|finetune RECIPE" in usage.stderr
    absent = bash(checkout / "run/torchrun.sh", "pretrain", "cim")
    assert absent.returncode == 1 and "run/setup.sh" in absent.stderr


@pytest.mark.parametrize(
    "words", [{}, {"NPROC": "3"}, {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "gpu01"}, {"NNODES": "2"}], ids=str
)
def test_torchrun_script_calls_torchrun(words: dict[str, str], checkout: Path) -> None:
    """What torchrun is called with, shown by a stand-in; on a machine whose Python finds no GPU."""
    shutil.copy(ROOT / "run" / "torchrun.sh", checkout / "run")
    tool = checkout / ".venv/bin/python"
    tool.parent.mkdir(parents=True)
    tool.write_text('#!/bin/sh\ncase "$2" in *cuda*) echo 0;; *) echo "$DS_ACCELERATOR|$PYTHONPATH|$*";; esac\n')
    tool.chmod(0o755)
    result = bash(checkout / "run/torchrun.sh", "pretrain", "cim_x", "data.path=a b", cwd=ROOT, PYTHONPATH="", **words)
    if words == {"NNODES": "2"}:
        assert result.returncode != 0 and "NODE_RANK" in result.stderr
        return
    accelerator, path, said = result.stdout.strip().split("|")
    assert accelerator == "cpu" and path == str(checkout) and said.endswith("--module pretrain cim_x data.path=a b")
    assert f"--nproc-per-node {words.get('NPROC', '1')} " in said and "SIGUSR1" in said
    several = "--nnodes 2 --node-rank 1 --master-addr gpu01 --master-port 29500"
    assert (several in said) == ("NNODES" in words) and ("--standalone" in said) == ("NNODES" not in words)


def test_launcher_needs_an_environment_and_a_recipe(checkout: Path) -> None:
    for name in ("launch.sh", "pretrain.sh"):
        shutil.copy(ROOT / "run" / name, checkout / "run")
    absent = bash(checkout / "run" / "pretrain.sh", "cim")
    assert absent.returncode == 1 and "run/setup.sh" in absent.stderr


@pytest.mark.parametrize("words", [{}, {"NPROC": "3"}, {"HOSTFILE": "hosts", "MASTER_PORT": "4711"}], ids=str)
def test_launcher_calls_deepspeed(words: dict[str, str], checkout: Path) -> None:
    """What deepspeed is called with, shown by a stand-in; on a machine whose Python finds no GPU."""
    for name in ("launch.sh", "pretrain.sh", "pretrain_hostfile.sh"):
        shutil.copy(ROOT / "run" / name, checkout / "run")
    tools = checkout / ".venv" / "bin"
    tools.mkdir(parents=True)
    (tools / "python").write_text('#!/bin/sh\ncase "$2" in *torch*) echo 0;; *) echo 12345;; esac\n')
    (tools / "deepspeed").write_text('#!/bin/sh\necho "$DS_ACCELERATOR|$PYTHONPATH|$*"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    script = "pretrain_hostfile.sh" if "HOSTFILE" in words else "pretrain.sh"
    result = bash(checkout / "run" / script, "cim_x", "data.path=a b", cwd=checkout.parent, PYTHONPATH="", **words)
    assert result.returncode == 0, result.stderr
    accelerator, path, said = result.stdout.strip().split("|")
    assert (
        path == str(checkout) and said.endswith("--module pretrain cim_x data.path=a b") and "--no_local_rank" in said
    )
    if "HOSTFILE" in words:
        assert "--hostfile hosts --master_port 4711" in said and "--num_gpus" not in said
    else:
        assert (
            accelerator == "cpu" and "--master_port 12345" in said and f"--num_gpus {words.get('NPROC', '1')}" in said
        )


def test_hostfile_is_asked_for() -> None:
    result = bash(ROOT / "run" / "pretrain_hostfile.sh", "cim", HOSTFILE="")
    assert result.returncode != 0 and "HOSTFILE=hosts" in result.stderr
