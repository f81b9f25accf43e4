"""The network as evaluation, export and the moving average see it: whole, whatever ZeRO has cut it into."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.world import World


class Whole:
    """The network of an engine, and its moving average where there is one, at ZeRO 0 to 2: both are ordinary modules."""

    def __init__(self, method: nn.Module, decay: float, world: World) -> None:
        """``decay`` of the average, 0 for none. Called before DeepSpeed takes the network."""
        self.method, self.world, self.decay = method, world, decay
        self.average: Any = copy.deepcopy(method).to(world.device).eval() if decay else None

    def begin(self) -> None:
        """DeepSpeed has taken the network."""

    def update(self) -> None:
        """Follow the weights by one step of the average."""
        if self.average is not None:
            _follow(_tensors(self.average), _tensors(self.method), self.decay)

    @contextmanager
    def weights(self) -> Iterator[nn.Module]:
        """The network with the weights that are trained; every process calls it."""
        yield self.method

    @contextmanager
    def kept(self) -> Iterator[nn.Module]:
        """The network that is evaluated and exported: the average where there is one; every process calls it."""
        yield self.method if self.average is None else self.average

    def average_state(self) -> dict[str, Tensor] | None:
        """State dict of the average, for a checkpoint; every process calls it."""
        return None if self.average is None else self.average.state_dict()

    def load_average(self, state: dict[str, Tensor]) -> None:
        """Put back what :meth:`average_state` gave."""
        self.average.load_state_dict(state)

    def squared_norm(self) -> Tensor:
        """Sum of the squares of all weights, a scalar."""
        return nn.utils.get_total_norm([p.detach() for p in self.method.parameters()]).double().square()


class Gathered(Whole):
    """The same at ZeRO-3: a copy on the CPU is filled from the shards, and lent to the device while it is used.

    The average is kept of this process's shards only, which needs no communication.
    """

    def __init__(self, method: nn.Module, decay: float, world: World) -> None:
        super().__init__(method, 0.0, world)
        self.decay = decay
        self.copy = copy.deepcopy(method).cpu()
        self.shards: dict[str, Tensor] | None = None
        self.buffers: dict[str, Tensor] = {}

    def begin(self) -> None:
        if self.decay and self.shards is None:
            self.shards = {name: _shard(p).clone() for name, p in self.method.named_parameters()}
            self.buffers = {name: value.clone() for name, value in self.method.named_buffers()}

    def update(self) -> None:
        if self.shards is not None:
            mine = {name: _shard(p) for name, p in self.method.named_parameters()}
            _follow(self.shards | self.buffers, mine | dict(self.method.named_buffers()), self.decay)

    @contextmanager
    def weights(self) -> Iterator[nn.Module]:
        yield from self._lend(None, dict(self.method.named_buffers()))

    @contextmanager
    def kept(self) -> Iterator[nn.Module]:
        yield from self._lend(self.shards, self.buffers if self.shards else dict(self.method.named_buffers()))

    def _lend(self, shards: dict[str, Tensor] | None, buffers: dict[str, Tensor]) -> Iterator[nn.Module]:
        self._fill(shards, buffers)
        try:
            yield self.copy.to(self.world.device)
        finally:
            self.copy.cpu()

    @torch.no_grad()
    def _fill(self, shards: dict[str, Tensor] | None, buffers: dict[str, Tensor]) -> None:
        targets = dict(self.copy.named_parameters())
        for name, parameter in self.method.named_parameters():
            shard = _shard(parameter) if shards is None else shards[name]
            targets[name].copy_(self._join(shard, parameter))
        for name, value in self.copy.named_buffers():
            value.copy_(buffers[name])

    def _join(self, shard: Tensor, parameter: Any) -> Tensor:
        """All processes' shards as one tensor of the parameter's shape."""
        shard = shard.to(self.world.device)
        whole = shard
        if self.world.size > 1:
            whole = torch.empty(shard.numel() * self.world.size, dtype=shard.dtype, device=shard.device)
            dist.all_gather_into_tensor(whole, shard.contiguous())
        return whole[: parameter.ds_numel].view(parameter.ds_shape)

    def average_state(self) -> dict[str, Tensor] | None:
        if self.shards is None:
            return None
        self._fill(self.shards, self.buffers)
        return {name: value.clone() for name, value in self.copy.state_dict().items()}

    @torch.no_grad()
    def load_average(self, state: dict[str, Tensor]) -> None:
        self.copy.load_state_dict(state)
        self.begin()
        assert self.shards is not None
        wholes = dict(self.copy.named_parameters())
        for name, shard in self.shards.items():
            mine = wholes[name].flatten()[self.world.rank * shard.numel() :][: shard.numel()]
            shard[: mine.numel()].copy_(mine)
        for name, value in self.copy.named_buffers():
            self.buffers[name].copy_(value)

    def squared_norm(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        parameter: Any
        for parameter in self.method.parameters():
            shard = _shard(parameter)
            valid = max(min(shard.numel(), parameter.ds_numel - self.world.rank * shard.numel()), 0)
            total += shard[:valid].double().square().sum().cpu()
        return self.world.sum([total.item()])[0]


def _shard(parameter: Any) -> Tensor:
    """This process's part of a parameter that ZeRO-3 has cut, flat; its end may be padding."""
    return parameter.ds_tensor.detach()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once, however many names it has."""
    return {name: p.detach() for name, p in module.named_parameters()} | dict(module.named_buffers())


def _follow(average: dict[str, Tensor], current: dict[str, Tensor], decay: float) -> None:
    """One step of the moving average, in place.

    timm's ``ModelEmaV3`` walks through state dicts, where a shared weight stands once per name: its average would take
    several steps.
    """
    for name, value in current.items():
        if not value.is_floating_point():
            average[name].copy_(value)
    moving = [name for name, value in current.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[name] for name in moving], [current[name] for name in moving], 1.0 - decay)


class Statistics:
    """Running statistics of batch norms as they were before a step: one on values that are not finite must not stay."""

    def __init__(self, module: nn.Module) -> None:
        norms = [one for one in module.modules() if isinstance(one, nn.modules.batchnorm._NormBase)]
        self._buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self.keep()

    def keep(self) -> None:
        """Remember them."""
        self._kept = [buffer.clone() for buffer in self._buffers]

    def restore(self) -> None:
        """Put back what was remembered."""
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(kept)
