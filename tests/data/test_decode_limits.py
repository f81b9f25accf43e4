"""What decoding refuses before it costs anything: images larger than they look, programs, arrays of objects, other files."""

import io
import os
import resource
import struct
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from data import decode as decode_module
from data.content import DecodeError, read_file
from data.decode import MAX_PIXELS, MismatchError, decode
from data.listing import EXTENSIONS
from tests.data.images import png

SIDE = 20_000
"""Of the pictures of a few bytes: more than MAX_PIXELS altogether."""


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _npy(header: str, data: bytes = b"", version: int = 1) -> bytes:
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + data


def _patched(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new, 1)


def _png_of(side: int, bits: int = 8) -> bytes:
    """A PNG that says it is ``side`` pixels wide and high, with one row of data."""
    head = struct.pack(">IIBBBBB", side, side, bits, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(1 + side * 3 * bits // 8))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _tiff(shape: tuple[int, ...], **options: object) -> bytes:
    """A compressed TIFF of zeros."""
    out = io.BytesIO()
    tifffile.imwrite(out, np.zeros(shape, np.uint16), compression="zlib", **options)  # type: ignore[arg-type]
    return out.getvalue()


def _tags(content: bytes, changes: dict[int, tuple[int, int]]) -> bytes:
    """A TIFF with other numbers in its tags: tag -> (the number in it, the one to be put there)."""
    for tag, (old, new) in changes.items():
        content = _patched(content, struct.pack("<HHII", tag, 4, 1, old), struct.pack("<HHII", tag, 4, 1, new))
    return content


def _bombs() -> dict[str, bytes]:
    small = Image.new("RGB", (7, 5))
    wide, high = struct.pack("<H", 7), struct.pack("<H", 5)
    huge = struct.pack("<H", SIDE)
    far = struct.pack("<I", SIDE)
    return {
        "png": _png_of(SIDE),
        "png16": _png_of(SIDE, 16),
        "jpeg": _patched(_saved(small, "JPEG"), struct.pack(">HH", 5, 7), struct.pack(">HH", SIDE, SIDE)),
        "gif": _patched(_saved(small, "GIF"), wide + high, huge + huge),
        "bmp": _patched(_saved(small, "BMP"), struct.pack("<ii", 7, 5), far + far),
        "ppm": b"P6 20000 20000 255\n",
        "pgm16": b"P5 20000 20000 65535\n",
        "tga": _saved(small, "TGA")[:12] + huge + huge + _saved(small, "TGA")[16:],
        "sgi": _patched(_saved(small, "SGI"), struct.pack(">HHH", 7, 5, 3), struct.pack(">HHH", SIDE, SIDE, 3)),
        "pcx": _patched(_saved(small, "PCX"), struct.pack("<HH", 6, 4), huge + huge),
        "npy": _npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({SIDE}, {SIDE}, 3), }}"),
        "npy2": _npy(f"{{'descr': '<f8', 'fortran_order': True, 'shape': (3, {SIDE}, {SIDE}), }}", version=2),
        "npy zero stride": _npy("{'descr': '|u1', 'fortran_order': False, 'shape': (4294967296, 4294967296), }"),
        "npy negative": _npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-5, 7), }", bytes(100)),
        "tiff": _tags(_tiff((16, 16)), {256: (16, SIDE), 257: (16, SIDE)}),
        "tiff of many planes": _tags(
            _tiff((16, 16, 9), photometric="minisblack", planarconfig="contig"), {256: (16, 10_000), 257: (16, 10_000)}
        ),
        "tiff of large tiles": _tags(_tiff((64, 64), tile=(16, 16)), {322: (16, SIDE), 323: (16, SIDE)}),
    }


BOMBS = _bombs()


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_at_once(name: str) -> None:
    """Each in a process that may take 400 MB more, a third of what they unpack to; none is longer than a few kilobytes."""
    content = BOMBS[name]
    assert len(content) < 2_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for in_chans in (1, 3, 5):
        with pytest.raises(DecodeError):
            decode(content, in_chans)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000


def test_large_images_that_are_honest_are_within_the_limit() -> None:
    assert MAX_PIXELS >= 11_000 * 11_000
    image = decode(_saved(Image.new("L", (6000, 4000)), "PNG"), 1)
    assert image.shape == (1, 4000, 6000)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_bytes_are_decoded_as_files_are(tmp_path: Path, in_chans: int) -> None:
    rows = np.arange(15 * 18 * in_chans, dtype=np.uint16).reshape(15, 18, in_chans) * 50
    buffer = io.BytesIO()
    np.save(buffer, np.asfortranarray(rows))
    image = Image.open(io.BytesIO(png(1)))
    files = {
        "a.png": png(1),
        "a.jpg": _saved(image, "JPEG"),
        "a.webp": _saved(image, "WEBP"),
        "a.npy": buffer.getvalue(),
        "a.tif": _tiff((9, 8)),
        "b.tif": _saved(image, "TIFF"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        expected = decode(str(tmp_path / name), in_chans)
        given = np.frombuffer(bytearray(content), np.uint8)
        before = given.copy()
        assert torch.equal(decode(content, in_chans), expected) and torch.equal(decode(given, in_chans), expected), name
        assert np.array_equal(given, before), "the bytes are left as they were"
    assert torch.equal(decode(files["a.npy"], in_chans), torch.from_numpy(rows.transpose(2, 0, 1) / 65535).float())


def test_the_two_kinds_of_error(tmp_path: Path) -> None:
    """A sound file that is not what was asked for, and a broken one."""
    buffer = io.BytesIO()
    np.save(buffer, np.full((4, 5, 7), 300.0))
    with pytest.raises(MismatchError, match="has 7 channels"):
        decode(buffer.getvalue(), 3, (0, 400))
    with pytest.raises(MismatchError, match="need a declared value_range"):
        decode(buffer.getvalue(), 7)
    with pytest.raises(MismatchError, match="lie outside"):
        decode(buffer.getvalue(), 7, (0, 200))
    for broken in (b"", b"x", png(0)[:40], buffer.getvalue()[:-1], buffer.getvalue()[:60]):
        with pytest.raises(DecodeError) as raised:
            decode(broken, 7, (0, 400))
        assert not isinstance(raised.value, MismatchError)


def test_arrays_of_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return os.mkdir, (str(tmp_path / "harm"),)

    buffer = io.BytesIO()
    np.save(buffer, np.asarray([[Harm()]], object), allow_pickle=True)
    with pytest.raises(DecodeError, match="array of Python objects is no image, and is never read"):
        decode(buffer.getvalue(), 1)
    assert not (tmp_path / "harm").exists()
    named = io.BytesIO()
    np.save(named, np.zeros((3, 3), [("猫", "u1")]))
    with pytest.raises(DecodeError, match="with named fields, is no image"):
        decode(named.getvalue(), 1)
    plain = io.BytesIO()
    np.save(plain, np.zeros((3, 3), [("a", "u1")]))
    with pytest.raises(DecodeError, match="are not pixel values"):
        decode(plain.getvalue(), 1)


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands it to Ghostscript, whatever the file's name is."""
    script = tmp_path / "gs"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    content = _saved(Image.new("RGB", (7, 5)), "EPS")
    with pytest.raises(DecodeError, match="no image in any format that is read"):
        decode(content, 3)
    assert not (tmp_path / "ran").exists()


def test_every_format_that_folders_take_is_read() -> None:
    formats = Image.registered_extensions()
    assert {formats[ending] for ending in EXTENSIONS - {".npy"}} <= {*decode_module.PILLOW_FORMATS}
    Image.init()
    assert not {"EPS", "WMF", "FITS", "GRIB", "HDF5", "BUFR", "MPEG"} & {*decode_module.PILLOW_FORMATS}
    assert {*decode_module.PILLOW_FORMATS} <= set(Image.OPEN)


def test_a_tiff_names_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OME-TIFF may spread over files: only the one that was given is opened."""
    tifffile.imwrite(tmp_path / "secret.ome.tif", np.full((8, 8), 7, np.uint16), metadata={"axes": "YX"})
    description = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" '
        'DimensionOrder="XYCZT" Type="uint16" SizeX="8" SizeY="8" SizeC="2" SizeZ="1" SizeT="1">'
        '<TiffData FirstC="0" IFD="0" PlaneCount="1"/><TiffData FirstC="1" IFD="0" PlaneCount="1">'
        f'<UUID FileName="{tmp_path}/secret.ome.tif">urn:uuid:1</UUID></TiffData></Pixels></Image></OME>'
    )
    out = io.BytesIO()
    tifffile.imwrite(out, np.zeros((8, 8), np.uint16), description=description, metadata=None)
    opened: list[str] = []

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    monkeypatch.chdir(tmp_path)
    with suppress(DecodeError):
        assert decode(out.getvalue(), 2).max() == 0
    assert not any("secret" in path for path in opened)
    with open(tmp_path / "secret.ome.tif", "rb"):
        assert any("secret" in path for path in opened), "the hook sees"


def test_files_that_are_no_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    for path in (tmp_path / "fifo.png", tmp_path, Path("/dev/zero")):
        with pytest.raises(DecodeError, match="no regular file"):
            read_file(str(path))


def test_endless_files_are_not_read(tmp_path: Path) -> None:
    """A sparse file of 3 GB is refused by its length, in no time."""
    path = tmp_path / "large.png"
    path.write_bytes(png(0))
    os.truncate(path, 3 * 2**30)
    with pytest.raises(DecodeError, match=r"the file has 3221225472 bytes, more than the 2147483648 that are read"):
        decode(str(path), 3)
