"""Image folders, tar shards and a web server for the tests of the data."""

import io
import tarfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.loader import Loader
from data.sources import ImageIndex
from data.transforms import CropResize, EvalTransform

CROP = CropResize((8, 12), (0.3, 1.0), (0.75, 4 / 3), 0.5)
EVAL = EvalTransform((8, 12), 1.0)


def folder(path: Path, count: int, classes: str = "abc") -> Path:
    """``count`` images in classes; every image is another."""
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (16 + i % 3, 20, 3)).astype(np.uint8)
        file = path / classes[i % len(classes)] / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return path


def png(seed: int) -> bytes:
    """A small picture as a file."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 11, 3)).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """A tar file as Python writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def train(index: ImageIndex, **changes: Any) -> Loader:
    """A training loader of batches of 4 in this process, but for ``changes``."""
    settings: dict[str, Any] = dict(
        batch_size=4, in_chans=3, seed=7, rank=0, world_size=1, workers=0, shuffle=True, drop_last=True
    )
    return Loader(index, changes.pop("transform", CROP), **(settings | changes))


def evaluate(index: ImageIndex, **changes: Any) -> Loader:
    """The same for evaluation."""
    return train(index, **(dict(shuffle=False, drop_last=False, transform=EVAL) | changes))


def indices(batches: Iterator[dict[str, Tensor]]) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]


def same(left: list[dict[str, Tensor]], right: list[dict[str, Tensor]]) -> bool:
    """Whether two runs of batches are equal, bit for bit."""
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(left, right, strict=True)
    )


class Server(ThreadingHTTPServer):
    """Serves a folder; may answer with errors, cut answers off, or know nothing of ranges."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.asked: list[tuple[str, int]] = []
        """(file name, first byte) of each request."""
        self.ranges = True
        self.errors: list[int] = []
        """HTTP codes of the next answers to questions for shards."""
        self.cut_after: list[int] = []
        """After how many bytes the next answers to questions for shards break off."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        first = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        self.server.asked.append((name, first))
        shard = name.endswith(".tar")
        path = self.server.root / name
        if shard and self.server.errors:
            self.send_error(self.server.errors.pop(0))
            return
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        if first and self.server.ranges:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            content = content[first:]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if shard and self.server.cut_after:
            content = content[: self.server.cut_after.pop(0)]
        with suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(content)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve(root: Path) -> Iterator[Server]:
    """A server for the files directly in ``root``."""
    with Server(root) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
