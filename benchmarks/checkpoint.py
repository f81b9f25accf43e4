"""``python -m benchmarks.checkpoint RECIPE [key=value ...]``: what a checkpoint costs a run, as one JSON object.

Complete checkpoints of an engine that has taken a step (weights, optimiser, moving average, hashes, flushed to the disk)
are written to a folder under ``output_dir``, or a temporary one, and removed. ``share`` is of a run that writes one every
ten minutes; nothing else goes on meanwhile. ``restore_seconds`` is from the folder back into the engine, hashes checked.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.command import command
from benchmarks.step import engine_step, prepared, settled
from engine import ds
from engine.checkpoint import Checkpoints, Progress
from engine.optim import build_optimizer, param_groups, set_step
from engine.whole import Gathered, Whole
from engine.world import World, join, to_device
from pretrain.__main__ import build

ROUNDS = 5
INTERVAL = 600.0
"""Seconds between two checkpoints."""


def bench(config: Any, world: World, folder: Path) -> dict[str, Any]:
    """Measure one configuration in this process."""
    method, loader, _ = build(config, world)
    parameters = sum(p.numel() for p in method.parameters())  # before ZeRO-3 takes them away
    merged = ds.merge(config, world.size, world.device.type)
    optimizer = build_optimizer(param_groups(method, config.optim), config.optim)
    decay = config.train.ema_decay
    whole = (Gathered if ds.stage_of(merged) == 3 else Whole)(method, decay, world)
    engine = ds.initialize(method, optimizer, merged, world)
    whole.begin()
    set_step(optimizer, 1e-4, config.optim.weight_decay)
    engine_step(engine, to_device(next(loader.batches(0)), world.device))
    whole.update()
    checkpoints = Checkpoints(folder, world, keep=1)
    progress = Progress.start(config, ds.layout(merged, world.size), "benchmark")
    written = []
    for i in range(ROUNDS + 1):
        progress.step = i + 1
        started = time.perf_counter()
        checkpoints.save(engine, progress, whole.average_state())
        written.append(time.perf_counter() - started)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    started = time.perf_counter()
    checkpoints.resume(engine, whole if decay else None, progress)
    restored = time.perf_counter() - started
    seconds = statistics.median(written[1:])
    return {
        "recipe": config.recipe,
        "deepspeed": config.deepspeed,
        "parameters": parameters,
        "average": bool(decay),
        "bytes": size,
        "rounds": ROUNDS,
        "seconds": round(seconds, 3),
        "slowest": round(max(written[1:]), 3),
        "share": round(seconds / (INTERVAL + seconds), 5),
        "restore_seconds": round(restored, 3),
    }


def main(words: list[str]) -> int:
    """Print one JSON object -> exit code."""

    def measure(words: list[str], folder: Path) -> dict[str, Any]:
        config = settled(prepared(words, folder))
        with join(config.threads) as world:
            return bench(config, world, folder / "checkpoints")

    given = [word.partition("=")[2] for word in words if word.startswith("output_dir=")]
    return command("checkpoint", words, measure, folder=given[-1] if given else None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
