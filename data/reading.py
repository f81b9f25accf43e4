"""The bytes of an image: a file, a piece of a tar shard, or of a stream.

One file that is missing or damaged is broken, at once. A folder that is gone altogether (a network disk that hangs, is not mounted or
empty) is waited for; when it stays away the run stops.
"""

from __future__ import annotations

import errno
import os
import time
from collections import OrderedDict

import numpy as np

from data.content import DecodeError, check_bytes, read_file
from data.patience import OF_THE_MACHINE, Patience, folder_is_gone
from data.remote import ShardStream
from data.sources import ImageIndex
from data.tar import BLOCK, TarError, check_header

OPEN_SHARDS = 128
"""Shards that a process keeps open."""

_ONCE_MORE = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOTCONN, errno.EREMOTEIO}
"""Errors of one file that may be gone at the next try, though its folder is there."""
_TRIES = 3


class Reader:
    """Reads images of an index, each on its own. Every process has one; forked ones share what is open."""

    def __init__(self, index: ImageIndex, retry_seconds: float) -> None:
        self.index, self.retry_seconds = index, retry_seconds
        self._open: OrderedDict[int, int] = OrderedDict()
        """Shard (its root) -> file descriptor, the longest unused first."""

    def read(self, i: int) -> np.ndarray:
        """Bytes of image ``i``: (size,) uint8.

        Raises:
            DecodeError: the file is missing, unreadable or too large.
            data.patience.StorageGoneError: its folder stayed away for ``retry_seconds``.
        """
        root = int(self.index.root_ids[i])
        home = self.index.homes[root]
        patience = Patience(home, self.retry_seconds)
        for tries in range(1, 1 << 30):
            try:
                found = self._shard(i, root) if self.index.in_shard(i) else read_file(self.index.path(i))
            except OSError as error:
                if error.errno in OF_THE_MACHINE:
                    raise
                self._forget(root)
                if home and (why := folder_is_gone(home)):
                    patience.wait(why)
                elif error.errno in _ONCE_MORE and tries < _TRIES:
                    time.sleep(tries / 10)
                else:
                    raise DecodeError(f"{type(error).__name__}: {error.strerror}") from error
            else:
                patience.done()
                return found
        raise AssertionError("tried for ever")

    def _shard(self, i: int, root: int) -> np.ndarray:
        start, size = int(self.index.starts[i]) * BLOCK, int(self.index.sizes[i])
        check_bytes(size)
        if self.index.in_stream(root):
            with ShardStream(self.index.roots[root], self.retry_seconds) as stream:
                return stream_member(stream, start, size)
        descriptor = self._open.get(root)
        if descriptor is None:
            if len(self._open) >= OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
            descriptor = self._open[root] = os.open(self.index.roots[root], os.O_RDONLY | os.O_CLOEXEC)
        self._open.move_to_end(root)
        found = np.empty(BLOCK + size, np.uint8)
        view, at = found.data, 0
        while at < len(view):
            count = os.preadv(descriptor, [view[at:]], start - BLOCK + at)
            if not count:
                raise DecodeError(f"the shard is cut off at byte {start - BLOCK + at}")
            at += count
        check_member(found[:BLOCK].tobytes(), start, size)
        return found[BLOCK:]

    def _forget(self, root: int) -> None:
        """Close a shard that gave an error: after a failure of its disk only a new open helps."""
        descriptor = self._open.pop(root, None)
        if descriptor is not None:
            os.close(descriptor)

    def close(self) -> None:
        """Close the shards that are open."""
        while self._open:
            os.close(self._open.popitem()[1])


def stream_member(stream: ShardStream, start: int, size: int) -> np.ndarray:
    """The member whose data begins at byte ``start`` of a stream that has not passed its header: (size,) uint8."""
    stream.seek(start - BLOCK)
    found = np.frombuffer(bytearray(stream.read(BLOCK + size, exactly=True)), np.uint8)
    check_member(found[:BLOCK].tobytes(), start, size)
    return found[BLOCK:]


def check_member(block: bytes, start: int, size: int) -> None:
    """Refuse a shard that has another member than its index says before byte ``start``."""
    try:
        length = check_header(block, start - BLOCK)[1]
        found = f"a member of {length} bytes at byte {start}" if length != size else ""
    except TarError as error:
        found = str(error)
    if found:
        raise DecodeError(
            f"the shard is not the one of its index ({found} instead of a member of {size} bytes): make the index anew with "
            "python -m data.shards, or remove it"
        )
