"""One process of two that share the batch norms of several networks: writes what it found.

``python -m tests.engine.batch_norm_run FOLDER``; the parent compares with one process that has all images.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from engine.batch_norm import synchronise
from engine.world import World, join
from models.masking import random_mask
from models.sparse import dense, sparse_images
from tests.saved import gradients

SHARES = (5, 2)
"""Images of the processes."""
HIDDEN = (2, 4)
"""Hidden patches, of 6, of the processes' images."""

KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(4), (4,)),
    "1d_sequence": (lambda: nn.BatchNorm1d(4, momentum=0.3), (4, 6)),
    "2d": (lambda: nn.BatchNorm2d(4, eps=1e-3), (4, 3, 5)),
    "3d": (lambda: nn.BatchNorm3d(4), (4, 2, 3, 2)),
    "cumulative": (lambda: nn.BatchNorm2d(4, momentum=None), (4, 3, 5)),
    "no_gain": (lambda: nn.BatchNorm2d(4, affine=False), (4, 3, 5)),
    "no_statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (4, 3, 5)),
    "timm": (lambda: BatchNormAct2d(4, act_layer=nn.SiLU), (4, 3, 5)),
}


def norm_of(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A norm with gains and statistics of its own, and the images of all processes, far from zero."""
    make, shape = KINDS[kind]
    draw = torch.Generator().manual_seed(3)
    norm: nn.Module = make().to(dtype).train()
    for value in (*norm.parameters(), *(b for b in norm.buffers() if b.is_floating_point())):
        value.data.copy_(0.5 + torch.rand(value.shape, generator=draw))
    batch = sum(SHARES)
    scale = torch.arange(1, batch + 1, dtype=torch.float64).view(-1, *[1] * len(shape))  # shares are not alike
    return norm, (torch.randn(batch, *shape, generator=draw, dtype=torch.float64) * scale + 3).to(dtype)


def weights_of(x: Tensor) -> Tensor:
    """What each value contributes to the loss: by its place among all images."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(x.dtype)


def twice(norm: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Any]:
    """Two training steps on ``x`` (the second on its half): outputs, gradients of the input and of the weights, statistics."""
    x = x.clone().requires_grad_()
    out = norm(x)
    (out * weights).sum().backward()
    grad, of_weights = x.grad, gradients(norm)
    with torch.no_grad():
        norm(x / 2)
    return {"out": out.detach(), "grad": grad, "weights": of_weights, "buffers": dict(norm.named_buffers())}


class Network(nn.Module):
    """Two convolutions with norms and ReLUs: sparse maps are made again for the backward pass, not kept."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
        self.gate = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()  # one value per image


def sparse_case(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, mask and weights of the loss of one process."""
    draw = torch.Generator().manual_seed(7 + rank)
    images = torch.randn(SHARES[rank], 3, 16, 24, generator=draw, dtype=torch.float64) * (1 + rank) + rank
    mask = random_mask(SHARES[rank], (2, 3), HIDDEN[rank], draw)
    return images, mask, torch.randn(SHARES[rank], 4, 8, 12, generator=draw, dtype=torch.float64)


def sparse_step(network: nn.Module, rank: int, backend: str) -> dict[str, Any]:
    """A training step on masked images."""
    images, mask, weights = sparse_case(rank)
    images.requires_grad_()
    out = dense(network(sparse_images(images, mask, backend)))
    (out * weights).sum().backward()
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    return {"out": out.detach(), "grad": images.grad, "weights": gradients(network), "buffers": buffers}


def main(folder: Path, world: World) -> None:
    first = sum(SHARES[: world.rank])
    mine = slice(first, first + SHARES[world.rank])
    found: dict[str, Any] = {}
    for kind in KINDS:
        norm, x = norm_of(kind)
        assert synchronise(norm, world) == 1
        found[kind] = twice(norm, x[mine], weights_of(x)[mine])
    norm, x = norm_of("2d", torch.float32)
    norm_and = nn.Sequential(norm)
    assert synchronise(norm_and, world) == 1
    found["bfloat16"] = twice(norm_and, x.bfloat16()[mine], weights_of(x.bfloat16())[mine])
    for backend in ("tiles", "masked"):
        network = Network().double().train()
        assert synchronise(network, world) == 3
        found[f"sparse_{backend}"] = sparse_step(network, world.rank, backend)
    # One value per channel in each process is enough where all of them have more.
    single, _ = norm_of("1d")
    synchronise(single, world)
    single(torch.full((1, 4), float(world.rank), dtype=torch.float64))
    found["single"] = dict(single.named_buffers())
    torch.save(found, folder / f"found{world.rank}.pt")


if __name__ == "__main__":
    with join(threads=1) as joined:
        main(Path(sys.argv[1]), joined)
