"""Batches of samples, the same ones whatever the number of workers, and after a resume the same as without it.

The order of an epoch is a function of (seed, epoch); what a sample looks like of (seed, epoch, index, copy). Nothing is drawn from
a global generator and no worker has a state, so prefetching, worker counts, a dead worker and a start in mid-epoch cannot change a
batch.
"""

from __future__ import annotations

import atexit
import functools
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from data.feed import Tasks, tasks
from data.order import Order
from data.samples import Samples, Task, Transform
from data.sources import ImageIndex
from data.workers import Pool

logger = logging.getLogger(__name__)


_ADVICE = "Lower data.workers or the batch size if memory ran out, or look for an image that crashes its decoder"


class DataSettings(Protocol):
    """How images are read: the part of a configuration that a loader needs."""

    in_chans: int
    value_range: list[float]
    workers: int
    max_broken: float
    retry_seconds: float
    shuffle_block: int
    streams: int


class Loader:
    """Batches of one rank.

    ``shuffle=True, drop_last=True`` is training: every rank gets the same number of full batches, a broken file is replaced by
    another one. ``shuffle=False, drop_last=False`` is evaluation: rank r gets the images r, r + world_size, ..., each exactly once,
    no padding; a broken file is left out.
    """

    def __init__(
        self,
        index: ImageIndex,
        transform: Transform,
        *,
        batch_size: int,
        in_chans: int,
        value_range: Sequence[float] | None = None,
        seed: int,
        rank: int,
        world_size: int,
        workers: int,
        shuffle: bool,
        drop_last: bool,
        max_broken: float = 0.05,
        repeats: int = 1,
        retry_seconds: float = 120.0,
        shuffle_block: int = 0,
        streams: int = 0,
    ) -> None:
        """``batch_size`` is per rank.

        ``max_broken``: the run stops when more than this share of the files is broken, and (unless it is 0) at least 10 or all of them. In random
        order it stops as soon as the files seen so far show it (three standard deviations above the share), in fixed order and
        shard by shard, where broken files may lie together, once they exceed the share of all the files of this rank.

        ``repeats`` (repeated augmentation, Hoffer et al. 2020): each index stands that many times in a row in the epoch's stream
        (so its copies fall on different ranks, or next to each other), each copy augmented on its own; the epoch's length stays,
        so that it shows ``1 / repeats`` of the images.

        ``retry_seconds``: how long a folder or a stream that is gone is waited for.

        ``shuffle_block``: images of a shard that are shuffled among each other, the shards themselves in random order: reading is
        nearly sequential, and a process holds so many encoded images of each stream it reads. 0: 1000 for streams, and for all
        others any image may follow any.

        ``streams``: shards that all ranks together read at once, best a multiple of their number: else ranks share shards, and
        each of them reads the whole. 0: one per rank of streams. The images of a global batch depend on it, and not on the
        number of ranks.
        """
        if batch_size < 1 or workers < 0 or repeats < 1 or not 0 <= rank < world_size or not 0 <= max_broken <= 1:
            raise ValueError(
                "batch_size and repeats must be >= 1, workers >= 0, 0 <= rank < world_size, max_broken in [0, 1], got "
                f"{batch_size=}, {repeats=}, {workers=}, {rank=}, {world_size=}, {max_broken=}"
            )
        if min(retry_seconds, shuffle_block, streams) < 0:
            raise ValueError(
                f"retry_seconds, shuffle_block and streams must be >= 0, got {retry_seconds=}, {shuffle_block=}, {streams=}"
            )
        if repeats > 1 and not shuffle:
            raise ValueError(f"repeats={repeats} needs shuffle=True: in evaluation every image counts once")
        if value_range is not None and not (len(value_range) == 2 and value_range[0] < value_range[1]):
            raise ValueError(f"value_range must be (lo, hi) with lo < hi, got {value_range!r}")
        if len(index) == 0:
            raise ValueError("the index has no images")
        if drop_last and len(index) < batch_size * world_size:
            raise ValueError(
                f"{len(index)} images are less than one batch of {batch_size} on each of {world_size} processes "
                f"({batch_size * world_size}): lower the batch size or add images"
            )
        self.index, self.transform, self.max_broken = index, transform, max_broken
        self.names_broken = rank == 0
        """Whether broken files are named in the log as they are met; what other ranks met is for rank 0 to name."""
        self.named: set[str] = set()
        """Paths that the log has named; loaders of one process may share it."""
        self.broken: dict[str, str] = {}
        """Path -> reason of every file that failed so far."""
        self._seen = np.zeros(len(index), np.bool_)
        self._reach = len(index) if shuffle or drop_last else len(range(rank, len(index), world_size))
        self._order = Order(
            index, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, shuffle=shuffle, drop_last=drop_last,
            repeats=repeats, shuffle_block=shuffle_block, streams=streams,
        )  # fmt: skip
        self._replace, self._retry_seconds = shuffle or drop_last, retry_seconds
        samples = Samples(index, transform, in_chans, value_range, seed, self._replace, retry_seconds)
        self._pool = Pool(samples.batch, workers, "loader worker", self._describe, _ADVICE)
        self._tasks: Tasks | None = None
        self._turn = 0
        """Number of the last call of ``batches`` or ``close``: earlier iterators have ended."""
        self._at_exit = functools.partial(_close, weakref.ref(self))

    @classmethod
    def of(
        cls,
        index: ImageIndex,
        transform: Transform,
        data: DataSettings,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        training: bool,
        repeats: int = 1,
    ) -> Self:
        """The loader that a configuration's ``data`` section describes, for training or for evaluation.

        For training on streams ``data.streams=0`` is replaced by what it comes to, the number of ranks: kept with the run
        (``engine.checkpoint.take_over``), it keeps the images of every step when the run goes on with another number of ranks.
        """
        loader = cls(
            index,
            transform,
            batch_size=batch_size,
            in_chans=data.in_chans,
            value_range=data.value_range or None,
            seed=seed,
            rank=rank,
            world_size=world_size,
            workers=data.workers,
            shuffle=training,
            drop_last=training,
            max_broken=data.max_broken,
            repeats=repeats,
            retry_seconds=data.retry_seconds,
            shuffle_block=data.shuffle_block,
            streams=data.streams,
        )
        if training and loader._order.streaming:
            data.streams = loader._order.lanes
        return loader

    @classmethod
    def preview(
        cls, index: ImageIndex, transform: Transform, data: DataSettings, count: int, seed: int
    ) -> dict[str, Tensor]:
        """A batch of at most ``count`` images spread over ``index``, the same at every call: what pictures show.

        Of streams the first ones: others would take reading up to them.

        Raises:
            ValueError: none of the images tried can be read.
        """
        step = 1 if index.streams.any() else max(len(index) // count, 1)
        part = index.select(range(0, len(index), step)[:count])
        quiet = SimpleNamespace(
            in_chans=data.in_chans, value_range=data.value_range, workers=0, max_broken=1.0,
            retry_seconds=data.retry_seconds, shuffle_block=0, streams=0,
        )  # fmt: skip
        loader = cls.of(part, transform, quiet, batch_size=count, seed=seed, training=False)
        loader.names_broken = False  # the loaders that count them name them
        batch = next(loader.batches(0), None)
        if batch is None:
            raise ValueError(
                f"none of {count} images spread over the training set can be read: {next(iter(loader.broken.items()))}"
            )
        return batch

    def _describe(self, task: Task) -> str:
        paths = [self.index.path(i) for _, i, _ in task.items]
        return f"{', '.join(paths[:3])} and {max(0, len(paths) - 3)} more images"

    def __len__(self) -> int:
        """Batches of an epoch on this rank (in evaluation a batch of nothing but broken files is not given)."""
        return len(self._order)

    def batches(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """The batches of ``epoch`` from number ``start`` on: ``image`` (B, C, H, W), ``index`` (B,) int64, and what the index and
        the transform add: ``label`` (B,) int64, ``token_image`` (B, C, h, w).

        One epoch at a time: asking for another ends the one before.
        """
        if epoch < 0 or not 0 <= start <= len(self):
            raise ValueError(f"epoch must be >= 0 and start in 0..{len(self)}, got {epoch=}, {start=}")
        self._turn += 1
        return self._iterate(epoch, start, self._turn)

    def _iterate(self, epoch: int, start: int, turn: int) -> Iterator[dict[str, Tensor]]:
        self._check_turn(turn)
        self._end_tasks()
        self._pool.start()  # before the threads of a stream
        # Registered after multiprocessing's own handler, so that it runs before: that one waits for the workers.
        atexit.unregister(self._at_exit)
        atexit.register(self._at_exit)
        self._tasks = tasks(self._order, epoch, start, self._retry_seconds)
        for batch in self._pool.run(self._tasks):
            self._account(batch.pop("broken"), batch.pop("lost"), batch.get("index"))
            if batch:
                yield {name: part.pin_memory() for name, part in batch.items()} if torch.cuda.is_available() else batch
                self._check_turn(turn)
        self._end_tasks()

    def _end_tasks(self) -> None:
        if self._tasks is not None:
            self._tasks.close()
            self._tasks = None

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise RuntimeError(
                "this loader was closed or has begun another epoch since: use one iterator of batches at a time"
            )

    def _account(self, broken: Sequence[tuple[int, str]], lost: int, indices: Tensor | None) -> None:
        """Note what a batch has shown; stop where too many files are broken."""
        if indices is not None:
            self._seen[indices.numpy()] = True
        for i, reason in broken:
            self._seen[i] = True
            path = self.index.path(i)
            if path not in self.broken:
                self.broken[path] = reason
                if self.names_broken:
                    self.name_broken({path: reason})
        if not broken:
            return
        failed, seen = len(self.broken), int(self._seen.sum())
        limit = self.max_broken * self._reach
        if self._order.random:  # what was seen is a random sample: clearly too many (3 sigma) of it are enough
            limit = min(limit, self.max_broken * seen + 3 * (self.max_broken * seen) ** 0.5)
        if failed > limit and (failed >= min(10, self._reach) or not self.max_broken):
            named = "; ".join(f"{path}: {reason}" for path, reason in list(self.broken.items())[:3])
            raise RuntimeError(
                f"{failed} of the {seen} images read so far are broken, more than max_broken={self.max_broken:g} of them: {named}. "
                "Mend or remove the files, or raise max_broken"
            )
        if lost and self._replace:
            raise RuntimeError(
                f"found no readable image to stand in for a broken one; broken are {', '.join(list(self.broken)[:3])} and "
                f"{max(0, failed - 3)} more: mend or remove them"
            )

    def name_broken(self, broken: Mapping[str, str]) -> None:
        """Name files (path -> reason) in the log that it has not named yet."""
        for path, reason in broken.items():
            if path not in self.named:
                self.named.add(path)
                logger.warning("skipped broken image %s: %s (%d so far)", path, reason, len(self.named))

    def close(self) -> None:
        """End the workers (also done when the loader is deleted, and at exit). A later epoch starts new ones."""
        self._turn += 1
        self._end_tasks()
        self._pool.close()
        atexit.unregister(self._at_exit)

    @property
    def restarts(self) -> int:
        """How many dead workers have been replaced so far."""
        return self._pool.restarts

    def worker_pids(self) -> list[int]:
        """Process ids of the workers, none before the first batch."""
        return self._pool.pids()

    def __del__(self) -> None:
        if getattr(self, "_tasks", None) is not None:
            self._end_tasks()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(loader: weakref.ref[Loader]) -> None:
    """End the workers of a loader that still exists."""
    alive = loader()
    if alive is not None:
        alive.close()
