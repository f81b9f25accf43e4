"""Is something computed in float32 under mixed precision? Seen in its values, and in what torch's functions are given."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import timm.layers.grn
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.grn import GRN
from models.sparse.tensor import SparseTensor, plain

NORMS = (
    *(nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm),
    *(GRN, timm.layers.grn.GlobalResponseNorm),
)

LOSSES = (
    "softmax",
    "log_softmax",
    "nll_loss",
    "mse_loss",
    "l1_loss",
    "binary_cross_entropy",
    "smooth_l1_loss",
    "huber_loss",
)
"""Parts of the names of torch's functions that must not see less than float32."""


def bare(x: Tensor) -> Tensor:
    return plain(x) if isinstance(x, SparseTensor) else x


def in_float32(function: Callable[[Any], Tensor], x: Tensor, result: Tensor) -> bool:
    """Whether ``result``, of ``function(x)`` for a bfloat16 ``x``, is what float32 arithmetic gives, rounded at most once."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        exact = bare(function(x.float()))
    found = bare(result).detach()
    if found.dtype == torch.float32:
        return bool(torch.isclose(found, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max())).all())
    # A rounding of float32's own last bit to the other side is rare; arithmetic in bfloat16 is off nearly everywhere.
    return float((found == exact.to(found.dtype)).float().mean()) > 0.99


@contextmanager
def watched(network: nn.Module) -> Iterator[dict[str, bool]]:
    """Every norm of ``network`` that is run on bfloat16 meanwhile, by name, and whether it was computed in float32."""
    found: dict[str, bool] = {}
    handles = []
    for name, module in network.named_modules():
        if not isinstance(module, NORMS):
            continue
        twin = copy.deepcopy(module)  # with statistics of its own

        def look(_: Any, inputs: Any, output: Any, name: str = name, twin: nn.Module = twin) -> None:
            if inputs[0].dtype == torch.bfloat16:
                found[name] = found.get(name, True) and in_float32(twin, inputs[0].detach(), output)

        handles.append(module.register_forward_hook(look))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Recorder(TorchDispatchMode):
    """The types that losses and softmaxes are computed in, by function."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0].strip("_")
        if any(part in name for part in LOSSES) and "attention" not in name:
            self.found.setdefault(name, set()).update(
                x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point()
            )
        return func(*args, **(kwargs or {}))
