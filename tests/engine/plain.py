"""Training in plain PyTorch, as the engine's documentation describes it: what runs under DeepSpeed are compared with.

The processes of a run are simulated one after another in this one: each draws from its own seed, gradients are summed in
float64. Neither DeepSpeed nor the engine's loop has a part in it.
"""

import copy
import functools
import itertools
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from timm.optim import Lamb
from torch import Tensor, nn

from engine.schedule import Plan
from engine.schema import BaseConfig
from engine.world import seed_step
from tests.engine.lockstep import Lockstep, statistics_of_all

FP16_SCALE = 4096.0
"""What a float16 loss is multiplied by, so that its gradients do not vanish."""


@dataclass
class Trace:
    """What a run did: the mean loss of every step, and its last weights, buffers and moving average by name."""

    losses: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)


def train(
    method: Any,
    loaders: Sequence[Any],
    config: BaseConfig,
    factors: dict[str, tuple[float, float]],
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    left_out: Collection[int] = (),
    synchronise: bool = False,
) -> Trace:
    """Train ``method`` on one loader per simulated process.

    Args:
        factors: name of each trained parameter -> factors of its learning rate and weight decay.
        dtype: of torch's own autocast, None for float32.
        left_out: steps (0-based) whose update is left out, as a loss scaler does.
        synchronise: batch norms take their statistics over all processes.
    """
    method.to(device)
    plan = Plan.make(config.optim, config.train, len(loaders[0]))
    named = dict(method.named_parameters())
    assert factors.keys() == {name for name, p in named.items() if p.requires_grad}
    optimizer = _optimizer([{"params": [named[name]], "factors": both} for name, both in factors.items()], config)
    trained = [named[name] for name in factors]
    average = copy.deepcopy(method) if config.train.ema_decay else None
    replicas = [method, *(_replica(method) for _ in loaders[1:])] if synchronise else [method] * len(loaders)
    streams = [_forever(loader, plan, config.train.accumulation) for loader in loaders]
    trace = Trace()
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = float(plan.lr[step]) * group["factors"][0]
            group["weight_decay"] = float(plan.weight_decay[step]) * group["factors"][1]
        for replica in replicas:
            if hasattr(replica, "before_step"):
                replica.before_step(step, plan.steps)
        loss, gradients = _gradients(replicas, trained, streams, step, config, dtype, device, synchronise)
        trace.losses.append(loss)
        if step not in left_out:
            _clip(gradients, config.optim.clip_grad)
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
            optimizer.zero_grad()
        if average is not None:
            _follow(average, method, config.train.ema_decay)
    trace.weights = _state(method)
    trace.average = _state(average) if average is not None else {}
    return trace


def _forever(loader: Any, plan: Plan, parts: int) -> Iterator[dict[str, Tensor]]:
    for epoch in itertools.count():
        yield from itertools.islice(loader.batches(epoch), plan.steps_per_epoch * parts)


def _replica(method: nn.Module) -> nn.Module:
    """The same weights and buffers in modules of their own, with their own hooks: simulated processes run at once."""
    return copy.deepcopy(method, {id(value): value for value in (*method.parameters(), *method.buffers())})


def _gradients(
    replicas: Sequence[Any],
    trained: list[nn.Parameter],
    streams: Sequence[Iterator[dict[str, Tensor]]],
    step: int,
    config: BaseConfig,
    dtype: torch.dtype | None,
    device: str,
    synchronise: bool,
) -> tuple[float, list[Tensor]]:
    """Mean loss, and mean gradients in float64, over processes and accumulated parts."""
    parts = config.train.accumulation
    share = 1 / (parts * len(streams))
    scale = FP16_SCALE if dtype == torch.float16 else 1.0
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in trained]
    total = 0.0

    def forward(part: int, rank: int) -> Tensor:
        batch = {key: value.to(device) for key, value in next(streams[rank]).items()}
        seed_step(config.seed, step * parts + part, rank)
        with torch.autocast(device, dtype) if dtype else nullcontext():
            return replicas[rank](batch)["loss"]

    def add(loss: Tensor) -> None:
        nonlocal total
        total += float(loss.detach()) * share
        (loss * scale).backward()
        for parameter, found in zip(trained, sums, strict=True):
            if parameter.grad is not None:
                found += parameter.grad.double() * (share / scale)
            parameter.grad = None

    with pytest.MonkeyPatch.context() as patch:
        # Not what a ZeRO-3 before it has left behind.
        patch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
        for part in range(parts):
            if synchronise:
                together = Lockstep(len(streams))
                with statistics_of_all(replicas[0], together):
                    losses = together.run(functools.partial(forward, part))
                # One graph, since statistics are of all: the sum has every process's gradients.
                add(torch.stack(losses).sum())
            else:
                for rank in range(len(streams)):
                    add(forward(part, rank))
    return total, sums


def _clip(gradients: list[Tensor], most: float) -> None:
    """Scale all gradients to a common norm of at most ``most``; 0 leaves them."""
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    if most and norm > most:
        for gradient in gradients:
            gradient *= most / norm


def _optimizer(groups: list[dict[str, Any]], config: BaseConfig) -> torch.optim.Optimizer:
    optim = config.optim
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps)
    if optim.name == "lamb":
        return Lamb(groups, lr=0.0, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, max_grad_norm=None)
    assert optim.name == "sgd", f"{optim.name}: not written"
    return torch.optim.SGD(groups, lr=0.0, momentum=optim.momentum, nesterov=optim.nesterov)


@torch.no_grad()
def _follow(average: nn.Module, method: nn.Module, decay: float) -> None:
    """One step of the exponential moving average, in float64."""
    for kind in ("named_parameters", "named_buffers"):
        for (_, kept), (_, now) in zip(getattr(average, kind)(), getattr(method, kind)(), strict=True):
            if now.is_floating_point():
                kept.copy_(decay * kept.double() + (1 - decay) * now.double())
            else:
                kept.copy_(now)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
