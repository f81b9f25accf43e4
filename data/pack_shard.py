"""One shard of ``data.pack``: written beside its place, indexed, and renamed when it is whole."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from data.content import DecodeError
from data.decode import PILLOW_FORMATS, MismatchError, decode
from data.listing import EXTENSIONS
from data.reading import Reader
from data.shard_index import Omitted, ShardIndex, read_tar
from data.shrink import shrunk
from data.sources import ImageIndex
from data.tar import BLOCK, rounded
from formats.files import write_atomically, write_text

_RETRY_SECONDS = 120.0
_MAGIC = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"\x93NUMPY": ".npy", b"II*\0": ".tif", b"MM\0*": ".tif"}


@dataclass(frozen=True)
class Job:
    """A shard to be written.

    Attributes:
        path: of the shard.
        part: of its index, until the index of all is made.
        images: (n,) positions in the index of the source.
        shrink, quality: as in :class:`data.pack.PackSettings`.
    """

    path: Path
    part: Path
    images: np.ndarray
    shrink: int
    quality: int


@dataclass
class ShardReport:
    """What became of a shard: images in it, how many of them smaller than they were, and (path, reason) of those left out."""

    images: int = 0
    shrunk: int = 0
    broken: list[tuple[str, str]] = field(default_factory=list)


def finished(job: Job) -> ShardReport | None:
    """The report of a shard that is there and whole, else None."""
    try:
        report = ShardReport(**json.loads(job.part.with_suffix(".json").read_text()))
        index = ShardIndex.load(job.part, str(job.part))
    except (OSError, ValueError, TypeError):
        return None
    if report.images == 0:
        job.path.unlink(missing_ok=True)  # a kill came before it
        return report
    whole = job.path.exists() and job.path.stat().st_size == index.lengths[0]
    return report if whole else None


def write_shard(job: Job, index: ImageIndex, count: Callable[[], object]) -> ShardReport:
    """Write a shard; ``count`` is called after each image."""
    report, reader = ShardReport(), Reader(index, _RETRY_SECONDS)
    taken: set[str] = set()

    def write(draft: Path) -> None:
        with open(draft, "wb") as file:
            for i in job.images.tolist():
                count()
                try:
                    content, smaller = _content(reader.read(i), job)
                    name = _name(index, i, content, smaller, taken)
                except DecodeError as error:
                    report.broken.append((index.path(i), str(error)))
                    continue
                _add(file, name, content)
                if index.class_names:
                    label = {"class": index.class_names[index.label(i)], "label": index.label(i)}
                    _add(file, os.path.splitext(name)[0] + ".json", json.dumps(label).encode())
                report.images += 1
                report.shrunk += smaller
            file.write(bytes(2 * BLOCK))

        with open(draft, "rb") as written:
            read_tar(written, job.path.name, draft.stat().st_size, Omitted()).save(job.part)
        write_text(job.part.with_suffix(".json"), json.dumps(asdict(report)))

    try:
        write_atomically(job.path, write)  # last: a shard that has its name is not written again
    finally:
        reader.close()
    if not report.images:
        job.path.unlink()
    return report


def _add(file: BinaryIO, name: str, content: bytes) -> None:
    """Append a member to a tar file."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    file.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
    file.write(content.ljust(rounded(len(content)), b"\0"))


def _content(data: np.ndarray, job: Job) -> tuple[bytes, bool]:
    """(the file as it goes into the shard, whether it was made smaller); DecodeError where it is broken."""
    small = shrunk(data, job.shrink, job.quality) if job.shrink else None
    if small is not None:
        return small, True
    with contextlib.suppress(MismatchError):  # a sound file of other channels or values
        decode(data, 3)
    return data.tobytes(), False


def _name(index: ImageIndex, i: int, content: bytes, smaller: bool, taken: set[str]) -> str:
    """Name of an image in its shard: that below its root, with one dot, before the ending, and with a key of its own."""
    name = index.name(i)
    if not index.in_shard(i) and (os.path.isabs(name) or ".." in name.split("/")):
        name = os.path.relpath(os.path.normpath(index.path(i)), index.homes[index.root_ids[i]])
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    stem, ending = os.path.splitext(parts[-1])
    if smaller:
        ending = ".jpg"
    elif ending.lower() not in EXTENSIONS:
        ending = _ending(content)
    key = free = "/".join([*parts[:-1], stem.replace(".", "_")])
    number = 1
    while free in taken:
        number, free = number + 1, f"{key}-{number}"
    taken.add(free)
    return free + ending


def _ending(content: bytes) -> str:
    """The file name ending of a format."""
    for magic, ending in _MAGIC.items():
        if content.startswith(magic):
            return ending
    with Image.open(io.BytesIO(content), formats=PILLOW_FORMATS) as image:
        kind = image.format
    return min(
        ending for ending, name in Image.registered_extensions().items() if name == kind and ending in EXTENSIONS
    )
