"""Talking to the cluster of cluster.sh: submit, look, wait."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.launch import ROOT

TOOLS = ("slurmctld", "slurmd", "munged", "sbatch")
SCRIPT = Path(__file__).with_name("cluster.sh")
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
SCRIPTS = ROOT / "run" / "slurm"


def missing() -> str:
    """Why there can be no cluster here; empty if there can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    hint = "apt-get install slurmctld slurmd slurm-client munge"
    return f"needs Slurm, there is no {', '.join(absent)} here: {hint}" if absent else ""


@dataclass(frozen=True)
class Cluster:
    """Two nodes that are this machine."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """Variables of a user of it, without those of a job or a launcher that this process may be in."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "RANK"))}
        for key in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            kept.pop(key, None)
        kept |= {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": f"{kept['PATH']}:/usr/sbin:/sbin"}
        return kept | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

    def start(self) -> None:
        """Start it, or fail with what its daemons said."""
        done = subprocess.run(
            ["bash", str(SCRIPT), "start", str(self.folder)], env=self.env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def stop(self) -> None:
        """End its jobs and its daemons."""
        subprocess.run(["bash", str(SCRIPT), "stop", str(self.folder)], env=self.env, check=True, timeout=60)

    def call(self, *words: object, cwd: Path | None = None, **env: str) -> str:
        """Run one of Slurm's commands -> what it printed."""
        done = subprocess.run(
            [str(word) for word in words],
            cwd=cwd or self.folder,
            env=self.env | env,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, *words: object, cwd: Path, **env: str) -> str:
        """Submit from ``cwd`` -> number of the job."""
        return self.call("sbatch", "--parsable", *words, cwd=cwd, **env).strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, Restarts, ExitCode, ..."""
        shown = self.call("scontrol", "show", "job", "--oneliner", number)
        return dict(re.findall(r"(\w+)=(\S*)", shown.splitlines()[0]))

    def wait(self, number: str, what: Callable[[dict[str, str]], bool], timeout: float, shown: Path) -> dict[str, str]:
        """Until ``what`` holds of the job -> what Slurm says of it; else fail with the logs in ``shown``."""
        deadline = time.monotonic() + timeout
        while not what(found := self.job(number)):
            assert time.monotonic() < deadline, f"job {number} is {found['JobState']}\n{logs(shown)}"
            # A requeued job would wait for its turn of the scheduler.
            if found["JobState"] == "PENDING" and int(found["Restarts"]):
                command = ["scontrol", "update", f"JobId={number}", "StartTime=now"]
                subprocess.run(command, env=self.env, capture_output=True, check=False)
            time.sleep(0.2)
        return found

    def end(self, number: str, shown: Path, timeout: float = 300) -> dict[str, str]:
        """Wait for the end of a job (for a moment, one that is queued again looks as if it had ended)."""
        for _ in range(10):
            found = self.wait(number, lambda job: job["JobState"] in ENDS, timeout, shown)
            time.sleep(1)
            if self.job(number) == found:
                return found
        raise AssertionError(f"job {number} does not come to an end\n{logs(shown)}")


def logs(folder: Path) -> str:
    """All logs of the jobs submitted from ``folder``."""
    found = sorted([*folder.glob("slurm-*.out"), *folder.glob("slurm-*/*.log")])
    return "\n".join(f"==> {path.relative_to(folder)}\n{path.read_text()[-3000:]}" for path in found)
