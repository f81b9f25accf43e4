"""Pickles that no honest program writes, and the containers that torch has put them in."""

import io
import pickle
import zipfile
from collections.abc import Callable
from typing import Any


class Call:
    """Pickles as a call of ``function(*args)``: what a hostile file looks like."""

    def __init__(self, function: Callable[..., Any], *args: Any):
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def zip_of(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def legacy_of(data: bytes) -> bytes:
    from models.safe_pickle import LEGACY_MAGIC, LEGACY_PROTOCOL

    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = b"".join(pickle.dumps(part, protocol=2) for part in (LEGACY_MAGIC, LEGACY_PROTOCOL, system))
    return head + data + pickle.dumps([], protocol=2)
