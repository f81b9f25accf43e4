"""Images per second and core of our loading paths against plain torchvision + Pillow, side by side in one process.

``python -m benchmarks.loader --path FOLDER`` prints one JSON object. All paths read the same images in the same order and cut the
same boxes; they take turns image by image, so that a busy machine slows all alike:

- folder: ``data.reading``, ``data.decode`` and ``data.transforms.CropResize``'s steps on the files, uint8 out;
- shards: the same on tar shards that ``data.pack`` makes of them in a temporary folder;
- plain: Pillow open and ``convert("RGB")`` (torchvision's ``ImageFolder`` loader), ``resized_crop`` to 224 with bicubic
  interpolation (``RandomResizedCrop`` with its box given), ``ToTensor``.

``mean_abs_difference`` is of the pixels, in units of 1/255. With ``--workers N`` the whole ``Loader`` is timed as well, on the
folder, the shards and the shards through pipes; with ``--shrink N`` also on shards of smaller pictures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from data.decode import decode
from data.loader import Loader
from data.order import sample_seed
from data.pack import PackSettings, pack
from data.reading import Reader
from data.sources import ImageIndex
from data.transforms import Box, CropResize, random_box, resize

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def ours(content: np.ndarray, box: Box, size: tuple[int, int]) -> Tensor:
    """Bytes of a file -> (3, H, W) uint8, by the code the loader runs."""
    top, left, height, width = box
    return resize(decode(content, 3)[:, top : top + height, left : left + width], size, "bicubic")


def plain(path: str, box: Box, size: tuple[int, int]) -> Tensor:
    """File -> (3, H, W) float32 in [0, 1], as torchvision's reference training code does."""
    with open(path, "rb") as file, Image.open(file) as opened:
        image = opened.convert("RGB")
    top, left, height, width = box
    return tv.to_tensor(tv.resized_crop(image, top, left, height, width, list(size), InterpolationMode.BICUBIC))


def compare(index: ImageIndex, shards: ImageIndex, size: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Time the paths over all images, ``rounds`` times; the box of an image differs by round."""
    files, packed = Reader(index, 0), Reader(shards, 0)
    ways: dict[str, Callable[[int, Box], Tensor]] = {
        "folder": lambda i, box: ours(files.read(i), box, size),
        "shards": lambda i, box: ours(packed.read(i), box, size),
        "plain": lambda i, box: plain(index.path(i), box, size),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    differences: list[float] = []
    for turn in range(-1, rounds):  # the first is a warm-up (file cache, lazy initialisation), and checks the pixels
        spent = dict.fromkeys(ways, 0.0)
        for i in range(len(index)):
            with Image.open(index.path(i)) as opened:
                width, height = opened.size
            generator = torch.Generator().manual_seed(sample_seed(0, turn + 1, i))
            box = random_box(height, width, SCALE, RATIO, generator)
            out: dict[str, Tensor] = {}
            names = [*ways] * 2
            for name in names[(turn + i) % 3 :][:3]:
                begin = time.perf_counter()
                out[name] = ways[name](i, box)
                spent[name] += time.perf_counter() - begin
            if turn < 0:
                differences.append(float((out["folder"].float() - out["plain"] * 255).abs().mean()))
                if not torch.equal(out["folder"], out["shards"]):
                    raise RuntimeError(f"{shards.path(i)} is not {index.path(i)}")
        if turn >= 0:
            for name, seconds in spent.items():
                rates[name].append(len(index) / seconds)

    def ratio(one: str, other: str) -> float:
        return round(statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True)), 3)

    return {
        "images": len(index),
        "image_size": list(size),
        "rounds": rounds,
        **{f"{name}_images_per_second": round(statistics.median(found), 1) for name, found in rates.items()},
        "folder_over_plain": ratio("folder", "plain"),
        "shards_over_plain": ratio("shards", "plain"),
        "shards_over_folder": ratio("shards", "folder"),
        "mean_abs_difference": round(statistics.fmean(differences), 4),
        "worst_image_difference": round(max(differences), 4),
        "threads": torch.get_num_threads(),
    }


def loader_rates(paths: dict[str, str], size: tuple[int, int], workers: int, rounds: int) -> dict[str, float]:
    """Images per second out of the whole ``Loader`` (reading, decoding, cropping, collating, transport), in turns of an epoch."""
    loaders, rates = {}, {name: [0.0] * rounds for name in paths}
    for name, path in paths.items():
        index = ImageIndex.scan(path, classes=False)
        batch_size = min(32, len(index))
        loader = Loader(
            index, CropResize(size, SCALE, RATIO, 0.5), batch_size=batch_size, in_chans=3, seed=0, rank=0, world_size=1,
            workers=workers, shuffle=True, drop_last=True,
        )  # fmt: skip
        next(loader.batches(0))  # start the workers
        loaders[name] = loader
    for turn in range(rounds):
        for name, loader in loaders.items():
            begin = time.perf_counter()
            count = sum(len(batch["image"]) for batch in loader.batches(turn + 1))
            rates[name][turn] = count / (time.perf_counter() - begin)
    for loader in loaders.values():
        loader.close()
    return {f"loader_{name}_images_per_second": round(statistics.median(found), 1) for name, found in rates.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--path", required=True, help="folder or list of RGB images")
    parser.add_argument("--size", type=int, nargs=2, default=(224, 224), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0, help="also time the whole Loader with this many workers")
    parser.add_argument(
        "--shrink", type=int, default=0, help="with --workers also on shards shrunk to this shorter side"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    size = (options.size[0], options.size[1])
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        number = len(pack(options.path, shards, PackSettings(shard_size=50, shuffle=False, classes="false"))["shards"])
        index, packed = (ImageIndex.scan(path, classes=False) for path in (options.path, shards))
        result = compare(index, packed, size, options.rounds)
        if options.workers:
            pipes = f"{shards}/index.npz,pipe:cat {shards}/shards-{{000000..{number - 1:06d}}}.tar"
            paths = {"folder": options.path, "shards": str(shards), "pipes": pipes}
            if options.shrink:
                small = Path(folder) / "small"
                pack(options.path, small, PackSettings(shard_size=50, shrink=options.shrink, classes="false"))
                paths["shrunk"] = str(small)
            result["loader_workers"] = options.workers
            result |= loader_rates(paths, size, options.workers, options.rounds)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
