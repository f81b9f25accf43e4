"""The index of tar shards: which images they hold, where each begins, how long it is and of which class it is.

``index.npz`` beside the shards has it (``data.pack`` and ``python -m data.shards`` write it); it holds arrays only and is read without
pickle. With it tar shards on a disk are as good as a folder: any image can be read on its own.
"""

from __future__ import annotations

import contextlib
import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.listing import EXTENSIONS
from data.part import Classes, Strings, gather, offsets_of
from data.remote import TooLongError
from data.tar import BLOCK, Readable, members, safe_name
from formats.files import write_atomically

INDEX_NAME = "index.npz"
MAX_LABEL = 1 << 16
"""Longest ``.cls`` or ``.json`` of a sample that is read, in bytes."""
MOST_BYTES = 2 << 30
"""Longest index that is taken from an address, sent or unpacked, in bytes: it is held in memory, whatever a server sends.

An image takes 20 to 24 of them and its name: 10 million with names of 190 bytes fit, 30 million of ImageNet's kind.
"""

FOLDER, WORD, NUMBER, NONE = 1, 2, 4, 8
"""Where a shard's classes come from: the first folder of the name, a word or a number in ``.cls`` or ``.json``, or nowhere."""

_IMAGES = frozenset(extension.encode() for extension in EXTENSIONS)
_KEYS = ("class", "cls", "label", "class_name", "target")
"""What a sample's ``.json`` may call its class."""


@dataclass(eq=False)
class ShardIndex:
    """The N images of S shards, shard after shard.

    Attributes:
        shards: their file names, without folders.
        lengths: (S,) int64, bytes of each tar file, -1 where it came out of a stream.
        firsts: (S + 1,) int64, the first image of each.
        sources: (S,) uint8, where its classes come from.
        starts: (N,) uint32, where the image's data begins, in blocks of 512 bytes.
        sizes: (N,) uint32, bytes; what is longer than 4 GiB stands as 4 GiB - 1 and is refused when it is read.
        names, offsets: names in the tar files, as in :class:`data.part.Part`.
        class_ids: (N,) int32 in ``classes``, -1 for none.
        classes: class names.
    """

    shards: list[str]
    lengths: np.ndarray
    firsts: np.ndarray
    sources: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    names: np.ndarray
    offsets: np.ndarray
    class_ids: np.ndarray
    classes: list[str]

    def take(self, chosen: Sequence[int]) -> ShardIndex:
        """The index of the shards ``chosen`` (positions), in that order."""
        if list(chosen) == list(range(len(self.shards))):
            return self
        counts = np.diff(self.firsts)[list(chosen)]
        images = np.concatenate(
            [np.zeros(0, np.int64), *(np.arange(self.firsts[shard], self.firsts[shard + 1]) for shard in chosen)]
        )
        names, offsets = gather(self.names, self.offsets, images)
        return ShardIndex(
            [self.shards[shard] for shard in chosen],
            self.lengths[list(chosen)],
            np.concatenate([[0], np.cumsum(counts)]),
            self.sources[list(chosen)],
            *(self.starts[images], self.sizes[images], names, offsets, self.class_ids[images], self.classes),
        )

    def save(self, path: Path) -> None:
        """Write ``path``, whole or not at all."""
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        texts = {name: _joined(value) for name, value in (("shards", self.shards), ("classes", self.classes))}

        def write(draft: Path) -> None:
            with open(draft, "wb") as file:  # by a name savez would add .npz to it
                np.savez(file, allow_pickle=False, **arrays, **texts)

        write_atomically(path, write)

    @classmethod
    def load(cls, file: BinaryIO | Path, name: str, most: int | None = None) -> ShardIndex:
        """Read what :meth:`save` wrote, where it unpacks to at most ``most`` bytes: few may be sent that become many.

        Raises:
            data.remote.TooLongError: it unpacks to more.
            ValueError: damaged, or no index; ``name`` says which.
        """
        try:
            with np.load(file, allow_pickle=False) as arrays:
                if most is not None and sum(part.file_size for part in arrays.zip.infolist()) > most:
                    raise TooLongError(f"{name} unpacks to more than {most} bytes")
                found = {key: arrays[key] for key in cls.__dataclass_fields__}
            index = cls(**found | {key: _parted(found[key]) for key in ("shards", "classes")})
            index._check()
            return index
        except (FileNotFoundError, TooLongError):
            raise
        except Exception as error:  # a damaged zip raises nearly every type there is
            raise ValueError(
                f"{name} is no index of shards, or damaged ({type(error).__name__}: {error}): remove it"
            ) from error

    @staticmethod
    def names_in(path: Path) -> list[str]:
        """The file names of the shards alone, of an index that :meth:`load` takes; [] of a damaged one."""
        with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as arrays:
            return _parted(arrays["shards"])
        return []

    def _check(self) -> None:
        images, shards = len(self.starts), len(self.shards)
        sized = [(self.lengths, shards), (self.firsts, shards + 1), (self.sources, shards), (self.sizes, images)]
        sized += [(self.offsets, images + 1), (self.class_ids, images)]
        if any(part.ndim != 1 or len(part) != length for part, length in sized):
            raise ValueError("its parts do not fit each other")
        if (self.starts.dtype, self.sizes.dtype, self.names.dtype) != (np.uint32, np.uint32, np.uint8):
            raise ValueError("its numbers are of other types")
        for rising, last in ((self.firsts, images), (self.offsets, len(self.names))):
            if rising[0] != 0 or rising[-1] != last or (rising[1:] < rising[:-1]).any():
                raise ValueError("its offsets do not rise to the end")
        if images and not (self.class_ids.min() >= -1 and self.class_ids.max() < len(self.classes)):
            raise ValueError("it has images of unknown classes")


def join(parts: Sequence[ShardIndex]) -> ShardIndex:
    """One index of the shards of several."""
    if len(parts) == 1:
        return parts[0]
    number: dict[str, int] = {}
    ids = []
    for part in parts:
        table = np.asarray([number.setdefault(name, len(number)) for name in part.classes] + [-1], np.int32)
        ids.append(table[part.class_ids])

    def all_of(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    counts = np.concatenate([np.diff(part.firsts) for part in parts])
    return ShardIndex(
        shards=[name for part in parts for name in part.shards],
        lengths=all_of("lengths"),
        firsts=np.concatenate([[0], np.cumsum(counts)]),
        sources=all_of("sources"),
        starts=all_of("starts"),
        sizes=all_of("sizes"),
        names=all_of("names"),
        offsets=offsets_of(np.concatenate([np.diff(part.offsets) for part in parts])),
        class_ids=np.concatenate(ids),
        classes=list(number),
    )


@dataclass
class Omitted:
    """What a scan of tar files left out.

    Attributes:
        unsafe: members with an absolute name or one that climbs out with ``..``.
        further: images of a sample after its first, such as masks.
    """

    unsafe: int = 0
    further: int = 0


def read_tar(file: Readable, name: str, length: int, omitted: Omitted) -> ShardIndex:
    """The index of one shard, from its headers and its samples' ``.cls`` and ``.json``.

    The members of a sample follow each other and share their name up to the first dot after the last slash.

    Raises:
        data.tar.TarError: the file is damaged.
    """
    strings, starts, sizes, classes = Strings(), array("I"), array("I"), Classes()
    source, key, image, label = 0, b"", b"", None
    for member in members(file):
        if (safe := safe_name(member.name)) is None:
            omitted.unsafe += 1
            continue
        folder, slash, base = safe.rpartition(b"/")
        stem, _, ending = base.lower().partition(b".")
        if not stem:  # hidden files, such as the ._NAME of a Mac
            continue
        this = folder + slash + base[: len(stem)]
        if this != key:
            if image:
                source |= _add_class(classes, image, label)
            key, image, label = this, b"", None
        if b"." + ending.rpartition(b".")[2] in _IMAGES:
            if image:
                omitted.further += 1
                continue
            image = safe
            strings.add(safe)
            starts.append(member.start // BLOCK)
            sizes.append(min(member.size, 2**32 - 1))
        elif ending in (b"cls", b"json") and member.size <= MAX_LABEL:
            file.seek(member.start)
            label = _label(file.read(member.size), ending) if label is None or ending == b"cls" else label
    if image:
        source |= _add_class(classes, image, label)
    return ShardIndex(
        [name],
        np.asarray([length], np.int64),
        np.asarray([0, len(strings)], np.int64),
        np.asarray([source], np.uint8),
        np.frombuffer(starts, np.uint32),
        np.frombuffer(sizes, np.uint32),
        *strings.arrays(),
        classes.ids(),
        classes.names,
    )


def _add_class(classes: Classes, image: bytes, label: str | int | None) -> int:
    """Note the class of a sample -> where it comes from."""
    if label is not None:
        classes.add(str(label))
        return NUMBER if isinstance(label, int) else WORD
    folder, slash, _ = image.partition(b"/")
    classes.add(os.fsdecode(folder) if slash else None)
    return FOLDER if slash else NONE


def _label(content: bytes, ending: bytes) -> str | int | None:
    """The class in a ``.cls`` (text) or ``.json`` (one of a few keys), None where there is none."""
    text = content.decode("utf-8", "surrogateescape").strip()
    if ending == b"cls":
        return int(text) if text.isascii() and text.isdigit() else text or None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    for key in _KEYS if isinstance(values, dict) else ():
        value = values.get(key)
        if isinstance(value, str) and value.strip():
            return value.strip()
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _joined(texts: Sequence[str]) -> np.ndarray:
    return np.frombuffer("\0".join(texts).encode("utf-8", "surrogateescape"), np.uint8)


def _parted(text: np.ndarray) -> list[str]:
    whole = text.tobytes().decode("utf-8", "surrogateescape")
    return whole.split("\0") if whole else []
