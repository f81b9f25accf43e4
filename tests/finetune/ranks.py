"""Several processes of a run as threads of this one, for what does not need DeepSpeed."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from engine.world import World

T = TypeVar("T")


class _Meeting:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.values: list[Any] = [None] * size


class ThreadWorld(World):
    """A rank whose sums and gathers meet those of the other threads."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        super().__init__(rank, len(meeting.values), torch.device("cpu"))
        object.__setattr__(self, "meeting", meeting)

    def gather(self, value: Any) -> list[Any]:
        meeting: _Meeting = self.__dict__["meeting"]
        meeting.values[self.rank] = value
        meeting.barrier.wait()
        found = list(meeting.values)
        meeting.barrier.wait()
        return found

    def sum(self, values: list[float] | torch.Tensor) -> torch.Tensor:
        mine = torch.asarray(values, dtype=torch.float64, copy=True).detach()
        return torch.stack(self.gather(mine)).sum(dim=0)


def on_ranks(size: int, work: Callable[[World], T]) -> list[T]:
    """``work(world)`` on every rank at once -> what each returned; an error of any rank is raised."""
    meeting = _Meeting(size)

    def one(rank: int) -> T:
        try:
            return work(ThreadWorld(rank, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        jobs = [pool.submit(one, rank) for rank in range(size)]
    errors = [error for job in jobs if (error := job.exception())]
    real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    for error in real or errors:
        raise error
    return [job.result() for job in jobs]
