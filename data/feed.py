"""What streams give, in the order of the batches: a few shards are read ahead, forwards, in threads of the main process.

Workers only decode, so that neither their number nor their end changes what is read. A start in mid-epoch opens the shards that are
still needed and no others.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from data.content import MAX_BYTES, DecodeError
from data.order import Order
from data.reading import stream_member
from data.remote import ShardStream
from data.samples import Task
from data.sources import ImageIndex
from data.tar import BLOCK

T = TypeVar("T")
_WAIT = 0.1


class ReadAhead(Generic[T]):
    """An iterator whose next values a thread works out beforehand, at most ``depth`` of them; its errors come in their place."""

    def __init__(self, source: Iterator[T], depth: int) -> None:
        self._queue: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(source,), daemon=True)
        self._thread.start()

    def _run(self, source: Iterator[T]) -> None:
        try:
            for value in source:
                if not self._put((True, value)):
                    return
            self._put((False, StopIteration()))
        except BaseException as error:
            self._put((False, error))
        finally:
            close = getattr(source, "close", None)
            if close is not None:
                close()

    def _put(self, entry: tuple[bool, Any]) -> bool:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(entry, timeout=_WAIT)
                return True
        return False

    def ready(self) -> bool:
        """Whether the next value is there."""
        return not self._queue.empty()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        while True:
            if self._stop.is_set():
                raise StopIteration
            with contextlib.suppress(queue.Empty):
                fine, value = self._queue.get(timeout=_WAIT)
                if fine:
                    return value
                self._stop.set()
                raise value

    def close(self) -> None:
        """End the thread as soon as it looks up."""
        self._stop.set()


class Lane:
    """The images of one lane that come out of streams, in its order: shards one after the other, each read forwards once."""

    def __init__(self, index: ImageIndex, wanted: np.ndarray, retry_seconds: float) -> None:
        self.index, self.wanted, self.retry_seconds = index, wanted, retry_seconds
        self._stream: ShardStream | None = None
        self._closed = False

    def images(self) -> Iterator[np.ndarray | None]:
        """Bytes of each image, (size,) uint8; None for one that is too large to be read.

        Raises:
            RuntimeError: a shard cannot be had, or is not the one that its index describes.
        """
        roots = self.index.root_ids[self.wanted]
        ends = [*(np.flatnonzero(np.diff(roots)) + 1).tolist(), len(self.wanted)]
        for first, last in zip([0, *ends], ends, strict=False):
            if first == last or self._closed:
                return
            address = self.index.roots[roots[first]]
            try:
                with ShardStream(address, self.retry_seconds) as self._stream:
                    yield from self._of_shard(self._stream, self.wanted[first:last])
            except (DecodeError, OSError) as error:
                raise RuntimeError(f"{address}: {error}") from error

    def _of_shard(self, stream: ShardStream, wanted: np.ndarray) -> Iterator[np.ndarray | None]:
        """Read on to the image that is wanted next, keeping on the way those that are wanted later."""
        starts = self.index.starts[wanted].tolist()
        left = Counter(starts)
        coming = iter(sorted(set(zip(starts, self.index.sizes[wanted].tolist(), strict=True))))
        kept: dict[int, np.ndarray | None] = {}
        for start in starts:
            while start not in kept:
                at, size = next(coming)
                kept[at] = stream_member(stream, at * BLOCK, size) if size <= MAX_BYTES else None
            left[start] -= 1
            yield kept[start] if left[start] else kept.pop(start)

    def close(self) -> None:
        """End a read that waits."""
        self._closed = True
        if self._stream is not None:
            self._stream.close()


class Direct:
    """Tasks of an epoch whose images the workers read themselves."""

    def __init__(self, order: Order, epoch: int, start: int) -> None:
        self._batches = order.batches(epoch, start)

    def ready(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Task]:
        return self

    def __next__(self) -> Task:
        return Task(next(self._batches))

    def close(self) -> None:
        pass


class Streamed:
    """Tasks of an epoch with the bytes of the images that come out of streams."""

    def __init__(self, order: Order, epoch: int, start: int, retry_seconds: float) -> None:
        index = order.index
        sequence = order.sequence(epoch)
        in_stream = index.streams
        self._lanes: dict[int, Lane] = {}
        self._ahead: dict[int, ReadAhead[np.ndarray | None]] = {}
        numbers = order.my_lanes()
        depth = max(2 * order.batch_size // len(numbers), 2)
        for number in numbers:
            entries = order.lane(sequence, number, start)
            lane = Lane(index, entries[in_stream[index.root_ids[entries]]], retry_seconds)
            self._lanes[number] = lane
            self._ahead[number] = ReadAhead(lane.images(), depth)
        self._tasks = ReadAhead(self._assembled(order, epoch, start, sequence, in_stream), 2)

    def _assembled(
        self, order: Order, epoch: int, start: int, sequence: np.ndarray, in_stream: np.ndarray
    ) -> Iterator[Task]:
        for number, items in enumerate(order.batches(epoch, start, sequence), start):
            pieces: list[np.ndarray] = []
            spans: list[tuple[int, int] | None] = []
            at = 0
            for position, (_, i, _) in zip(order.positions(number), items, strict=True):
                content = next(self._ahead[position % order.lanes]) if in_stream[order.index.root_ids[i]] else None
                if content is None:
                    spans.append(None)
                    continue
                pieces.append(content)
                spans.append((at, at + len(content)))
                at += len(content)
            yield Task(items, torch.from_numpy(np.concatenate(pieces)) if pieces else None, spans if pieces else ())

    def ready(self) -> bool:
        """Whether a task is there without waiting for a stream."""
        return self._tasks.ready()

    def __iter__(self) -> Iterator[Task]:
        return self

    def __next__(self) -> Task:
        return next(self._tasks)

    def close(self) -> None:
        """End all reading."""
        self._tasks.close()
        for ahead in self._ahead.values():
            ahead.close()
        for lane in self._lanes.values():
            lane.close()


Tasks = Direct | Streamed


def tasks(order: Order, epoch: int, start: int, retry_seconds: float) -> Tasks:
    """The tasks of a rank's batches of an epoch, from number ``start`` on."""
    return Streamed(order, epoch, start, retry_seconds) if order.streaming else Direct(order, epoch, start)
