"""Which tar files a path means: those of a pattern, or of a folder."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any

from data.shard_index import INDEX_NAME, ShardIndex
from formats.paths import expand

INFO_NAME = "shards.json"
"""What ``data.pack`` says about the shards beside it, for people and for its own next start."""


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
