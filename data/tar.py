"""What stands where in a tar file: names, offsets and sizes of its regular files, from the headers alone.

Nothing is ever extracted: a name is text, never a path on this machine, and links, devices and folders are passed over.
Reads what GNU tar, bsdtar, Python and the webdataset tools write (v7, ustar, GNU, PAX).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

BLOCK = 512
"""Bytes of a header; every member's data begins at a multiple of it."""

MAX_NAME = 1 << 16
"""Longest name or PAX record that is read, in bytes; real ones have some hundred."""

_REGULAR = (b"0", b"\0", b"7")
_LINKS = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, folders and pipes: their headers have no data behind them."""


class TarError(ValueError):
    """Bytes that are no tar file, or a damaged one."""


class Member(NamedTuple):
    """A regular file in a tar file.

    Attributes:
        name: as written, in the archive's own encoding.
        start: offset of its data in the tar file, in bytes.
        size: its length in bytes.
    """

    name: bytes
    start: int
    size: int


class Readable(Protocol):
    """A file, or a stream that can only be read on: ``seek`` goes forward only."""

    def read(self, count: int, /) -> bytes: ...
    def seek(self, position: int, /) -> object: ...


def members(file: Readable) -> Iterator[Member]:
    """Regular files of a tar file from its beginning on.

    Between two of them the caller may ``seek`` to the member's data and read it.

    Raises:
        TarError: no tar file, damaged, or cut off in a header.
    """
    position, long_name, pax = 0, b"", {}
    while True:
        file.seek(position)
        block = file.read(BLOCK)
        if not block.strip(b"\0"):  # the end mark, or the end of a file that lacks one
            return
        kind, size = check_header(block, position)
        start = position + BLOCK
        if kind in (b"L", b"x"):
            if size > MAX_NAME:
                raise TarError(f"the name at byte {position} has {size} bytes, more than the {MAX_NAME} that are read")
            content = file.read(size)
            if len(content) < size:
                raise TarError(f"the file is cut off at byte {start + len(content)}")
            if kind == b"L":
                long_name = content.split(b"\0", 1)[0]
            else:
                pax = _pax(content, start)
            position = start + rounded(size)
            continue
        size = int(pax.get(b"size", size))
        if b"GNU.sparse.major" in pax or b"GNU.sparse.size" in pax or kind == b"S":
            raise TarError(f"the member at byte {position} is a sparse file: make the tar file without --sparse")
        position = start if kind in _LINKS else start + rounded(size)
        name = pax.get(b"path") or long_name or _name(block)
        long_name, pax = b"", {}
        if kind in _REGULAR and not name.endswith(b"/"):
            yield Member(name, start, size)


def check_header(block: bytes, position: int) -> tuple[bytes, int]:
    """(type, size of the data) of a header block that was read at ``position``.

    Raises:
        TarError: it is none.
    """
    if len(block) < BLOCK:
        raise TarError(f"the file is cut off at byte {position + len(block)}")
    if block[:2] == b"\x1f\x8b":
        raise TarError("the file is compressed: unpack it with gzip -d, or read it with pipe:zcat FILE")
    # The low half of Adler-32 is 1 + the sum of the bytes, modulo 65521; the checksum's own field counts as blanks.
    if zlib.adler32(block[:148] + b" " * 8 + block[156:]) & 0xFFFF != (1 + _number(block[148:156], position)) % 65521:
        raise TarError(f"no tar header at byte {position}")
    return block[156:157], _number(block[124:136], position)


def rounded(size: int) -> int:
    """Bytes that ``size`` bytes of data take in a tar file."""
    return -(-size // BLOCK) * BLOCK


def safe_name(name: bytes) -> bytes | None:
    """A member's name without a leading ``./``; None where it is absolute or climbs out of its folder with ``..``."""
    while name.startswith(b"./"):
        name = name[2:].lstrip(b"/")
    if not name or name.startswith(b"/") or b"\0" in name or b".." in name.split(b"/"):
        return None
    return name


def _number(field: bytes, position: int) -> int:
    """A number field: octal digits, or (GNU, beyond 8 GB) 0x80 and base 256."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip() or b"0"
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise TarError(f"no tar header at byte {position}")
    return int(digits, 8)


def _name(block: bytes) -> bytes:
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax(content: bytes, start: int) -> dict[bytes, bytes]:
    """The records ``LENGTH KEY=VALUE\\n`` of a PAX header."""
    found, at = {}, 0
    try:
        while at < len(content):
            digits, _, _ = content[at : at + 20].partition(b" ")
            length = int(digits)
            key, equals, value = content[at + len(digits) + 1 : at + length - 1].partition(b"=")
            if length < len(digits) + 3 or not equals or at + length > len(content):
                raise ValueError
            found[key] = value
            at += length
        if int(found.get(b"size", b"0")) < 0:
            raise ValueError
    except ValueError:
        raise TarError(f"a damaged PAX header at byte {start}") from None
    return found
