"""Dead workers and storage that goes away, really: nothing is lost, the same batches come."""

import errno
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.decode import decode
from data.pack import PackSettings, pack
from data.patience import StorageGoneError, folder_is_gone
from data.sources import ImageIndex
from data.workers import WorkerDiedError
from tests.data.images import CROP, evaluate, folder, indices, same, train


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("images"), 60)


@pytest.fixture
def index(images: Path) -> ImageIndex:
    return ImageIndex.scan(images, classes=True)


@pytest.fixture(autouse=True)
def _quick(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("data.patience.FIRST_DELAY", 0.02)
    monkeypatch.setattr("data.patience.LONGEST_DELAY", 0.05)
    with caplog.at_level(logging.WARNING):
        yield


def _said(caplog: pytest.LogCaptureFixture, text: str) -> int:
    return sum(text in record.getMessage() for record in caplog.records)


# --- workers ----------------------------------------------------------------------------------------------------------


def _slow(image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    time.sleep(0.01)
    return CROP(image, generator)


@pytest.mark.parametrize("workers", [1, 3])
def test_killed_workers_are_replaced_and_nothing_is_lost(
    index: ImageIndex, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """One is killed while it works, one while it waits between two epochs, all of them at once: the same batches."""
    whole = [list(train(index, batch_size=3).batches(epoch)) for epoch in range(3)]
    with train(index, batch_size=3, workers=workers, transform=_slow) as loader:
        got: list[dict[str, Tensor]] = []
        for number, batch in enumerate(loader.batches(0)):
            got.append(batch)
            if number == 5:
                victim = loader.worker_pids()[0]
                os.kill(victim, signal.SIGKILL)
        assert same(got, whole[0]) and loader.restarts == 1
        assert (
            _said(caplog, f"loader worker 0 (pid {victim}) died: it was ended by SIGKILL, as the kernel does when") == 1
        )
        os.kill(loader.worker_pids()[-1], signal.SIGKILL)
        assert same(list(loader.batches(1)), whole[1]) and loader.restarts == 2
        batches = loader.batches(2, 4)
        got = [next(batches)]
        loader._pool._made += 100  # much later
        for pid in loader.worker_pids():
            os.kill(pid, signal.SIGKILL)
        assert same(got + list(batches), whole[2][4:]) and loader.restarts == 2 + workers
        assert _said(caplog, f"({2 + workers} replaced so far)") == 1
        assert len(set(loader.worker_pids())) == workers


def test_kills_at_any_moment(index: ImageIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread kills a worker again and again, whatever it is doing."""
    monkeypatch.setattr("data.workers.MAX_DEATHS", 10**6)
    whole = [list(train(index, batch_size=3).batches(epoch)) for epoch in range(4)]
    with train(index, batch_size=3, workers=2, transform=_slow) as loader:
        loader._pool.start()
        done = threading.Event()

        def kill() -> None:
            for turn in range(8):
                if done.wait(0.1 + 0.03 * (turn % 5)):
                    return
                pids = loader.worker_pids()
                assert all(pids)
                with suppress(ProcessLookupError):  # found dead already
                    os.kill(pids[turn % len(pids)], signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        try:
            for epoch in range(4):
                assert same(list(loader.batches(epoch)), whole[epoch])
        finally:
            done.set()
            thread.join()
        assert loader.restarts > 3


def test_a_killed_worker_on_streams(images: Path, tmp_path: Path) -> None:
    pack(str(images), tmp_path / "out", PackSettings(shard_size=7, workers=1))
    streams = ImageIndex.scan(f"{tmp_path}/out/index.npz,pipe:cat {tmp_path}/out/out-{{000000..000008}}.tar", True)
    whole = list(train(streams).batches(0))
    with train(streams, workers=2) as loader:
        got = []
        for number, batch in enumerate(loader.batches(0)):
            got.append(batch)
            if number in (2, 6):
                os.kill(loader.worker_pids()[number % 2], signal.SIGKILL)
        assert same(got, whole) and loader.restarts == 2


def test_workers_forked_while_commands_start(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked worker must not hold the pipes of a command that another thread is starting: nothing would ever end them."""
    monkeypatch.setattr("data.workers.MAX_DEATHS", 10**6)
    pack(str(images), tmp_path / "out", PackSettings(shard_size=2, workers=1))
    streams = ImageIndex.scan(f"{tmp_path}/out/index.npz,pipe:cat {tmp_path}/out/out-{{000000..000029}}.tar", True)
    with train(streams, workers=1, batch_size=2, streams=3) as loader:
        for number, _ in enumerate(loader.batches(0)):
            if number % 2:
                os.kill(loader.worker_pids()[0], signal.SIGKILL)
        assert number == 29 and loader.restarts >= 14


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL, as the kernel does when memory runs out"),
        (lambda: os._exit(3), "it left with exit code 3"),
    ],
    ids=["kill", "exit"],
)
def test_an_image_that_ends_every_worker_is_named(index: ImageIndex, end: Callable[[], Any], cause: str) -> None:
    with train(index, workers=2) as loader:
        items = list(loader._order.batches(0, 0))[5]
        victim = decode(index.path(items[2][1]), 3)

        def deadly(image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
            if torch.equal(image, victim):
                end()
            return CROP(image, generator)

        loader._pool.work.__self__.transform = deadly  # type: ignore[attr-defined]
        got: list[dict[str, Tensor]] = []
        with pytest.raises(WorkerDiedError) as raised:
            got.extend(loader.batches(0))
        paths = ", ".join(index.path(i) for _, i, _ in items[:3])
        for text in (
            "loader worker 1 (pid ",
            cause,
            "the 4th within",
            f"{paths} and 1 more images",
            "Lower data.workers",
        ):
            assert text in str(raised.value)
        assert loader.restarts == 3


def test_signals_to_the_whole_job_do_not_end_workers(index: ImageIndex) -> None:
    """Slurm sends them to every process; the main one saves and leaves, its workers work on until then."""
    with train(index, workers=2) as loader:
        batches = loader.batches(0)
        next(batches), next(batches)  # both are up
        for pid in loader.worker_pids():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
                os.kill(pid, number)
        list(batches)
        assert loader.restarts == 0


def test_errors_carry_their_place(index: ImageIndex) -> None:
    def wrong(image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        raise KeyError("a bug")

    class Odd(Exception):  # noqa: N818
        def __init__(self, one: int, two: int) -> None:
            super().__init__("cannot be made again from its arguments")

    def odd(image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        raise Odd(1, 2)

    with train(index, workers=1, transform=wrong) as loader, pytest.raises(KeyError, match="a bug") as raised:
        list(loader.batches(0))
    assert "in loader worker 0:" in raised.value.__notes__[0] and "in wrong" in raised.value.__notes__[0]
    with train(index, workers=1, transform=odd) as loader, pytest.raises(RuntimeError, match="in odd"):
        list(loader.batches(0))


# --- storage ----------------------------------------------------------------------------------------------------------


def _copy(images: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(images, tmp_path / "disk/set"))


@pytest.mark.parametrize("kind", ["folder", "list", "shards", "empty mount point", "parent"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_that_is_gone_for_a_while_is_waited_for(
    images: Path,
    tmp_path: Path,
    kind: str,
    workers: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is renamed away in mid-epoch and back from a thread: no image counts as broken, the batches are the same."""
    monkeypatch.setattr("data.reading.OPEN_SHARDS", 1)
    place = _copy(images, tmp_path)
    path = place
    if kind == "list":
        path = tmp_path / "list.txt"
        path.write_text("".join(f"{file}\n" for file in sorted(place.rglob("*.png"))))
    elif kind == "shards":
        path = place = tmp_path / "disk/shards"
        pack(str(images), path, PackSettings(shard_size=7, workers=1))
    index = ImageIndex.scan(path, classes=False)
    whole = list(train(index, batch_size=3).batches(0))
    gone = tmp_path / "disk" if kind == "parent" else place
    back: list[float] = []

    def away() -> None:
        gone.rename(tmp_path / "elsewhere")
        if kind == "empty mount point":
            gone.mkdir()
        time.sleep(0.6)
        if kind == "empty mount point":
            gone.rmdir()
        back.append(time.monotonic())
        (tmp_path / "elsewhere").rename(gone)

    with train(index, batch_size=3, workers=workers, transform=_slow, retry_seconds=30) as loader:
        thread = threading.Thread(target=away)
        got = []
        for number, batch in enumerate(loader.batches(0)):
            got.append(batch)
            if number == 2:
                thread.start()
                time.sleep(0.1)
        assert same(got, whole) and not loader.broken and loader.restarts == 0
        assert back and time.monotonic() > back[0]
        thread.join()
    if not workers:
        assert _said(caplog, "cannot be reached (") >= 1 and _said(caplog, "is back after") >= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_that_stays_away_ends_the_run(images: Path, tmp_path: Path, workers: int) -> None:
    place = _copy(images, tmp_path)
    index = ImageIndex.scan(place, classes=False)
    with train(index, workers=workers, retry_seconds=0.4) as loader:
        batches = loader.batches(0)
        next(batches)
        place.rename(tmp_path / "elsewhere")
        begin = time.monotonic()
        with pytest.raises(
            StorageGoneError,
            match=r"disk/set could not be reached for 0\.4 s \(No such file or directory\): start the same",
        ):
            list(batches)
        assert time.monotonic() - begin < 10
        assert not loader.broken


def test_one_missing_file_is_broken_at_once(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = _copy(images, tmp_path)
    index = ImageIndex.scan(place, classes=False)
    lost = index.path(7)
    os.unlink(lost)
    (place / "b").rename(place / "renamed")  # a class that is gone is no disk that is gone
    loader = evaluate(index, max_broken=0.5)
    seen = [i for batch in indices(loader.batches(0)) for i in batch]
    assert len(seen) == 60 - 21 and loader.broken[lost] == "FileNotFoundError: No such file or directory"
    assert not _said(caplog, "cannot be reached")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_an_error_of_one_file(
    index: ImageIndex, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again, briefly; a bad file does not hold up the others for long."""
    real, failures = os.open, {index.path(4): 2, index.path(9): 10**6}

    def fail(path: str, *args: Any, **kwargs: Any) -> int:
        if failures.get(path, 0) > 0:
            failures[path] -= 1
            raise OSError(number, os.strerror(number), path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", fail)
    loader = evaluate(index, max_broken=0.5)
    seen = [i for batch in indices(loader.batches(0)) for i in batch]
    assert seen == [i for i in range(60) if i != 9] and list(loader.broken) == [index.path(9)]
    assert os.strerror(number) in loader.broken[index.path(9)] and not _said(caplog, "cannot be reached")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_errors_of_the_folder_itself(
    index: ImageIndex, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A mount that answers every question with an error, for a while."""
    real_open, real_scan, until = os.open, os.scandir, time.monotonic() + 0.5

    def fail(real: Any) -> Any:
        def failing(path: Any, *args: Any, **kwargs: Any) -> Any:
            if str(path).startswith(index.roots[0]) and time.monotonic() < until:
                raise OSError(number, os.strerror(number), path)
            return real(path, *args, **kwargs)

        return failing

    monkeypatch.setattr(os, "open", fail(real_open))
    monkeypatch.setattr(os, "scandir", fail(real_scan))
    loader = evaluate(index)
    assert sum(map(len, indices(loader.batches(0)))) == 60 and not loader.broken
    assert _said(caplog, f"cannot be reached ({os.strerror(number)}): trying again for 120 s") == 1


def test_too_many_open_files_is_no_files_fault(index: ImageIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    loader = evaluate(index)
    monkeypatch.setattr("data.content.os.open", fail)
    with pytest.raises(OSError, match="Too many open files"):
        list(loader.batches(0))
    assert not loader.broken


def test_folder_is_gone(tmp_path: Path) -> None:
    assert folder_is_gone(str(tmp_path)) == "the folder is empty"
    assert folder_is_gone(str(tmp_path / "x")) == "No such file or directory"
    (tmp_path / "x").touch()
    assert folder_is_gone(str(tmp_path)) == "" and folder_is_gone(str(tmp_path / "x")) == "Not a directory"


def test_a_pipe_with_an_images_name_is_not_waited_for(tmp_path: Path) -> None:
    folder(tmp_path, 3)
    os.mkfifo(tmp_path / "a/x.png")
    loader = evaluate(ImageIndex.scan(tmp_path, classes=False), max_broken=0.5)
    list(loader.batches(0))
    assert loader.broken == {str(tmp_path / "a/x.png"): "it is no regular file"}
