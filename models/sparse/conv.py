"""Convolutions on tiles that see their neighbours' sites, several exact ways.

* *halo*: each tile is gathered with its border and convolved without padding. Wins on large tiles.
* *canvas*: the dense map, zeros where hidden, is convolved and its visible part gathered. Costs the dense convolution;
  wins for depthwise kernels on small tiles, where borders are larger than the tiles.
* *columns*: the sites under the kernel are gathered into one row per output site, and one matrix product does the
  rest. Wins for full convolutions on tiles of a few sites.

All keep for the backward pass what the convolution was given and nothing wider: gathering again is cheap.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.sparse.gather import gather, scatter
from models.sparse.tensor import Pad

if TYPE_CHECKING:
    from models.sparse.tiles import Tiles

WAYS = ("halo", "canvas", "columns")


@dataclasses.dataclass(frozen=True)
class Neighbourhood:
    """A convolution's reach over the tiles of one batch."""

    tiles: "Tiles"
    side: tuple[int, int]
    """sites per tile of the input"""
    pad: Pad
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def out_side(self) -> tuple[int, int]:
        """Sites per tile of the output."""
        return self.side[0] // self.stride[0], self.side[1] // self.stride[1]

    def extent(self, kernel: tuple[int, int]) -> tuple[int, int]:
        """Sites under the kernel over all of a tile's outputs."""
        rows, columns = (
            (b - 1) * s + d * (k - 1) + 1
            for b, s, d, k in zip(self.out_side, self.stride, self.dilation, kernel, strict=True)
        )
        return rows, columns


def tile_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, near: Neighbourhood) -> Tensor:
    """``x`` (N, C, h, w) tiles, ``weight`` (O, C / groups, kh, kw) -> (N, O, h', w') tiles."""
    if torch.is_autocast_enabled(x.device.type):
        # What conv2d would do by itself; inside an autograd.Function autocast has no say in the backward pass.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _HaloConv.apply(x, weight, bias, near)


def _halo(x: Tensor, kernel: tuple[int, int], near: Neighbourhood) -> tuple[Tensor, Any]:
    """Tiles with what lies under the kernel around them, (N, C, *extent)."""
    from models.sparse.tiles import flat, unflat

    extent = near.extent(kernel)
    plan = near.tiles.halo_plan(near.side, near.pad, extent)
    return unflat(gather(flat(x), plan), extent), plan


class _HaloConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, near: Neighbourhood) -> Tensor:
        ctx.near, ctx.has_bias = near, bias is not None
        ctx.save_for_backward(x, weight)
        wide, _ = _halo(x, (weight.shape[2], weight.shape[3]), near)
        return F.conv2d(wide, weight, bias, near.stride, 0, near.dilation, near.groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        from models.sparse.tiles import flat, unflat

        near: Neighbourhood = ctx.near
        x, weight = ctx.saved_tensors
        wide, plan = _halo(x, (weight.shape[2], weight.shape[3]), near)
        asked = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
        grad_wide, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, wide, weight, [weight.shape[0]], near.stride, (0, 0), near.dilation, False, (0, 0), near.groups, asked
        )
        grad_x = unflat(scatter(flat(grad_wide), plan), near.side) if asked[0] else None
        return grad_x, grad_weight, grad_bias if asked[2] else None, None
