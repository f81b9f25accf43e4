"""Packing: what goes in comes out, kills and stops lose nothing, other people's folders are left alone."""

import fcntl
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from data.decode import decode
from data.pack import PackSettings, main, pack, parse
from data.pack_shard import _add
from data.reading import Reader
from data.shrink import shrunk
from data.sources import ImageIndex
from tests.data.images import folder, png, tar


def _contents(path: Path, classes: bool = True) -> dict[str, tuple[str, bytes]]:
    index = ImageIndex.scan(path, classes)
    reader = Reader(index, 0)
    names = [*index.class_names, ""]
    return {index.name(i): (names[index.label(i)], reader.read(i).tobytes()) for i in range(len(index))}


def _files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
def test_round_trip(tmp_path: Path, shuffle: bool, workers: int) -> None:
    images = folder(tmp_path / "images", 31)
    info = pack(str(images), tmp_path / "out", PackSettings(shard_size=7, shuffle=shuffle, workers=workers))
    assert _contents(images) == _contents(tmp_path / "out")
    assert (list(_contents(images)) == list(_contents(tmp_path / "out"))) == (not shuffle)
    assert info["images"] == 31 and list(info["shards"].values()) == [7, 7, 7, 7, 3] and not info["broken"]
    assert sorted(_files(tmp_path / "out")) == [
        "index.npz", *(f"out-{number:06d}.tar" for number in range(5)), "shards.json",
    ]  # fmt: skip
    before = _files(tmp_path / "out")
    again = pack(str(images), tmp_path / "out", PackSettings(shard_size=7, shuffle=shuffle))
    assert again == info and _files(tmp_path / "out") == before, "it stands there already"
    pack(str(images), tmp_path / "out2", PackSettings(shard_size=7, shuffle=shuffle, workers=2))
    assert [content for name, content in _files(tmp_path / "out2").items() if name.endswith(".tar")] == [
        content for name, content in before.items() if name.endswith(".tar")
    ], "the same bytes for any number of workers"


def test_lists_mixtures_and_shards(tmp_path: Path) -> None:
    """Names are made relative and unique, endings found out; shards can be packed again."""
    images = folder(tmp_path / "images", 6)
    (images / "odd").mkdir()
    for name, content in {"two.dots.png": png(1), "same.png": png(2), "same.jpg": png(3), "none": png(4)}.items():
        (images / "odd" / name).write_bytes(content)
    (tmp_path / "list.txt").write_text(
        f"{images}/a/000.png\tx\n../{tmp_path.name}/images/odd/two.dots.png\ty\n{images}/odd/none\tx\n"
        f"{images}/odd/same.png\tx\n{images}/odd/same.jpg\ty\n"
    )
    pack(str(tmp_path / "list.txt"), tmp_path / "out", PackSettings(shuffle=False, workers=1))
    found = _contents(tmp_path / "out")
    assert list(found) == ["a/000.png", "odd/two_dots.png", "odd/none.png", "odd/same.png", "odd/same-1.jpg"]
    assert [label for label, _ in found.values()] == ["x", "y", "x", "x", "y"]
    assert [content for _, content in found.values()][1:] == [png(seed) for seed in (1, 4, 2, 3)]
    pack(f"{images},{tmp_path / 'out'}", tmp_path / "both", PackSettings(classes="false", shuffle=False, workers=1))
    assert len(_contents(tmp_path / "both", classes=False)) == 6 + 3 + 5
    pack(str(tmp_path / "out"), tmp_path / "again", PackSettings(shard_size=2, shuffle=False, workers=1))
    assert _contents(tmp_path / "again") == found
    with pytest.raises(ValueError, match="streams cannot be packed"):
        pack(f"{tmp_path}/out/index.npz,pipe:cat {tmp_path}/out/out-000000.tar", tmp_path / "z", PackSettings())


def test_classes(tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(3):
        (flat / f"{i}.png").write_bytes(png(i))
    assert pack(str(flat), tmp_path / "a", PackSettings(workers=1))["classes"] == []
    with pytest.raises(ValueError, match="have no class"):
        ImageIndex.scan(tmp_path / "a", classes=True)
    with pytest.raises(ValueError, match="lies directly in"):
        pack(str(flat), tmp_path / "b", PackSettings(classes="true"))
    numbered = tar(tmp_path / "n.tar", {"0.png": png(0), "0.cls": b"10", "1.png": png(1), "1.cls": b"9"})
    pack(str(numbered), tmp_path / "c", PackSettings(shuffle=False, workers=1))
    assert [label for label, _ in _contents(tmp_path / "c").values()] == ["10", "9"]
    os.unlink(tmp_path / "c/index.npz")
    os.environ["XDG_CACHE_HOME"], before = str(tmp_path), os.environ.get("XDG_CACHE_HOME")
    try:
        assert [label for label, _ in _contents(tmp_path / "c").values()] == ["10", "9"], "the shards say it themselves"
    finally:
        os.environ.pop("XDG_CACHE_HOME")
        if before:
            os.environ["XDG_CACHE_HOME"] = before


def test_broken_images_are_left_out_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = folder(tmp_path / "images", 12)
    for name, content in {"a/000.png": b"", "b/001.png": (images / "b/001.png").read_bytes()[:300]}.items():
        (images / name).write_bytes(content)
    np.save(images / "c/array.npy", np.zeros((4, 5, 9), np.float32))  # sound, though not for everybody
    for extra in ([], ["shrink=8"]):
        target = tmp_path / f"out{len(extra)}"
        assert main([str(images), str(target), "shard_size=5", "workers=2", *extra]) == 0
        said = capsys.readouterr()
        assert "11 images in 3 shards" in said.out and "2 broken ones left out, 3 classes" in said.out
        assert all(f"left out broken image {images}/{name}: " in said.err for name in ("a/000.png", "b/001.png"))
        assert len(_contents(target)) == 11 and "c/array.npy" in _contents(target)
        assert [entry["path"] for entry in json.loads((target / "shards.json").read_text())["broken"]]
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    (nothing / "x.png").touch()
    assert main([str(nothing), str(tmp_path / "none")]) == 2
    assert "none of the 1 images at" in capsys.readouterr().err


# --- shrinking --------------------------------------------------------------------------------------------------------


def _array(image: Image.Image, kind: str, **options: object) -> np.ndarray:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return np.frombuffer(out.getvalue(), np.uint8)


def _smooth(height: int, width: int) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [127 + 60 * np.sin(rows / (30 + c)) + 60 * np.cos(columns / (40 + c)) for c in range(3)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"])
def test_every_mode_shrinks(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    small = shrunk(_array(_smooth(60, 90).convert(mode), kind), 20, 95)
    assert small is not None
    with Image.open(io.BytesIO(small)) as image:
        assert image.format == "JPEG" and image.size == (30, 20)
        assert image.mode == ("L" if mode in ("L", "LA", "1") else "RGB")


def test_shrinking_is_of_high_quality() -> None:
    """Close to a Lanczos resize of the whole picture, though a JPEG is decoded at a half; upright by EXIF."""
    picture = _smooth(400, 700)
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    for content in (_array(picture, "PNG"), _array(picture, "JPEG", quality=97, exif=exif)):
        small = shrunk(content, 40, 97)
        assert small is not None
        turned = picture.rotate(-90, expand=True) if content[0] == 0xFF else picture
        size = (40, 70) if content[0] == 0xFF else (70, 40)
        expected = np.asarray(turned.resize(size, Image.Resampling.LANCZOS), float)
        difference = np.abs(decode(small, 3).permute(1, 2, 0).numpy() - expected)
        assert difference.shape == expected.shape and difference.mean() < 1.5


def test_what_is_left_as_it_is() -> None:
    arrays = [_smooth(20, 90), _smooth(20, 20)]
    assert all(shrunk(_array(picture, "JPEG"), 20, 90) is None for picture in arrays), "no larger than that"
    deep = Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60))
    assert shrunk(_array(deep, "PNG"), 20, 90) is None and shrunk(_array(deep, "TIFF"), 20, 90) is None
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((40, 60, 5), np.float32))
    assert shrunk(np.frombuffer(buffer.getvalue(), np.uint8), 20, 90) is None
    for array in (np.zeros((40, 60, 7), np.uint8), np.zeros((40, 60, 3), np.uint16), np.zeros((40, 60), np.float32)):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, array, photometric="minisblack")
        assert shrunk(np.frombuffer(buffer.getvalue(), np.uint8), 20, 90) is None


def test_pack_shrinks(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    _smooth(50, 80).save(images / "large.png")
    _smooth(8, 80).save(images / "small.png")
    info = pack(str(images), tmp_path / "out", PackSettings(shrink=16, quality=90, shuffle=False, workers=1))
    assert info["shrunk"] == 1 and list(_contents(tmp_path / "out", False)) == ["large.jpg", "small.png"]
    large, small = (
        torch.tensor(decode(content, 3).shape) for _, content in _contents(tmp_path / "out", False).values()
    )
    assert large.tolist() == [3, 16, 26] and small.tolist() == [3, 8, 80]


# --- kills, stops, other folders --------------------------------------------------------------------------------------


def _many(path: Path, count: int) -> Path:
    """Larger images, so that packing takes a while."""
    path.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3)).astype(np.uint8)
    for i in range(count):
        Image.fromarray(np.roll(pixels, i, 0)).save(path / f"{i:03d}.png", compress_level=0)
    return path


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stop_in_the_middle_loses_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """Finished shards are kept as they are, unfinished ones are invisible, and the end is the same."""
    images, target = _many(tmp_path / "images", 60), tmp_path / "out"
    words = [str(images), str(target), "shard_size=4", "workers=2", "shrink=100"]
    said = tmp_path / "said"

    def begin() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def slowly(*args: Any) -> None:
            time.sleep(0.05)
            _add(*args)

        with open(said, "w") as sys.stderr, pytest.MonkeyPatch.context() as patch:
            patch.setattr("data.pack_shard._add", slowly)
            code = main(words)
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=begin)
    process.start()
    deadline = time.monotonic() + 60
    while len(list(target.glob("*.tar")) if target.exists() else []) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid or 0, number)
    process.join(60)
    assert process.exitcode == (130 if number == signal.SIGINT else -9)
    if number == signal.SIGINT:
        assert "stopped: finished shards are kept, the same command goes on" in said.read_text()
    kept = {path.name: path.stat().st_mtime_ns for path in target.glob("*.tar")}
    assert 3 <= len(kept) < 15 and not (target / "index.npz").exists()
    with pytest.raises(ValueError, match="not all packed"):
        ImageIndex.scan(target, classes=False)
    assert main(words) == 0
    assert {name: (target / name).stat().st_mtime_ns for name in kept} == kept
    pack(str(images), tmp_path / "out2", PackSettings(shard_size=4, shrink=100, workers=2))
    assert [content for _, content in _contents(target, False).values()] == [
        content for _, content in _contents(tmp_path / "out2", False).values()
    ]
    assert not [path for path in target.iterdir() if path.name.startswith(".")]


def test_a_process_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = folder(tmp_path / "images", 12)
    words = [str(images), str(tmp_path / "out"), "shard_size=2", "workers=1", "shuffle=false"]

    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr("data.pack_shard._name", killed)
        with pytest.raises(
            RuntimeError, match=r"pack worker 0 .* SIGKILL, .* shard .*out-000000\.tar.* Finished shards are kept"
        ):
            pack(*parse(words))
    assert main(words) == 0 and len(_contents(tmp_path / "out")) == 12


def test_a_damaged_or_missing_shard_is_made_again(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", 10)
    settings = PackSettings(shard_size=2, workers=1)
    pack(str(images), tmp_path / "whole", settings)
    expected = _contents(tmp_path / "whole")
    out = tmp_path / "out"

    class StopError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StopError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.pack.join", stop)
        with pytest.raises(StopError):
            pack(str(images), out, settings)
    os.truncate(out / "out-000001.tar", 1024)
    (out / "out-000002.tar").unlink()
    (out / ".parts/out-000003.npz").write_bytes(b"x")
    (out / ".out-000004.tar.7.tmp").write_bytes(b"half")
    pack(str(images), out, settings)
    assert _contents(out) == expected and len(_files(out)) == 7


def test_two_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.pack._LOCK_TRIES", 1)
    images = folder(tmp_path / "images", 4)
    (tmp_path / "out").mkdir()
    pack(str(images), tmp_path / "out", PackSettings(workers=1))
    info = json.loads((tmp_path / "out/shards.json").read_text())
    (tmp_path / "out/shards.json").write_text(json.dumps(info | {"complete": False}))
    with open(tmp_path / "out/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"another data\.pack is at work in"):
            pack(str(images), tmp_path / "out", PackSettings(workers=1))


def test_other_content_is_refused(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", 4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    for taken in (tmp_path / "mine", tmp_path / "mine/notes.txt", images):
        with pytest.raises(
            ValueError, match=r"exists and was not written by data\.pack: give an empty or a new folder"
        ):
            pack(str(images), taken, PackSettings())
    pack(str(images), tmp_path / "out", PackSettings(workers=1))
    before = _files(tmp_path / "out")
    with pytest.raises(ValueError, match=r"was packed with shrink=0 \(now 64\): give another folder, or the old"):
        pack(str(images), tmp_path / "out", PackSettings(shrink=64))
    folder(images, 5)
    with pytest.raises(ValueError, match=r"was packed with images=4 \(now 5\), source="):
        pack(str(images), tmp_path / "out", PackSettings())
    assert _files(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "give the images, the folder of the shards, and settings out of shrink=, quality="),
        (["a", "b", "c=1"], "give the images"),
        (["a", "b", "shrink=x"], "shrink=x: shrink must be a whole number"),
        (["a", "b", "shuffle=no"], "shuffle must be true or false"),
        (["a", "b", "quality=0"], r"quality in 1\.\.100"),
        (["a", "b", "classes=some"], "classes must be auto, true or false"),
        (["nowhere", "b"], "image path 'nowhere' does not exist"),
    ],
)
def test_wrong_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert main(words) == 2
    assert re.search(message, capsys.readouterr().err)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0 and "shard_size: images per shard" in capsys.readouterr().out
    assert main([]) == 2
