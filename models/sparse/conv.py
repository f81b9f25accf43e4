"""Convolutions on tiles that see their neighbours' sites, several exact ways.

* *halo*: each tile is gathered with its border and convolved without padding. Wins on large tiles.
* *canvas*: the dense map, zeros where hidden, is convolved and its visible part gathered. Costs the dense convolution;
  wins for depthwise kernels on small tiles, where borders are larger than the tiles.
* *pairs*: for every position in the kernel, the output sites that have a visible neighbour there are listed; their
  neighbours are gathered, multiplied by that position's matrix, and summed. Skips hidden neighbours altogether: less
  arithmetic than the visible share of the dense convolution. Wins for full convolutions on small tiles, and for
  depthwise ones (one number per channel and position instead of a matrix) on tiles of one site.

All keep for the backward pass what the convolution was given and nothing wider: gathering again is cheap.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from models.sparse.gather import Plan, gather, scatter
from models.sparse.tensor import Pad, padded

if TYPE_CHECKING:
    from models.sparse.tiles import Tiles

WAYS = ("halo", "canvas", "pairs")

WIDE = 2.5
"""Sites per tile with its border, over those of the dense map per visible tile, up to which *halo* beats *canvas*.

Measured on a CPU (AMD EPYC, oneDNN) for depthwise and grouped kernels of 3 to 7: equal at 2.5."""
SMALL = 2
"""Largest tile side on which *pairs* beats *halo* for a full convolution (the same CPU)."""


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


def choose(x: Tensor, weight: Tensor, near: Neighbourhood) -> str:
    """The fastest way for these shapes: a rule, not a measurement, so that a continued run computes what it computed."""
    kernel = (weight.shape[2], weight.shape[3])
    if near.pad.mode not in ("constant", "reflect") or near.pad.value:
        return "canvas"  # what lies outside the image is neither zero nor a site nearby
    largest = {1: SMALL, x.shape[1]: 1}.get(near.groups, 0)
    if max(near.out_side) <= largest and (near.groups == 1 or len(weight) == near.groups) and near.tiles.on_cpu:
        return "pairs"
    extent, grid = near.extent(kernel), near.tiles.grid
    wide = extent[0] * extent[1] / (near.side[0] * near.side[1])
    dense = grid[0] * grid[1] / near.tiles.visible
    return "halo" if near.groups == 1 or wide <= WIDE * dense else "canvas"


def tile_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, near: Neighbourhood, way: str | None = None) -> Tensor:
    """``x`` (N, C, h, w) tiles, ``weight`` (O, C / groups, kh, kw) -> (N, O, h', w') tiles; ``way`` as in :data:`WAYS`."""
    if torch.is_autocast_enabled(x.device.type):
        # What conv2d would do by itself; inside an autograd.Function autocast has no say in the backward pass.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    way = way or choose(x, weight, near)
    if way == "canvas":
        return _canvas_conv(x, weight, bias, near)
    return {"halo": _HaloConv, "pairs": _PairsConv}[way].apply(x, weight, bias, near)


def flat(x: Tensor) -> Tensor:
    """(N, C, h, w) -> (N * h * w, C); a view of what is channels last in memory."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def unflat(rows: Tensor, side: tuple[int, int]) -> Tensor:
    """The inverse of :func:`flat`."""
    return rows.view(-1, *side, rows.shape[-1]).permute(0, 3, 1, 2)


def patch_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution whose kernel is its stride as one matrix product: on maps of a few sites the fastest way."""
    p, q = weight.shape[2:]
    rows = x.permute(0, 2, 3, 1)
    if (p, q) != (1, 1):
        rows = rearrange(rows, "n (h p) (w q) c -> n h w (p q c)", p=p, q=q)
    return F.linear(rows, weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)


def _canvas_conv(x: Tensor, weight: Tensor, bias: Tensor | None, near: Neighbourhood) -> Tensor:
    left, right, top, bottom = near.pad.amounts
    whole, padding = near.tiles.canvas(x, near.side), (top, left)
    if left != right or top != bottom or near.pad.mode != "constant" or near.pad.value:
        whole, padding = padded(whole, near.pad), (0, 0)
    out = F.conv2d(whole, weight, bias, near.stride, padding, near.dilation, near.groups)
    return near.tiles.from_canvas(out, near.out_side)


class _HaloConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, near: Neighbourhood) -> Tensor:
        ctx.near, ctx.has_bias = near, bias is not None
        ctx.save_for_backward(x, weight)
        wide, _ = _halo(x, weight, near)
        return F.conv2d(wide, weight, bias, near.stride, 0, near.dilation, near.groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        near: Neighbourhood = ctx.near
        x, weight = ctx.saved_tensors
        wide, plan = _halo(x, weight, near)
        asked = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
        grad_wide, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, wide, weight, [weight.shape[0]], near.stride, (0, 0), near.dilation, False, (0, 0), near.groups, asked
        )
        grad_x = unflat(scatter(flat(grad_wide), plan), near.side) if asked[0] else None
        return grad_x, grad_weight if asked[1] else None, grad_bias if asked[2] else None, None


def _halo(x: Tensor, weight: Tensor, near: Neighbourhood) -> tuple[Tensor, Plan]:
    """Tiles with what lies under the kernel around them, (N, C, *extent)."""
    extent = near.extent((weight.shape[2], weight.shape[3]))
    plan = near.tiles.halo_plan(near.side, near.pad, extent)
    return unflat(gather(flat(x), plan), extent), plan


@dataclasses.dataclass(frozen=True)
class Pairs:
    """For each position in the kernel, which input site is the neighbour there of which output site; hidden ones left out."""

    inputs: Plan
    """pairs from input sites"""
    outputs: Plan
    """pairs from output sites"""
    counts: list[int]
    """pairs of each position, row by row through the kernel"""


def pairs_of(near: Neighbourhood, kernel: tuple[int, int]) -> Pairs:
    """All pairs of a kernel, position after position."""
    extent, out_side, (rows, columns) = near.extent(kernel), near.out_side, near.dilation
    source = near.tiles.halo_plan(near.side, near.pad, extent).source.view(-1, *extent)
    found = torch.stack(
        [
            source[:, i * rows :: near.stride[0], j * columns :: near.stride[1]][:, : out_side[0], : out_side[1]]
            for i in range(kernel[0])
            for j in range(kernel[1])
        ]
    ).flatten(1)  # (positions, output sites): the input site there
    there = found >= 0
    sites = torch.arange(found.shape[1], device=found.device).expand_as(found)
    num_inputs = len(source) * near.side[0] * near.side[1]
    return Pairs(Plan(found[there], num_inputs), Plan(sites[there], found.shape[1]), there.sum(1).tolist())


class _PairsConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, near: Neighbourhood) -> Tensor:
        ctx.near, ctx.has_bias = near, bias is not None
        ctx.save_for_backward(x, weight)
        pairs = near.tiles.pairs(near, (weight.shape[2], weight.shape[3]))
        products = _by_position(gather(flat(x), pairs.inputs), weight, pairs.counts, near.groups)
        rows = scatter(products, pairs.outputs)
        return unflat(rows if bias is None else rows.add_(bias), near.out_side)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        near: Neighbourhood = ctx.near
        x, weight = ctx.saved_tensors
        pairs = near.tiles.pairs(near, (weight.shape[2], weight.shape[3]))
        rows = flat(grad)
        grads = gather(rows, pairs.outputs)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            products = _by_position(grads, weight, pairs.counts, near.groups, transposed=True)
            grad_x = unflat(scatter(products, pairs.inputs), near.side)
        if ctx.needs_input_grad[1]:
            inputs = gather(flat(x), pairs.inputs)
            found = rows.new_empty(len(pairs.counts), *weight.shape[:2])
            for a, b, result in zip(inputs.split(pairs.counts), grads.split(pairs.counts), found, strict=True):
                if near.groups == 1:
                    torch.mm(b.t(), a, out=result)
                else:
                    torch.sum(a * b, 0, out=result.squeeze(1))
            grad_weight = found.view(*weight.shape[2:], *weight.shape[:2]).permute(2, 3, 0, 1)
        return grad_x, grad_weight, rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None, None


def _by_position(rows: Tensor, weight: Tensor, counts: list[int], groups: int, *, transposed: bool = False) -> Tensor:
    """Rows of each position times that position's part of ``weight``: a matrix (O, C), or where depthwise (C, 1)."""
    parts = weight.permute(2, 3, 0, 1).flatten(0, 1).contiguous()  # contiguous as matrix products want it
    out = rows.new_empty(len(rows), weight.shape[1 if transposed and groups == 1 else 0])
    for source, part, result in zip(rows.split(counts), parts, out.split(counts), strict=True):
        if groups == 1:
            torch.mm(source, part if transposed else part.t(), out=result)
        else:
            torch.mul(source, part.squeeze(1), out=result)
    return out
