"""``python -m benchmarks.blocks [images=2] [encoder=resnet50]``: what ``train.checkpoint_blocks`` saves and costs, as one JSON object.

Encoders at 224 px, forwards and backwards: megabytes that are kept per image for the backward pass, and seconds per step,
with and without, in turns in one process. ``tiles``: on the visible 40 % of masked images.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.command import command
from engine.config import ConfigError
from models.blocks import arrange
from models.encoder import build_encoder, stage_features
from models.masking import random_mask
from models.sparse import dense, sparse_images

T = TypeVar("T")

SIZE = (224, 224)
ENCODERS = (
    ("vit_small_patch16_224", ""),
    ("beit_base_patch16_224", ""),
    ("resnet50", ""),
    ("resnet50", "tiles"),
    ("convnext_tiny", ""),
    ("convnext_tiny", "tiles"),
    ("convnextv2_atto", "tiles"),
    ("convvit_small", "tiles"),
)
ROUNDS = 5


class Holder(nn.Module):
    """An encoder as a method has it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder


def kept_bytes(work: Callable[[], T], network: nn.Module) -> tuple[T, int]:
    """Result of ``work``, and bytes that autograd keeps of it; weights and buffers of ``network``, there anyway, do not count."""
    own = {value.untyped_storage().data_ptr() for value in (*network.parameters(), *network.buffers())}
    found: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        where = value.untyped_storage().data_ptr()
        if where not in own:
            found[where] = value  # alive until the end: no other tensor comes to lie at the same place
        return value

    with saved_tensors_hooks(keep, lambda value: value):
        result = work()
    return result, sum(value.untyped_storage().nbytes() for value in found.values())


def forward(network: Any, images: Tensor, backend: str) -> Tensor:
    """A scalar of the encoder's last map."""
    x = images
    if backend:
        mask = random_mask(len(images), (7, 7), 29, torch.Generator().manual_seed(1))
        x = sparse_images(images, mask, backend)
    return dense(stage_features(network.encoder, x, 1)[0]).square().mean()


def bench(name: str, backend: str, images: int, rounds: int, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    """One encoder, as it is and with its blocks computed again."""
    torch.manual_seed(0)
    encoder = build_encoder(name, in_chans=3, image_size=size, drop_path_rate=0.1)
    networks = {"plain": Holder(encoder).train()}
    networks["again"] = copy.deepcopy(networks["plain"])
    blocks = arrange(networks["again"], recompute=True, compiled=False)
    x = torch.randn(images, 3, *size)
    kept, seconds = {}, {key: [0.0] * 0 for key in networks}
    for number in range(rounds + 1):
        for key, network in networks.items():
            if not number:
                loss, total = kept_bytes(lambda network=network: forward(network, x, backend), network)  # type: ignore[misc]
                kept[key] = total / images / 2**20
                loss.backward()
                continue
            started = time.perf_counter()
            forward(network, x, backend).backward()
            seconds[key].append(time.perf_counter() - started)
    return {
        "encoder": name,
        "backend": backend or "dense",
        "blocks": blocks,
        "kept_mb_per_image": {key: round(value, 1) for key, value in kept.items()},
        "seconds_per_step": {key: round(statistics.median(values), 3) for key, values in seconds.items()},
        "time_ratio": round(min(seconds["again"]) / min(seconds["plain"]), 2),
        "share_kept": round(kept["again"] / kept["plain"], 3),
    }


def main(words: list[str]) -> int:
    """Print the results -> exit code."""

    def measure(words: list[str], _: Path) -> list[dict[str, Any]]:
        given = {"images": "2", "encoder": ""} | dict(word.partition("=")[::2] for word in words)
        number, chosen = given.pop("images"), [one for one in ENCODERS if given["encoder"] in ("", one[0])]
        if given.keys() != {"encoder"} or not number.isdigit() or not int(number) or not chosen:
            names = ", ".join(dict(ENCODERS))
            raise ConfigError(f"{' '.join(words)!r} is not images=N, from 1 on, and encoder=NAME, one of {names}")
        torch.set_num_threads(1)
        return [bench(name, backend, int(number), ROUNDS) for name, backend in chosen]

    return command("blocks", words, measure, takes="[images=2] [encoder=NAME]")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
