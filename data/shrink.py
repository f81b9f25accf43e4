"""Make pictures smaller once, for good, so that every epoch has less to read and decode."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from data.content import DecodeError
from data.decode import PILLOW_FORMATS, check_size

_DEEP_PNG = b"\x10"


def shrunk(content: np.ndarray, side: int, quality: int) -> bytes | None:
    """The JPEG of a picture whose shorter side is made ``side``; None for what is left as it is.

    That is what has no more pixels than that already, and what a JPEG cannot hold: more than 8 bits, floats, other channels than
    grey or colour. Upright by the EXIF orientation, Lanczos resampling, alpha dropped, grey stays grey.

    Args:
        content: (size,) uint8, a file that decodes.
        quality: of the JPEG, 1 to 100.

    Raises:
        DecodeError: it does not decode after all.
    """
    data = content.tobytes()
    if data.startswith(b"\x89PNG") and data[24:25] == _DEEP_PNG:  # Pillow would cut colour to 8 bits
        return None
    try:
        with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
            check_size(image.height, image.width)
            tags = getattr(image, "tag_v2", {})
            if image.mode.startswith(("I", "F")) or max(tags.get(258, (8,))) > 8 or tags.get(277, 1) > 4:
                return None
            short, long = sorted(image.size)
            if short <= side:
                return None
            factor = side / short
            if image.mode in ("L", "RGB"):  # decode a JPEG at a half or less, while that has twice the pixels to come
                image.draft(image.mode, (max(1, int(2 * factor * image.width)), max(1, int(2 * factor * image.height))))
            picture = ImageOps.exif_transpose(image)
            if picture.mode in ("P", "PA"):
                picture = picture.convert("RGBA" if picture.mode == "PA" or "transparency" in picture.info else "RGB")
            picture = picture.convert("L" if picture.mode in ("1", "L", "LA", "La") else "RGB")
            ends = side, max(side, round(long * factor))
            size = ends if picture.width <= picture.height else ends[::-1]
            out = io.BytesIO()
            picture.resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=quality)
            return out.getvalue()
    except DecodeError:
        raise
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:  # arrays
        return None
    except Exception as error:  # the decoders raise nearly every type there is
        raise DecodeError(f"{type(error).__name__}: {error}") from error
