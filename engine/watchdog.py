"""Notices that a run does not get on, and says which process keeps the others waiting."""

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from engine import faults
from engine.world import World

log = logging.getLogger(__name__)

EXIT_HUNG = 1
_ORPHAN = 60.0
"""Seconds that a process whose launcher has died may stand still."""
_ANSWER = 10.0
"""Seconds that the meeting point of the processes has to answer, at most."""
_SIGNAL = "palimpsest_signal"
"""Where the processes tell each other of a signal: in the midst of an evaluation they do not meet."""


@dataclass(frozen=True)
class Beat:
    """What a process was doing when last seen.

    Attributes:
        count: beats so far: whoever has fewest keeps the others waiting.
        since: wall clock at the last one, in seconds.
        seen: wall clock when the process last wrote this down.
    """

    rank: int
    count: int
    step: int
    doing: str
    since: float
    seen: float


class Watchdog:
    """Ends this process when its main thread has not come to a next :meth:`beat` within the timeout."""

    def __init__(self, world: World, timeout: float) -> None:
        """``timeout`` in seconds; 0: never."""
        self._world, self._timeout = world, timeout
        self._count, self._step, self._doing, self._since = 0, 0, "starting", time.time()
        self._moved, self._parent = time.monotonic(), os.getppid()
        self._end = threading.Event()
        self._store: Any = dist.distributed_c10d._get_default_store() if timeout and world.size > 1 else None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if timeout:
            self._thread.start()

    def beat(self, step: int, doing: str) -> None:
        """The run gets on: it is in ``step`` (the first is 1), and ``doing`` comes next."""
        self._count += 1
        self._step, self._doing, self._since, self._moved = step, doing, time.time(), time.monotonic()

    @contextmanager
    def during(self, step: int, doing: str) -> Iterator[None]:
        """Something long is done, in which every call of a module counts as a beat."""
        self.beat(step, doing)
        if not self._timeout:
            yield
            return

        def alive(*_: Any) -> None:
            self._since, self._moved = time.time(), time.monotonic()

        hook = torch.nn.modules.module.register_module_forward_pre_hook(alive)
        try:
            yield
        finally:
            hook.remove()
            self.beat(step, doing)

    def close(self) -> None:
        """Watch no more."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        with suppress(Exception):  # known to the others from the start; where they cannot be told, it is seen below
            self._exchange(wait=0.0)
        while not self._end.wait(min(self._timeout / 10, 10.0)):
            late = self._late()
            if os.getppid() != self._parent and time.monotonic() - self._moved > min(self._timeout, _ORPHAN):
                sys.stderr.write(f"error: rank {self._world.rank}: the launcher is gone, and the run does not get on\n")
                os._exit(EXIT_HUNG)
            try:
                others = self._exchange(wait=self._timeout / 5 if late else 0.0)
            except Exception as error:  # the meeting point has gone with its process
                others, told = [], f"; the other processes cannot be asked ({error})"
            else:
                told = ""
            if late and not self._end.is_set() and self._late():
                self._bark(others, told)

    def _late(self) -> bool:
        return time.monotonic() - self._moved > self._timeout

    def _mine(self) -> Beat:
        return Beat(self._world.rank, self._count, self._step, self._doing, self._since, time.time())

    def _exchange(self, wait: float) -> list[Beat]:
        """Write down the own beat; where ``wait`` is given, read the others' after so many seconds."""
        if self._store is None:
            return []
        found: list[Beat] = []
        wait = min(wait, _ANSWER)

        def talk() -> None:
            with suppress(RuntimeError):  # the process that keeps the store has gone: told by who waits for it
                ask()

        def ask() -> None:
            self._store.set(f"palimpsest_beat_{self._world.rank}", json.dumps(self._mine().__dict__))
            if signals := faults.received():
                self._store.set(_SIGNAL, str(faults.REQUEUE if faults.REQUEUE in signals else faults.STOP.value))
            elif self._store.check([_SIGNAL]):
                faults.hear(int(self._store.get(_SIGNAL)))
            if wait:
                time.sleep(wait)  # those that live have written theirs by now
                for rank in range(self._world.size):
                    key = f"palimpsest_beat_{rank}"
                    if rank != self._world.rank and self._store.check([key]):
                        found.append(Beat(**json.loads(self._store.get(key))))

        asking = threading.Thread(target=talk, daemon=True)
        asking.start()
        asking.join(_ANSWER + wait)
        if asking.is_alive():
            raise TimeoutError("their meeting point, on rank 0, does not answer")
        return found

    def _bark(self, others: list[Beat], told: str) -> None:
        now, mine = time.time(), self._mine()
        behind = [beat for beat in others if beat.count < mine.count or now - beat.seen > self._timeout / 2]
        missing = sorted(set(range(self._world.size)) - {beat.rank for beat in others} - {self._world.rank})
        line = f"rank {mine.rank} has been {mine.doing} in step {mine.step} for {now - mine.since:.0f} s"
        for beat in behind:
            gone = (
                f", and shows no sign of life for {now - beat.seen:.0f} s"
                if now - beat.seen > self._timeout / 2
                else ""
            )
            line += f"; it waits for rank {beat.rank}, which is {beat.doing} in step {beat.step} since {now - beat.since:.0f} s{gone}"
        if missing and not told:
            line += f"; rank {', '.join(map(str, missing))} never reported"
        if not behind and not missing and not told and self._world.size > 1:
            line += "; the other processes have come as far, and wait for this one or for the network"
        line += f"{told}. It is ended (train.timeout_minutes={self._timeout / 60:g}); the same command continues"
        sys.stderr.write(f"error: {line}\n")
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        time.sleep(min(self._timeout / 5, _ANSWER))  # the others, who are late by now, ask what this one was doing
        os._exit(EXIT_HUNG)
