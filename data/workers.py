"""Processes that do tasks, such as making batches. One that dies is replaced, and its tasks are done again.

Each worker has a connection of its own, so that a kill at any moment leaves nothing locked and nothing half read that others need.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import gc
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.reduction
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.multiprocessing  # so that connections pass tensors through shared memory

logger = logging.getLogger(__name__)

Task = TypeVar("Task")
Result = TypeVar("Result")
Coming = TypeVar("Coming", covariant=True)

PREFETCH = 2
"""Tasks that each worker has at a time."""
MAX_DEATHS, WITHIN = 3, 100
"""A pool gives up when more workers than this die within so many tasks."""
_LOOK_FOR_PARENT = 1.0
_GOODBYE = 5.0


class WorkerDiedError(RuntimeError):
    """Workers died again and again."""


class Tasks(Protocol[Coming]):
    """Tasks in their order; ``ready`` says whether the next one is there without waiting."""

    def ready(self) -> bool: ...
    def __next__(self) -> Coming: ...


class _Worker(Generic[Task, Result]):
    """One process and the tasks that it has; the process is started again at will."""

    def __init__(self, number: int, name: str, work: Callable[[Task], Result]) -> None:
        self.number, self.name, self.work = number, f"{name} {number}", work
        self.tasks: collections.deque[Task] = collections.deque()
        self.stale = 0
        """How many of its first tasks nobody waits for any more."""
        self.start()

    def start(self) -> None:
        """Fork the process and give it all tasks of this worker that somebody waits for."""
        # Forked workers share the index; other systems cannot fork safely and copy its few arrays.
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, self.work, os.getpid()), name=self.name, daemon=True
        )
        self.process.start()
        theirs.close()  # now its end is open in that process only, and breaks with it
        for _ in range(self.stale):
            self.tasks.popleft()
        self.stale = 0
        for task in self.tasks:
            self._send(task)

    def give(self, task: Task) -> None:
        self.tasks.append(task)
        self._send(task)

    def _send(self, task: Task) -> None:
        with contextlib.suppress(OSError):  # it is dead: found out, and repeated, when its result is waited for
            self.connection.send(task)

    def result(self) -> Result | None:
        """What the first task gave; None where the process is dead.

        Raises:
            Exception: what the work raised.
        """
        while True:
            ready = multiprocessing.connection.wait([self.connection, self.process.sentinel])
            if self.connection not in ready:
                return None
            try:
                fine, value = self.connection.recv()
            except Exception:  # a message that was cut off, or tensors whose process is gone
                self.process.join(1)
                if self.process.is_alive():
                    raise
                return None
            self.tasks.popleft()
            if self.stale:
                self.stale -= 1
            elif fine:
                return value
            else:
                raise value

    def end(self) -> None:
        """End the process, at once."""
        self.process.kill()
        self.process.join(_GOODBYE)
        self.connection.close()

    def cause(self) -> str:
        """How the process ended."""
        self.process.join(_GOODBYE)
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"it left with exit code {code}"
        name = signal.Signals(-code).name
        hint = {
            signal.SIGKILL: ", as the kernel does when memory runs out",
            signal.SIGBUS: ", as happens when /dev/shm is full",
        }.get(signal.Signals(-code), "")
        return f"it was ended by {name}{hint}"


class Pool(Generic[Task, Result]):
    """A fixed number of workers, or none: then the work is done by the caller."""

    def __init__(
        self, work: Callable[[Task], Result], workers: int, name: str, describe: Callable[[Task], str], advice: str
    ) -> None:
        """Workers are called ``name``; ``describe`` says what a task is, ``advice`` what to do if workers keep dying."""
        self.work, self.size, self.name, self.describe, self.advice = work, workers, name, describe, advice
        self.restarts = 0
        """How many workers have been replaced so far."""
        self._workers: list[_Worker[Task, Result]] = []
        self._deaths: collections.deque[int] = collections.deque(maxlen=MAX_DEATHS + 1)
        self._made = 0
        self._owner = os.getpid()

    def start(self) -> None:
        """Start the workers, unless they are there."""
        if not self._workers:
            self._workers = [_Worker(number, self.name, self.work) for number in range(self.size)]

    def run(self, tasks: Tasks[Task]) -> Iterator[Result]:
        """What the work gives for each task, in their order; one run at a time, a new one forgets the one before.

        Raises:
            WorkerDiedError: workers die faster than they can be replaced.
        """
        if not self.size:
            while True:
                try:
                    task = next(tasks)
                except StopIteration:
                    return
                yield self.work(task)
        self.start()
        for worker in self._workers:
            worker.stale = len(worker.tasks)
        waiting: collections.deque[_Worker[Task, Result]] = collections.deque()
        number, more = 0, True
        while True:
            while more and len(waiting) < PREFETCH * self.size and (not waiting or tasks.ready()):
                try:
                    task = next(tasks)
                except StopIteration:
                    more = False
                    break
                worker = self._workers[number % self.size]
                number += 1
                worker.give(task)
                waiting.append(worker)
            if not waiting:
                return
            worker = waiting.popleft()
            while (result := worker.result()) is None:
                self._replace(worker)
            self._made += 1
            yield result

    def _replace(self, worker: _Worker[Task, Result]) -> None:
        pid, cause = worker.process.pid, worker.cause()
        worker.connection.close()
        self._deaths.append(self._made)
        many = len(self._deaths) > MAX_DEATHS and self._made - self._deaths[0] < WITHIN
        if many:
            raise WorkerDiedError(
                f"{worker.name} (pid {pid}) died: {cause}. It is the {len(self._deaths)}th within "
                f"{self._made - self._deaths[0]} tasks; it had {self._had(worker)}. {self.advice}"
            )
        self.restarts += 1
        logger.warning(
            "%s (pid %s) died: %s; a new one does its tasks again (%d replaced so far)",
            *(worker.name, pid, cause, self.restarts),
        )
        worker.start()

    def _had(self, worker: _Worker[Task, Result]) -> str:
        """What a worker was at work on, one of these: a result that was not fetched before the end is lost with it."""
        return "; then ".join(self.describe(task) for task in list(worker.tasks)[worker.stale :])

    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers if worker.process.pid]

    def close(self) -> None:
        """End the workers."""
        if os.getpid() != self._owner:  # a copy in a forked process: they are not its own
            return
        while self._workers:
            self._workers.pop().end()

    def __del__(self) -> None:
        self.close()


def _serve(connection: Any, work: Callable[[Any], Any], parent: int) -> None:
    """The life of a worker: tasks in, results out, until the parent closes the connection or is gone."""
    # Signals to the whole group or job are for the main process: it ends its workers itself.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    gc.freeze()  # what was there before the fork is never collected here: looking at it would copy its pages
    torch.set_num_threads(1)
    while True:
        while not connection.poll(_LOOK_FOR_PARENT):
            if os.getppid() != parent:
                return
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            result: tuple[bool, Any] = True, work(task)
        except Exception as error:
            result = False, _portable(error)
        try:
            connection.send(result)
        except OSError:
            return
        del task, result


def _portable(error: Exception) -> Exception:
    """The error with its traceback as a note, or its text where it cannot be passed on."""
    trace = f"in {multiprocessing.current_process().name}:\n" + "".join(traceback.format_exception(error))
    try:
        passed = copy.copy(error)  # made anew from its arguments, as the other side will
        multiprocessing.reduction.ForkingPickler.dumps(passed)
    except Exception:
        return RuntimeError(trace)
    passed.add_note(trace)
    return passed
