"""Files that are either whole or absent, whatever happens while they are written."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

DRAFTS = ".*.tmp"
"""What stands beside a file while it is written, and stays there after a kill."""


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a neighbour of ``path``, then put it in its place in one step, on the disk before it has its name."""
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


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically."""
    write_atomically(path, lambda draft: draft.write_text(text))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")
