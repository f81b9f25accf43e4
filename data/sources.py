"""Which images there are: folders, file lists and tar shards, scanned once into a compact index.

The index holds every path in one byte array with offsets, not in a list of Python strings: a million paths cost about as many
bytes as their text, and forked loader workers share them (touching a Python string's reference count would copy its page).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.listing import EXTENSIONS, folder_part, list_part
from data.part import CHUNK, Part, gather, offsets_of
from data.shard_index import INDEX_NAME, ShardIndex
from data.shard_paths import in_folder, matching, packed
from data.shards import local_part, stream_part
from formats.paths import expand, is_pattern, is_stream, split_path

ALLOWED = (
    "a folder of images or of tar shards, a text file of paths, shards such as train-{000..099}.tar, pipe:COMMAND, an http(s) "
    "address, or a comma-separated list of these"
)
FILE = np.uint32(2**32 - 1)
"""What stands for the beginning of an image that is a file of its own."""


@dataclass(frozen=True, eq=False)
class ImageIndex:
    """An ordered list of N images, each with a class or without.

    The order is sorted by path below each folder (lists and shards keep their own order), so it does not depend on the file system.
    """

    roots: tuple[str, ...]
    """What names are relative to: the absolute folder of each part of the path, or each shard (its path or address)."""
    root_ids: np.ndarray
    """(N,) int32, the root of each image."""
    names: np.ndarray
    """(bytes,) uint8, all relative paths one after the other, in the file system's encoding."""
    offsets: np.ndarray
    """(N + 1,) uint32 or int64, where each path begins in ``names``."""
    labels: np.ndarray
    """(N,) int32, the class of each image in ``class_names``, -1 for none."""
    class_names: list[str]
    """Sorted class names; empty without classes."""
    homes: tuple[str, ...] = ()
    """For each root the folder without which nothing of it can be read, "" for none."""
    starts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    """(N,) uint32, where an image's data begins in its shard, in blocks of 512 bytes, ``FILE`` for a file; empty without shards."""
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    """(N,) uint32, the length of an image in a shard in bytes, 0 for a file; empty without shards."""

    @classmethod
    def scan(
        cls,
        path: str | os.PathLike[str],
        classes: bool,
        class_names: Sequence[str] | None = None,
        retry_seconds: float = 120.0,
    ) -> ImageIndex:
        """Find the images at ``path``.

        ``path`` is one of these, or several separated by commas:

        - a folder of images (searched at any depth, links followed, names that begin with a dot left out);
        - a text file with one image path per line (relative to that file; a tab and a class name may follow; empty lines and lines
          that begin with ``#`` are skipped);
        - tar shards in webdataset's form: a folder with them, a ``.tar`` file, ``x-{000..099}.tar``, ``x-*.tar``;
        - the same read as a stream: ``pipe:COMMAND`` or ``http(s)://...``, with braces as above. What they hold is known from
          ``index.npz`` beside an address, or given as a further part of the path; else they are read through once.

        With ``classes`` every image needs a class: in a folder the first directory level below it, in a list the name after the
        tab, in a shard the sample's ``.cls`` or ``.json``, or the first folder of its name. ``class_names`` fixes the classes and
        their numbering (those of the training set, for a validation set that may lack some); without it they are the sorted names
        found (class numbers of shards in the order of numbers).
        """
        parts = find_parts(os.fspath(path), classes, retry_seconds)
        if classes and (why := next((part.unlabelled for part in parts if part.unlabelled), "")):
            raise ValueError(why)
        known = _known_classes(parts, class_names) if classes else []
        number = {name: i for i, name in enumerate(known)}
        total = sum(map(len, parts))
        labels: np.ndarray = np.broadcast_to(np.int32(-1), (total,))
        if classes:
            tables = [np.asarray([*(number[name] for name in part.classes), -1], np.int32) for part in parts]
            labels = np.concatenate([table[part.class_ids] for table, part in zip(tables, parts, strict=True)])
        root_ids, first = [], 0
        for part in parts:
            alone = np.broadcast_to(np.int32(first), (len(part),))
            root_ids.append(part.root_ids + np.int32(first) if len(part.root_ids) else alone)
            first += len(part.roots)
        sharded = any(len(part.starts) for part in parts)
        return cls(
            tuple(root for part in parts for root in part.roots),
            _concatenated(root_ids),
            _concatenated([part.names for part in parts]),
            parts[0].offsets
            if len(parts) == 1
            else offsets_of(np.concatenate([np.diff(part.offsets) for part in parts])),
            labels,
            known,
            tuple(home for part in parts for home in part.homes),
            _concatenated([_or_full(part.starts, part, FILE) for part in parts]) if sharded else np.zeros(0, np.uint32),
            _concatenated([_or_full(part.sizes, part, 0) for part in parts]) if sharded else np.zeros(0, np.uint32),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Name of image ``i`` below its root."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of an index of {len(self)}")
        return os.fsdecode(self.names[self.offsets[i] : self.offsets[i + 1]].tobytes())

    def path(self, i: int) -> str:
        """Absolute path of image ``i``; in a shard the shard's path or address, a slash and the name in it."""
        name, root = self.name(i), self.roots[self.root_ids[i]]
        return f"{root}/{name}" if self.in_shard(i) else os.path.join(root, name)

    def in_shard(self, i: int) -> bool:
        """Whether image ``i`` is a piece of a tar file, not a file of its own."""
        return len(self.starts) > 0 and self.starts[i] != FILE

    def in_stream(self, root: int) -> bool:
        """Whether what is in a root can only be read from its beginning on."""
        return is_stream(self.roots[root])

    @property
    def streams(self) -> np.ndarray:
        """(number of roots,) bool: :meth:`in_stream` of each."""
        return np.fromiter(map(is_stream, self.roots), bool, len(self.roots))

    @property
    def shards(self) -> np.ndarray:
        """(number of roots,) bool, which roots are tar shards, streams or not."""
        found = np.zeros(len(self.roots), bool)
        if len(self.starts):
            found[self.root_ids[self.starts != FILE]] = True
        return found

    def label(self, i: int) -> int:
        """Class number of image ``i``, -1 for none."""
        return int(self.labels[i])

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the order, the paths relative to their root, and the classes: moving the data set does not change it.

        Of shards also the lengths of the images, and whether they are streams, which have an order of their own.
        """
        digest = hashlib.sha256()
        parts = [(self.root_ids, np.int32), (self.offsets, np.int64), (self.names, np.uint8), (self.labels, np.int64)]
        if len(self.sizes):
            parts += [(self.sizes, np.uint32), (self.streams, np.uint8)]
        for part, kind in parts:
            for first in range(0, len(part), CHUNK):
                digest.update(np.ascontiguousarray(part[first : first + CHUNK], kind).tobytes())
        digest.update("\0".join(self.class_names).encode())
        return digest.hexdigest()

    def select(self, chosen: np.ndarray | Sequence[int]) -> ImageIndex:
        """The index of the images ``chosen`` (positions, in the order given); classes keep their numbers."""
        chosen = np.asarray(chosen, np.int64)
        starts, sizes = (part[chosen] if len(part) else part for part in (self.starts, self.sizes))
        packed = gather(self.names, self.offsets, chosen)
        labels, classes = self.labels[chosen], list(self.class_names)
        return ImageIndex(self.roots, self.root_ids[chosen], *packed, labels, classes, self.homes, starts, sizes)

    def subset(self, fraction_or_count: float | int, seed: int) -> ImageIndex:
        """A few-label subset, stratified by class, in the order of this index.

        A float in (0, 1] takes that share of each class (rounded, at least one image). An int takes that many images in all, of
        each class in proportion to its size, and at least one where there are as many images asked for as classes. Under one seed
        a smaller share lies within a larger one, and a smaller number within a larger. Without labels all images are one class.
        """
        share = fraction_or_count
        if (
            isinstance(share, bool)
            or (isinstance(share, float) and not 0 < share <= 1)
            or (isinstance(share, int) and not 1 <= share <= len(self))
        ):
            raise ValueError(
                f"a subset is a float in (0, 1] (share of each class) or an int in 1..{len(self)} (images in all), got {share!r}"
            )
        chosen, turns = [], []
        by_class = np.argsort(self.labels, kind="stable")
        labels, firsts = np.unique(self.labels[by_class], return_index=True)
        for label, members in zip(labels, np.split(by_class, firsts[1:]), strict=True):
            order = members[np.random.default_rng([seed, int(label) + 1]).permutation(len(members))]
            chosen.append(order[: max(1, round(share * len(members)))] if isinstance(share, float) else order)
            turns.append((np.arange(len(members)) + 0.5) / len(members))  # evenly through the class, whatever its size
            turns[-1][0] = -1
        if isinstance(share, int):
            chosen = [np.concatenate(chosen)[np.argsort(np.concatenate(turns), kind="stable")[:share]]]
        return self.select(np.sort(np.concatenate(chosen)))


def find_parts(text: str, classes: bool, retry_seconds: float = 120.0) -> list[Part]:
    """The parts of a path, each with its images.

    Raises:
        FileNotFoundError: one does not exist.
        ValueError: one has no images, or with ``classes`` images without a class.
    """
    if not text.strip():
        raise ValueError(f"no image path given: give {ALLOWED}")
    whole = os.path.expanduser(text)
    words = [whole] if os.path.exists(whole) else [os.path.expanduser(part) for part in split_path(text)]
    indices = [ShardIndex.load(Path(word), word) for word in words if _is_index(word)]
    words = [word for word in words if not _is_index(word)]
    if indices and not any(map(is_stream, words)):
        raise ValueError(f"image path {text!r} has an index of shards, but no pipe: or http(s) address that it is for")
    found = []
    for word in words:
        part, kind = _part(word, classes, indices, retry_seconds)
        if not len(part):
            looked = f"; looked, at any depth, for {' '.join(sorted(EXTENSIONS))}" if kind != "list" else ""
            raise ValueError(f"no images in {kind} {word!r}{looked}")
        found.append(part)
    return found


def _is_index(word: str) -> bool:
    return word.endswith(".npz") and not is_stream(word) and os.path.isfile(word)


def _part(word: str, classes: bool, indices: Sequence[ShardIndex], retry_seconds: float) -> tuple[Part, str]:
    """(images of one part of a path, what kind of part it is)."""
    if is_stream(word):
        return stream_part(expand(word), indices, retry_seconds), "stream"
    path = Path(word)
    if not path.exists() and is_pattern(word):
        return local_part(matching(word)), "shards"
    if not path.exists():
        raise FileNotFoundError(f"image path {word!r} does not exist (it may be {ALLOWED})")
    if path.is_dir():
        if (packed(path) or (path / INDEX_NAME).exists()) and (shards := in_folder(path)):
            return local_part(shards), "folder"
        part = folder_part(path, classes)
        shards = [] if len(part) else in_folder(path)  # beside images tar files are what these came out of
        return (local_part(shards) if shards else part), "folder"
    return (local_part([path]), "shard") if path.suffix == ".tar" else (list_part(path, classes), "list")


def _or_full(values: np.ndarray, part: Part, other: int | np.uint32) -> np.ndarray:
    return values if len(values) else np.broadcast_to(np.uint32(other), (len(part),))


def _concatenated(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _known_classes(parts: Iterable[Part], class_names: Sequence[str] | None) -> list[str]:
    """Sorted names found, or the given ones after a check that they cover what was found."""
    parts = list(parts)
    present = {part.classes[i] for part in parts for i in np.unique(part.class_ids)}
    if class_names is None:
        return sorted(present, key=int) if all(part.counted for part in parts) else sorted(present)
    unknown = sorted(present - set(class_names))
    if unknown:
        raise ValueError(
            f"classes {unknown[:5]} are not among the {len(class_names)} known ones ({list(class_names)[:5]} ...)"
        )
    return list(class_names)
