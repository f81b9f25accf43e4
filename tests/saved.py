"""How much a forward pass keeps for the backward pass."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

T = TypeVar("T")


def kept_bytes(work: Callable[[], T], network: nn.Module) -> tuple[T, int]:
    """Result of ``work``, and bytes that autograd keeps of it; weights and buffers of ``network``, there anyway, do not count."""
    own = {value.untyped_storage().data_ptr() for value in (*network.parameters(), *network.buffers())}
    found: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        where = value.untyped_storage().data_ptr()
        if where not in own:
            found[where] = value  # alive until the end: no other tensor comes to lie at the same place
        return value

    with saved_tensors_hooks(keep, lambda value: value):
        result = work()
    return result, sum(value.untyped_storage().nbytes() for value in found.values())


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """The gradients that there are, by name; the network has none afterwards."""
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    return found


def weighted(maps: list[Tensor]) -> Tensor:
    """A scalar to which every value contributes differently, the same at every call."""
    draw = torch.Generator().manual_seed(5)
    return torch.stack([(x.float() * torch.randn(x.shape, generator=draw)).sum() for x in maps]).sum()
