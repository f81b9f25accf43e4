"""The processes of a run: joining them, seeding them, talking among them."""

import logging
import os
import random
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from engine import slurm
from engine.config import ConfigError
from engine.faults import StoppedRunError

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """One process among the others of its run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and files that need one writer."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier()

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Mean over the processes of values that every process holds under the same keys."""
        return dict(zip(values, (self.sum(list(values.values())) / self.size).tolist(), strict=True))

    def sum(self, values: list[float] | Tensor) -> Tensor:
        """Sum over the processes, a new tensor of float64."""
        total = torch.asarray(values, dtype=torch.float64, device=self.device, copy=True).detach()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def agree(self, flag: bool) -> bool:
        """What rank 0 says, on every process."""
        if self.size == 1:
            return flag
        said = torch.tensor([int(flag)], device=self.device)
        dist.broadcast(said, 0)
        return bool(said.item())

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every process, in rank order, on every process."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


@contextmanager
def join(threads: int = 0) -> Iterator[World]:
    """Join the processes the launcher started (one process without a launcher), and leave them in order at the end.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are read as the deepspeed launcher, torchrun and our
    Slurm scripts set them. Inside another ``join`` this is the same world, left by the outer one: DeepSpeed cannot be
    set up twice in a process.
    """
    if dist.is_initialized():
        yield _here()
        return
    slurm.environment()
    if "RANK" not in os.environ:
        # A lone process: without these DeepSpeed would look for MPI.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ.update(zip(_ENVIRONMENT, ("0", "1", "0", "127.0.0.1", port), strict=True))
    if missing := [key for key in _ENVIRONMENT if key not in os.environ]:
        raise ConfigError(
            f"RANK is set, but not {', '.join(missing)}: a launcher sets all of them, a lone process none"
        )
    if threads:
        torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Nothing here uses DeepSpeed's C++ operators; left alone it compiles them for a minute at the first start.
    deepspeed.ops.__compatible_ops__ = {}
    # Longer than the watchdog's patience: it names who is missing, the network library does not.
    deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False, timeout=timedelta(hours=2))
    try:
        yield _here()
    except StoppedRunError:  # which all processes agreed upon
        dist.destroy_process_group()
        raise
    # Not after an error: taking leave waits for the others, who wait in the middle of a step.
    dist.destroy_process_group()


def _here() -> World:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), device)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch, numpy and random for one micro step, so that what it draws does not depend on what ran before."""
    value = zlib.crc32(f"{seed},{step},{rank}".encode())
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on ``device``, copied asynchronously where the memory is pinned."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
