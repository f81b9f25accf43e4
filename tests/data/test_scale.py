"""Memory and time of large sets: index and shuffle, what workers hold for themselves, a loader over an epoch.

``python -m tests.data.test_scale FOLDER COUNT`` prints what the nightly test measures.
"""

import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.loader import Loader
from data.shards import main as index_main
from data.sources import ImageIndex
from data.transforms import EvalTransform
from tests.data.images import folder, png, tar, train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

PER_SHARD = 1000


def _made(path: Path, count: int) -> tuple[Path, Path]:
    """(shards, list) of ``count`` small images: one shard under many names, and one file in many lines."""
    shards = path / "shards"
    names = (f"n{i % 7:08d}/n{i % 7:08d}_{i:05d}.png" for i in range(PER_SHARD))
    first = tar(shards / "s-000000.tar", {name: png(i % 50) for i, name in enumerate(names)})
    for number in range(1, count // PER_SHARD):
        os.link(first, shards / f"s-{number:06d}.tar")
    (path / "x.png").write_bytes(png(0))
    lines = path / "list.txt"
    with open(lines, "w") as file:
        for i in range(count):
            file.write(f"n{i % 7:08d}/../x_{i:09d}.png\tn{i % 7:08d}\n")
    return shards, lines


def _memory(pid: int | str, key: str) -> int:
    """A number of /proc/PID/smaps_rollup, in bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(key)


def _private(pid: int) -> int:
    """Bytes that a process shares with no other."""
    return _memory(pid, "Private_Dirty") + _memory(pid, "Private_Clean")


def _peak() -> int:
    """Most bytes this process has held so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("VmHWM")


def measure(path: str, classes: bool) -> dict[str, float]:
    """Scan, shuffle, and (of shards) load a batch with two workers; bytes are of this process, above what it began with."""
    torch.set_num_threads(1)
    base, begin = _peak(), time.perf_counter()
    index = ImageIndex.scan(path, classes)
    scanned = time.perf_counter()
    workers = 0 if path.endswith(".txt") else 2
    loader = Loader(
        index, EvalTransform((8, 8), 1.0), batch_size=64, in_chans=3, seed=0, rank=0, world_size=1, workers=workers,
        shuffle=True, drop_last=True,
    )  # fmt: skip
    result: dict[str, float] = {"images": len(index), "scan_seconds": scanned - begin}
    if workers:
        batches = loader.batches(0)
        next(batches)
        result["first_batch_seconds"] = time.perf_counter() - scanned
        for _ in range(10):
            next(batches)
        result["worker_private_bytes"] = max(_private(pid) for pid in loader.worker_pids())
    else:
        loader._order.sequence(0)
        result["shuffle_seconds"] = time.perf_counter() - scanned
    result |= {"base_bytes": base, "peak_bytes": _peak()}
    begin = time.perf_counter()
    index.fingerprint()
    result["fingerprint_seconds"] = time.perf_counter() - begin
    loader.close()
    return result


def _measured(path: Path, classes: bool) -> dict[str, float]:
    """:func:`measure` in a process of its own."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=lambda: theirs.send(measure(str(path), classes)))
    process.start()
    theirs.close()
    found = mine.recv()
    process.join()
    return found


def report(path: Path, count: int) -> dict[str, dict[str, float]]:
    """Everything that is measured of ``count`` images."""
    shards, lines = _made(path, count)
    begin = time.perf_counter()
    assert index_main([str(shards)]) == 0
    found = {"headers": {"seconds": time.perf_counter() - begin}}
    for name, part, classes in (("shards", shards, True), ("list", lines, True)):
        found[name] = _measured(part, classes)
    return found


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_ten_million_images(tmp_path: Path) -> None:
    """Index and shuffle within 1 GB above torch and its libraries, and ready to train in seconds."""
    found = report(tmp_path, 10_000_000)
    shards, listed = found["shards"], found["list"]
    assert shards["images"] == listed["images"] == 10_000_000
    for part in (shards, listed):
        assert part["peak_bytes"] - part["base_bytes"] < 1e9
    assert shards["scan_seconds"] + shards["first_batch_seconds"] < 60, "on a busy machine"
    assert shards["worker_private_bytes"] < 50e6


def test_the_bytes_of_an_image(tmp_path: Path) -> None:
    """A fiftieth of that: no more than the arrays and what building them takes; workers hold none of it for themselves."""
    count = 200_000
    found = report(tmp_path, count)
    for name, most in (("shards", 130), ("list", 130)):
        assert (found[name]["peak_bytes"] - found[name]["base_bytes"]) / count < most + 30e6 / count, name
    few = tmp_path / "few"
    few.mkdir()
    os.link(tmp_path / "shards/s-000000.tar", few / "s-000000.tar")
    alone = _measured(few, True)["worker_private_bytes"]
    assert found["shards"]["worker_private_bytes"] - alone < 3e6, "its index has 12 MB"


def test_workers_share_the_index(tmp_path: Path) -> None:
    """A quarter of a million paths, looked at one after the other: what the workers hold for themselves does not grow by a quarter of them."""
    (tmp_path / "x.png").write_bytes(png(0))
    lines = tmp_path / "list.txt"
    lines.write_text("".join(f"{'./' * (i % 20 + 1)}{'.//' * 20}x.png\n" for i in range(250_000)))
    index = ImageIndex.scan(lines, classes=False)
    assert index.names.nbytes > 20e6
    with train(index, workers=2, batch_size=50) as loader:
        batches = loader.batches(0)
        for _ in range(20):
            next(batches)
        before = [_private(pid) for pid in loader.worker_pids()]
        for _ in range(100):
            next(batches)
        after = [_private(pid) for pid in loader.worker_pids()]
    assert max(b - a for a, b in zip(before, after, strict=True)) < 6e6


def _files(pid: int | str) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.parametrize("kind", ["folder", "shards", "pipes"])
def test_memory_does_not_grow_over_an_epoch(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the main process nor the workers, nor the files that they have open."""
    images = folder(tmp_path / "images", 20)
    repeated: Any = str(images)
    if kind != "folder":
        shard = tar(tmp_path / "s/s-00.tar", {f"{i:03d}.png": png(i) for i in range(200)})
        for number in range(1, 10):
            os.link(shard, tmp_path / f"s/s-{number:02d}.tar")
        assert index_main([str(tmp_path / "s")]) == 0
        repeated = tmp_path / "s"
        if kind == "pipes":
            repeated = f"{tmp_path}/s/index.npz,pipe:cat {tmp_path}/s/s-{{00..09}}.tar"
    else:
        repeated = tmp_path / "list.txt"
        repeated.write_text("".join(f"{file}\n" for file in sorted(images.rglob("*.png"))) * 100)
    index = ImageIndex.scan(repeated, classes=False)
    assert len(index) == 2000
    with train(index, workers=2, batch_size=4, shuffle_block=50) as loader:

        def held(batches: Iterator[Any], count: int) -> tuple[int, int]:
            for _ in range(count):
                next(batches)
            gc.collect()
            pids = [os.getpid(), *loader.worker_pids()]
            return sum(_private(pid) for pid in pids), sum(map(_files, pids))

        batches = loader.batches(0)
        first = held(batches, 150)
        last = held(batches, 340)
        epochs = [held(loader.batches(epoch), 490) for epoch in (1, 2)]
    memory, files = zip(first, last, *epochs, strict=True)
    assert min(np.diff(memory)) < 3e6, "what is kept of every image grows in every epoch; an allocator in one of them"
    assert all(abs(count - files[0]) < 30 for count in files), "at most the shards, once for each worker"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(report(Path(sys.argv[1]), int(sys.argv[2])), indent=1) + "\n")
