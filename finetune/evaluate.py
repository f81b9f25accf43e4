"""Evaluation in which every image counts exactly once, whatever the number of processes and the batch size."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.loader import Loader
from engine.faults import until_stopped
from engine.log import progress
from engine.world import World, to_device


class Census:
    """Which images have been looked at: refuses the second sight of one, and misses none."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.seen = np.zeros(len(loader.index), bool)

    def add(self, indices: Tensor) -> None:
        """Note a batch; (B,) int64."""
        found = indices.cpu().numpy()
        if self.seen[found].any() or len(np.unique(found)) != len(found):
            raise RuntimeError("an image was evaluated twice")
        self.seen[found] = True

    def close(self, world: World) -> int:
        """Compare with all other processes -> number of images looked at; the rest must be broken files."""
        for elsewhere in world.gather(self.loader.broken):
            if world.is_main:
                self.loader.name_broken(elsewhere)
        unread = np.zeros_like(self.seen)
        if self.loader.broken:  # by index: a list may name a file twice
            unread[[i for i in np.flatnonzero(~self.seen) if self.loader.index.path(int(i)) in self.loader.broken]] = (
                True
            )
        parts = world.gather((np.packbits(self.seen), np.packbits(unread)))
        times = sum(self._unpack(seen).astype(int) for seen, _ in parts)
        known_broken = np.logical_or.reduce([self._unpack(unread) for _, unread in parts])
        lost = (times != 1) & ~(known_broken & (times == 0))
        if lost.any():
            raise RuntimeError(
                f"{int(lost.sum())} of {len(lost)} images were not evaluated exactly once, the first is "
                f"{self.loader.index.path(int(np.flatnonzero(lost)[0]))}"
            )
        return int(np.sum(times))

    def _unpack(self, bits: np.ndarray) -> np.ndarray:
        return np.unpackbits(bits, count=len(self.seen)).astype(bool)


@dataclass(frozen=True)
class Outcome:
    """What became of every image that could be read, on all processes together, in the order of the set.

    Attributes:
        indices: (N,) int64, each image's place in the set.
        labels: (N,) int64.
        predicted: (N,) int64, the class with the highest logit.
        in_top5: (N,) bool, whether the label is among the five highest (all, where there are fewer classes).
        loss: mean cross entropy.
    """

    indices: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    in_top5: np.ndarray
    loss: float

    def numbers(self) -> dict[str, float]:
        """Top-1 and top-5 accuracy in per cent, mean cross entropy and the number of images."""
        count = len(self.labels)
        top1, top5 = (self.predicted == self.labels).sum(), self.in_top5.sum()
        return {
            "top1": 100 * int(top1) / count,
            "top5": 100 * int(top5) / count,
            "eval_loss": self.loss,
            "eval_images": count,
        }


def evaluate(method: Any, loader: Loader, world: World) -> dict[str, float]:
    """Top-1 and top-5 accuracy in per cent (top-K where there are fewer classes) and mean cross entropy over all processes.

    ``method.logits(image)`` maps a batch (B, C, H, W) to (B, K) float32.
    """
    return judge(method, loader, world).numbers()


def judge(method: Any, loader: Loader, world: World) -> Outcome:
    """:func:`evaluate`, image by image; the same on every process."""
    census = Census(loader)
    rows, loss = [np.zeros((0, 4), np.int64)], 0.0
    with rank0_buffers(method, world):
        batches = progress(loader.batches(0), world, "evaluate", total=len(loader), leave=False, unit="batch")
        for batch in until_stopped(batches, world):
            census.add(batch["index"])
            on_device = to_device(batch, world.device)
            labels = on_device["label"]
            with torch.inference_mode():
                logits = method.logits(on_device["image"])
                loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
                best = logits.topk(min(5, logits.shape[1]), dim=1).indices
                among = (best == labels[:, None]).any(dim=1)
                found = torch.stack([on_device["index"], labels, best[:, 0], among.long()], dim=1)
            rows.append(found.cpu().numpy())
    loader.close()
    count = census.close(world)
    if not count:
        raise RuntimeError("no image could be evaluated")
    everything = np.concatenate(world.gather(np.concatenate(rows)))
    indices, labels, predicted, among = everything[np.argsort(everything[:, 0])].T
    return Outcome(indices, labels, predicted, among.astype(bool), float(world.sum([loss])[0]) / count)


@contextmanager
def rank0_buffers(model: nn.Module, world: World) -> Iterator[None]:
    """Give every process rank 0's buffers meanwhile.

    Running statistics of batch norms differ between processes; what rank 0 exports is what is to be evaluated.
    """
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if world.size == 1 or not buffers:
        yield
        return
    own = [buffer.detach().clone() for buffer in buffers]
    flat = torch.cat([buffer.detach().double().flatten() for buffer in buffers])
    shared = world.sum((flat if world.is_main else torch.zeros_like(flat)).tolist())
    try:
        for buffer, values in zip(buffers, shared.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.detach().copy_(values.view(buffer.shape))
        yield
    finally:
        for buffer, values in zip(buffers, own, strict=True):
            buffer.detach().copy_(values)
