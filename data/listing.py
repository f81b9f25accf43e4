"""The images of a folder or of a text file of paths."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from data.part import Classes, Part, Strings

EXTENSIONS: frozenset[str] = frozenset(
    """.apng .avif .avifs .bmp .dib .dds .gif .icns .ico .im .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .pbm .pcx .pfm
    .pgm .png .pnm .ppm .psd .qoi .ras .rgb .rgba .bw .sgi .tga .tif .tiff .webp .xbm .xpm .npy""".split()  # noqa: SIM905
)
"""File name endings taken from a folder (any case): the raster formats Pillow opens, and ``.npy``. A file list may name any file."""


def folder_part(root: Path, classes: bool) -> Part:
    """Every image below ``root``, sorted by path; with ``classes`` the first folder level is the class."""
    strings, labels = Strings(), Classes()
    for relative in _walk(str(root), "", ()):
        if classes:
            name, separator, _ = relative.partition("/")
            if not separator:
                raise ValueError(
                    f"image {relative!r} lies directly in {str(root)!r}: with classes every image must be in a class folder below it"
                )
            labels.add(name)
        strings.add(os.fsencode(relative))
    home = os.path.abspath(root)
    return Part([home], [home], *strings.arrays(), class_ids=labels.ids(), classes=labels.names)


def _walk(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Relative paths of the images below ``folder``, sorted; a link back to a folder ``above`` is not followed."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                found.append(entry.name + "/")
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                found.append(entry.name)
    found.sort()  # with its slash a folder stands where its files stand among all paths sorted as text
    for name in found:
        if name.endswith("/"):
            yield from _walk(os.path.join(folder, name[:-1]), prefix + name, (*above, here))
        else:
            yield prefix + name


def list_part(file: Path, classes: bool) -> Part:
    """The image of every line of a list, in its order; with ``classes`` the class stands after a tab."""
    strings, labels = Strings(), Classes()
    root = os.path.abspath(file.parent)
    shared = ""
    with open(file, encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):  # lists may have millions
            path, _, name = line.rstrip("\r\n").partition("\t")
            if not path or path[0] == "#" or path.isspace():
                continue
            if "\0" in path:
                raise ValueError(f"{str(file)!r} is not a text file of image paths: line {number} holds a zero byte")
            if classes:
                if not (name := name.strip()):
                    raise ValueError(
                        f"line {number} of {str(file)!r} has no class: with classes each line is PATH<tab>CLASS"
                    )
                labels.add(name)
            if path[0] == "~":
                path = os.path.expanduser(path)
            strings.add(path.encode("utf-8", "surrogateescape"))
            whole = path if path[0] == "/" else f"{root}/{path}"
            if not shared or not whole.startswith(shared):
                folder = os.path.dirname(os.path.normpath(whole))
                shared = (os.path.commonpath([shared, folder]) if shared else folder).rstrip("/") + "/"
    home = os.path.normpath(shared or root)
    return Part([root], [home], *strings.arrays(), class_ids=labels.ids(), classes=labels.names)
