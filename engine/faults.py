"""What a run does when something outside it goes wrong: signals, lost processes, values that are not finite."""

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

EXIT_REQUEUE = 75
"""Exit code of a run that was told to stop, has written a checkpoint and wants to be continued (EX_TEMPFAIL of sysexits.h)."""

STOP, REQUEUE = signal.SIGTERM, signal.SIGUSR1
_received: set[int] = set()


class StoppedRunError(Exception):
    """The run was told to stop, and has written a checkpoint."""


class NonFiniteLossError(RuntimeError):
    """Loss or gradients became NaN or infinite, oftener than the recipe allows."""


class LostProcessError(RuntimeError):
    """Another process of the run has gone."""


class UnwrittenError(RuntimeError):
    """What a run ends with could not be written."""


def listen() -> None:
    """From now on SIGTERM and SIGUSR1 are noted, and acted upon after the step in which they come.

    SIGUSR1 is Slurm's warning before the time limit (``--signal=USR1@120``): the job asks to be queued again. SIGTERM
    comes when it is preempted, or from a launcher that ends: the run stops, ready to be continued. Where a launcher
    has started this process and dies, the kernel sends it SIGTERM: nobody would collect it.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # a run within a larger program, whose signals these are
    signal.signal(STOP, _note)
    signal.signal(REQUEUE, _note)
    if {"TORCHELASTIC_RUN_ID", "CROSS_RANK"} & os.environ.keys():  # torchrun's and deepspeed's
        with contextlib.suppress(OSError, AttributeError):
            pr_set_pdeathsig = 1
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def unlisten() -> None:
    """From now on the signals end this process at once: it takes no steps after which they would be heeded."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(STOP, signal.SIG_DFL)
        signal.signal(REQUEUE, signal.SIG_DFL)


def _note(number: int, frame: Any) -> None:
    _received.add(number)


def received() -> set[int]:
    """Which of :data:`STOP` and :data:`REQUEUE` this process was sent."""
    return set(_received)


def forget() -> None:
    """No signal has come: a run begins in a process that had one."""
    _received.clear()


@contextlib.contextmanager
def naming_lost_processes(last: Any) -> Iterator[None]:
    """Turn what the network library says when a peer is gone into one line; ``last()`` is the newest checkpoint."""
    try:
        yield
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        checkpoint = last()
        kept = f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        raise LostProcessError(
            f"lost the connection to another process of this run ({str(error).splitlines()[0][:200]}): it was killed or has "
            f"failed, its own log says why; {kept}. The same command continues from there"
        ) from error


def _is_loss(error: RuntimeError) -> bool:
    text = str(error)
    words = ("Connection closed by peer", "Connection reset", "Socket Timeout", "Timed out waiting", "Broken pipe")
    return any(word in text for word in (*words, "NCCL communicator was aborted", "Connection refused"))
