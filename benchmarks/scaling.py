"""``python -m benchmarks.scaling RECIPE [key=value ...]``: images per second of 1 and 2 processes at every ZeRO stage, as one JSON object.

Each process is pinned to a core of its own. The sides take turns, step by step, so that a busy machine slows all alike:

- alone: one process on the first core, the second core idle;
- apart: one process on each core, which know nothing of each other. Twice what they do is the most that two processes
  could: they share memory bandwidth and clock;
- together: two processes of one run, each with as many images as the lone one.

``efficiency`` is together over apart, ``waiting`` the share of a step of two processes in which the lone ones beside each
other were done already: communication, and waiting for the other. Without ``data.path`` the embedded digits are read.
"""

import multiprocessing
import os
import socket
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import command
from benchmarks.step import prepared, settled
from engine import ds
from engine.cli import read_config
from engine.config import ConfigError
from engine.optim import build_optimizer, param_groups, set_step
from engine.schedule import peak_lr
from engine.world import World, join, seed_step, to_device
from pretrain.__main__ import PROGRAM, build

ROUNDS = 5
STAGES = ("zero0_fp32", "zero1_fp32", "zero2_fp32", "zero3_fp32")


def worker(words: list[str], rank: int, size: int, core: int, port: int, turn: Connection) -> None:
    """Build an engine per stage, then take a step of the one that ``turn`` names, and tell how long it took."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    own = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, MASTER_PORT=port, MASTER_ADDR="127.0.0.1")
    os.environ.update({key: str(value) for key, value in own.items()} | {"DS_ACCELERATOR": "cpu"})
    with join() as world:
        engines = {}
        for stage in STAGES:
            config = settled([*words, f"deepspeed={stage}", f"train.batch_size={micro_batch(words) * size}"])
            method, loader, _ = build(config, world)
            optimizer = build_optimizer(param_groups(method, config.optim), config.optim)
            set_step(optimizer, peak_lr(config.optim, config.train.batch_size) / 100, config.optim.weight_decay)
            batch = to_device(next(loader.batches(0)), world.device)
            engines[stage] = ds.initialize(method, optimizer, ds.merge(config, size, "cpu"), world), batch
        turn.send("ready")
        while stage := turn.recv():
            turn.send(timed_step(*engines[stage], world))


def timed_step(engine: Any, batch: Any, world: World) -> float:
    """Seconds of one step, begun by all processes of the run together."""
    world.barrier()
    seed_step(0, 0, world.rank)
    started = time.perf_counter()
    loss = engine(batch)["loss"]
    engine.backward(loss)
    engine.step()
    return time.perf_counter() - started


def micro_batch(words: list[str]) -> int:
    """Images per process: the batch that was asked for."""
    return int(read_config(PROGRAM, words[0], words[1:]).train.batch_size)


def start(words: list[str], size: int, first_core: int) -> list[Connection]:
    """The processes of one run -> how to talk to them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    talks = []
    for rank in range(size):
        here, there = multiprocessing.Pipe()
        arguments = (words, rank, size, first_core + rank, port, there)
        multiprocessing.get_context("spawn").Process(target=worker, args=arguments, daemon=True).start()
        there.close()  # so that a process that dies is noticed
        talks.append(here)
    for talk in talks:
        talk.recv()
    return talks


def step(talks: list[Connection], stage: str) -> float:
    """A step of all of them at once -> seconds of the slowest."""
    for talk in talks:
        talk.send(stage)
    return max(talk.recv() for talk in talks)


def bench(words: list[str]) -> dict[str, Any]:
    """Measure every stage, alone, apart and together."""
    first, second, both = start(words, 1, 0), start(words, 1, 1), start(words, 2, 0)
    sides = {"alone": first, "apart": first + second, "together": both}
    times: dict[tuple[str, str], list[float]] = {(stage, side): [] for stage in STAGES for side in sides}
    for i in range(ROUNDS + 1):
        for stage in STAGES:
            for side in list(sides) if i % 2 else list(reversed(sides)):
                took = step(sides[side], stage)
                if i:  # the first warms up
                    times[stage, side].append(took)
    for talk in first + second + both:
        talk.send("")
    batch = micro_batch(words)
    rows = {}
    for stage in STAGES:
        seconds = {side: statistics.median(times[stage, side]) for side in sides}
        by_round = list(zip(times[stage, "apart"], times[stage, "together"], strict=True))
        rows[stage] = {
            "images_per_second": {
                "alone": round(batch / seconds["alone"], 2),
                "apart": round(2 * batch / seconds["apart"], 2),
                "together": round(2 * batch / seconds["together"], 2),
            },
            "efficiency": round(statistics.median(apart / together for apart, together in by_round), 3),
            "waiting": round(statistics.median(1 - apart / together for apart, together in by_round), 3),
            "over_zero0": round(
                statistics.median(
                    zero0 / own
                    for zero0, own in zip(times[STAGES[0], "together"], times[stage, "together"], strict=True)
                ),
                3,
            ),
        }
    config = settled(words)
    return {
        "recipe": config.recipe,
        "encoder": getattr(getattr(config, "encoder", None), "name", ""),
        "image_size": config.data.image_size,
        "images_per_process": batch,
        "rounds": ROUNDS,
        "cores": os.cpu_count(),
        "stages": rows,
    }


def main(words: list[str]) -> int:
    """Print one JSON object -> exit code."""

    def measure(words: list[str], folder: Path) -> dict[str, Any]:
        if (os.cpu_count() or 1) < 2:
            raise ConfigError("one core cannot show how two processes scale")
        words = prepared(words, folder)
        for stage in STAGES:
            ds.merge(settled([*words, f"deepspeed={stage}"]), 1, "cpu")
        return bench(words)

    return command("scaling", words, measure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
