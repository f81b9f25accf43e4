"""Which shards a path means: ``{000..099}``, wildcards, a folder of tar files, ``pipe:`` commands, http(s) addresses."""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

from data.shard_index import INDEX_NAME, ShardIndex

INFO_NAME = "shards.json"
"""What ``data.pack`` says about the shards beside it, for people and for its own next start."""

_STREAM = re.compile(r"pipe:|https?://")
_BRACES = re.compile(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}")
_MOST = 1_000_000


def is_stream(text: str) -> bool:
    """Whether a part of a path is read as a stream: a ``pipe:`` command or an ``http(s)://`` address."""
    return _STREAM.match(text) is not None


def is_pattern(text: str) -> bool:
    """Whether a part of a path stands for several files: braces, or wildcards."""
    return _BRACES.search(text) is not None or glob.has_magic(text)


def split_path(text: str) -> list[str]:
    """The parts of a path: between commas, but for those in braces."""
    return [part.strip() for part in re.split(r",(?![^{}]*\})", text) if part.strip()]


def expand(text: str) -> list[str]:
    """Write out ``{000..099}`` (as many digits as the first number has) and ``{a,b}``, in order."""
    pieces: list[list[str]] = []
    at = 0
    for found in _BRACES.finditer(text):
        pieces.append([text[at : found.start()]])
        first, dots, last = found[1].partition("..")
        if dots and first.isdigit():
            if not 0 <= int(last) - int(first) < _MOST:
                raise ValueError(f"{found[0]} in {text!r} must rise, to at most {_MOST} shards")
            pieces.append([str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)])
        else:
            pieces.append(found[1].split(","))
        at = found.end()
    return ["".join(words) for words in itertools.product(*pieces, [text[at:]])]


def matching(text: str) -> list[Path]:
    """The tar files that a pattern stands for: braces in their order, wildcards sorted.

    Raises:
        FileNotFoundError: one of them does not exist, or nothing matches.
        ValueError: a match is no .tar file.
    """
    found: list[Path] = []
    for name in expand(text):
        name = os.path.expanduser(name)
        some = sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.exists(name) else [name]
        if not some or not os.path.exists(some[0]):
            raise FileNotFoundError(f"{name!r}, of image path {text!r}, does not exist")
        found += map(Path, some)
    if other := [path for path in found if path.suffix != ".tar" or not path.is_file()]:
        raise ValueError(
            f"{str(other[0])!r}, of image path {text!r}, is no .tar file: braces and wildcards name shards"
        )
    return found


def in_folder(folder: Path) -> list[Path]:
    """The shards directly in a folder, sorted by name.

    Raises:
        ValueError: they were not packed to the end, or some that their index knows are missing.
    """
    if packed(folder).get("complete") is False:
        raise ValueError(
            f"the shards in {str(folder)!r} are not all packed: give the command of data.pack again, it goes on"
        )
    found = sorted(path for path in folder.glob("*.tar") if path.is_file())
    if (folder / INDEX_NAME).exists():
        known = ShardIndex.names_in(folder / INDEX_NAME)
        if missing := sorted(set(known) - {path.name for path in found}):
            raise ValueError(
                f"{len(missing)} of the {len(known)} shards that {str(folder / INDEX_NAME)!r} knows are not there, such as "
                f"{missing[0]}: put them back, or remove the index to do without them"
            )
    return found


def packed(folder: Path) -> dict[str, Any]:
    """What ``data.pack`` says about a folder, {} where it says nothing."""
    try:
        found = json.loads((folder / INFO_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
