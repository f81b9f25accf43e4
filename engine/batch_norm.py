"""Batch norm over the images of all processes: what one process with the whole batch would compute.

Statistics are sums, added up with the number of values that stand behind them, so that processes may hold different
numbers of images, or of visible sites. The maths is torch's own, in float32 at least, and sums over processes are of
float64. A batch norm keeps its class's name and its keys; in evaluation, and in a run of one process, nothing changes.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import handle_torch_function, has_torch_function_unary

from engine.config import ConfigError
from engine.world import World

log = logging.getLogger(__name__)


def share(module: nn.Module, world: World, wanted: bool) -> None:
    """As ``train.sync_batchnorm`` says: :func:`synchronise`, or tell that it is not done. Before DeepSpeed takes ``module``."""
    if world.size == 1:
        return
    if wanted:
        if count := synchronise(module, world):
            log.info("%d batch norms use the statistics of all %d processes' images", count, world.size)
    elif any(isinstance(m, _BatchNorm) and m.track_running_stats for m in module.modules()):
        log.warning(
            "train.sync_batchnorm=false: each of %d processes normalises by its own images, and of their running statistics "
            "those of rank 0 are kept",
            world.size,
        )


def synchronise(module: nn.Module, world: World) -> int:
    """Make every batch norm in ``module`` use the statistics of all processes; returns how many there are.

    They are changed in place. With one process there is nothing to do, and nothing is done.

    Raises:
        ConfigError: a norm takes statistics over a batch in a way of its own, so that they cannot be added up.
    """
    if world.size == 1:
        return 0
    count, batch_norm = 0, BatchNorm(world.sum)
    for name, norm in module.named_modules():
        if isinstance(norm, Synchronised) or getattr(norm, "over_processes", False):
            continue
        if isinstance(norm, nn.SyncBatchNorm):  # torch's own, of a model that brings it
            continue
        if isinstance(norm, _BatchNorm) and type(norm).forward in (_BatchNorm.forward, BatchNormAct2d.forward):
            norm.__class__ = _synchronised(type(norm))  # type: ignore[arg-type]
            norm.batch_norm = batch_norm  # type: ignore[assignment]
            count += 1
        elif type(norm).__name__.startswith("Frozen"):  # whose statistics never change
            continue
        elif isinstance(norm, _BatchNorm) or ("running_var" in norm._buffers and not isinstance(norm, _NormBase)):
            raise ConfigError(
                f"{name} ({type(norm).__name__}) takes statistics over a batch in a way that is not known here, so that those "
                "of several processes cannot be added up: set train.sync_batchnorm=false, or choose another encoder"
            )
    return count


class Synchronised(_BatchNorm):
    """What a batch norm's class is extended by."""

    batch_norm: "BatchNorm"

    @torch.compiler.disable  # processes talk to each other in the middle of it
    def forward(self, input: Tensor) -> Tensor:
        """As the class that is extended does it, in training by all processes' statistics."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        factor = 0.0 if self.momentum is None else self.momentum
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a mean over all batches
                factor = 1.0 / float(self.num_batches_tracked)
        running = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        out = self.batch_norm(input, *running, self.weight, self.bias, True, factor, self.eps)
        if isinstance(self, BatchNormAct2d):
            out = self.act(self.drop(out))
        return out


@functools.cache
def _synchronised(kind: type[_BatchNorm]) -> type[_BatchNorm]:
    """``kind`` as :class:`Synchronised`, under its own name."""
    return type(kind.__name__, (Synchronised, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


class BatchNorm:
    """``torch.nn.functional.batch_norm`` with statistics that ``total`` adds up over processes.

    Any tensor that takes part in torch's functions by ``__torch_function__`` is handed this as it would be torch's
    own: a map of visible sites gives the sites alone, and that is how sparse encoding needs no code of its own here.

    Args:
        total: a float64 vector -> its sum over all processes; all of them call it equally often.
    """

    def __init__(self, total: Callable[[Tensor], Tensor]) -> None:
        self.total = total
        self.__name__ = "batch_norm"

    def __call__(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """(N, C, ...) -> the same shape and type."""
        given = (running_mean, running_var, weight, bias, training, momentum, eps)
        if has_torch_function_unary(input):
            return handle_torch_function(self, (input,), input, *given)
        return self.remembering(input, *given)[0]

    def remembering(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The result, and a function that makes it again of the same input without asking the other processes.

        Raises:
            ValueError: all processes together hold one value per channel, or none.
        """
        if not training:
            again = functools.partial(
                F.batch_norm, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias, eps=eps
            )
            return again(input), again
        count, mean, var = self._statistics(input.detach())
        if count <= 1:
            raise ValueError(
                f"a batch norm in training needs more than 1 value per channel over all processes, got {count:g} from an input of "
                f"{tuple(input.shape)}: use a larger batch"
            )
        with torch.no_grad():
            if running_mean is not None:
                running_mean.mul_(1 - momentum).add_(mean.to(running_mean.dtype), alpha=momentum)
            if running_var is not None:
                unbiased = var * (count / (count - 1))
                running_var.mul_(1 - momentum).add_(unbiased.to(running_var.dtype), alpha=momentum)
        dtype = _wide(input.dtype)
        mean, var = mean.to(dtype), var.to(dtype)
        out = _Normalise.apply(input, weight, bias, mean, var, eps, count, self.total)
        # What is behind a weight now: ZeRO-3 takes it away from the parameter itself until that is needed.
        gain, shift = (None if value is None else value.detach() for value in (weight, bias))
        return out, lambda x: F.batch_norm(x, mean, var, gain, shift, False, 0.0, eps)

    def _statistics(self, x: Tensor) -> tuple[float, Tensor, Tensor]:
        """Number of values per channel over all processes, and their mean and (biased) variance, float64 (C,)."""
        own = x.numel() // x.shape[1]
        mean = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        squares = mean
        if own:
            values, axes = x.to(_wide(x.dtype)), _others(x)
            centre = values.mean(axes, keepdim=True)
            mean, squares = centre.flatten().double(), (values - centre).square_().mean(axes).double()
        # Each process's own spread is about its own mean; sums of these two numbers have no other cancellation.
        sums = torch.cat([mean.new_tensor([1.0]), mean, squares + mean.square()]) * own
        count, *moments = self.total(sums).split([1, len(mean), len(mean)])
        number = float(count)
        mean, powers = (moment / number for moment in moments)
        return number, mean, (powers - mean.square()).clamp_(min=0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _others(x: Tensor) -> list[int]:
    """All axes but the channels'."""
    return [axis for axis in range(x.dim()) if axis != 1]


class _Normalise(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps) * weight + bias``, where mean and variance follow from all processes' ``x``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        count: float,
        total: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.count, ctx.total = count, total
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.dim() - 2)
        dtype = _wide(x.dtype)
        grads, centred, axes = grad.to(dtype), x.to(dtype) - mean.view(shape), _others(x)
        sums = torch.stack([grads.sum(axes), (grads * centred).sum(axes)])
        grad_x = None
        if ctx.needs_input_grad[0]:
            over_all = ctx.total(sums.double()) / ctx.count
            mean_grad, slope = over_all[0].to(dtype), (over_all[1].to(dtype) * inverse.square())
            scale = inverse if weight is None else inverse * weight
            grad_x = torch.addcmul(grads - mean_grad.view(shape), centred, slope.view(shape), value=-1)
            grad_x = grad_x.mul_(scale.view(shape)).to(x.dtype)
        # Of a gain and a bias each process has the part of its own images, as of any weight: DeepSpeed adds them up.
        grad_weight = sums[1] * inverse if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, sums[0] if ctx.needs_input_grad[2] else None, None, None, None, None, None
