"""A file, or its bytes -> a tensor of the channels the recipe asks for.

JPEG goes through torchvision's decoder (faster, and no copy through a PIL image), arrays (``.npy``, TIFF of more than 8 bits or
4 channels) through NumPy and tifffile, all else through Pillow. What kind a file is, its first bytes say, not its name. Whatever
the decoder, the picture is turned upright by its EXIF orientation, as ``PIL.ImageOps.exif_transpose`` does.

Shapes: C channels, H rows, W columns.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tifffile
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# Deprecated since torchvision 0.29 in favour of TorchCodec: on a change of the pinned version look here first.
from torchvision.io import ImageReadMode, decode_jpeg, decode_png

from data.content import DecodeError, read_file

MAX_PIXELS = 2**27
"""Largest H * W that is decoded: a small file may unpack to any size ("decompression bomb")."""

_JPEG, _PNG, _NPY = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_LUMA = (0.299, 0.587, 0.114)
"""ITU-R 601-2, what Pillow's ``convert("L")`` and JPEG's Y use."""

PILLOW_FORMATS = (
    *(
        "AVIF",
        "BLP",
        "BMP",
        "CUR",
        "DCX",
        "DDS",
        "DIB",
        "FLI",
        "FTEX",
        "GBR",
        "GIF",
        "ICNS",
        "ICO",
        "IM",
        "IMT",
        "JPEG",
    ),
    *(
        "JPEG2000",
        "MSP",
        "PCX",
        "PIXAR",
        "PNG",
        "PPM",
        "PSD",
        "QOI",
        "SGI",
        "SPIDER",
        "SUN",
        "TGA",
        "TIFF",
        "WEBP",
        "XBM",
    ),
    "XPM",
)
"""What Pillow may be asked to open. Not EPS, which it hands to Ghostscript as a program to run, nor formats that unpack the whole
file before their size is known."""

Range = Sequence[float] | None


class MismatchError(DecodeError):
    """A sound file that holds other channels or values than those asked for."""


def decode(source: str | bytes | np.ndarray, in_chans: int, value_range: Range = None) -> Tensor:
    """Read one image, a path or the bytes (uint8) of a file, as a tensor (C, H, W) with C = ``in_chans``.

    uint8 in [0, 255] where the file holds 8-bit (or 1-bit) samples; else float32 in [0, 1], ``(x - lo) / (hi - lo)`` with
    ``(lo, hi) = value_range``. Unsigned 16-bit samples have the range (0, 65535) where none is given; other integers and floats
    need one. Values outside the range (and NaN) are an error, never clipped.

    Channels of pictures: grey, palette, RGB, CMYK and the rest become 1 (luma) or 3 (RGB), alpha is dropped; 2 and 4 channels are
    given only by files that have them (LA; RGBA or CMYK). Arrays have no colours to convert: ``.npy`` of shape (H, W), (H, W, C) or
    (C, H, W) (in doubt the last axis is the channels) and multi-channel TIFF must have ``in_chans`` channels, or one, which is
    repeated.

    Raises ``DecodeError`` for whatever is wrong with the file.
    """
    try:
        if isinstance(source, np.ndarray):
            data = source
        else:
            data = np.frombuffer(bytearray(source), np.uint8) if isinstance(source, bytes) else read_file(source)
        head = data[:32].tobytes()
        if head.startswith(_JPEG):
            return _decode_jpeg(data, in_chans)
        if head.startswith(_NPY):
            return _decode_npy(data, in_chans, value_range)
        if head.startswith(_TIFF):
            return _decode_tiff(data, in_chans, value_range)
        if head.startswith(_PNG) and head[24] == 16:
            return _decode_png16(data, in_chans, value_range)
        return _decode_pillow(data, in_chans, value_range)
    except DecodeError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # the decoders raise nearly every type there is on damaged files
        raise DecodeError(f"{type(error).__name__}: {error}") from error


def check_size(height: int, width: int) -> None:
    """Refuse images without pixels, or with too many."""
    if height < 1 or width < 1:
        raise DecodeError(f"the image is empty: {height} x {width}")
    if height * width > MAX_PIXELS:
        raise DecodeError(
            f"{height} x {width} pixels are more than the {MAX_PIXELS} that are decoded (data.decode.MAX_PIXELS)"
        )


def _jpeg_header(data: np.ndarray) -> tuple[int, int, int] | None:
    """(height, width, components) from the frame header of a JPEG, None where the markers do not lead to one."""
    view, at = data.data, 2
    while at + 9 < len(view):
        if view[at] != 0xFF:
            return None
        marker = view[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # no length follows
            at += 2
            continue
        if marker in (0xD9, 0xDA):
            return None
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return (view[at + 5] << 8) | view[at + 6], (view[at + 7] << 8) | view[at + 8], view[at + 9]
        at += 2 + ((view[at + 2] << 8) | view[at + 3])
    return None


def _decode_jpeg(data: np.ndarray, in_chans: int) -> Tensor:
    """JPEG -> (C, H, W) uint8. Grey and YCbCr by torchvision; CMYK, and what torchvision refuses, by Pillow."""
    header = _jpeg_header(data)
    if header is not None and header[2] in (1, 3) and in_chans in (1, 3):
        check_size(header[0], header[1])
        mode = ImageReadMode.RGB if in_chans == 3 else ImageReadMode.GRAY
        try:
            return decode_jpeg(torch.from_numpy(data), mode, apply_exif_orientation=True)
        except RuntimeError:
            pass  # Pillow has the last word, and the clearer message
    return _decode_pillow(data, in_chans, None)


def _decode_pillow(data: np.ndarray, in_chans: int, value_range: Range) -> Tensor:
    """Any format that Pillow opens (the first frame) -> (C, H, W)."""
    try:
        opened = Image.open(io.BytesIO(data.tobytes()), formats=PILLOW_FORMATS)
    except UnidentifiedImageError:  # its own message names the buffer
        raise DecodeError("no image in any format that is read") from None
    with opened as image:
        check_size(image.height, image.width)
        sixteen = image.format == "PPM"  # Pillow gives the 16 bits of a PGM in 32
        ImageOps.exif_transpose(image, in_place=True)
        return _from_pillow(image, in_chans, value_range, sixteen)


def _from_pillow(image: Image.Image, in_chans: int, value_range: Range, sixteen: bool) -> Tensor:
    """PIL image of any mode -> (C, H, W). ``sixteen``: a mode of 32-bit integers holds 16-bit samples."""
    if (
        image.mode.startswith("I") or image.mode == "F"
    ):  # I, I;16 and its byte orders, F: one channel of more than 8 bits
        deep = np.asarray(image)
        return _scaled((deep.astype(np.uint16) if sixteen and image.mode == "I" else deep)[None], in_chans, value_range)
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    bands = len(image.getbands())
    if in_chans == 3 and image.mode != "RGB":
        image = image.convert("RGB")
    elif in_chans == 1 and image.mode != "L":
        image = image.convert("L") if bands <= 2 else image.convert("RGB").convert("L")
    elif in_chans not in (1, 3) and bands != in_chans:
        raise _channels_differ(bands, in_chans)
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _decode_png16(data: np.ndarray, in_chans: int, value_range: Range) -> Tensor:
    """16-bit PNG -> float32 (C, H, W); Pillow would cut colour to 8 bits."""
    check_size(int.from_bytes(data[20:24].tobytes(), "big"), int.from_bytes(data[16:20].tobytes(), "big"))
    image = decode_png(torch.from_numpy(data), ImageReadMode.UNCHANGED, apply_exif_orientation=True)
    return _scaled(_colours(image.numpy(), in_chans), in_chans, value_range)


def _decode_npy(data: np.ndarray, in_chans: int, value_range: Range) -> Tensor:
    """NumPy array file of shape (H, W), (H, W, C) or (C, H, W) -> (C, H, W)."""
    head = io.BytesIO(data[: 1 << 17].tobytes())
    version = np.lib.format.read_magic(head)
    if version > (2, 0):
        raise DecodeError(f"an array file of version {version}, with named fields, is no image")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, kind = read_header(head)
    if kind.hasobject:
        raise DecodeError("an array of Python objects is no image, and is never read")
    count = math.prod(shape)
    if count * kind.itemsize > len(data) - head.tell():
        raise DecodeError(
            f"the file is cut off: an array of shape {shape} and type {kind} has {count * kind.itemsize} bytes"
        )
    array = np.frombuffer(data, kind, count, head.tell()).reshape(shape, order="F" if by_columns else "C")
    return _scaled(_channels_first(array, in_chans, last=None), in_chans, value_range)


def _decode_tiff(data: np.ndarray, in_chans: int, value_range: Range) -> Tensor:
    """TIFF -> (C, H, W): pictures of 8 bits by Pillow, arrays (more bits or channels) by tifffile.

    Of several pages the first is taken, unless they are as many grey pages as channels are asked for: then each is a channel.
    """
    # Not multi-file: some kinds of TIFF name other files to read along.
    with tifffile.TiffFile(io.BytesIO(data.tobytes()), _multifile=False) as file:
        page = file.pages.first
        check_size(page.imagelength, page.imagewidth)
        bands = page.samplesperpixel
        series: Any = file.series[0] if bands == 1 < in_chans else None
        stacked = series is not None and series.ndim == 3 and series.shape[0] == in_chans
        if not stacked and bands <= 4 and page.bitspersample <= 8 and page.sampleformat == 1:
            return _decode_pillow(data, in_chans, value_range)
        _check_tiff(page, series.size if stacked else page.size, in_chans)
        try:
            array = series.asarray() if stacked else page.asarray()
        except ValueError as error:  # tifffile leaves most compressions to an optional package
            if "imagecodecs" not in str(error):
                raise
            if bands == 1 and not stacked and page.photometric == tifffile.PHOTOMETRIC.MINISBLACK:
                return _decode_pillow(data, in_chans, value_range)
            raise DecodeError(
                f"{error}: pip install imagecodecs, or save the file uncompressed or with deflate"
            ) from error
        array = _channels_first(array, in_chans, last=None if stacked else page.axes.endswith("S"))
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and array.dtype.kind == "u":
            array = np.iinfo(array.dtype).max - array
        if page.photometric == tifffile.PHOTOMETRIC.RGB:
            array = _colours(array, in_chans)
        orientation = page.tags.get("Orientation")
        return _scaled(_upright(array, 1 if orientation is None else int(orientation.value)), in_chans, value_range)


def _check_tiff(page: Any, samples: int, in_chans: int) -> None:
    """Refuse what unpacks to far more than its picture: surplus planes, and tiles larger than an image may be."""
    if page.is_tiled:
        check_size(page.tilelength, page.tilewidth)
    if samples > MAX_PIXELS * max(in_chans, 4):
        raise DecodeError(f"an array of shape {page.shape} is larger than an image of {in_chans} channels may be")


def _channels_first(array: np.ndarray, in_chans: int, last: bool | None) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) -> (C, H, W). ``last``: whether the channels are the last axis, None to go by the sizes."""
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3:
        raise DecodeError(f"an array of shape {array.shape} is no image: allowed are (H, W), (H, W, C) and (C, H, W)")
    if last is None:
        fits = [(axis, size) for size in (in_chans, 1) for axis in (2, 0) if array.shape[axis] == size]
        last = array.shape[0] != 1 and (not fits or fits[0][0] == 2)
    array = array.transpose(2, 0, 1) if last else array
    check_size(array.shape[1], array.shape[2])
    return array


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (C, H, W) by an EXIF/TIFF orientation of 1 to 8 (others count as 1)."""
    if orientation in (5, 6, 7, 8):  # stored with rows and columns exchanged
        array = array.transpose(0, 2, 1)
    if orientation in (3, 4, 7, 8):
        array = array[:, ::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, :, ::-1]
    return array


def _colours(array: np.ndarray, in_chans: int) -> np.ndarray:
    """Grey, grey + alpha, RGB or RGBA (C, H, W) -> the 1 or 3 channels asked for, in the same dtype; else unchanged."""
    bands = array.shape[0]
    if bands == in_chans or in_chans not in (1, 3):
        return array
    if bands == 2:
        return array[:1]
    if bands == 4 and in_chans == 3:
        return array[:3]
    if bands in (3, 4) and in_chans == 1:
        luma = np.tensordot(np.asarray(_LUMA), array[:3].astype(np.float64), axes=1)[None]
        return (np.rint(luma) if array.dtype.kind in "ui" else luma).astype(array.dtype)
    return array


def _channels_differ(found: int, in_chans: int) -> MismatchError:
    return MismatchError(
        f"the file has {found} channels, in_chans={in_chans} is asked for: set in_chans={found} or convert the files"
    )


def _scaled(array: np.ndarray, in_chans: int, value_range: Range) -> Tensor:
    """Array (C, H, W) of any number type -> tensor with ``in_chans`` channels: 8-bit kept, else float32 in [0, 1] by the range."""
    if array.shape[0] != in_chans:
        if array.shape[0] != 1:
            raise _channels_differ(array.shape[0], in_chans)
        array = np.repeat(array, in_chans, axis=0)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint8:
        return torch.from_numpy(np.array(array, order="C"))  # a copy: an array file is only mapped
    if array.dtype.kind not in "uif":
        raise DecodeError(f"samples of type {array.dtype} are not pixel values")
    if value_range is None:
        if array.dtype.kind != "u" or array.dtype.itemsize != 2:
            raise MismatchError(f"samples of type {array.dtype} need a declared value_range (lo, hi)")
        value_range = (0.0, 65535.0)
    lo, hi = float(value_range[0]), float(value_range[1])
    low, high = float(array.min()), float(array.max())
    if not (low >= lo and high <= hi):  # the negation also catches NaN
        raise MismatchError(
            f"values from {low:g} to {high:g} lie outside value_range=({lo:g}, {hi:g}): declare the range of the data"
        )
    return torch.from_numpy(np.ascontiguousarray(((array.astype(np.float64) - lo) / (hi - lo)).astype(np.float32)))
