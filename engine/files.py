"""Files that are either whole or absent, whatever happens while they are written."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a neighbour of ``path``, then put it in its place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(draft)
        mask = os.umask(0)
        os.umask(mask)
        draft.chmod(0o666 & ~mask)  # safetensors makes files that only their owner reads
        sync(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk: a power cut must not leave an empty one."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(path: str | Path) -> str:
    """sha256 of a file's contents, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically."""
    write_atomically(path, lambda draft: draft.write_text(text))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def append_result(path: Path, result: dict[str, Any], seconds: float) -> None:
    """Add one object, and how long it took, to the list in a results.json.

    A finished run that is started again measures the same in no time: its first result stays the only one.
    """
    results = json.loads(path.read_text()) if path.is_file() else []
    if not any(result.items() <= found.items() for found in results):
        write_json(path, [*results, result | {"seconds": round(seconds, 1)}])
