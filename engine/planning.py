"""Which DeepSpeed configurations fit a cluster, with which batch, and how fast they may be: one row for each."""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine import ds
from engine.config import ConfigError
from engine.memory import FLOAT, Account, Tensors, Zero, account, gathered_elements
from engine.optim import build_optimizer, set_step
from engine.schema import BaseConfig, OptimConfig, option
from engine.traced import Shapes, Step

GIB = 2**30

PRECISIONS = ("fp32", "bf16", "fp16")

CONFIGURATIONS = tuple(
    f"zero{stage}_{precision}{offload}"
    for precision in PRECISIONS
    for stage in range(4)
    for offload in ("", "_offload")
    if stage or not offload
)
"""In ds_configs/: every stage and precision, with and without optimiser offload."""

TRACED = (64, 128)
"""Images of traced steps; what more images need follows from straight lines. A tokenizer sees 64 images at a time."""


@dataclass
class Cluster:
    """The words of the command: what is planned for."""

    nodes: int = option(1, "machines", ge=1)
    gpus: int = option(8, "GPUs of each machine", ge=1)
    memory: float = option(80.0, "GiB of each GPU", gt=0)
    reserve: float = option(
        0.1, "share of the memory for what is not counted: CUDA and NCCL, cuDNN's work space, fragmentation", ge=0, lt=1
    )
    flops: float = option(312.0, "TFLOP/s of a GPU in bf16 and fp16; an A100 has the default", gt=0)
    flops_fp32: float = option(19.5, "TFLOP/s in float32; an A100 has the default, and 156 with TF32", gt=0)
    utilisation: float = option(0.4, "share of these that a step reaches: a guess, measure yours", gt=0, le=1)
    bandwidth: float | None = option(
        None, "GB/s that each GPU can send to the others; unset: 25 between machines, 250 inside one", gt=0
    )

    @property
    def size(self) -> int:
        """GPUs."""
        return self.nodes * self.gpus

    @property
    def usable(self) -> float:
        """Bytes of a GPU that may be planned with."""
        return self.memory * GIB * (1 - self.reserve)

    @property
    def sent_per_second(self) -> float:
        """Bytes."""
        return 1e9 * (self.bandwidth or (25.0 if self.nodes > 1 else 250.0))


@dataclass(frozen=True)
class Row:
    """What one DeepSpeed configuration needs.

    Attributes:
        peak: bytes of a GPU, with the recipe's micro batch.
        largest: images per GPU and pass that fit.
        sent: bytes that each GPU sends per step.
        slow, fast: images per second where communication never, and always, happens beside the computing.
        flops: of one image, forward and backward.
        per_gpu: images per second that one GPU computes.
        least: bytes of a GPU with a micro batch of one image.
        refused: why the recipe and the configuration do not go together; empty where they do.
    """

    name: str
    account: Account | None = None
    activations: float = 0
    peak: float = 0
    largest: int = 0
    sent: float = 0
    slow: float = 0
    fast: float = 0
    flops: float = 0
    per_gpu: float = 0
    least: float = 0
    refused: str = ""


@dataclass(frozen=True)
class Subject:
    """What is planned.

    Attributes:
        title: what it is, in words.
        tensors: what the method is made of.
        trace: (images, type of autocast or None) -> the traced step.
        apart: of what the weights apart from the method are, in words.
    """

    config: BaseConfig
    title: str
    tensors: Tensors
    trace: Callable[[int, torch.dtype | None], Step]
    apart: str = ""


def traced_sizes(micro_batch: int) -> list[int]:
    """Numbers of images to trace: two, and the micro batch itself where it is not larger."""
    return sorted({*TRACED, min(micro_batch, TRACED[-1])})


def step_of(steps: Sequence[Step], images: int) -> Step:
    """A step of ``images`` images, from traced ones in the order of their images: on straight lines between neighbours."""
    above = next((i for i, step in enumerate(steps) if step.images >= images), len(steps) - 1)
    above = max(above, 1)
    return steps[above - 1].stretched(steps[above], images)


def rows(subject: Subject, cluster: Cluster) -> list[Row]:
    """One row per configuration; the recipe's own comes first where it is none of ours.

    Raises:
        ConfigError: the batch does not divide among the GPUs.
    """
    config = subject.config
    micro_batch = ds.micro_batch_size(config, cluster.size)
    names = [*([] if config.deepspeed in CONFIGURATIONS else [config.deepspeed]), *CONFIGURATIONS]
    found: dict[str, dict[str, Any] | str] = {}
    for name in names:
        asked = copy.copy(config)
        asked.deepspeed = name
        try:
            found[name] = ds.merge(asked, cluster.size, "cuda")
        except ConfigError as error:
            if name == config.deepspeed:
                raise
            found[name] = str(error).removeprefix(f"deepspeed={name}: ")
    traced: dict[bool, list[Step]] = {}
    cost = functools.cache(lambda sizes: optimizer_cost(config.optim, sizes))
    result = []
    for name, merged in found.items():
        if isinstance(merged, str):
            result.append(Row(name, refused=merged))
            continue
        zero = Zero.of(merged)
        if zero.half not in traced:
            dtype = torch.bfloat16 if zero.half else None
            traced[zero.half] = [subject.trace(images, dtype) for images in traced_sizes(micro_batch)]
        held = account(
            subject.tensors,
            zero,
            cluster.size,
            lambda sizes: cost(tuple(sizes)),
            ema=bool(config.train.ema_decay),
            accumulation=config.train.accumulation,
        )
        result.append(_row(name, subject, zero, cluster, held, traced[zero.half]))
    return result


def _row(name: str, subject: Subject, zero: Zero, cluster: Cluster, found: Account, steps: Sequence[Step]) -> Row:
    config, parts = subject.config, subject.config.train.accumulation
    micro_batch = ds.micro_batch_size(config, cluster.size)
    step = step_of(steps, micro_batch)
    sent = sent_bytes(subject.tensors, zero, cluster.size, parts)
    reached = 1e12 * (cluster.flops if zero.half else cluster.flops_fp32) * cluster.utilisation
    flops = step.flops / step.images
    computing = flops * micro_batch * parts / reached
    talking = sent / cluster.sent_per_second
    images = config.train.batch_size
    return Row(
        name,
        found,
        step.activations,
        found.peak(step),
        largest_batch(found, steps, cluster.usable),
        sent,
        images / (computing + talking),
        images / max(computing, talking),
        flops,
        reached / flops,
        found.peak(step_of(steps, 1)),
    )


def largest_batch(found: Account, steps: Sequence[Step], usable: float) -> int:
    """Images per pass that fit into ``usable`` bytes, 0 where not even one does."""
    fits, too_many = 0, 2**20
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if found.peak(step_of(steps, middle)) <= usable:
            fits = middle
        else:
            too_many = middle
    return fits


def sent_bytes(tensors: Tensors, zero: Zero, world_size: int, accumulation: int) -> float:
    """What each process sends in a step, every collective as a ring.

    DeepSpeed's ZeRO 1 and 2 do an all-reduce, 2 (N - 1) / N of the gradients, before they gather the updated weights;
    at ZeRO-0 gradients are sent in float32 whatever the precision.
    """
    ring = (world_size - 1) / world_size
    weights = FLOAT * tensors.trained
    gradients = sum((2 if half and zero.half else FLOAT) * elements for elements, half in tensors.parameters)
    if zero.stage == 0:
        return ring * 2 * weights
    if zero.stage < 3:
        return ring * (2 * gradients * (accumulation if zero.stage == 2 else 1) + weights)
    everything = [*tensors.parameters, *((elements, False) for elements in tensors.frozen)]
    large = [(n, half) for n, half in everything if n >= zero.persistent]
    gathered = sum((2 if half and zero.half else FLOAT) * n for n, half in large)
    elements = sum(n for n, _ in large)
    again = 1 - gathered_elements([n for n, _ in everything], zero) / elements if elements else 0
    always = FLOAT * sum(n for n, _ in everything if n < zero.persistent)
    return ring * (accumulation * (gradients + gathered * (1 + again)) + always)


def optimizer_cost(optim: OptimConfig, sizes: Sequence[int], *, gpu: bool = True) -> tuple[int, int]:
    """Bytes of the optimiser's states for tensors of so many elements, and the most that a step needs besides.

    Two steps of the real optimiser without values, as torch runs it on a GPU: many tensors at a time.
    """
    with Shapes() as mode:
        tensors = [nn.Parameter(mode.emptied(torch.empty(size))) for size in sizes]
        for tensor in tensors:
            tensor.grad = mode.emptied(torch.empty(tensor.numel()))
        optimizer = build_optimizer([dict(params=tensors, names=[], lr_scale=1.0, wd_scale=1.0)], optim)
        for group in optimizer.param_groups:
            if "foreach" in group:
                group["foreach"] = gpu
        set_step(optimizer, 1e-3, 0.1)
        mode.start([value for tensor in tensors for value in (tensor, tensor.grad) if value is not None])
        optimizer.step()
        states = mode.alive
        mode.moments.clear()
        optimizer.step()
        mode.stop()
        return states, max(alive for alive, _ in mode.moments) - states
