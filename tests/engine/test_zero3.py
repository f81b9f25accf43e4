"""What ZeRO-3 changes in torch, made to fit sparse maps."""

from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor, nn

from engine import zero3
from models.masking import random_mask
from models.sparse import SparseError, dense, sparse_images


class Mlp(nn.Module):
    """A linear layer over the channels of a map, and one over pooled values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.gate = nn.Linear(3, 4).double(), nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x * self.gate(x.mean((2, 3)))[:, :, None, None]


def run(backend: str) -> tuple[Tensor, list[Any]]:
    """The map and all gradients."""
    network, draw = Mlp(), torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 16, 24, generator=draw, dtype=torch.float64).requires_grad_()
    out = dense(network(sparse_images(images, random_mask(2, (2, 3), 2, draw), backend)))
    (out * torch.randn(out.shape, generator=draw, dtype=torch.float64)).sum().backward()
    return out.detach(), [images.grad, *(p.grad for p in network.parameters())]


@pytest.mark.parametrize("backend", ["tiles", "masked"])
def test_deepspeeds_linear_hands_sparse_maps_over(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, gradients = run(backend)
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    with pytest.raises(SparseError, match="matmul"):
        run(backend)
    zero3._hand_over()
    wrapped = torch.nn.functional.linear
    zero3._hand_over()
    assert torch.nn.functional.linear is wrapped, "wrapped once"
    found, others = run(backend)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(others, gradients, rtol=1e-12, atol=1e-12)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(Mlp().fc(x), zero3_linear_wrap(x, Mlp().fc.weight, Mlp().fc.bias))


def test_torchs_own_linear_is_left_alone() -> None:
    before = torch.nn.functional.linear
    zero3._hand_over()
    assert torch.nn.functional.linear is before
