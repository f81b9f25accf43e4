"""How much memory real steps of the engine take, as the operating system counts it.

``python -m tests.pretrain.resident OUT RECIPE [key=value ...]`` as one or several ranks; rank 0 writes ``OUT``: the most
bytes that were resident during the steps after the first, beyond what the libraries have. Every tensor of 16 KB or
more must be mapped alone and unmapped when it is freed: start it with :data:`ENVIRONMENT`. It shares nothing with the
prediction that it is compared with but the recipe.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.transforms import CropResize
from engine import ds
from engine.cli import read_config
from engine.config import check_run
from engine.optim import build_optimizer, param_groups, set_step
from engine.whole import Gathered, Whole
from engine.world import World, join, seed_step, to_device
from pretrain.__main__ import PROGRAM, check
from pretrain.methods import METHODS

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
"""For glibc: small thresholds, so that what is freed is given back at once."""


class Toy(nn.Module):
    """Whatever the libraries allocate once, they allocate for this."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 4))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": self.encoder(batch["image"]).square().mean()}


def fill_holes() -> None:
    """Take every free block of the heap that a tensor could be put into."""
    libc = ctypes.CDLL(None)
    libc.sbrk.restype = libc.malloc.restype = ctypes.c_void_p
    top = libc.sbrk(0)
    while libc.sbrk(0) == top:
        libc.malloc(12_000)
    libc.malloc_trim(0)


def status(key: str) -> int:
    """Bytes that this process has resident (VmRSS), or had at most (VmHWM) since :func:`reset`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {key} in /proc/self/status")


def reset() -> None:
    """Forget the most so far."""
    Path("/proc/self/clear_refs").write_text("5")


def random_batch(config: Any, images: int) -> dict[str, Tensor]:
    """Images of noise, as a method's transform returns them."""
    transform: CropResize = METHODS[config.method].transform(config)
    draw = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (config.data.in_chans, 8, 8), dtype=torch.uint8, generator=draw)
    samples = [transform(noise, draw) for _ in range(images)]
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def step(engine: Any, optimizer: Any, config: Any, world: World, number: int) -> None:
    """As the loop takes it."""
    set_step(optimizer, 1e-4, 0.05)
    for part in range(config.train.accumulation):
        batch = to_device(random_batch(config, ds.micro_batch_size(config, world.size)), world.device)
        seed_step(config.seed, number * config.train.accumulation + part, 0)
        loss = engine(batch)["loss"]
        engine.backward(loss)
        engine.step()


def warm_up(config: Any, merged: dict[str, Any], world: World) -> None:
    """Steps of a toy through the same engine."""
    toy = Toy()
    optimizer = build_optimizer(param_groups(toy, config.optim), config.optim)
    engine = ds.initialize(toy, optimizer, merged, world)
    for _ in range(2 * config.train.accumulation):
        engine.backward(engine({"image": torch.randn(2, 3, 8, 8)})["loss"])
        engine.step()
    engine.destroy()


def measure(config: Any, world: World) -> dict[str, Any]:
    """The most bytes of one process: in all, and between the boundaries of a step's parts."""
    merged = ds.merge(config, world.size, "cpu")
    config.optim.layer_decay, decay = 1.0, config.optim.layer_decay
    warm_up(config, merged, world)
    config.optim.layer_decay = decay
    seed_step(config.seed, -1, 0)
    method = METHODS[config.method](config)
    method(random_batch(config, 1))["loss"].backward()
    method.zero_grad(set_to_none=True)
    gc.collect()
    fill_holes()
    tokenizer = getattr(method, "tokenizer", None)
    networks = [method, *([] if tokenizer is None else [tokenizer._dvae])]
    own = sum(value.nbytes for network in networks for value in (*network.parameters(), *network.buffers()))
    before = status("VmRSS") - own
    optimizer = build_optimizer(param_groups(method, config.optim), config.optim)
    whole = (Gathered if ds.stage_of(merged) == 3 else Whole)(method, config.train.ema_decay, world)
    engine = ds.initialize(method, optimizer, merged, world)
    whole.begin()
    step(engine, optimizer, config, world, 0)
    peak = 0
    for number in range(1, 4):
        gc.collect()
        reset()
        step(engine, optimizer, config, world, number)
        whole.update()
        peak = max(peak, status("VmHWM"))
    return {"bytes": peak - before, "parameters": own}


def main(out: str, words: list[str]) -> None:
    """Measure on every rank and write what the one with the most had."""
    config = read_config(PROGRAM, words[0], words[1:])
    check_run(config)
    check(config)
    with join(config.threads) as world:
        found = world.gather(measure(config, world))
        if world.is_main:
            Path(out).write_text(json.dumps(max(found, key=lambda one: one["bytes"])))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
