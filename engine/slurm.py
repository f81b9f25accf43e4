"""Inside a Slurm job: which process this is among those that srun started, and queueing the job again."""

import logging
import os
import re
import signal
import subprocess

from engine.config import ConfigError

log = logging.getLogger(__name__)

_FIRST_PORT, _NUM_PORTS = 12000, 16000
"""Below the ports that Linux gives to outgoing connections, above those that services commonly have."""


def environment() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in a process that srun started as one of several.

    Does nothing where a launcher has set RANK (torchrun and deepspeed inside a job), outside of Slurm, and for a lone
    process in a batch script or a shell of ``salloc`` or ``srun --pty``: a batch script has the SLURM_PROCID and
    SLURM_NTASKS of its job, but is no step, and a shell is the one task of its own. A MASTER_ADDR or MASTER_PORT that
    is set already stays.

    Signals that run/slurm/rank.py holds back are let through where this process has said what to do with them.

    Raises:
        ConfigError: the variables contradict each other, or there are fewer GPUs on this node than processes.
    """
    heard = {number for number in (signal.SIGTERM, signal.SIGUSR1) if callable(signal.getsignal(number))}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)
    env = os.environ
    if "RANK" in env or not _is_task(env.get("SLURM_STEP_NUM_TASKS"), env.get("SLURM_NTASKS"), env.get("SLURM_PROCID")):
        return
    step = int(env.get("SLURM_STEP_ID", "0"))
    nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
    env["LOCAL_RANK"] = _local_rank(int(env["SLURM_LOCALID"]), env.get("CUDA_VISIBLE_DEVICES"))
    env.setdefault("MASTER_ADDR", first_host(nodes))
    env.setdefault("MASTER_PORT", str(port(int(env["SLURM_JOB_ID"]), step)))
    env["WORLD_SIZE"] = env["SLURM_STEP_NUM_TASKS"]
    env["RANK"] = env["SLURM_PROCID"]


def _is_task(step_tasks: str | None, tasks: str | None, index: str | None) -> bool:
    """Whether this process is one of several tasks of a step."""
    if step_tasks is None or tasks is None or index is None or int(step_tasks) == 1:
        return False
    if step_tasks == tasks:
        return True
    # A batch script that was submitted from within a step inherits that one's SLURM_STEP_* beside its own SLURM_NTASKS.
    if int(index) == 0:
        return False
    raise ConfigError(
        f"SLURM_NTASKS={tasks} and SLURM_STEP_NUM_TASKS={step_tasks} disagree about the number of processes: start them "
        "by srun without --preserve-env"
    )


def _local_rank(index: int, visible: str | None) -> str:
    """Number of this process's GPU among those it sees, or of the process on its node where no GPU is asked for."""
    if not visible:
        return str(index)
    count = len(visible.split(","))
    if count == 1:  # --gpus-per-task=1: every task sees its own
        return "0"
    if index >= count:
        raise ConfigError(
            f"process {index} of this node sees {count} GPUs (CUDA_VISIBLE_DEVICES={visible}): ask for as many GPUs as "
            "processes, --gpus-per-node=N --ntasks-per-node=N"
        )
    return str(index)


def first_host(nodes: str) -> str:
    """The first name in a node list as Slurm abbreviates it: ``"gpu[007-009,12],old3"`` -> ``"gpu007"``."""
    host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0])  # type: ignore[index]
    if not re.fullmatch(r"[\w.:-]+", host):
        raise ConfigError(f"SLURM_STEP_NODELIST={nodes!r} is no list of nodes: set MASTER_ADDR to the first one's name")
    return host


def port(job: int, step: int) -> int:
    """Where the processes of a step meet: 16 steps of a job, and a thousand jobs in a row, have ports of their own."""
    return _FIRST_PORT + (16 * job + step % 16) % _NUM_PORTS


def requeue() -> bool:
    """Ask Slurm to end this job and to queue it again under the same number -> whether it will.

    It then sends SIGTERM to every process, and SIGKILL after its KillWait. Only batch jobs submitted with ``--requeue``
    can be queued again (where the cluster does not do it by default).
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    else:
        if done.returncode == 0:
            log.info("asked Slurm to queue job %s again", job)
            return True
        said = " ".join(done.stderr.split())
    log.warning("Slurm does not queue job %s again (%s): submit the same command, it continues", job, said)
    return False
