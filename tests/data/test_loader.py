"""Order, randomness, resume, ranks, broken files and workers of the loader."""

import gc
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.loader import Loader
from data.order import sample_seed
from data.sources import ImageIndex
from data.transforms import CropResize, EvalTransform

ROOT = Path(__file__).resolve().parents[2]
CROP = CropResize((8, 12), (0.3, 1.0), (0.75, 4 / 3), 0.5, token_size=(4, 6))
EVAL = EvalTransform((8, 12), 1.0)


def _folder(path: Path, count: int) -> Path:
    """``count`` images in two classes; every image is another."""
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 20, 3)).astype(np.uint8)
        file = path / "ab"[i % 2] / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return path


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    return ImageIndex.scan(str(_folder(tmp_path_factory.mktemp("images"), 23)), classes=True)


def _train(index: ImageIndex, **changes: Any) -> Loader:
    settings: dict[str, Any] = dict(
        batch_size=4, in_chans=3, seed=7, rank=0, world_size=1, workers=0, shuffle=True, drop_last=True
    )
    return Loader(index, changes.pop("transform", CROP), **(settings | changes))


def _evaluate(index: ImageIndex, **changes: Any) -> Loader:
    return _train(index, **(dict(shuffle=False, drop_last=False, transform=EVAL) | changes))


def _indices(batches: Iterator[dict[str, Tensor]]) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]


def _same(left: list[dict[str, Tensor]], right: list[dict[str, Tensor]]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(left, right, strict=True)
    )


def test_batches(index: ImageIndex) -> None:
    loader = _train(index)
    batches = list(loader.batches(0))
    assert len(loader) == len(batches) == 5
    for batch in batches:
        assert {name: (tuple(part.shape), part.dtype) for name, part in batch.items()} == {
            "image": ((4, 3, 8, 12), torch.uint8),
            "token_image": ((4, 3, 4, 6), torch.uint8),
            "index": ((4,), torch.int64),
            "label": ((4,), torch.int64),
        }
        assert batch["label"].tolist() == [index.label(i) for i in batch["index"].tolist()]
    without = _train(ImageIndex.scan(index.roots[0], classes=False))
    assert "label" not in next(without.batches(0))


def test_order_is_a_function_of_seed_and_epoch(index: ImageIndex) -> None:
    loader = _train(index)
    first, second, again = (_indices(loader.batches(epoch)) for epoch in (0, 1, 0))
    assert first == again != second
    assert first == _indices(_train(index).batches(0)) != _indices(_train(index, seed=8).batches(0))
    assert all(len({i for batch in epoch for i in batch}) == 20 for epoch in (first, second))


def test_a_sample_is_a_function_of_seed_epoch_and_index(index: ImageIndex) -> None:
    """Batch size, world size and rank do not matter to what an image looks like; the epoch does."""

    def looks(epoch: int, **changes: Any) -> dict[int, Tensor]:
        return {
            i: image
            for batch in _train(index, **changes).batches(epoch)
            for i, image in zip(batch["index"].tolist(), batch["image"], strict=True)
        }

    alone, other = looks(0), looks(0, batch_size=3, rank=1, world_size=2)
    assert len(other) == 9 and all(torch.equal(alone[i], other[i]) for i in other if i in alone)
    later = looks(1)
    assert sum(torch.equal(alone[i], later[i]) for i in alone if i in later) == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(index: ImageIndex, workers: int) -> None:
    with _train(index, workers=workers) as loader:
        for epoch in (0, 1):
            assert _same(list(loader.batches(epoch)), list(_train(index).batches(epoch)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 2, 4, 5])
def test_resume_in_mid_epoch(index: ImageIndex, start: int, workers: int) -> None:
    whole = list(_train(index).batches(3))
    with _train(index, workers=workers) as loader:
        assert _same(list(loader.batches(3, start)), whole[start:])


def test_an_epoch_left_early_does_not_leak_into_the_next(index: ImageIndex) -> None:
    with _train(index, workers=2) as loader:
        left = loader.batches(0)
        next(left)
        assert _same(list(loader.batches(1, 1)), list(_train(index).batches(1, 1)))
        with pytest.raises(RuntimeError, match="begun another epoch"):
            next(left)


def test_global_generators_are_left_alone(index: ImageIndex) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state(legacy=False)
    for workers in (0, 1):
        with _train(index, workers=workers) as loader:
            list(loader.batches(0))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_equal(np.random.get_state(legacy=False), numpy_before)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_training_ranks_share_an_epoch(index: ImageIndex, world_size: int) -> None:
    """Equal lengths, no image twice; together a global batch is the same slice of the order for every split of it."""
    loaders = [_train(index, rank=rank, world_size=world_size, batch_size=2) for rank in range(world_size)]
    per_rank = [_indices(loader.batches(2)) for loader in loaders]
    assert {len(loader) for loader in loaders} == {23 // (2 * world_size)} == {len(batches) for batches in per_rank}
    seen = [i for batches in per_rank for batch in batches for i in batch]
    assert len(seen) == len(set(seen))
    one = _indices(_train(index, batch_size=2 * world_size).batches(2))
    for number, batch in enumerate(one):
        assert sorted(i for batches in per_rank for i in batches[number]) == sorted(batch)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 23, 30])
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_evaluation_counts_every_image_once(index: ImageIndex, world_size: int, batch_size: int) -> None:
    for rank in range(world_size):
        loader = _evaluate(index, rank=rank, world_size=world_size, batch_size=batch_size)
        if batch_size == 4 and world_size in (2, 30):
            batches = _indices(loader.batches(0))
            assert len(batches) == len(loader)
        else:  # the order alone: decoding is the same
            batches = [[i for _, i, _ in batch] for batch in loader._order.batches(0, 0)]
        assert [i for batch in batches for i in batch] == list(range(rank, 23, world_size))
        assert len(batches) == len(loader) and all(len(batch) <= batch_size for batch in batches)


def test_repeats(index: ImageIndex) -> None:
    """Each index stands three times in a row in the stream, as different crops; the epoch keeps its length."""
    ranks = [_train(index, repeats=3, rank=rank, world_size=3, batch_size=2) for rank in range(3)]
    assert {len(loader) for loader in ranks} == {3}
    batches = [list(loader.batches(0)) for loader in ranks]
    for parts in zip(*batches, strict=True):
        assert parts[0]["index"].tolist() == parts[1]["index"].tolist() == parts[2]["index"].tolist()
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert not torch.equal(parts[a]["image"], parts[b]["image"])
    stream = _train(index, repeats=3)._order.sequence(0)
    assert len(stream) == 23 and set(np.unique(stream, return_counts=True)[1][:-1]) <= {2, 3} and len(set(stream)) == 8
    assert _same(list(ranks[0].batches(0, 1)), batches[0][1:])
    with pytest.raises(ValueError, match="repeats=3 needs shuffle=True"):
        _evaluate(index, repeats=3)


def test_seeds_of_neighbours_differ() -> None:
    keys = [(seed, epoch, i, copy) for seed in range(4) for epoch in range(5) for i in range(50) for copy in range(3)]
    seeds = {sample_seed(*key) for key in keys}
    assert len(seeds) == len(keys) and all(0 <= seed < 2**64 for seed in seeds)
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == len(keys), "torch seeds its CPU generator with 32 bits"
    assert sample_seed(1) != sample_seed(1, 0) and sample_seed(0, 1) != sample_seed(1, 0)


# --- broken files ----------------------------------------------------------------------------------------------------


def _broken_folder(path: Path, count: int, broken: list[int]) -> ImageIndex:
    index = ImageIndex.scan(str(_folder(path, count)), classes=True)
    for i in broken:
        file = Path(index.path(i))
        file.write_bytes(file.read_bytes()[: 200 if i % 2 else 0])
    return index


@pytest.mark.parametrize("workers", [0, 2])
def test_training_replaces_broken_files(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    index = _broken_folder(tmp_path, 24, [3, 10])
    caplog.set_level(logging.WARNING, logger="data.loader")
    with _train(index, workers=workers, max_broken=0.2) as loader:
        epochs = [list(loader.batches(epoch)) for epoch in range(3)]
        again = list(loader.batches(1, 2))
    assert all(len(batch["index"]) == 4 for batches in epochs for batch in batches)
    seen = {i for batches in epochs for batch in batches for i in batch["index"].tolist()}
    assert seen == set(range(24)) - {3, 10}
    assert all(batch["label"].tolist() == [index.label(i) for i in batch["index"].tolist()] for batch in epochs[0])
    assert loader.broken.keys() == {index.path(3), index.path(10)}
    assert all(reason for reason in loader.broken.values())
    for path in loader.broken:
        assert sum(path in record.getMessage() for record in caplog.records) == 1, "named once"
    assert _same(again, epochs[1][2:]), "the stand-ins are the same after a resume"


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_broken_files_out(tmp_path: Path, workers: int) -> None:
    index = _broken_folder(tmp_path, 11, [0, 1, 6])
    for world_size in (1, 2, 3):
        seen: list[int] = []
        for rank in range(world_size):
            with _evaluate(
                index, batch_size=2, rank=rank, world_size=world_size, workers=workers, max_broken=0.3
            ) as loader:
                batches = list(loader.batches(0))
            assert all(len(batch["image"]) == len(batch["index"]) >= 1 for batch in batches)
            seen += [i for batch in batches for i in batch["index"].tolist()]
        assert sorted(seen) == sorted(set(range(11)) - {0, 1, 6})


@pytest.mark.parametrize("count", [5, 30, 200])
@pytest.mark.parametrize("training", [False, True])
def test_all_broken_is_fatal(tmp_path: Path, count: int, training: bool) -> None:
    index = _broken_folder(tmp_path, count, list(range(count)))
    loader = (_train if training else _evaluate)(index, batch_size=2)
    with pytest.raises(RuntimeError, match=r"of the \d+ images read so far are broken, more than max_broken=0.05"):
        list(loader.batches(0))


def test_share_of_broken_files(tmp_path: Path) -> None:
    """12 of 60 are 20 %: fatal at 15 %, not at 20 %; nine broken files are too few to judge; a broken folder is no verdict."""
    index = _broken_folder(tmp_path / "many", 60, list(range(0, 60, 5)))
    with pytest.raises(RuntimeError, match=r"broken, more than max_broken=0.15 of them: .*png: .*Mend or remove"):
        for epoch in range(3):
            list(_train(index, max_broken=0.15).batches(epoch))
    loader = _train(index, max_broken=0.2)
    for epoch in range(3):
        list(loader.batches(epoch))
    assert len(loader.broken) == 12
    together = _broken_folder(tmp_path / "together", 120, list(range(12)))
    assert sum(len(batch["index"]) for batch in _evaluate(together, max_broken=0.1).batches(0)) == 108
    with pytest.raises(RuntimeError, match="are broken"):
        list(_evaluate(together, max_broken=0.09).batches(0))
    none_left = _broken_folder(tmp_path / "none_left", 300, [i for i in range(300) if i % 100])
    with pytest.raises(RuntimeError, match=r"found no readable image to stand in .* more: mend or remove them"):
        for epoch in range(3):
            list(_train(none_left, max_broken=1.0).batches(epoch))
    few = _evaluate(_broken_folder(tmp_path / "few", 30, list(range(9))), max_broken=0.01)
    assert sum(len(batch["index"]) for batch in few.batches(0)) == 21


def test_other_channels_are_named_as_the_reason(index: ImageIndex) -> None:
    with pytest.raises(RuntimeError, match="has 3 channels, in_chans=5 is asked for"):
        list(_train(index, in_chans=5).batches(0))


def test_errors_of_a_transform_are_not_broken_files(index: ImageIndex) -> None:
    def wrong(image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        raise ValueError("a bug")

    for workers in (0, 1):
        with _train(index, transform=wrong, workers=workers) as loader, pytest.raises(ValueError, match="a bug"):
            list(loader.batches(0))


def test_depths_may_mix_in_a_folder(tmp_path: Path) -> None:
    """A batch with 8-bit and 16-bit files is float32 in [0, 1] for all of them."""
    Image.fromarray(np.full((9, 9), 51, np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.full((9, 9), 13107, np.uint16)).save(tmp_path / "b.png")
    index = ImageIndex.scan(str(tmp_path), classes=False)
    batch = next(_evaluate(index, in_chans=1).batches(0))
    torch.testing.assert_close(batch["image"], torch.full((2, 1, 8, 12), 0.2))


# --- settings and processes ------------------------------------------------------------------------------------------


def test_a_set_smaller_than_a_global_batch(index: ImageIndex) -> None:
    _train(index, batch_size=23)
    with pytest.raises(
        ValueError, match=r"23 images are less than one batch of 8 on each of 3 processes \(24\): lower"
    ):
        _train(index, batch_size=8, world_size=3)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(batch_size=0),
        dict(workers=-1),
        dict(rank=2, world_size=2),
        dict(max_broken=1.5),
        dict(repeats=0),
        dict(value_range=(1, 0)),
    ],
    ids=str,
)
def test_settings_out_of_range(index: ImageIndex, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        _train(index, **wrong)


@pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (0, -1), (0, 6)])
def test_batches_out_of_range(index: ImageIndex, epoch: int, start: int) -> None:
    with pytest.raises(ValueError, match=r"start in 0\.\.5"):
        _train(index).batches(epoch, start)


def test_workers_live_over_epochs_and_end_with_the_loader(index: ImageIndex) -> None:
    others = {process.pid for process in multiprocessing.active_children()}
    loader = _train(index, workers=2)
    pids = []
    for epoch in range(3):
        next(loader.batches(epoch))
        pids.append({process.pid for process in multiprocessing.active_children()} - others)
    assert pids[0] == pids[1] == pids[2] and len(pids[0]) == 2
    loader.close()
    gc.collect()
    assert {process.pid for process in multiprocessing.active_children()} == others
    assert len(list(loader.batches(0))) == 5, "a closed loader starts again"
    del loader
    gc.collect()
    assert {process.pid for process in multiprocessing.active_children()} == others


_SCRIPT = """
import atexit, multiprocessing, signal, sys, time
left = []  # when the end began; the handler that is registered first runs last
atexit.register(lambda: sys.stdout.write(f"{time.monotonic() - left[0]}\\n"))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with Ctrl-C ignored
from data.loader import Loader
from data.sources import ImageIndex
from data.transforms import EvalTransform

index = ImageIndex.scan(sys.argv[1], classes=False)
loader = Loader(index, EvalTransform((8, 8), 1.0), batch_size=1, in_chans=3, seed=0, rank=0, world_size=1, workers=2,
                shuffle=True, drop_last=True)
batches = loader.batches(0)
next(batches)
try:  # before it says so: from then on it may be interrupted
    sys.stdout.write(" ".join(str(process.pid) for process in multiprocessing.active_children()) + "\\n")
    sys.stdout.flush()
    if sys.argv[2] == "leave":
        left.append(time.monotonic())
        sys.exit(0)
    time.sleep(60)
except KeyboardInterrupt:
    left.append(time.monotonic())
    sys.exit(3)
"""


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("end", ["leave", "interrupt", "kill"])
def test_no_worker_outlives_the_run(index: ImageIndex, end: str) -> None:
    """At a plain exit in mid-epoch, a Ctrl-C (to the whole group, as a terminal does) and a SIGKILL of the main process."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, index.roots[0], end],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    if end == "interrupt":
        os.killpg(process.pid, signal.SIGINT)
    elif end == "kill":
        process.kill()
    assert process.wait(timeout=60) == {"leave": 0, "interrupt": 3, "kill": -signal.SIGKILL}[end]
    if end != "kill":
        assert float(process.stdout.readline()) < 3, "the exit waits for nobody"
    deadline = time.monotonic() + 20  # workers look for their parent every 2 seconds
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_alive, pids))
    assert "Traceback" not in process.stderr.read()
    process.stdout.close()
    process.stderr.close()
