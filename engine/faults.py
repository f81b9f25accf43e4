"""What a run does when something outside it goes wrong: signals, lost processes, values that are not finite."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from engine.world import World

T = TypeVar("T")

EXIT_REQUEUE = 75
"""Exit code of a run that was told to stop, has written a checkpoint and wants to be continued (EX_TEMPFAIL of sysexits.h)."""

STOP, REQUEUE = signal.SIGTERM, signal.SIGUSR1
_received: set[int] = set()


class StoppedRunError(Exception):
    """The run was told to stop, and has written a checkpoint."""


class StoppedEvaluationError(StoppedRunError):
    """A signal came in the midst of an evaluation, to this process or to another one; ``signal`` is which."""

    def __init__(self, number: int) -> None:
        super().__init__("stopped by a signal while images were evaluated; the same command does that again")
        self.signal = number


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
    """From now on the signals end this process at once: it takes no steps after which they would be heeded.

    One that has come already is forgotten: the run that it was for is over.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(STOP, signal.SIG_DFL)
        signal.signal(REQUEUE, signal.SIG_DFL)
    _received.clear()


def _note(number: int, frame: Any) -> None:
    _received.add(number)


def hear(number: int) -> None:
    """Another process was sent this signal, which is meant for all of them."""
    _received.add(number)


def received() -> set[int]:
    """Which of :data:`STOP` and :data:`REQUEUE` this process was sent."""
    return set(_received)


def told(counts: Iterable[float]) -> int:
    """:data:`REQUEUE`, :data:`STOP` or 0 from how many processes were sent which (:func:`shares`, summed)."""
    stop, requeue = counts
    return REQUEUE if requeue else STOP if stop else 0


def shares() -> list[float]:
    """What this process adds to :func:`told`."""
    return [float(STOP in _received), float(REQUEUE in _received)]


def until_stopped(batches: Iterable[T], world: World) -> Iterator[T]:
    """The batches of an evaluation, which every process takes to their end: that comes early where a signal has.

    Raises:
        StoppedEvaluationError: at the end, on every process, if any of them was sent a signal; what was evaluated is a part only.
    """
    for batch in batches:
        if _received:
            break
        yield batch
    if number := told(world.sum(shares()).tolist()):
        raise StoppedEvaluationError(number)


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
