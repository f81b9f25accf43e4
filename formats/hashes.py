"""``hashes.json`` in the folder of a checkpoint: the sha256 of each file in it, written after all of them."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

HASHES = "hashes.json"


def file_digest(path: str | Path) -> str:
    """sha256 of a file's contents, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_hashes(folder: Path) -> dict[str, str]:
    """sha256 by file name.

    Raises:
        FileNotFoundError: the folder has no hashes.json.
        ValueError: it is damaged.
        OSError: it cannot be read now.
    """
    try:
        found = json.loads((folder / HASHES).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{HASHES} cannot be read ({error})") from None
    if not isinstance(found, dict) or not all(isinstance(digest, str) for digest in found.values()):
        raise ValueError(f"{HASHES} cannot be read (it holds no names of files)")
    return found


def wrong_file(folder: Path, hashes: Mapping[str, str]) -> str:
    """What is wrong with the first file of ``hashes`` that is not as it was written, empty if they all are.

    Raises:
        OSError: a file is there and cannot be read now.
    """
    for name, digest in hashes.items():
        try:
            if file_digest(folder / name) != digest:
                return f"{name} is not as it was written ({(folder / name).stat().st_size} bytes)"
        except FileNotFoundError:
            return f"{name} is missing"
    return ""


def refuse_damaged(folder: Path, pattern: str) -> None:
    """Check the files of a checkpoint that are to be read, those of its hashes.json and of the folder that fit ``pattern``.

    A folder of another code, which writes no hashes.json, is not looked at.

    Raises:
        ValueError: one of them is damaged, missing, or was put there afterwards; it names the checkpoint before this one.
        OSError: one of them cannot be read now.
    """
    try:
        hashes = read_hashes(folder)
    except FileNotFoundError:
        if _is_ours(folder):
            raise _damaged(folder, f"{HASHES} is missing") from None
        return
    except ValueError as error:
        raise _damaged(folder, str(error)) from None
    wanted = {name: digest for name, digest in sorted(hashes.items()) if Path(name).match(pattern)}
    if added := sorted({file.name for file in folder.glob(pattern)} - wanted.keys()):
        raise _damaged(folder, f"{added[0]} is not in its {HASHES}")
    if wrong := wrong_file(folder, wanted):
        raise _damaged(folder, wrong)


def _is_ours(folder: Path) -> bool:
    """Whether a run of this code, which writes hashes.json, made a checkpoint: its progress.json tells the layout."""
    try:
        return "layout" in json.loads((folder / "progress.json").read_text())
    except (OSError, ValueError):
        return False


def _damaged(folder: Path, wrong: str) -> ValueError:
    before = _before(folder)
    remedy = (
        f"use the one before it, {before}" if before else "there is none before it, so copy it again or train again"
    )
    return ValueError(f"checkpoint {folder} is damaged: {wrong}; {remedy}")


def _before(folder: Path) -> Path | None:
    """The last of the checkpoints beside ``folder``, called stepNNN like it, that are older."""
    of = re.compile(r"step(\d+)$")
    own = of.search(folder.name)
    beside: Iterable[Path] = folder.absolute().parent.glob("step*") if own else ()
    older = {int(found[1]): path for path in beside if (found := of.match(path.name)) and path.is_dir()}
    earlier = [step for step in older if own and step < int(own[1])]
    return folder.parent / older[max(earlier)].name if earlier else None
