"""From an item to a transformed sample, and from samples to a batch: what the workers do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from data.content import DecodeError
from data.decode import decode
from data.order import Item, sample_seed
from data.reading import Reader
from data.sources import ImageIndex

Transform = Callable[[Tensor, torch.Generator], dict[str, Tensor]]

REPLACEMENT_TRIES = 64
"""How many files after a broken one are tried in its place."""


class Task(NamedTuple):
    """A batch to be made.

    Attributes:
        items: its images.
        content: the bytes of those that came out of a stream, one after the other, (M,) uint8; None without.
        spans: (first, last) of each item's bytes in it, None for an image to be read; empty without.
    """

    items: list[Item]
    content: Tensor | None = None
    spans: Sequence[tuple[int, int] | None] = ()

    def bytes_of(self, k: int) -> np.ndarray | None:
        """Bytes of item ``k`` if they came with the task: (size,) uint8."""
        span = self.spans[k] if self.content is not None else None
        return None if span is None or self.content is None else self.content[slice(*span)].numpy()


class Samples:
    """Reads, decodes and transforms the samples of a task."""

    def __init__(
        self,
        index: ImageIndex,
        transform: Transform,
        in_chans: int,
        value_range: Sequence[float] | None,
        seed: int,
        replace: bool,
        retry_seconds: float,
    ) -> None:
        self.index, self.transform, self.in_chans, self.value_range = index, transform, in_chans, value_range
        self.seed, self.replace = seed, replace
        self.reader = Reader(index, retry_seconds)

    def batch(self, task: Task) -> dict[str, Any]:
        """The batch, as :func:`collate` makes it."""
        return collate([self._sample(task, k) for k in range(len(task.items))])

    def _sample(self, task: Task, k: int) -> dict[str, Any]:
        """The transformed sample with its ``index`` and ``label``, and ``broken``: [(index, reason)] of the files that failed.

        Where a file is broken and ``replace`` is set, the sample is of another file, chosen by (seed, epoch, index); else only
        ``broken`` is given.
        """
        epoch, i, copy = task.items[k]
        broken: list[tuple[int, str]] = []
        for candidate, content in self._candidates(task, k):
            try:
                image = decode(
                    self.reader.read(candidate) if content is None else content, self.in_chans, self.value_range
                )
            except DecodeError as error:
                broken.append((candidate, str(error)))
                continue
            generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch, i, copy))
            sample: dict[str, Any] = dict(self.transform(image, generator))
            sample["index"] = candidate
            if self.index.class_names:
                sample["label"] = self.index.label(candidate)
            return sample | {"broken": broken}
        return {"broken": broken}

    def _candidates(self, task: Task, k: int) -> Iterator[tuple[int, np.ndarray | None]]:
        """The image itself, then (in training) those that stand in for it: all others of a small set, some of a large one.

        For an image of a stream its neighbours in the batch come first: others would have to be fetched.
        """
        epoch, i, _ = task.items[k]
        yield i, task.bytes_of(k)
        others = len(self.index) - 1
        if not self.replace or not others:
            return
        first = sample_seed(self.seed, epoch, i, -1)
        if task.content is not None:
            size = len(task.items)
            for step in range(size - 1):
                near = (k + 1 + (first + step) % (size - 1)) % size
                if task.items[near][1] != i and (content := task.bytes_of(near)) is not None:
                    yield task.items[near][1], content
        for step in range(min(others, REPLACEMENT_TRIES)):
            yield (i + 1 + (first % others + step) % others) % len(self.index), None


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Samples -> a batch of stacked tensors, with ``broken`` joined and ``lost``, the number of samples without an image.

    A batch whose samples are all lost has only these two keys.
    """
    whole = [
        {name: value for name, value in sample.items() if name != "broken"} for sample in samples if "index" in sample
    ]
    account = {"broken": [entry for sample in samples for entry in sample["broken"]], "lost": len(samples) - len(whole)}
    if not whole:
        return account
    for name in ("image", "token_image"):
        if (
            name in whole[0] and len({sample[name].dtype for sample in whole}) > 1
        ):  # 8-bit and deeper files in one folder
            for sample in whole:
                if sample[name].dtype == torch.uint8:
                    sample[name] = sample[name].float() / 255
    return default_collate(whole) | account
