"""Tar shards on a disk: which they are, their index and its cache, labels, and that they show what the folder shows."""

import itertools
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from data.decode import decode
from data.order import Order
from data.pack import PackSettings, pack
from data.reading import Reader
from data.shard_index import ShardIndex
from data.shards import main as index_main
from data.sources import ImageIndex
from formats.paths import expand, split_path
from tests.data.images import evaluate, folder, indices, png, same, tar, train


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path / "palimpsest"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("images"), 23)


@pytest.fixture(scope="module")
def shards(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images in their order, 5 to a shard."""
    target = tmp_path_factory.mktemp("shards") / "train"
    pack(str(images), target, PackSettings(shard_size=5, shuffle=False, workers=1))
    return target


def _contents(index: ImageIndex) -> list[tuple[str, int, bytes]]:
    reader = Reader(index, 0)
    return [(index.name(i), index.label(i), reader.read(i).tobytes()) for i in range(len(index))]


def test_shards_show_what_the_folder_shows(images: Path, shards: Path) -> None:
    """The same batches bit for bit: training with any workers and ranks, a start in mid-epoch, evaluation."""
    plain, packed = (ImageIndex.scan(path, classes=True) for path in (images, shards))
    assert _contents(plain) == _contents(packed) and packed.class_names == ["a", "b", "c"]
    assert packed.path(7) == f"{shards}/train-000001.tar/{plain.name(7)}"
    for changes in ({}, {"workers": 2}, {"rank": 1, "world_size": 2}, {"repeats": 2}):
        with train(plain, **changes) as left, train(packed, **changes) as right:
            assert same(list(left.batches(1)), list(right.batches(1)))
            assert same(list(left.batches(2, 1)), list(right.batches(2, 1)))
    assert same(list(evaluate(plain).batches(0)), list(evaluate(packed).batches(0)))
    part, packed_part = plain.subset(0.5, seed=3), packed.subset(0.5, seed=3)
    assert _contents(part) == _contents(packed_part)
    assert len(ImageIndex.scan(shards, classes=False).class_names) == 0


def test_every_way_to_name_them(images: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _contents(ImageIndex.scan(shards, classes=True))
    ways = [str(shards / "train-{000000..000004}.tar"), str(shards / "train-*.tar"), str(shards / "*-00000[0-4].tar")]
    ways += [",".join(str(shards / f"train-{number:06d}.tar") for number in range(5))]
    ways += [str(shards / "train-00000{0,1}.tar") + ", " + str(shards / "train-00000{2..4}.tar")]
    monkeypatch.chdir(shards)
    for way in (*ways, ".", "train-00000{0..4}.tar"):
        assert _contents(ImageIndex.scan(way, classes=True)) == expected, way
    mixed = ImageIndex.scan(f"{images},{shards},{_list(images)}", classes=True)
    assert len(mixed) == 23 + 23 + 3 and [mixed.in_shard(i) for i in (0, 22, 23, 45, 46)] == [False] * 2 + [True] * 2 + [False]  # fmt: skip
    assert _contents(mixed)[:46] == _contents(ImageIndex.scan(images, classes=True)) + expected
    seen = indices(train(mixed, batch_size=7).batches(0))
    assert sorted(i for batch in seen for i in batch) == list(range(49))


def _list(images: Path) -> Path:
    file = images.parent / "some.txt"
    file.write_text("".join(f"{images}/a/{number}.png\ta\n" for number in ("000", "003", "006")))
    return file


def test_names_that_are_not_there(shards: Path, tmp_path: Path) -> None:
    for wrong in ("train-{000003..000007}.tar", "other-*.tar", "train-9.tar"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            ImageIndex.scan(shards / wrong, classes=False)
    with pytest.raises(ValueError, match=r"index\.npz.* is no \.tar file"):
        ImageIndex.scan(shards / "*", classes=False)
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    (copy / "train-000002.tar").unlink()
    with pytest.raises(ValueError, match=r"1 of the 5 shards .* are not there, such as train-000002\.tar"):
        ImageIndex.scan(copy, classes=False)
    (copy / "shards.json").write_text(json.dumps({"complete": False}))
    with pytest.raises(ValueError, match=r"not all packed: give the command of data\.pack again"):
        ImageIndex.scan(copy, classes=False)
    (tmp_path / "none.tar").write_bytes(bytes(1024))
    with pytest.raises(ValueError, match="no images in shard"):
        ImageIndex.scan(tmp_path / "none.tar", classes=False)


def test_tar_files_beside_images_are_left_alone(tmp_path: Path) -> None:
    folder(tmp_path, 3)
    tar(tmp_path / "original.tar", {"x.png": png(0)})
    assert len(ImageIndex.scan(tmp_path, classes=False)) == 3
    assert len(ImageIndex.scan(tmp_path, classes=True)) == 3


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("x-{00..02}.tar", ["x-00.tar", "x-01.tar", "x-02.tar"]),
        ("x-{8..10}", ["x-8", "x-9", "x-10"]),
        ("{a,b}/{1..2}", ["a/1", "a/2", "b/1", "b/2"]),
        ("pipe:cat x | awk '{print}'", ["pipe:cat x | awk '{print}'"]),
        ("plain", ["plain"]),
    ],
)
def test_braces(text: str, names: list[str]) -> None:
    assert expand(text) == names


def test_commas_in_braces_part_nothing() -> None:
    assert split_path("a/{x,y}.tar, b ,,pipe:cat {1..2}.tar") == ["a/{x,y}.tar", "b", "pipe:cat {1..2}.tar"]
    for wrong in ("x{0..99999999}", "x{3..1}"):
        with pytest.raises(ValueError, match="must rise, to at most 1000000 shards"):
            expand(wrong)


# --- the index -------------------------------------------------------------------------------------------------------


def test_without_an_index_the_headers_are_read_once(
    shards: Path, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = _contents(ImageIndex.scan(shards, classes=True))
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    (copy / "index.npz").unlink()
    for times in (1, 1):
        assert _contents(ImageIndex.scan(copy, classes=True)) == expected
        assert sum("reading the headers" in record.getMessage() for record in caplog.records) == times
    assert [path.suffix for path in sorted(cache.iterdir())] == [".lock", ".npz"]
    os.utime(copy / "train-000001.tar", (0, 0))  # another file, for all we know
    assert _contents(ImageIndex.scan(copy, classes=True)) == expected
    assert sum("reading the headers" in record.getMessage() for record in caplog.records) == 2
    next(cache.glob("*.npz")).write_bytes(b"damaged")
    assert _contents(ImageIndex.scan(copy, classes=True)) == expected
    assert index_main([str(copy)]) == 0
    assert ImageIndex.scan(copy, classes=True).fingerprint() == ImageIndex.scan(shards, classes=True).fingerprint()
    assert index_main([str(tmp_path)]) == 2


def test_a_cache_that_cannot_be_written(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    shutil.copy(shards / "train-000000.tar", tmp_path / "x.tar")
    assert len(ImageIndex.scan(tmp_path / "x.tar", classes=False)) == 5
    assert any("is not kept" in record.getMessage() for record in caplog.records)


def test_a_shard_that_was_changed_is_noticed(shards: Path, tmp_path: Path) -> None:
    """By its length at the start; if that is the same, by what stands where the index says."""
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    tar(copy / "train-000001.tar", {f"new/{i}.png": png(i) for i in range(9)})
    index = ImageIndex.scan(copy, classes=False)
    assert len(index) == 23 - 5 + 9 and index.name(5) == "new/0.png"
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    index = ImageIndex.scan(other, classes=False)
    content = bytearray((other / "train-000001.tar").read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    (other / "train-000001.tar").write_bytes(content)
    loader = evaluate(index, max_broken=0.5)
    assert len([i for batch in indices(loader.batches(0)) for i in batch]) < 23
    assert all("the shard is not the one of its index" in reason for reason in loader.broken.values())
    assert all("train-000001.tar/" in path for path in loader.broken)


def test_a_truncated_shard_costs_only_what_is_cut_off(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    index = ImageIndex.scan(copy, classes=True)
    os.truncate(copy / "train-000003.tar", int(index.starts[17]) * 512 + 100)
    loader = train(index, max_broken=0.5)
    list(loader.batches(0))
    list(loader.batches(1))
    assert set(loader.broken) == {index.path(i) for i in (17, 18, 19)}
    assert all("cut off" in reason for reason in loader.broken.values())


def test_fingerprint(shards: Path, images: Path, tmp_path: Path) -> None:
    before = ImageIndex.scan(shards, classes=True).fingerprint()
    moved = tmp_path / "moved"
    shutil.copytree(shards, moved)
    assert ImageIndex.scan(moved, classes=True).fingerprint() == before
    assert ImageIndex.scan(images, classes=True).fingerprint() != before
    assert ImageIndex.scan(moved, classes=False).fingerprint() != before
    assert ImageIndex.scan(moved / "train-00000{0..3}.tar", classes=True).fingerprint() != before
    smaller = tmp_path / "smaller"
    pack(str(images), smaller, PackSettings(shard_size=5, shuffle=False, shrink=9, workers=1))
    assert ImageIndex.scan(smaller, classes=True).fingerprint() != before


@pytest.mark.parametrize("damage", ["cut", "text", "pickle", "offsets", "classes", "kinds", "lengths"])
def test_a_damaged_index_is_refused(shards: Path, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    file = copy / "index.npz"
    with np.load(file) as loaded:
        arrays = dict(loaded)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:500])
    elif damage == "text":
        file.write_text("hello")
    else:
        changed = {
            "pickle": {"shards": np.asarray([{}], object)},
            "offsets": {"offsets": arrays["offsets"][::-1].copy()},
            "classes": {"class_ids": arrays["class_ids"] + 7},
            "kinds": {"starts": arrays["starts"].astype(np.float64)},
            "lengths": {"sizes": arrays["sizes"][:-1]},
        }[damage]
        np.savez(file, allow_pickle=True, **(arrays | changed))
    with pytest.raises(ValueError, match=r"index\.npz is no index of shards, or damaged .*: remove it"):
        ImageIndex.scan(copy, classes=False)


def test_index_round_trip(shards: Path, tmp_path: Path) -> None:
    index = ShardIndex.load(shards / "index.npz", "")
    index.save(tmp_path / "again.npz")
    again = ShardIndex.load(tmp_path / "again.npz", "")
    for name in ShardIndex.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(index, name), getattr(again, name))
    assert [path.name for path in tmp_path.iterdir()] == ["again.npz"]


# --- samples and their classes ----------------------------------------------------------------------------------------


def _one(path: Path, members: dict[str, bytes], classes: bool = True) -> ImageIndex:
    return ImageIndex.scan(tar(path / "x.tar", members), classes)


def test_classes_out_of_cls_json_and_folders(tmp_path: Path) -> None:
    words = {"s0.jpg": png(0), "s0.cls": b"zebra\n", "s1.json": b'{"label": "ape"}', "s1.png": png(1)}
    index = _one(tmp_path / "words", words)
    assert index.class_names == ["ape", "zebra"] and index.labels.tolist() == [1, 0]
    numbers = {name: content for i, n in enumerate((10, 2, 10, 9)) for name, content in {f"{i}.png": png(i), f"{i}.cls": b"%d" % n}.items()}  # fmt: skip
    index = _one(tmp_path / "numbers", numbers)
    assert index.class_names == ["2", "9", "10"] and index.labels.tolist() == [2, 0, 2, 1], "in the order of numbers"
    index = _one(tmp_path / "folders", {"b/x.png": png(0), "a/deep/y.png": png(1)})
    assert index.class_names == ["a", "b"] and index.labels.tolist() == [1, 0]
    both = {"0.png": png(0), "0.cls": b"3", "0.json": b'{"class": "cat", "label": 3}'}
    assert _one(tmp_path / "both", both).class_names == ["3"], ".cls comes first"
    batch = next(evaluate(_one(tmp_path / "words", words)).batches(0))
    assert batch["label"].dtype == torch.int64 and batch["label"].tolist() == [1, 0]


def test_samples_without_a_class(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images of shard .*x\.tar' have no class: it stands in the sample's \.cls"):
        _one(tmp_path / "none", {"0.png": png(0), "1.png": png(1), "1.cls": b"2"})
    with pytest.raises(ValueError, match=r"some samples .* have a \.cls or \.json with a class, others none"):
        _one(tmp_path / "some", {"a/0.png": png(0), "b/1.png": png(1), "b/1.cls": b"2"})
    assert len(_one(tmp_path / "free", {"0.png": png(0), "1.png": png(1), "1.cls": b"2"}, classes=False)) == 2
    odd = {"a.png": png(0), "a.json": b"[" * 60000, "b.png": png(0), "b.json": b'{"label": true}', "c.png": png(0), "c.cls": b" "}  # fmt: skip
    assert len(_one(tmp_path / "odd", odd, classes=False)) == 3


def test_one_image_of_a_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {"d.x/a.jpg": png(0), "d.x/a.seg.png": png(1), "d.x/a.txt": b"words", "d.x/b.B.PNG": png(2), "d.x/._b.png": b"mac"}  # fmt: skip
    index = _one(tmp_path, members)
    assert [index.name(i) for i in range(len(index))] == ["d.x/a.jpg", "d.x/b.B.PNG"]
    assert any("left out 1 images of samples" in record.getMessage() for record in caplog.records)


def test_names_that_climb_out_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = tmp_path / "victim.png"
    members = {"../victim.png": png(0), "/etc/x.png": png(1), "a/../../y.png": png(2), "./fine/z.png": png(3)}
    index = _one(tmp_path / "in", members)
    assert [index.name(i) for i in range(len(index))] == ["fine/z.png"] and index.class_names == ["fine"]
    assert any("left out 3 members of shards whose names" in record.getMessage() for record in caplog.records)
    list(evaluate(index).batches(0))
    assert not target.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_links_and_devices_are_never_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(5))
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        for name, kind in (("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE), ("c.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            file.addfile(info)
    with pytest.raises(ValueError, match="no images in shard"):
        ImageIndex.scan(tmp_path / "x.tar", classes=False)


def test_a_damaged_tar_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(ValueError, match=r"x\.tar: the file is compressed: .*pipe:zcat"):
        ImageIndex.scan(tmp_path / "x.tar", classes=False)


# --- other people's tools ---------------------------------------------------------------------------------------------


def test_shards_of_the_webdataset_library_are_read(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "w-%04d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(10):
            writer.write({"__key__": f"{i:05d}", "png": png(i), "cls": i % 3})
    index = ImageIndex.scan(tmp_path / "w-{0000..0002}.tar", classes=True)
    assert index.labels.tolist() == [i % 3 for i in range(10)] and index.class_names == ["0", "1", "2"]
    assert [content for _, _, content in _contents(index)] == [png(i) for i in range(10)]


def test_the_webdataset_library_reads_ours(shards: Path, images: Path) -> None:
    found = webdataset.WebDataset([str(path) for path in sorted(shards.glob("*.tar"))], shardshuffle=False)
    samples = list(found)
    index = ImageIndex.scan(images, classes=True)
    assert [sample["__key__"] for sample in samples] == [index.name(i)[:-4] for i in range(23)]
    for i, sample in enumerate(samples):
        assert json.loads(sample["json"]) == {"class": index.class_names[index.label(i)], "label": index.label(i)}
        assert torch.equal(decode(sample["png"], 3), decode(index.path(i), 3))


# --- the order --------------------------------------------------------------------------------------------------------


def _sequence(index: ImageIndex, **changes: object) -> np.ndarray:
    settings = dict(batch_size=2, seed=1, rank=0, world_size=1, shuffle=True, drop_last=True, repeats=1)
    return Order(index, **(settings | changes)).sequence(0)  # type: ignore[arg-type]


def test_shuffle_block_reads_shard_by_shard(shards: Path, images: Path) -> None:
    index = ImageIndex.scan(shards, classes=False)
    order = _sequence(index, shuffle_block=3)
    assert sorted(order) == list(range(23)) and not np.array_equal(order, np.arange(23))
    visited = index.root_ids[order]
    assert (np.diff(visited) != 0).sum() == 4, "each shard once"
    first = order[visited == visited[0]]
    assert max(first[:3]) < min(first[3:]), "a block of it after the other"
    assert not np.array_equal(order, _sequence(index, shuffle_block=3, seed=2))
    mixed = ImageIndex.scan(f"{images},{shards}", classes=False)
    order = _sequence(mixed, shuffle_block=3)
    assert sorted(order) == list(range(46)) and (np.diff(order < 23) != 0).sum() > 8, "files anywhere between"
    assert (np.diff(mixed.root_ids[order[order >= 23]]) != 0).sum() == 4


@pytest.mark.parametrize("streams", [1, 3, 4, 12])
def test_the_images_of_a_step_do_not_depend_on_the_processes(shards: Path, streams: int) -> None:
    """With shards dealt out in lanes: for 1, 2 and 4 processes, and after a change between two of them in mid-epoch."""
    index = ImageIndex.scan(shards, classes=False)

    def steps(world_size: int, start: int = 0) -> list[list[int]]:
        ranks = [
            indices(train(index, rank=rank, world_size=world_size, batch_size=4 // world_size, streams=streams,
                          shuffle_block=2).batches(0, start))
            for rank in range(world_size)
        ]  # fmt: skip
        return [sorted(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]

    alone = steps(1)
    assert alone == steps(2) == steps(4) and steps(2)[:2] + steps(4, 2) == alone
    seen = list(itertools.chain(*alone))
    assert len(seen) == len(set(seen)) == 20


@pytest.fixture(autouse=True)
def _warnings(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.WARNING):
        yield
