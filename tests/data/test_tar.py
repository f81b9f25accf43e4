"""The tar reader against Python's own, and against tar files made to do harm."""

import io
import tarfile
from pathlib import Path

import pytest

from data.tar import BLOCK, TarError, check_header, members, rounded, safe_name

NAMES = ["a.jpg", "deep/er/" + "x" * 90 + ".png", "y" * 180 + "/" + "z" * 120 + ".jpg", "café/猫.png", "b.cls"]


def _tar(entries: dict[str, bytes], form: int = tarfile.GNU_FORMAT, kind: bytes = tarfile.REGTYPE) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size, info.type = len(content), kind
            info.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


class Forward(io.BytesIO):
    """A stream: going back is an error."""

    def seek(self, position: int, whence: int = 0, /) -> int:
        assert position >= self.tell(), "a stream cannot go back"
        return super().seek(position, whence)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_agrees_with_python(form: int) -> None:
    names = NAMES[:2] if form == tarfile.USTAR_FORMAT else NAMES
    entries = {name: bytes([i]) * (i * 300) for i, name in enumerate(names)}
    content = _tar(entries, form)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar]
    found = list(members(Forward(content)))
    assert [(member.name.decode(), member.start, member.size) for member in found] == expected
    assert {member.name.decode(): content[member.start :][: member.size] for member in found} == entries
    assert all(check_header(content[m.start - BLOCK : m.start], m.start - BLOCK)[1] == m.size for m in found)


def test_data_may_be_read_between_two_members() -> None:
    stream = Forward(_tar({"a": b"1" * 700, "b": b"2", "c": b"3" * 512}))
    read = {}
    for member in members(stream):
        stream.seek(member.start)
        read[member.name] = stream.read(member.size)
    assert read == {b"a": b"1" * 700, b"b": b"2", b"c": b"3" * 512}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_devices_and_folders_are_passed_over(kind: bytes) -> None:
    harmful = _tar({"harm.jpg": b""}, kind=kind)[:BLOCK]
    assert [member.name for member in members(io.BytesIO(harmful + _tar({"good.jpg": b"x"})))] == [b"good.jpg"]


def test_sparse_files_are_refused(tmp_path: Path) -> None:
    block = bytearray(_tar({"a.jpg": b"x"})[:BLOCK])
    block[156:157] = b"S"
    block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 8 * 32)
    with pytest.raises(TarError, match="sparse"):
        list(members(io.BytesIO(bytes(block))))


def test_numbers_beyond_8_gigabytes() -> None:
    info = tarfile.TarInfo("big.npy")
    info.size = 2**34 + 5
    header = info.tobuf(tarfile.GNU_FORMAT)
    assert check_header(header, 0) == (b"0", 2**34 + 5)


@pytest.mark.parametrize("cut", [100, 511, BLOCK * 3 + 17])
def test_cut_off_and_damaged(cut: int) -> None:
    content = _tar({"a.jpg": b"x" * 1000, "b.jpg": b"y"})
    with pytest.raises(TarError, match=f"cut off at byte {cut}"):
        list(members(io.BytesIO(content[:cut])))
    for at in (3, 130, 150, BLOCK * 3 + 3):
        damaged = bytearray(content)
        damaged[at] ^= 0x55
        with pytest.raises(TarError, match="no tar header at byte"):
            list(members(io.BytesIO(bytes(damaged))))


def test_files_that_are_no_tar_files() -> None:
    with pytest.raises(TarError, match=r"compressed.*pipe:zcat"):
        list(members(io.BytesIO(b"\x1f\x8b" + b"x" * 600)))
    with pytest.raises(TarError, match="no tar header at byte 0"):
        list(members(io.BytesIO(b"\x89PNG" + b"x" * 600)))
    assert list(members(io.BytesIO(b""))) == [] == list(members(io.BytesIO(bytes(1024))))


def test_a_name_without_end_is_not_read() -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = b"L", 2**33
    with pytest.raises(TarError, match="more than the 65536 that are read"):
        list(members(io.BytesIO(info.tobuf(tarfile.GNU_FORMAT))))


@pytest.mark.parametrize("record", [b"x path=a\n", b"999 path=a\n", b"3 \n", b"12 size=-99\n", b"9999999999999 a=b\n"])
def test_damaged_pax_records(record: bytes) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = b"x", len(record)
    with pytest.raises(TarError, match="damaged PAX header"):
        list(members(io.BytesIO(info.tobuf() + record.ljust(BLOCK, b"\0") + _tar({"a": b""}))))


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        (b"a/b.jpg", b"a/b.jpg"),
        (b"./a/b.jpg", b"a/b.jpg"),
        (b"././/a.jpg", b"a.jpg"),
        (b"a..b/c...jpg", b"a..b/c...jpg"),
        (b"/etc/passwd.jpg", None),
        (b"../x.jpg", None),
        (b"a/../../x.jpg", None),
        (b"./../x.jpg", None),
        (b".//etc/x.jpg", b"etc/x.jpg"),
        (b"..", None),
        (b"", None),
        (b"a\0b.jpg", None),
    ],
)
def test_names_that_climb_out(name: bytes, safe: bytes | None) -> None:
    assert safe_name(name) == safe


def test_rounding() -> None:
    assert [rounded(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]
