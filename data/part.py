"""Many short byte strings and class numbers in a few arrays, which is how an index holds its images.

A Python list of ten million paths takes gigabytes, and forked loader workers would copy its pages one by one, since merely looking
at an object counts a reference in it. Arrays take the bytes of their contents and are shared.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

CHUNK = 1 << 17
"""Images looked at together where a step needs memory for each byte of their names."""


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Lengths (N,) -> where each string begins and the last ends, (N + 1,): uint32 where that is enough, else int64."""
    total = int(lengths.sum(dtype=np.int64))
    offsets = np.zeros(len(lengths) + 1, np.uint32 if total < 2**32 else np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def gather(names: np.ndarray, offsets: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The strings ``chosen`` (positions), in that order, as (bytes, offsets)."""
    begins = offsets[:-1][chosen].astype(np.int64)
    lengths = offsets[1:][chosen].astype(np.int64) - begins
    into = offsets_of(lengths)
    out = np.empty(int(into[-1]), np.uint8)
    for first in range(0, len(chosen), CHUNK):
        part = slice(first, first + CHUNK)
        where = np.repeat(begins[part] - into[:-1][part], lengths[part])
        where += np.arange(int(into[first]), int(into[min(first + CHUNK, len(chosen))]))
        out[into[first] : into[min(first + CHUNK, len(chosen))]] = names[where]
    return out, into


class Strings:
    """Byte strings, collected one by one."""

    def __init__(self) -> None:
        self._bytes, self._lengths = bytearray(), array("I")

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, text: bytes) -> None:
        self._bytes += text
        self._lengths.append(len(text))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(all bytes (M,) uint8, offsets (N + 1,)); nothing can be added any more."""
        offsets = offsets_of(np.frombuffer(self._lengths, np.uint32))
        self._lengths = array("I")
        return np.frombuffer(self._bytes, np.uint8), offsets


class Classes:
    """Class names, numbered in the order they are met, and the number of each image's."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._ids = array("i")

    def add(self, name: str | None) -> None:
        """Note the class of the next image, None for none."""
        if name is None:
            self._ids.append(-1)
            return
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = len(self.names)
            self.names.append(name)
        self._ids.append(number)

    def ids(self) -> np.ndarray:
        """(N,) int32, -1 for none; nothing can be added any more."""
        return np.frombuffer(self._ids, np.int32)


@dataclass(eq=False)
class Part:
    """The images of one part of a path: a folder, a list, or a set of shards.

    Attributes:
        roots: what the names are relative to: the folder, or each shard.
        homes: for each root the folder without which nothing of it can be read.
        names: (M,) uint8, all names one after the other.
        offsets: (N + 1,), where each begins in ``names``.
        root_ids: (N,) int32; empty where there is one root.
        class_ids: (N,) int32 in ``classes``, -1 for none; empty where no image has one.
        classes: class names, in any order.
        counted: whether the class names are numbers, to be put in their order.
        unlabelled: why the images cannot be taken with classes, "" where they can.
        starts: (N,) uint32, for images in shards where their data begins, in tar blocks; empty for files.
        sizes: (N,) uint32, for images in shards their length in bytes; empty for files.
    """

    roots: Sequence[str]
    homes: Sequence[str]
    names: np.ndarray
    offsets: np.ndarray
    root_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    class_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    classes: Sequence[str] = ()
    counted: bool = False
    unlabelled: str = ""
    starts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))

    def __len__(self) -> int:
        return len(self.offsets) - 1
