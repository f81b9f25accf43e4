"""Tar shards as a part of a path: which they are, and their index, found or made.

``python -m data.shards FOLDER`` writes ``index.npz`` beside shards that others made, so that no run has to read their headers.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import io
import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.part import Part
from data.patience import StorageGoneError
from data.remote import ShardStream, TooLongError, fetch
from data.shard_index import FOLDER, INDEX_NAME, MOST_BYTES, NONE, NUMBER, WORD, Omitted, ShardIndex, join, read_tar
from data.tar import TarError

logger = logging.getLogger(__name__)

_SAY_SECONDS = 10.0
_SCANNERS = 4
"""Shards whose headers are read at the same time: on a network disk most of it is waiting."""


def local_part(paths: Sequence[Path]) -> Part:
    """The images of tar files on disk, in the order of the files and within them."""
    paths = [Path(os.path.abspath(path)) for path in paths]
    return _part(_local_index(paths), list(map(str, paths)), [str(path.parent) for path in paths])


def stream_part(addresses: Sequence[str], indices: Sequence[ShardIndex], retry_seconds: float = 120.0) -> Part:
    """The images of shards that are read from pipes and addresses, in that order.

    One of ``indices`` knows a shard whose file name it holds and the address contains; else ``index.npz`` beside an http(s) address
    does; what none knows is read once from end to end.
    """
    return _part(_stream_index(addresses, indices, retry_seconds), list(addresses), [""] * len(addresses))


def _part(index: ShardIndex, roots: list[str], homes: list[str]) -> Part:
    sources = int(np.bitwise_or.reduce(index.sources)) if len(index.sources) else 0
    unlabelled = ""
    if sources & NONE:
        shard = int(np.flatnonzero(index.sources & NONE)[0])
        unlabelled = (
            f"images of shard {roots[shard]!r} have no class: it stands in the sample's .cls or .json (as class, cls, label, "
            "class_name or target), or is the first folder of its name"
        )
    elif sources & FOLDER and sources & (WORD | NUMBER):
        unlabelled = (
            f"some samples of {roots[0]!r} and the shards with it have a .cls or .json with a class, others none"
        )
    return Part(
        roots,
        homes,
        *(index.names, index.offsets),
        root_ids=np.repeat(np.arange(len(roots), dtype=np.int32), np.diff(index.firsts)),
        class_ids=index.class_ids,
        classes=index.classes,
        counted=sources == NUMBER,
        unlabelled=unlabelled,
        starts=index.starts,
        sizes=index.sizes,
    )


def _local_index(paths: Sequence[Path]) -> ShardIndex:
    """From the indices beside the shards; the headers of those that no index knows are read, once."""
    lengths = [path.stat().st_size for path in paths]
    known: list[tuple[ShardIndex, int] | None] = [None] * len(paths)
    for folder in sorted({path.parent for path in paths}):
        if not (folder / INDEX_NAME).exists():
            continue
        index = ShardIndex.load(folder / INDEX_NAME, str(folder / INDEX_NAME))
        at = {name: shard for shard, name in enumerate(index.shards)}
        for i, path in enumerate(paths):
            if path.parent == folder and (shard := at.get(path.name)) is not None:
                if index.lengths[shard] in (-1, lengths[i]):
                    known[i] = (index, shard)
                else:
                    logger.warning("%s was changed after its index.npz was made: its headers are read", path)
    rest = [i for i, found in enumerate(known) if found is None]
    if rest:
        stamps = [f"{paths[i]}\0{lengths[i]}\0{paths[i].stat().st_mtime_ns}" for i in rest]
        read = _once(stamps, lambda: _scan([str(paths[i]) for i in rest], [lengths[i] for i in rest], _scan_file))
        for shard, i in enumerate(rest):
            known[i] = (read, shard)
    return _assembled(known)


def _stream_index(addresses: Sequence[str], indices: Sequence[ShardIndex], retry_seconds: float) -> ShardIndex:
    known: list[tuple[ShardIndex, int] | None] = [_named_in(address, indices) for address in addresses]
    beside: dict[str, ShardIndex | None] = {}
    for i, address in enumerate(addresses):
        if known[i] is None and not address.startswith("pipe:"):
            base = address.partition("?")[0].rpartition("/")[0] + "/" + INDEX_NAME
            if base not in beside:
                beside[base] = _index_at(base)
            if (index := beside[base]) is not None:
                known[i] = _named_in(address, [index])
    rest = [i for i, found in enumerate(known) if found is None]
    if rest:
        some = [addresses[i] for i in rest]

        def scan(address: str, length: int, omitted: Omitted) -> ShardIndex:
            with ShardStream(address, retry_seconds) as stream:
                return read_tar(stream, address, -1, omitted)

        read = _once(some, lambda: _scan(some, [-1] * len(some), scan))
        for shard, i in enumerate(rest):
            known[i] = (read, shard)
    return _assembled(known)


def _index_at(address: str) -> ShardIndex | None:
    """The index at an http(s) address, None where there is none."""
    try:
        content = fetch(address, MOST_BYTES)
        return None if content is None else ShardIndex.load(io.BytesIO(content), address, MOST_BYTES)
    except TooLongError as error:
        raise ValueError(
            f"{error}, the most that is taken from an address: copy it to a disk and give it as a part of the path: "
            f"FOLDER/{INDEX_NAME},http://..."
        ) from error


def _named_in(address: str, indices: Sequence[ShardIndex]) -> tuple[ShardIndex, int] | None:
    """The shard with the longest file name that stands in an address."""
    found = [
        (len(name), index, shard) for index in indices for shard, name in enumerate(index.shards) if name in address
    ]
    return max(found, key=lambda entry: entry[0])[1:] if found else None


def _assembled(known: Sequence[tuple[ShardIndex, int] | None]) -> ShardIndex:
    """One index of shards, in that order; neighbours out of one index are taken together."""
    parts = []
    for _, group in itertools.groupby((found for found in known if found), key=lambda found: id(found[0])):
        same = list(group)
        parts.append(same[0][0].take([shard for _, shard in same]))
    return join(parts)


def _scan_file(path: str, length: int, omitted: Omitted) -> ShardIndex:
    with open(path, "rb", buffering=1 << 13) as file:
        return read_tar(file, os.path.basename(path), length, omitted)


def _scan(
    addresses: Sequence[str], lengths: Sequence[int], scan: Callable[[str, int, Omitted], ShardIndex]
) -> ShardIndex:
    """Read through shards -> their index."""
    what = "headers of the shards" if lengths[0] >= 0 else "whole shards, to learn what they hold"
    logger.warning(
        "reading the %s %s and %d more, once: no index.npz knows them", what, addresses[0], len(addresses) - 1
    )
    said, parts, omitted = time.monotonic(), [], Omitted()

    def one(i: int) -> ShardIndex:
        try:
            return scan(addresses[i], lengths[i], omitted)
        except TarError as error:
            raise ValueError(f"{addresses[i]}: {error}") from error
        except StorageGoneError as error:
            raise ValueError(str(error)) from error

    with ThreadPoolExecutor(_SCANNERS) as pool:
        for i, part in enumerate(pool.map(one, range(len(addresses)))):
            parts.append(part)
            if time.monotonic() - said > _SAY_SECONDS:
                said = time.monotonic()
                logger.warning("read %d of %d shards", i + 1, len(addresses))
    if omitted.unsafe:
        logger.warning("left out %d members of shards whose names are absolute or hold '..'", omitted.unsafe)
    if omitted.further:
        logger.warning("left out %d images of samples that have another one before", omitted.further)
    return join(parts)


def _once(stamps: Sequence[str], make: Callable[[], ShardIndex]) -> ShardIndex:
    """What ``make`` gives, kept in the user's cache folder for the next run with the same ``stamps``.

    Of several processes on a machine one makes it, the others wait.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "palimpsest"
    file = folder / f"shards_{hashlib.sha256(chr(10).join(stamps).encode('utf-8', 'surrogateescape')).hexdigest()}.npz"
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = held.enter_context(open(file.with_suffix(".lock"), "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("no cache in %s (%s): the index of the shards is not kept", folder, error)
        with contextlib.suppress(OSError, ValueError):
            return ShardIndex.load(file, str(file))
        index = make()
        try:
            index.save(file)
            logger.info("the index of the shards is kept in %s", file)
        except OSError as error:
            logger.warning("the index of the shards could not be kept: %s", error)
        return index


def main(words: Sequence[str] | None = None) -> int:
    """``python -m data.shards FOLDER``: write the index of the shards in a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m data.shards", description="Write index.npz beside tar shards, from their headers."
    )
    parser.add_argument("folder", help="folder with .tar files directly in it")
    folder = Path(parser.parse_args(words).folder)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        sys.stderr.write(f"no .tar files directly in {str(folder)!r}\n")
        return 2
    logging.basicConfig(format="%(message)s")
    try:
        index = _scan([str(path) for path in paths], [path.stat().st_size for path in paths], _scan_file)
        index.save(folder / INDEX_NAME)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{folder / INDEX_NAME}: {len(index.starts)} images in {len(paths)} shards\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
