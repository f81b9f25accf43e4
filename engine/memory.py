"""What DeepSpeed keeps on each device, stage by stage: sums over the parameters of a method, checked against measured runs.

The sums follow DeepSpeed's own allocations, which are more than the textbook's: ZeRO 1 to 3 keep a second float32 copy of
the weights that a process updates, the buckets of ZeRO have their full size from the start, and ZeRO-3 lets go of a
gathered weight only where it is not soon used again. docs/planning.md says what was measured and what is left out.

Everything is in bytes for one process unless it says elements. ``N`` is the number of processes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from engine import ds
from engine.traced import Step

FLOAT = 4
"""Bytes of a float32, which weights, gradients and states are in every precision here."""

ALLREDUCE_ELEMENTS = 500_000_000
"""Gradients that ZeRO-0 copies together for one all-reduce (a constant of DeepSpeed's engine)."""

_SENT_IN_HALF = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules, not sub-classes, whose gradients DeepSpeed sends in autocast's precision."""


@dataclass(frozen=True)
class Tensors:
    """What a method is made of.

    Attributes:
        groups: of each parameter group the trained parameters in their order: (elements, whether autocast has
            DeepSpeed send them in half precision).
        frozen: elements of each parameter that is not trained.
        buffers: bytes.
        apart: bytes of networks that are no part of the module, such as CIM's tokenizer.
    """

    groups: tuple[tuple[tuple[int, bool], ...], ...]
    frozen: tuple[int, ...] = ()
    buffers: int = 0
    apart: int = 0

    @classmethod
    def of(cls, method: nn.Module, groups: Sequence[dict[str, Any]], apart: Sequence[nn.Module] = ()) -> "Tensors":
        """Of ``method`` with the parameter groups that :func:`engine.optim.param_groups` made of it."""
        half = {id(p) for m in method.modules() if type(m) in _SENT_IN_HALF for p in m.parameters(recurse=False)}
        frozen = [p.numel() for p in method.parameters() if not p.requires_grad]
        return cls(
            tuple(tuple((p.numel(), id(p) in half) for p in group["params"]) for group in groups),
            tuple(frozen),
            sum(b.nbytes for b in method.buffers()),
            sum(t.nbytes for m in apart for t in (*m.parameters(), *m.buffers())),
        )

    @property
    def trained(self) -> int:
        """Elements."""
        return sum(elements for elements, _ in self.parameters)

    @property
    def parameters(self) -> list[tuple[int, bool]]:
        """All trained ones."""
        return [parameter for group in self.groups for parameter in group]


@dataclass(frozen=True)
class Zero:
    """What a DeepSpeed configuration says about memory; its sizes are in elements."""

    stage: int
    offload: bool = False
    half: bool = False
    bucket: int = 500_000_000
    persistent: int = 100_000
    prefetch: int = 50_000_000
    reuse: int = 1_000_000_000

    @classmethod
    def of(cls, merged: dict[str, Any]) -> "Zero":
        """Of a configuration that :func:`engine.ds.merge` made, with DeepSpeed's defaults."""
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        settings: Any = DeepSpeedZeroConfig(**merged.get("zero_optimization", {}))
        return cls(
            ds.stage_of(merged),
            settings.offload_optimizer is not None and settings.offload_optimizer.device != "none",
            ds.autocast_dtype(merged) is not None,
            settings.reduce_bucket_size,
            settings.param_persistence_threshold,
            settings.prefetch_bucket_size,
            settings.max_reuse_distance,
        )


OptimizerCost = Callable[[Sequence[int]], tuple[int, int]]
"""Elements of the tensors of a group -> bytes of their states, bytes that a step needs besides."""


@dataclass(frozen=True)
class Account:
    """One process's memory; each entry is what is held at its fullest, ``peak`` the most at once.

    Attributes:
        parameters: weights, with DeepSpeed's second copy of those that this process updates.
        gradients: at the end of the backward pass.
        optimizer: states of the optimiser.
        other: moving average, frozen networks, buffers.
        communication: buffers of DeepSpeed, and gathered weights of ZeRO-3.
        outside: the most while the optimiser works or processes talk: it does not depend on the batch.
        held: what is there all the time, during forward and backward pass.
        while_made: what n bytes of gradients occupy while the backward pass makes them.
        host: in the memory of the machine.
        offload: whether the optimiser works there.
    """

    parameters: float
    gradients: float
    optimizer: float
    other: float
    communication: float
    outside: float
    held: float
    while_made: Callable[[int], float]
    host: float = 0.0
    offload: bool = False

    def peak(self, step: Step) -> float:
        """The most at once."""
        return max(self.outside, self.held + step.peak(self.while_made))


def account(
    tensors: Tensors,
    zero: Zero,
    world_size: int,
    cost: OptimizerCost,
    *,
    ema: bool = False,
    accumulation: int = 1,
) -> Account:
    """The memory of one process of ``world_size``.

    Args:
        cost: of the optimiser.
        ema: whether a moving average is kept.
    """
    make = {0: _whole, 1: _partitioned, 2: _partitioned, 3: _sharded}[zero.stage]
    return make(tensors, zero, world_size, cost, ema, accumulation)


def _average(tensors: Tensors, ema: bool) -> int:
    return FLOAT * (tensors.trained + sum(tensors.frozen)) + tensors.buffers if ema else 0


def _whole(tensors: Tensors, zero: Zero, world_size: int, cost: OptimizerCost, ema: bool, parts: int) -> Account:
    """ZeRO-0: everything everywhere; gradients are copied together for an all-reduce, even where there is one process."""
    weights = FLOAT * tensors.trained
    costs = [cost([elements for elements, _ in group]) for group in tensors.groups]
    states, work = sum(c[0] for c in costs), max(c[1] for c in costs)
    other = FLOAT * sum(tensors.frozen) + tensors.buffers + tensors.apart + _average(tensors, ema)
    copied = FLOAT * _largest_bucket([elements for elements, _ in tensors.parameters], ALLREDUCE_ELEMENTS)
    held = weights + states + other
    return Account(
        weights,
        weights,
        states,
        other,
        copied,
        held + weights + max(copied, work),
        held,
        lambda made: made,
    )


def _partitioned(tensors: Tensors, zero: Zero, world_size: int, cost: OptimizerCost, ema: bool, parts: int) -> Account:
    """ZeRO-1 and 2: each process updates a part of every group, of which it has a second float32 copy."""
    sizes = [partition(sum(elements for elements, _ in group), world_size) for group in tensors.groups]
    costs = [cost([size]) for size in sizes]
    mine, states = FLOAT * sum(sizes), sum(c[0] for c in costs)
    whole = FLOAT * sum(size * world_size for size in sizes)
    # A parameter that lies across a border is kept whole by both.
    kept = 0 if zero.offload else FLOAT * _most_kept(tensors, sizes, world_size)
    buckets = _buckets(tensors, zero)
    buffers = FLOAT * zero.bucket * len(buckets)
    filled = max(FLOAT * min(_largest_bucket(sent, zero.bucket), zero.bucket) for sent, _ in buckets)
    together = max(_copied(sent, is_half, zero.bucket, world_size) for sent, is_half in buckets)
    largest = FLOAT * max(elements for elements, _ in tensors.parameters)
    other = FLOAT * sum(tensors.frozen) + tensors.buffers + tensors.apart + _average(tensors, ema)
    held = whole + other + (largest if zero.offload else mine + states)
    if zero.stage == 2 and parts > 1:
        held += kept  # the sum of the parts so far

    def gradients(made: int) -> float:
        if not made:
            return 0
        if zero.stage == 1:
            return made + buffers
        return buffers + (together + kept if made >= filled else 0)

    gathered = FLOAT * tensors.trained - filled if zero.stage == 1 else 0
    moments = [held + buffers + gathered + max(together, kept), held + buffers + together + kept]
    if zero.stage == 1:
        moments = moments[:1]
    if not zero.offload:
        for index, (size, (_, work)) in enumerate(zip(sizes, costs, strict=True)):
            last = index == len(sizes) - 1
            moments += [held + kept + FLOAT * size, held + (0 if last else kept) + FLOAT * size + work]
    return Account(
        whole + (0 if zero.offload else mine),
        FLOAT * tensors.trained if zero.stage == 1 else kept,
        0 if zero.offload else states,
        other,
        buffers + together + (largest if zero.offload else 0),
        max(moments),
        held,
        gradients,
        3 * mine + states + largest + max(c[1] for c in costs) if zero.offload else 0,
        zero.offload,
    )


def _sharded(tensors: Tensors, zero: Zero, world_size: int, cost: OptimizerCost, ema: bool, parts: int) -> Account:
    """ZeRO-3: each process has a shard of every parameter, and gathers whole ones while they are used."""
    sizes = [sum(math.ceil(elements / world_size) for elements, _ in group) for group in tensors.groups]
    costs = [cost([size]) for size in sizes]
    mine, states = FLOAT * sum(sizes), sum(c[0] for c in costs)
    frozen = FLOAT * sum(math.ceil(elements / world_size) for elements in tensors.frozen)
    everything = [*(elements for elements, _ in tensors.parameters), *tensors.frozen]
    always = FLOAT * sum(elements for elements in everything if elements < zero.persistent)
    gathered = FLOAT * gathered_elements(everything, zero) if world_size > 1 else 0
    buckets = _buckets(tensors, zero)
    buffers = sum((2 if is_half else FLOAT) * zero.bucket for _, is_half in buckets)
    together = max((2 if is_half else FLOAT) * _largest_bucket(sent, zero.bucket) for sent, is_half in buckets)
    average = mine + frozen + tensors.buffers if ema else 0
    other = frozen + tensors.buffers + tensors.apart + average
    on_device = mine if zero.offload else 3 * mine + states
    held = on_device + other + (always if world_size > 1 else 0) + buffers
    lent = FLOAT * sum(everything) + tensors.buffers  # a whole copy, while it is evaluated or exported
    moments = [held + lent, held + together]
    if not zero.offload:
        moments += [held + FLOAT * size + work for size, (_, work) in zip(sizes, costs, strict=True)]
    return Account(
        mine if zero.offload else 2 * mine,
        0 if zero.offload else mine,
        0 if zero.offload else states,
        other,
        buffers + together + gathered + (always if world_size > 1 else 0),
        max(moments),
        held + gathered,
        lambda made: together if made else 0,
        3 * mine + states + max(c[1] for c in costs) + lent if zero.offload else lent,
        zero.offload,
    )


def partition(elements: int, world_size: int) -> int:
    """Elements of a group that each process updates, ZeRO 1 and 2: the group is padded to a multiple of 2 N."""
    return math.ceil(elements / (2 * world_size)) * 2


def gathered_elements(parameters: Sequence[int], zero: Zero) -> int:
    """Elements of whole parameters that ZeRO-3 holds for the turn from the forward to the backward pass.

    A module's weights stay where fewer than ``reuse`` elements are used before it is used again; of the others there
    are those of one module (taken to be the largest parameter) and those fetched ahead.
    """
    large = [elements for elements in parameters if elements >= zero.persistent]
    total = sum(large)
    return min(total, zero.reuse // 2 + max(large, default=0) + zero.prefetch)


def _buckets(tensors: Tensors, zero: Zero) -> list[tuple[list[int], bool]]:
    """Parameters that go through each bucket, in the order of the backward pass, and whether it sends half precision."""
    found = [
        ([n for n, half in reversed(tensors.parameters) if (half and zero.half) == is_half], is_half)
        for is_half in (False, True)
    ]
    return [(sent, is_half) for sent, is_half in found if sent]


def _fillings(sent: Sequence[int], bucket: int) -> Iterator[int]:
    """Elements of what goes together where a bucket is emptied before it would overflow; larger parameters go alone."""
    filled = 0
    for elements in sent:
        if filled and filled + elements > bucket:
            yield filled
            filled = 0
        filled += elements
    if filled:
        yield filled


def _largest_bucket(sent: Sequence[int], bucket: int) -> int:
    return max(_fillings(sent, bucket), default=0)


def _copied(sent: Sequence[int], is_half: bool, bucket: int, world_size: int) -> int:
    """Bytes of a bucket's copies on the way through an all-reduce."""
    elements = _largest_bucket(sent, bucket)
    return elements * ((FLOAT if world_size > 1 else 0) + (2 if is_half else 0))


def _most_kept(tensors: Tensors, sizes: Sequence[int], world_size: int) -> int:
    """Elements of the parameters of which a process updates anything, for the process with the most."""
    kept = [0] * world_size
    for group, size in zip(tensors.groups, sizes, strict=True):
        start = 0
        for elements, _ in group:
            for rank in range(start // size, (start + elements - 1) // size + 1):
                kept[rank] += elements
            start += elements
    return max(kept)
