"""What tests of training steps compare: gradients, and how much a forward pass keeps for the backward pass."""

import torch
from torch import Tensor, nn

from benchmarks.blocks import kept_bytes

__all__ = ["gradients", "kept_bytes", "weighted"]


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """The gradients that there are, by name; the network has none afterwards."""
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    return found


def weighted(maps: list[Tensor]) -> Tensor:
    """A scalar to which every value contributes differently, the same at every call."""
    draw = torch.Generator().manual_seed(5)
    return torch.stack([(x.float() * torch.randn(x.shape, generator=draw)).sum() for x in maps]).sum()
