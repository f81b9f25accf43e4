"""Which images make up each batch: a function of (seed, epoch), whatever the processes and workers.

The epoch's sequence is dealt out in *lanes*: lane l of L is a contiguous piece of it, and position p of the run of all global batches
is entry ``p // L`` of lane ``p % L``. A process takes the positions of its rank. With one lane that is the sequence itself. Shards
that can only be read in order get a lane for each that is read at once. Where L is a multiple of the processes, every shard is read by
one of them, but for those at the ends of a lane; else every lane by ``processes / gcd(L, processes)``, each keeping its own images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from data.sources import ImageIndex

Item = tuple[int, int, int]
"""What is asked for: epoch, index, copy."""

STREAM_BLOCK = 1000
"""Images of a stream that are shuffled among each other where nothing else is said."""


def sample_seed(*key: int) -> int:
    """Mix whole numbers into one of 64 bits (splitmix64 steps): a cheap hash, the same on every machine."""
    state = 0x9E3779B97F4A7C15
    for value in key:
        state = (state ^ (value & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


_MASK = 2**64 - 1


class Order:
    """The batches of one rank, in each epoch."""

    def __init__(
        self,
        index: ImageIndex,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        shuffle: bool,
        drop_last: bool,
        repeats: int,
        shuffle_block: int = 0,
        streams: int = 0,
    ) -> None:
        """See :class:`data.loader.Loader`."""
        self.index, self.count, self.batch_size, self.seed = index, len(index), batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.shuffle, self.drop_last, self.repeats = shuffle, drop_last, repeats
        in_order = index.streams
        self.streaming = bool(in_order.any())
        """Whether some images come in the order of their shards only."""
        self.lanes = (streams if shuffle else 0) or (world_size if self.streaming else 1)
        if shuffle_block:
            in_order = index.shards
        self._in_blocks = in_order
        """(number of roots,) bool, which roots are shuffled in blocks."""
        self.random = shuffle and not in_order.any()
        """Whether the first images of an epoch are a random sample of all."""
        self._block = shuffle_block or STREAM_BLOCK

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""
        if self.drop_last:
            return self.count // (self.batch_size * self.world_size)
        mine = len(range(self.rank, self.count, self.world_size))
        return (mine + self.batch_size - 1) // self.batch_size

    def sequence(self, epoch: int) -> np.ndarray:
        """(count,) the indices of the epoch in order; with repeats each stands ``repeats`` times in a row."""
        kind = np.uint32 if self.count < 2**32 else np.int64
        if not self.shuffle:
            return np.arange(self.count, dtype=kind)
        generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch))
        if self._in_blocks.any():
            order = self._blocked(generator).astype(kind)
        else:
            order = torch.randperm(self.count, generator=generator).numpy().astype(kind)
        return order if self.repeats == 1 else np.repeat(order, self.repeats)[: self.count]

    def _blocked(self, generator: torch.Generator) -> np.ndarray:
        """Shards in random order, and in each its blocks one after the other, shuffled within; all other images anywhere between."""
        bound = self._in_blocks[self.index.root_ids]
        free, kept = np.flatnonzero(~bound), np.flatnonzero(bound)
        roots = self.index.root_ids[kept]
        if (roots[1:] < roots[:-1]).any():
            by_root = np.argsort(roots, kind="stable")
            kept, roots = kept[by_root], roots[by_root]
        shards = np.split(kept, np.flatnonzero(np.diff(roots)) + 1)
        pieces = []
        for shard in torch.randperm(len(shards), generator=generator).tolist():
            for first in range(0, len(shards[shard]), self._block):
                block = shards[shard][first : first + self._block]
                pieces.append(block[torch.randperm(len(block), generator=generator).numpy()])
        order = np.concatenate(pieces)
        if not len(free):
            return order
        places = torch.randperm(self.count, generator=generator).numpy()
        whole = np.empty(self.count, np.int64)
        whole[places[: len(free)]] = free
        whole[np.sort(places[len(free) :])] = order
        return whole

    def place(self, position: int) -> int:
        """Where a position of the run of global batches stands in the sequence."""
        lane, step = position % self.lanes, position // self.lanes
        each, more = divmod(self.count, self.lanes)
        return lane * each + min(lane, more) + step

    def my_lanes(self) -> range:
        """The lanes that this rank reads."""
        together = math.gcd(self.lanes, self.world_size)
        return range(self.rank % together, self.lanes, together)

    def lane(self, sequence: np.ndarray, lane: int, start: int) -> np.ndarray:
        """The entries of a lane that this rank's batches from number ``start`` on take."""
        size = self.batch_size * self.world_size
        first, last = (len(range(lane, min(end, self.count), self.lanes)) for end in (start * size, len(self) * size))
        positions = lane + self.lanes * np.arange(first, last)
        begin = self.place(lane)
        return sequence[begin + first : begin + last][positions % self.world_size == self.rank]

    def positions(self, batch: int) -> range:
        """A global batch is a run of positions; rank r takes every world_size-th of it from r on."""
        size = self.batch_size * self.world_size
        return range(batch * size + self.rank, min((batch + 1) * size, self.count), self.world_size)

    def batches(self, epoch: int, start: int, sequence: np.ndarray | None = None) -> Iterator[list[Item]]:
        """The items of each batch of the epoch from number ``start`` on."""
        sequence = self.sequence(epoch) if sequence is None else sequence
        for batch in range(start, len(self)):
            places = [self.place(position) for position in self.positions(batch)]
            yield [(epoch, int(sequence[place]), place % self.repeats) for place in places]
