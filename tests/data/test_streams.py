"""Shards out of pipes and from a web server: exact division, exact resume, faults on the way."""

import itertools
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.loader import Loader
from data.order import Order
from data.pack import PackSettings, pack
from data.patience import StorageGoneError
from data.remote import ShardStream, TooLongError, fetch
from data.shard_index import MOST_BYTES, ShardIndex
from data.sources import ImageIndex
from tests.data.images import EVAL, Server, evaluate, folder, indices, png, same, serve, tar, train

COUNT = 46
"""Images, in ten shards of at most 5."""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    monkeypatch.setattr("data.patience.FIRST_DELAY", 0.01)
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = folder(tmp_path_factory.mktemp("images"), COUNT)
    target = tmp_path_factory.mktemp("shards") / "train"
    pack(str(images), target, PackSettings(shard_size=5, workers=1))
    return target


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    with serve(shards) as running:
        yield running


def _pipes(shards: Path, command: str = "cat") -> str:
    """A path of pipes with their index."""
    return f"{shards}/index.npz,pipe:{command} {shards}/train-{{000000..000009}}.tar"


def _urls(server: Server) -> str:
    return server.address + "/train-{000000..000009}.tar"


def _logged(shards: Path, log: Path) -> str:
    """Pipes that write down when they are opened."""
    return f"{shards}/index.npz,pipe:f={shards}/train-{{000000..000009}}.tar; echo $f >> {log}; cat $f"


def _opened(log: Path) -> list[str]:
    return [os.path.basename(line) for line in log.read_text().split()] if log.exists() else []


# --- the same images --------------------------------------------------------------------------------------------------


def test_the_same_index_as_of_local_shards(shards: Path, server: Server) -> None:
    local = ImageIndex.scan(shards, classes=True)
    for path in (_pipes(shards), _urls(server)):
        index = ImageIndex.scan(path, classes=True)
        assert [index.name(i) for i in range(COUNT)] == [local.name(i) for i in range(COUNT)]
        assert index.labels.tolist() == local.labels.tolist() and index.class_names == list("abc")
        assert index.streams.all() and not local.streams.any()
        assert index.fingerprint() != local.fingerprint(), "streams have an order of their own"
    assert index.path(7) == f"{server.address}/train-000001.tar/{local.name(7)}"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("rank", "world_size", "streams"), [(0, 1, 1), (0, 1, 3), (1, 2, 4), (2, 3, 3), (1, 2, 1), (2, 4, 6)]
)
def test_the_same_batches_as_of_local_shards(
    shards: Path, server: Server, rank: int, world_size: int, streams: int, workers: int
) -> None:
    """In one order, bit for bit, from any batch on: training with and without repeats, evaluation."""
    local = ImageIndex.scan(shards, classes=True)
    changes = dict(rank=rank, world_size=world_size, streams=streams, shuffle_block=3, batch_size=2)
    for path, more in ((_pipes(shards), {}), (_urls(server), {"repeats": 2})):
        index = ImageIndex.scan(path, classes=True)
        with train(index, workers=workers, **changes, **more) as ours:
            for epoch, start in ((0, 0), (1, 3), (1, 0), (2, len(ours))):
                expected = list(train(local, **changes, **more).batches(epoch, start))
                assert same(list(ours.batches(epoch, start)), expected)
                assert len(expected) == len(ours) - start


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_image_once(shards: Path, world_size: int) -> None:
    """Each rank has as many batches; together they see no image twice, in evaluation all of them, each shard opened by one rank
    but for those at the ends of its share."""
    index = ImageIndex.scan(_pipes(shards), classes=False)
    ranks = [train(index, rank=rank, world_size=world_size, batch_size=2) for rank in range(world_size)]
    batches = [indices(loader.batches(4)) for loader in ranks]
    assert {len(part) for part in batches} == {len(ranks[0])} == {COUNT // 2 // world_size}
    seen = list(itertools.chain(*itertools.chain(*batches)))
    assert len(seen) == len(set(seen)) == len(ranks[0]) * 2 * world_size
    shards_seen = [len({int(index.root_ids[i]) for batch in part for i in batch}) for part in batches]
    assert sum(shards_seen) <= 10 + world_size - 1
    judges = [evaluate(index, rank=rank, world_size=world_size) for rank in range(world_size)]
    parts = [list(itertools.chain(*indices(loader.batches(0)))) for loader in judges]
    assert sorted(itertools.chain(*parts)) == list(range(COUNT))
    assert [len(part) for part in parts] == [len(range(rank, COUNT, world_size)) for rank in range(world_size)]
    assert all(part == sorted(part) for part in parts)


def test_shuffling(shards: Path) -> None:
    """Shards in another order each epoch, images of a block among each other; another seed, another order."""
    index = ImageIndex.scan(_pipes(shards), classes=False)

    def sequence(epoch: int, seed: int = 1) -> np.ndarray:
        order = Order(
            index, batch_size=2, seed=seed, rank=0, world_size=1, shuffle=True, drop_last=True, repeats=1
        )  # fmt: skip
        return order.sequence(epoch)

    first, second = sequence(0), sequence(1)
    assert sorted(first) == list(range(COUNT)) == sorted(second)
    orders = [
        index.root_ids[part][np.flatnonzero(np.diff(index.root_ids[part], prepend=-1))] for part in (first, second)
    ]
    assert all(sorted(order) == list(range(10)) for order in orders) and not np.array_equal(*orders)
    assert any(np.diff(first[index.root_ids[first] == shard].astype(int)).min() < 0 for shard in range(9)), (
        "shuffled within"
    )
    assert np.array_equal(first, sequence(0)) and not np.array_equal(first, sequence(0, seed=2))


def test_beside_folders_and_local_shards(shards: Path, tmp_path: Path, server: Server) -> None:
    images = folder(tmp_path / "more", 20)
    index = ImageIndex.scan(f"{images},{_pipes(shards)},{shards},{_urls(server)}", classes=True)
    assert len(index) == 20 + 3 * COUNT
    for world_size in (1, 2):
        batches = [
            list(train(index, rank=rank, world_size=world_size, workers=rank, batch_size=3).batches(0))
            for rank in range(world_size)
        ]
        seen = [i for part in batches for batch in part for i in batch["index"].tolist()]
        assert len(seen) == len(set(seen)) >= 156
        for part in batches:
            for batch in part:
                assert batch["label"].tolist() == [index.label(i) for i in batch["index"].tolist()]
    with train(index, workers=2) as loader:
        whole = list(loader.batches(1))
        assert same(list(loader.batches(1, 30)), whole[30:])


def test_a_part_of_the_set(shards: Path) -> None:
    """A subset opens only shards it needs, and gives its own images; a preview opens one."""
    log = shards.parent / "part.log"
    index = ImageIndex.scan(_logged(shards, log), classes=True)
    part = index.select([40, 3, 4, 44])
    assert [batch["index"].tolist() for batch in evaluate(part).batches(0)] == [[0, 1, 2, 3]]
    expected = evaluate(ImageIndex.scan(shards, classes=True).select([40, 3, 4, 44]))
    assert same(list(evaluate(part).batches(0)), list(expected.batches(0)))
    assert _opened(log)[:3] == ["train-000008.tar", "train-000000.tar", "train-000008.tar"]
    log.unlink()
    settings = type("Data", (), dict(in_chans=3, value_range=[], retry_seconds=1.0))
    assert Loader.preview(index, EVAL, settings, 4, seed=0)["index"].tolist() == [0, 1, 2, 3]  # type: ignore[arg-type]
    assert _opened(log) == ["train-000000.tar"]


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 5, 9, 11])
def test_a_start_in_mid_epoch_reads_the_current_shard_again_and_none_before(
    shards: Path, tmp_path: Path, start: int
) -> None:
    log = tmp_path / "log"
    index = ImageIndex.scan(_logged(shards, log), classes=False)
    whole = list(train(index).batches(3))
    visited = _opened(log)
    assert len(visited) == len(set(visited)) == 10
    log.unlink()
    assert same(list(train(index).batches(3, start)), whole[start:])
    assert _opened(log) == (visited[-len(_opened(log)) :] if start < 11 else [])
    needed = {
        re.findall(r"train-\d+\.tar", index.roots[index.root_ids[i]])[0]
        for batch in whole[start:]
        for i in batch["index"].tolist()
    }
    assert set(_opened(log)) == needed


def test_the_number_of_streams_is_kept_with_the_run(shards: Path) -> None:
    """A run of two ranks that goes on with one, or four, shows the same images: if its setting says how it began."""
    index = ImageIndex.scan(_pipes(shards), classes=False)

    def settings(streams: int) -> Any:
        values = dict(in_chans=3, value_range=[], workers=0, max_broken=0.1, retry_seconds=1.0, shuffle_block=0)
        return SimpleNamespace(**values, streams=streams)

    def steps(data: Any, world_size: int, start: int) -> list[list[int]]:
        ranks = [
            Loader.of(
                index, EVAL, data, batch_size=4 // world_size, seed=0, rank=rank, world_size=world_size, training=True
            )
            for rank in range(world_size)
        ]
        parts = [indices(loader.batches(0, start)) for loader in ranks]
        return [sorted(itertools.chain(*batch)) for batch in zip(*parts, strict=True)]

    data = settings(0)
    whole = steps(data, 2, 0)
    assert data.streams == 2
    assert steps(data, 1, 5) == whole[5:] == steps(settings(2), 2, 5) == steps(data, 4, 5) != steps(settings(0), 1, 5)
    local, packed = settings(0), ImageIndex.scan(shards, classes=False)
    Loader.of(packed, EVAL, local, batch_size=4, seed=0, world_size=2, training=True)
    assert local.streams == 0


def test_an_epoch_left_early(shards: Path, server: Server) -> None:
    index = ImageIndex.scan(_urls(server), classes=False)
    with train(index, workers=2, batch_size=2) as loader:
        whole = list(loader.batches(1))
        for _ in range(3):
            left = loader.batches(0)
            next(left)
        assert same(list(loader.batches(1)), whole)
        with pytest.raises(RuntimeError, match="begun another epoch"):
            next(left)


def test_commands_and_threads_end_with_the_loader(shards: Path, tmp_path: Path) -> None:
    """Also a command that gives nothing any more, and what it has started."""
    pids = tmp_path / "pids"
    command = f"pipe:echo $$ >> {pids}; head -c 1536 {shards}/train-{{000000..000009}}.tar; sleep 1000 | sleep 1001"
    index = ImageIndex.scan(f"{shards}/index.npz,{command}", classes=False)
    before = threading.active_count()
    loader = train(index, batch_size=1, shuffle_block=1, streams=2)
    batches = loader.batches(0)
    waiting = threading.Thread(target=lambda: list(batches), daemon=True)
    waiting.start()
    deadline = time.monotonic() + 20
    while len(pids.read_text().split() if pids.exists() else []) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    loader.close()
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() == before
    groups = pids.read_text().split()
    assert len(groups) == 2
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            assert group not in groups or state == "Z"


# --- what they hold ---------------------------------------------------------------------------------------------------


def test_without_an_index_they_are_read_through_once(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "log"
    path = _logged(shards, log).split(",", 1)[1]
    expected = ImageIndex.scan(_pipes(shards), classes=True)
    for _ in range(2):
        index = ImageIndex.scan(path, classes=True)
        assert index.fingerprint() == expected.fingerprint()
        assert sorted(_opened(log)) == [f"train-{number:06d}.tar" for number in range(10)]
    assert sum("reading the whole shards" in record.getMessage() for record in caplog.records) == 1


def test_an_index_beside_an_address(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "copy")
    with serve(tmp_path / "copy") as server:
        ImageIndex.scan(_urls(server), classes=False)
        assert server.asked == [("index.npz", 0)]
        (tmp_path / "copy/index.npz").unlink()
        assert len(ImageIndex.scan(_urls(server), classes=True)) == COUNT
        assert len([name for name, _ in server.asked if name.endswith(".tar")]) == 10
        (tmp_path / "copy/index.npz").write_text("nonsense")
        with pytest.raises(ValueError, match=r"http://.*/index\.npz is no index of shards, or damaged"):
            ImageIndex.scan(_urls(server), classes=False)
        assert fetch(f"{server.address}/nothing", 10) is None
    with pytest.raises(OSError, match="refused"):
        fetch(f"{server.address}/index.npz", 10)
    with pytest.raises(ValueError, match="is no http"):
        fetch("file:///etc/passwd", 10)


@pytest.fixture
def endless() -> Iterator[str]:
    """An address where bytes come that no length announces, until the reader goes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with suppress(BrokenPipeError, ConnectionResetError):
                while True:
                    self.wfile.write(b"PK" * 5000)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_an_index_at_an_address_is_no_longer_than_fits(
    shards: Path, tmp_path: Path, endless: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sent, as announced, and as unpacked; from a disk it may be as long as it likes."""
    shutil.copytree(shards, tmp_path / "copy")
    index = tmp_path / "copy/index.npz"
    with serve(tmp_path / "copy") as server:
        length = index.stat().st_size
        content = fetch(f"{server.address}/index.npz", length)
        assert content == index.read_bytes()
        with pytest.raises(TooLongError, match=rf"/index\.npz is longer than {length - 1} bytes"):
            fetch(f"{server.address}/index.npz", length - 1)
        monkeypatch.setattr("data.shards.MOST_BYTES", length - 1)
        told = rf"http://.*/index\.npz is longer than {length - 1} bytes, .*: copy it to a disk and give it as a part of the path"
        with pytest.raises(ValueError, match=told):
            ImageIndex.scan(_urls(server), classes=False)
        assert len(ImageIndex.scan(f"{index},{_urls(server)}", classes=True)) == COUNT
        with np.load(index) as arrays:
            np.savez_compressed(index, **arrays, more=np.zeros(1 << 22, np.uint8))
        monkeypatch.setattr("data.shards.MOST_BYTES", 1 << 20)
        assert index.stat().st_size < 1 << 14
        with pytest.raises(ValueError, match=r"index\.npz unpacks to more than 1048576 bytes, the most"):
            ImageIndex.scan(_urls(server), classes=False)
    with pytest.raises(TooLongError, match="is longer than 3000000 bytes"):
        fetch(endless, 3_000_000)
    with pytest.raises(ValueError, match="is longer than 1048576 bytes"):
        ImageIndex.scan(f"{endless}/a.tar", classes=False)


def test_ten_million_images_fit_into_an_index_at_an_address() -> None:
    """By the bytes of one image: what stands in the arrays of each, and a name of 190 bytes."""
    count, name = 1000, b"n" * 190
    index = ShardIndex(
        ["a.tar"],
        *(np.asarray([-1]), np.asarray([0, count]), np.asarray([1], np.uint8)),
        *(np.zeros(count, np.uint32), np.zeros(count, np.uint32)),
        *(np.frombuffer(name * count, np.uint8), np.arange(count + 1, dtype=np.int64) * len(name)),
        *(np.zeros(count, np.int32), ["a"]),
    )
    index._check()
    one = sum(len(value.tobytes()) for value in vars(index).values() if isinstance(value, np.ndarray)) / count
    assert 10_000_000 * one <= MOST_BYTES


def test_an_index_that_breaks_off_is_no_index(shards: Path, server: Server) -> None:
    server.cut_after = [3000]
    with pytest.raises(ConnectionError, match=r"train-000000\.tar: the connection ended at byte 3000"):
        fetch(f"{server.address}/train-000000.tar", 1 << 20)


def test_an_index_that_nothing_needs(shards: Path) -> None:
    with pytest.raises(ValueError, match="has an index of shards, but no pipe: or http"):
        ImageIndex.scan(f"{shards},{shards}/index.npz", classes=False)


# --- faults -----------------------------------------------------------------------------------------------------------


def test_a_connection_that_breaks_is_taken_up_where_it_was(
    shards: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    index = ImageIndex.scan(_urls(server), classes=False)
    whole = list(train(index).batches(0))
    first = min(server.asked[1:], key=server.asked.index)[0]
    for ranges in (True, False):
        server.ranges = ranges
        server.asked.clear()
        server.cut_after = [3000, 2000]
        assert same(list(train(index).batches(0)), whole)
        begin, second, third = [at for name, at in server.asked if name == first][:3]
        assert begin == 0 and 3000 <= second < 4600, "at the member that was not whole"
        assert 2000 <= third - second < 3600 if ranges else third == second
    server.cut_after, server.errors = [], [503, 429, 500]
    assert same(list(train(index).batches(0)), whole)
    messages = [record.getMessage() for record in caplog.records]
    assert any("cannot be reached (the connection ended at byte 3000): trying again" in text for text in messages)
    assert any("is back after" in text for text in messages)


def test_a_shard_that_the_server_does_not_have(shards: Path, server: Server) -> None:
    index = ImageIndex.scan(f"{shards}/index.npz,{server.address}/x/train-{{000000..000009}}.tar", classes=False)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"x/train-00000\d\.tar: .*the server answers 404"):
        list(train(index).batches(0))
    assert time.monotonic() - begin < 10, "this is not waited for"


def test_a_command_that_fails_is_run_again(shards: Path, tmp_path: Path) -> None:
    """The first three times it gives a part of the shard and an error, then all of it."""
    count = tmp_path / "count"
    fails = f"f={shards}/train-{{000000..000009}}.tar; echo x >> {count}; " + (
        f"if [ $(wc -l < {count}) -le 3 ]; then head -c 2500 $f; exit 7; fi; cat $f"
    )
    whole = list(train(ImageIndex.scan(_pipes(shards), classes=False)).batches(0))
    index = ImageIndex.scan(f"{shards}/index.npz,pipe:{fails}", classes=False)
    assert same(list(train(index).batches(0)), whole)
    assert len(count.read_text().split()) == 13


def test_a_command_that_does_not_exist(shards: Path) -> None:
    """Found out at once, also where it is to be counted."""
    index = ImageIndex.scan(_pipes(shards, "no_such_command"), classes=False)
    with pytest.raises(RuntimeError, match="the shell finds no such command"):
        list(train(index).batches(0))
    with pytest.raises(FileNotFoundError, match="the shell finds no such command"):
        ImageIndex.scan("pipe:no_such_command x.tar", classes=False)


def test_broken_images_that_lie_together(shards: Path, tmp_path: Path) -> None:
    """Of the first twelve images of an epoch eleven are broken, of all no quarter: no reason to stop, unless the order is random."""
    copy = tmp_path / "train"
    shutil.copytree(shards, copy)
    index = ImageIndex.scan(_pipes(copy), classes=False)
    local = ImageIndex.scan(copy, classes=False)
    first = list(itertools.chain(*indices(train(index).batches(0))))[:11]
    for i in first:
        with open(local.roots[local.root_ids[i]], "r+b") as file:
            file.seek(int(local.starts[i]) * 512)
            file.write(b"broken")
    loader = train(index, max_broken=0.25)
    assert len(list(loader.batches(0))) == 11 and len(loader.broken) == 11
    loader = train(index, max_broken=0.25)
    loader._order.random = True
    with pytest.raises(RuntimeError, match="are broken"):
        list(loader.batches(0))


@pytest.mark.parametrize("command", ["false", "head -c 700", "true"])
def test_a_command_that_never_works_ends_the_run(shards: Path, command: str) -> None:
    index = ImageIndex.scan(_pipes(shards, command), classes=False)
    with pytest.raises(
        StorageGoneError, match=r"pipe:.* could not be reached for 0\.3 s \(.*\): start the same command again"
    ):
        list(train(index, retry_seconds=0.3).batches(0))


def test_a_command_that_never_works_is_given_up_while_it_is_looked_through(shards: Path) -> None:
    with pytest.raises(ValueError, match=r"pipe:false .* could not be reached for 0\.2 s"):
        ImageIndex.scan(f"pipe:false {shards}", classes=False, retry_seconds=0.2)


def test_another_shard_than_the_index_knows(shards: Path, tmp_path: Path) -> None:
    other = tmp_path / "train-000000.tar"
    tar(other, {f"{i}.png": png(i) * 20 for i in range(9)})
    index = ImageIndex.scan(f"{shards}/index.npz,pipe:cat {other}", classes=False)
    with pytest.raises(RuntimeError, match=r"pipe:cat .*: the shard is not the one of its index"):
        list(train(index, batch_size=2).batches(0))


def test_broken_images_are_replaced_by_neighbours(shards: Path, tmp_path: Path) -> None:
    """Named, and the same ones after a resume and with workers; a whole broken batch is replaced from elsewhere."""
    copy = tmp_path / "train"
    shutil.copytree(shards, copy)
    local = ImageIndex.scan(copy, classes=True)
    for i in (3, 20, 21):
        with open(local.roots[local.root_ids[i]], "r+b") as file:
            file.seek(int(local.starts[i]) * 512)
            file.write(b"broken")
    index = ImageIndex.scan(_pipes(copy), classes=True)
    loader = train(index, max_broken=0.3)
    epochs = [list(loader.batches(epoch)) for epoch in range(3)]
    assert set(loader.broken) == {index.path(i) for i in (3, 20, 21)}
    for batch in epochs[0]:
        assert len(batch["index"]) == 4 and not {3, 20, 21} & set(batch["index"].tolist())
        assert batch["label"].tolist() == [index.label(i) for i in batch["index"].tolist()]
    with train(index, max_broken=0.3, workers=2) as again:
        assert same(list(again.batches(1, 2)), epochs[1][2:])
    alone = train(index, max_broken=0.3, batch_size=1)
    seen = [i for epoch in range(2) for batch in indices(alone.batches(epoch)) for i in batch]
    assert len(seen) == 2 * COUNT and not {3, 20, 21} & set(seen)
    judged = list(itertools.chain(*indices(evaluate(index, max_broken=0.3).batches(0))))
    assert judged == [i for i in range(COUNT) if i not in (3, 20, 21)]


def test_too_large_members_are_not_read(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = ImageIndex.scan(shards, classes=False)
    most = int(np.unique(local.sizes)[-2])
    for module in ("content", "feed"):
        monkeypatch.setattr(f"data.{module}.MAX_BYTES", most)
    for index in (local, ImageIndex.scan(_pipes(shards), classes=False)):
        loader = evaluate(index, max_broken=0.5)
        seen = list(itertools.chain(*indices(loader.batches(0))))
        assert seen == np.flatnonzero(local.sizes <= most).tolist() and len(loader.broken) >= 1
        assert all(f"more than the {most} that are read" in reason for reason in loader.broken.values())


def test_a_stream_goes_forward_only(shards: Path) -> None:
    content = (shards / "train-000000.tar").read_bytes()
    with ShardStream(f"pipe:cat {shards}/train-000000.tar", 1.0) as stream:
        stream.seek(100)
        assert stream.read(50) == content[100:150]
        stream.seek(150)
        assert stream.read(10) == content[150:160]
        with pytest.raises(ValueError, match="cannot go back from byte 160 to 159"):
            stream.seek(159)
        assert stream.read(10**7) == content[160:] and stream.read(1) == b""
    with pytest.raises(EOFError, match="was closed"):
        stream.read(1)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL


@pytest.fixture(autouse=True)
def _warnings(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.WARNING):
        yield
