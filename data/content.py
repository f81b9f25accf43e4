"""The bytes of a file, as long as it is one that can be read as a whole."""

from __future__ import annotations

import os
import stat

import numpy as np

MAX_BYTES = 2**31
"""Longest file, or member of a shard, that is read."""


class DecodeError(ValueError):
    """A file that cannot be turned into the image asked for: absent, damaged, too large, or of other channels or values."""


def read_file(path: str) -> np.ndarray:
    """All bytes of a regular file: (size,) uint8.

    Raises:
        OSError: it cannot be read.
        DecodeError: it is no regular file, or too large.
    """
    # A pipe under an image's name would let an ordinary open wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DecodeError("it is no regular file")
        check_bytes(status.st_size)
        found = np.empty(status.st_size, np.uint8)
        view, at = found.data, 0
        while at < len(view) and (count := os.readv(descriptor, [view[at:]])):
            at += count
        return found[:at]
    finally:
        os.close(descriptor)


def check_bytes(size: int) -> None:
    """Refuse files too large to be read as a whole."""
    if size > MAX_BYTES:
        raise DecodeError(
            f"the file has {size} bytes, more than the {MAX_BYTES} that are read (data.content.MAX_BYTES)"
        )
