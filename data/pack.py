"""``python -m data.pack FOLDER SHARDS [key=value ...]``: images -> tar shards with their index.

Works on several cores, goes on after a kill where it was (a finished shard is complete or not there), and refuses a folder that
holds anything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import logging
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.pack_shard import Job, ShardReport, finished, write_shard
from data.shard_index import INDEX_NAME, ShardIndex, join
from data.shard_paths import INFO_NAME, packed
from data.sources import ImageIndex
from data.workers import Pool
from formats.files import DRAFTS, write_json

VERSION = 1
PARTS = ".parts"
LOCK = ".lock"
_NAMED = 20
_LOCK_TRIES = 10
_ADVICE = "Finished shards are kept, the same command goes on: with workers=N fewer of them take less memory"


@dataclasses.dataclass(frozen=True)
class PackSettings:
    """How shards are made.

    Attributes:
        shrink: length that the shorter side of larger pictures is brought to, saved as JPEG; 0 keeps every file as it is.
        quality: of these JPEGs, 1 to 100.
        shard_size: images per shard.
        shuffle: in random order, which streams need (they are shuffled by shards and in blocks); false keeps the order.
        seed: of that order.
        classes: whether to keep the classes; auto: if every image has one.
        workers: processes; 0: as many as there are cores.
    """

    shrink: int = 0
    quality: int = 95
    shard_size: int = 2000
    shuffle: bool = True
    seed: int = 0
    classes: str = "auto"
    workers: int = 0

    def __post_init__(self) -> None:
        if self.shrink < 0 or not 1 <= self.quality <= 100 or self.shard_size < 1 or self.workers < 0:
            raise ValueError(f"shrink and workers must be >= 0, quality in 1..100, shard_size >= 1, got {self}")
        if self.classes not in ("auto", "true", "false"):
            raise ValueError(f"classes must be auto, true or false, got {self.classes!r}")


def pack(source: str, target: Path, settings: PackSettings) -> dict[str, Any]:
    """Write the images at ``source`` as shards into the folder ``target`` -> what ``shards.json`` says.

    Raises:
        ValueError: ``target`` holds something else, or no image can be read.
    """
    index = _scan(source, settings.classes)
    if index.streams.any():
        raise ValueError("streams cannot be packed: give folders, lists or shards on a disk")
    form = {
        "images": len(index),
        "source": index.fingerprint(),
        **{key: value for key, value in dataclasses.asdict(settings).items() if key not in ("workers", "classes")},
        "version": VERSION,
    }
    found = _check_target(target, form)
    if found.get("complete"):
        return found
    (target / PARTS).mkdir(parents=True, exist_ok=True)
    with _locked(target):
        write_json(target / INFO_NAME, {"complete": False, "form": form})
        for draft in target.glob(DRAFTS):
            draft.unlink()
        jobs = list(_jobs(index, target, settings))
        reports = _run(jobs, index, settings)
        parts = [ShardIndex.load(job.part, str(job.part)) for job in jobs if reports[job.path.name].images]
        if not parts:
            raise ValueError(f"none of the {len(index)} images at {source!r} can be read")
        whole = join(parts)
        whole.save(target / INDEX_NAME)
        info = _info(form, whole, [reports[job.path.name] for job in jobs])
        write_json(target / INFO_NAME, info)
        shutil.rmtree(target / PARTS)
    (target / LOCK).unlink(missing_ok=True)
    return info


def _scan(source: str, classes: str) -> ImageIndex:
    if classes != "auto":
        return ImageIndex.scan(source, classes=classes == "true")
    try:
        return ImageIndex.scan(source, classes=True)
    except ValueError:
        return ImageIndex.scan(source, classes=False)


def _check_target(target: Path, form: dict[str, Any]) -> dict[str, Any]:
    """What an earlier start with the same form has left, {} for nothing; anything else is refused."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return {}
    found = packed(target) if target.is_dir() else {}
    old = found.get("form")
    if not isinstance(old, dict):
        raise ValueError(f"{str(target)!r} exists and was not written by data.pack: give an empty or a new folder")
    if differ := [key for key in form if old.get(key) != form[key]]:
        named = ", ".join(f"{key}={old.get(key)} (now {form[key]})" for key in differ)
        raise ValueError(
            f"{str(target)!r} was packed with {named}: give another folder, or the old settings and source"
        )
    return found


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    with open(target / LOCK, "w") as file:
        for tries in range(_LOCK_TRIES, -1, -1):  # workers of one that was killed hold it until they notice
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not tries:
                    raise ValueError(f"another data.pack is at work in {str(target)!r}") from None
                time.sleep(0.5)
        yield


def _jobs(index: ImageIndex, target: Path, settings: PackSettings) -> Iterator[Job]:
    count = len(index)
    order = np.random.default_rng(settings.seed).permutation(count) if settings.shuffle else np.arange(count)
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", Path(os.path.abspath(target)).name)
    for number, first in enumerate(range(0, count, settings.shard_size)):
        name = f"{stem}-{number:06d}"
        images = order[first : first + settings.shard_size]
        yield Job(target / f"{name}.tar", target / PARTS / f"{name}.npz", images, settings.shrink, settings.quality)


def _run(jobs: Sequence[Job], index: ImageIndex, settings: PackSettings) -> dict[str, ShardReport]:
    """Write the shards that are not there yet -> a report of each, by its file name."""
    reports = {job.path.name: report for job in jobs if (report := finished(job)) is not None}
    to_do = [job for job in jobs if job.path.name not in reports]
    counter: Any = multiprocessing.get_context("fork").Value("q", 0)
    counter.value = sum(len(job.images) for job in jobs if job.path.name in reports)
    # The index reaches the processes by the fork, not as an argument.
    work = functools.partial(_work, index=index, counter=counter, parent=os.getpid())
    workers = min(settings.workers or os.cpu_count() or 1, max(len(to_do), 1))
    pool = Pool(work, workers, "pack worker", lambda job: f"shard {job.path}", _ADVICE)
    with tqdm(total=len(index), initial=counter.value, unit="image") as bar:
        watch = _Watch(bar, counter)
        try:
            for job, report in zip(to_do, pool.run(_Jobs(to_do)), strict=True):
                reports[job.path.name] = report
        finally:
            pool.close()
            watch.close()
    return reports


class _Jobs:
    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = iter(jobs)

    def ready(self) -> bool:
        return True

    def __next__(self) -> Job:
        return next(self._jobs)


class _Watch:
    """Keeps a bar at the number that the processes count together."""

    def __init__(self, bar: Any, counter: Any) -> None:
        self._bar, self._counter, self._end = bar, counter, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        more = True
        while more:
            more = not self._end.wait(0.5)
            self._bar.update(min(self._counter.value, self._bar.total) - self._bar.n)

    def close(self) -> None:
        self._end.set()
        self._thread.join()


def _work(job: Job, *, index: ImageIndex, counter: Any, parent: int) -> ShardReport:
    def count() -> None:
        if os.getppid() != parent:  # nobody waits for it any more, and a new start may write the same shard
            os._exit(1)
        with counter.get_lock():
            counter.value += 1

    return write_shard(job, index, count)


def _info(form: dict[str, Any], whole: ShardIndex, reports: Sequence[ShardReport]) -> dict[str, Any]:
    counts = np.diff(whole.firsts).tolist()
    return {
        "complete": True,
        "form": form,
        "images": len(whole.starts),
        "bytes": int(whole.lengths.sum()),
        "shrunk": sum(report.shrunk for report in reports),
        "classes": whole.classes,
        "shards": dict(zip(whole.shards, counts, strict=True)),
        "broken": [{"path": path, "reason": reason} for report in reports for path, reason in report.broken],
    }


def parse(words: Sequence[str]) -> tuple[str, Path, PackSettings]:
    """(source, target, settings) of the command line.

    Raises:
        ValueError: naming what is wrong.
    """
    fields = {field.name: field for field in dataclasses.fields(PackSettings)}
    places = [word for word in words if word.partition("=")[0] not in fields]
    given: dict[str, Any] = {}
    for word in words:
        key, _, text = word.partition("=")
        if key not in fields:
            continue
        kind: Any = type(fields[key].default)
        try:
            given[key] = {"true": True, "false": False}[text] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise ValueError(f"{word}: {key} must be {'true or false' if kind is bool else 'a whole number'}") from None
    if len(places) != 2:
        raise ValueError(
            f"give the images, the folder of the shards, and settings out of {', '.join(f'{key}=' for key in fields)}; "
            f"got {' '.join(places) or 'nothing'}"
        )
    return places[0], Path(places[1]).expanduser(), PackSettings(**given)


def main(words: Sequence[str]) -> int:
    """The command line -> exit code."""
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(f"{__doc__}\n{PackSettings.__doc__}\n")
        return 0 if words else 2
    logging.basicConfig(format="%(message)s")
    started = time.monotonic()
    try:
        source, target, settings = parse(words)
        info = pack(source, target, settings)
    except (ValueError, OSError, RuntimeError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped: finished shards are kept, the same command goes on\n")
        return 130
    broken = info["broken"]
    for entry in broken[:_NAMED]:
        sys.stderr.write(f"left out broken image {entry['path']}: {entry['reason']}\n")
    if len(broken) > _NAMED:
        sys.stderr.write(f"and {len(broken) - _NAMED} more, in {target / INFO_NAME}\n")
    sys.stdout.write(
        f"{target}: {info['images']} images in {len(info['shards'])} shards, {info['bytes'] / 1e6:.1f} MB, {info['shrunk']} shrunk, "
        f"{len(broken)} broken ones left out, {len(info['classes'])} classes, {time.monotonic() - started:.0f} s\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
