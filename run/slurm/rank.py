"""Runs one rank of a job: ``python rank.py MARKER COMMAND ...`` does COMMAND and ends with its exit code.

- SIGTERM (preemption) and SIGUSR1 (the time limit is near) would end a process that has not yet said what to do with
  them, and a run needs a while before it can. They are held back until it joins the others (``engine.slurm.environment``).
- Exit code 75 says that a signal has stopped the run, and that it has a checkpoint. srun would take it for a failure and
  kill the ranks that are still about to leave: the file MARKER is made instead, and the exit code is 0.
"""

import signal
import subprocess
import sys
from pathlib import Path

STOPPED = 75


def main(marker: str, *command: str) -> int:
    """Run it -> exit code."""
    # Inherited by the command; this process never lets them through, it ends when the command does.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    code = subprocess.run(command, check=False).returncode
    if code == STOPPED:
        Path(marker).touch()
        return 0
    return code if code >= 0 else 128 - code  # ended by a signal, as a shell says it


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
