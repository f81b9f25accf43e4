"""``python -m benchmarks.step RECIPE [key=value ...]``: what a pre-training step costs, part by part, as one JSON object.

The engine's step is measured beside a plain PyTorch loop of the same network at the same settings, interleaved in one
process. Without ``data.path`` the embedded digits are read, without ``cim.tokenizer`` an untrained one of DALL-E's size
is used: the cost does not depend on what they show. A recipe's batch is for many GPUs: give train.batch_size.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.command import command
from data.digits import write_digits
from engine import ds
from engine.cli import read_config
from engine.config import ConfigError, check_run
from engine.loop import peak_memory
from engine.optim import build_optimizer, param_groups, set_step
from engine.schedule import peak_lr
from engine.world import World, join, seed_step, to_device
from models.dvae import DVAE, save_tokenizer
from pretrain.__main__ import PROGRAM, build, check

ROUNDS = 7
"""Timed rounds, after one that is not; a round is one step of each side."""


class Stopwatch:
    """Seconds spent inside named methods of an object, waiting for the device on both ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def measure(self, name: str, work: Callable[[], Any]) -> Any:
        """Run ``work`` and add its time to ``name``."""
        self._wait()
        started = time.perf_counter()
        result = work()
        self._wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        return result

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Measure every call of ``owner.attribute``."""
        original = getattr(owner, attribute)
        setattr(owner, attribute, lambda *a, **k: self.measure(name, lambda: original(*a, **k)))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def plain_step(
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    config: Any,
    dtype: torch.dtype | None,
) -> None:
    """One step as one would write it without an engine."""
    device = batch["image"].device.type
    with torch.autocast(device, dtype, enabled=dtype is not None):
        loss = method(batch)["loss"]
    loss.backward()
    if config.optim.clip_grad:
        nn.utils.clip_grad_norm_(method.parameters(), config.optim.clip_grad)
    optimizer.step()
    optimizer.zero_grad()


def engine_step(engine: Any, batch: dict[str, Tensor]) -> None:
    """One step as the loop takes it."""
    loss = engine(batch)["loss"]
    engine.backward(loss)
    engine.step()


def bench(config: Any, world: World) -> dict[str, Any]:
    """Measure one configuration in one process."""
    if config.train.accumulation != 1:
        raise ConfigError(f"train.accumulation={config.train.accumulation}: the benchmark measures steps of one part")
    method, loader, _ = build(config, world)
    batch = to_device(next(loader.batches(0)), world.device)
    merged = ds.merge(config, world.size, world.device.type)
    dtype = ds.autocast_dtype(merged)
    plain = copy.deepcopy(method).to(world.device)
    optimizers = [build_optimizer(param_groups(m, config.optim), config.optim) for m in (method, plain)]
    for optimizer in optimizers:
        set_step(optimizer, peak_lr(config.optim, config.train.batch_size) / 100, config.optim.weight_decay)
    engine = ds.initialize(method, optimizers[0], merged, world)

    times: dict[str, list[float]] = {"engine": [], "plain": []}
    steps = {
        "engine": lambda: engine_step(engine, batch),
        "plain": lambda: plain_step(plain, optimizers[1], batch, config, dtype),
    }
    for i in range(ROUNDS + 1):
        # Taking turns at going first: neither side always runs on what the other left in the caches.
        for name in list(steps) if i % 2 else list(reversed(steps)):
            watch = Stopwatch(world.device)
            seed_step(config.seed, i, 0)
            watch.measure("step", steps[name])
            if i:
                times[name].append(watch.seconds["step"])
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = [a / b for a, b in zip(times["engine"], times["plain"], strict=True)]
    return {
        "recipe": config.recipe,
        "method": config.method,
        "encoder": getattr(getattr(config, "encoder", None), "name", ""),
        "deepspeed": config.deepspeed,
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in method.parameters()),
        "batch_size": config.train.batch_size,
        "image_size": config.data.image_size,
        "rounds": ROUNDS,
        "seconds_per_step": {name: round(value, 4) for name, value in medians.items()},
        "images_per_second": round(config.train.batch_size / medians["engine"], 2),
        "engine_over_plain": round(medians["engine"] / medians["plain"], 3),
        "engine_over_plain_by_round": [
            round(min(ratios), 3),
            round(statistics.median(ratios), 3),
            round(max(ratios), 3),
        ],
        "seconds_per_part": _parts(plain, optimizers[1], batch, config, dtype),
        "peak_memory_gb": round(peak_memory(world.device) / 2**30, 3),
    }


def _parts(
    method: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], config: Any, dtype: torch.dtype | None
) -> dict[str, float]:
    """Seconds of the named parts of a step, and of what remains."""
    watch = Stopwatch(batch["image"].device)
    if config.method == "cim":
        if method.tokenizer is not None:
            watch.watch(method.tokenizer, "tokens", "tokenise")
            watch.watch(method.generator, "forward", "generate")
            watch.watch(method.tokenizer, "paint", "paint")
        watch.watch(method, "enhance", "enhance")
        watch.watch(method, "enhancer_loss", "enhancer_loss")
    device = batch["image"].device.type
    for _ in range(ROUNDS):
        with torch.autocast(device, dtype, enabled=dtype is not None):
            loss = watch.measure("forward", lambda: method(batch)["loss"])
        watch.measure("backward", loss.backward)
        watch.measure("optimiser", optimizer.step)
        optimizer.zero_grad()
    named = {name: seconds / ROUNDS for name, seconds in watch.seconds.items()}
    forward = named.pop("forward")
    inside = sum(seconds for name, seconds in named.items() if name not in ("backward", "optimiser"))
    named["rest_of_forward"] = forward - inside
    return {name: round(seconds, 4) for name, seconds in named.items()}


def prepared(words: list[str], folder: Path) -> list[str]:
    """``RECIPE key=value ...`` with images and a tokenizer where none are given."""
    given = {word.partition("=")[0] for word in words[1:]}
    words = [words[0], "data.workers=0", f"output_dir={folder}/unused", *words[1:]]
    if "data.path" not in given:
        write_digits(folder / "digits")
        words.append(f"data.path={folder}/digits/train")
    config = read_config(PROGRAM, words[0], words[1:])
    if config.method == "cim" and not config.cim.tokenizer and config.cim.corruption == "generator":
        words.append(f"cim.tokenizer={folder}/tokenizer.safetensors")
        save_tokenizer(DVAE(in_chans=config.data.in_chans), f"{folder}/tokenizer.safetensors")
    return words


def settled(words: list[str]) -> Any:
    """The configuration that ``RECIPE key=value ...`` asks for, checked."""
    config = read_config(PROGRAM, words[0], words[1:])
    check_run(config)
    check(config)
    return config


def main(words: list[str]) -> int:
    """Print one JSON object -> exit code."""

    def measure(words: list[str], folder: Path) -> dict[str, Any]:
        config = settled(prepared(words, folder))
        with join(config.threads) as world:
            return bench(config, world)

    return command("step", words, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
