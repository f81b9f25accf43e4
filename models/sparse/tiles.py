"""The default backend: a masked image is a batch of its visible tiles.

Each visible mask patch owns a square of every feature map, its *tile*. Tiles are gathered into the batch axis,
``(B * K, C, h, w)`` for ``K`` visible patches, images in order; local functions then run as they are and cost the
visible share, and only what looks beyond a tile needs this file. Memory is laid out channels last: a site is a row of
``C`` values, and tiles, tiles with a border of neighbours (*halo*), and dense maps (*canvas*) are gathers of rows.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.sparse.conv import Neighbourhood, Pairs, flat, pairs_of, patch_conv2d, tile_conv2d, unflat
from models.sparse.gather import Plan, gathered
from models.sparse.geometry import Geometry, require_size
from models.sparse.tensor import Pad, Sites, SparseTensor, Window, padded, wrap

FEW = 2
"""Largest tile side on which a matrix product beats the library's convolution where a kernel stays inside a tile."""


class Tiles(Geometry):
    """Maps are (B * K, C, h, w), channels last in memory. Index maps are made once per call and shared by its layers."""

    backend = "tiles"
    recomputes = True

    def __init__(self, mask: Tensor, image_size: tuple[int, int]) -> None:
        super().__init__(mask, image_size)
        self.on_cpu = mask.is_cpu
        """whether ways are chosen that are fast on a CPU; a trace of a step answers for the device that it stands for"""
        self.patches = (~mask).flatten().nonzero().squeeze(1)
        """(B * K,) int64: the visible patches, counted through the batch"""
        slots = torch.full((mask.numel(),), -1, dtype=torch.long, device=mask.device)
        slots[self.patches] = torch.arange(len(self.patches), device=mask.device)
        self.slots = slots.view(self.batch, *self.grid)
        """(B, h, w) int64: the tile of a patch, -1 where it is hidden"""
        self._plans: dict[tuple[object, ...], Plan] = {}
        self._pairs: dict[tuple[object, ...], Pairs] = {}

    @property
    def rows_of_batch(self) -> int:
        return len(self.patches)

    def enter(self, images: Tensor) -> SparseTensor:
        side = self.mask_patch
        tiles = images.unfold(2, side[0], side[0]).unfold(3, side[1], side[1])  # (B, C, grid, side), a view
        patch, columns = self.patches, self.grid[1]
        sites = self.grid[0] * columns
        picked = tiles[patch // sites, :, patch % sites // columns, patch % columns]
        return wrap(picked.contiguous(memory_format=torch.channels_last), Sites(self, "nchw", side))

    def images(self, x: Tensor) -> Tensor:
        return x[:: self.visible]

    def spread(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.visible, 0)

    def rows(self, x: Tensor, sites: Sites) -> Tensor:
        return flat(x).view(self.batch, -1, x.shape[1])

    def from_rows(self, rows: Tensor, sites: Sites) -> Tensor:
        return unflat(rows.reshape(-1, rows.shape[-1]), sites.side)

    def places(self, sites: Sites) -> Tensor:
        size = self.grid[0] * sites.side[0] * self.grid[1] * sites.side[1]
        return self.tiles_plan(sites.side).source.view(self.batch, -1) % size

    def dense(self, x: Tensor, sites: Sites) -> Tensor:
        return self.canvas(x, sites.side)

    def batch_norm(self, x: Tensor, sites: Sites, norm: Callable[[Tensor], Tensor]) -> Tensor:
        # As one image with one column: the same sums, and on maps of one site several times faster.
        rows = flat(x)
        return unflat(flat(norm(rows.view(1, -1, 1, x.shape[1]).permute(0, 3, 1, 2))), sites.side)

    # --- index maps ---

    def canvas_plan(self, side: tuple[int, int]) -> Plan:
        """Dense sites (B * H * W) from tile sites."""
        return self._plan(("canvas", side), lambda: self.sources(side, self._patch_sites(side)))

    def tiles_plan(self, side: tuple[int, int]) -> Plan:
        """Tile sites from dense sites."""
        return self._plan(("tiles", side), lambda: self.canvas_plan(side).inverse().source, dense=True)

    def halo_plan(self, side: tuple[int, int], pad: Pad, extent: tuple[int, int]) -> Plan:
        """Sites of ``extent`` around each tile, from ``pad.amounts`` left of and above it on, from tile sites.

        Hidden neighbours and what lies outside the image are absent; a padding by reflection reads the reflected site.
        """
        return self._plan(("halo", side, pad, extent), lambda: self._halo(side, pad, extent))

    def pairs(self, near: Neighbourhood, kernel: tuple[int, int]) -> Pairs:
        """Neighbours under a kernel, pair by pair."""
        key = (near.side, near.pad, near.stride, near.dilation, kernel)
        if key not in self._pairs:
            self._pairs[key] = pairs_of(near, kernel)
        return self._pairs[key]

    def _plan(self, key: tuple[object, ...], make: Callable[[], Tensor], *, dense: bool = False) -> Plan:
        if key not in self._plans:
            side: tuple[int, int] = key[1]  # type: ignore[assignment]
            patches = self.mask.numel() if dense else len(self.patches)
            self._plans[key] = Plan(make(), patches * side[0] * side[1])
        return self._plans[key]

    def _patch_sites(self, side: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Image, row and column of every dense site, broadcastable to (B, H, W)."""
        device = self.mask.device
        image = torch.arange(self.batch, device=device).view(-1, 1, 1)
        row = torch.arange(self.grid[0] * side[0], device=device).view(1, -1, 1)
        return image, row, torch.arange(self.grid[1] * side[1], device=device).view(1, 1, -1)

    def sources(self, side: tuple[int, int], where: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Tile sites at (image, row, column) of the dense map, -1 where hidden -> flat int64."""
        image, row, column = where
        slot = self.slots[image, row // side[0], column // side[1]]
        site = (slot * side[0] + row % side[0]) * side[1] + column % side[1]
        return torch.where(slot >= 0, site, -1).flatten()

    def _halo(self, side: tuple[int, int], pad: Pad, extent: tuple[int, int]) -> Tensor:
        device, size = self.mask.device, (self.grid[0] * side[0], self.grid[1] * side[1])
        sites = self.grid[0] * self.grid[1]
        patch = self.patches.view(-1, 1, 1)
        left, _, top, _ = pad.amounts
        row = patch % sites // self.grid[1] * side[0] - top + torch.arange(extent[0], device=device).view(1, -1, 1)
        column = patch % self.grid[1] * side[1] - left + torch.arange(extent[1], device=device).view(1, 1, -1)
        if pad.mode == "reflect":
            row, column = _reflect(row, size[0]), _reflect(column, size[1])
        inside = (row >= 0) & (row < size[0]) & (column >= 0) & (column < size[1])
        found = self.sources(side, (patch // sites, row.clamp(0, size[0] - 1), column.clamp(0, size[1] - 1)))
        return torch.where(inside.flatten(), found, -1)

    def canvas(self, x: Tensor, side: tuple[int, int]) -> Tensor:
        """Tiles -> the dense map (B, C, H, W), channels last in memory, zeros where hidden."""
        rows = gathered(flat(x), self.canvas_plan(side))
        size = (self.grid[0] * side[0], self.grid[1] * side[1])
        return rows.view(self.batch, *size, -1).permute(0, 3, 1, 2)

    def from_canvas(self, x: Tensor, side: tuple[int, int]) -> Tensor:
        """The dense map -> tiles."""
        return unflat(gathered(flat(x), self.tiles_plan(side)), side)

    # --- functions that look beyond a tile ---

    def neighbours(
        self,
        function: Callable[[Tensor], Tensor],
        x: Tensor,
        sites: Sites,
        side: tuple[int, int],
        *,
        fill: float,
        local: bool,
        stride: tuple[int, int],
        window: Window | None = None,
    ) -> Tensor:
        if local:
            return require_size(function(x), side)
        if window is not None and sites.pad is None:
            near = Neighbourhood(self, sites.side, window.pad, stride, window.dilation, 1)
            self._require_output(near, window.kernel)
            extent = near.extent(window.kernel)
            plan = self.halo_plan(sites.side, window.pad, extent)
            rows = gathered(flat(x), plan)
            return window.function(unflat(rows if fill == 0.0 else rows.index_fill(0, plan.absent, fill), extent))
        whole = self.canvas(x, sites.side)
        if fill != 0.0:
            hidden = (self.canvas_plan(sites.side).source < 0).view(self.batch, 1, *whole.shape[2:])
            whole = whole.masked_fill(hidden, fill)
        size = (self.grid[0] * side[0], self.grid[1] * side[1])
        out = require_size(function(padded(whole, sites.pad)), size)
        return self.from_canvas(out.contiguous(memory_format=torch.channels_last), side)

    def conv2d(
        self,
        x: Tensor,
        sites: Sites,
        weight: Tensor,
        bias: Tensor | None,
        *,
        stride: tuple[int, int],
        pad: Pad,
        dilation: tuple[int, int],
        groups: int,
    ) -> Tensor:
        side = self.scaled(sites.side, stride)
        reach = tuple(d * (k - 1) + 1 for k, d in zip(weight.shape[2:], dilation, strict=True))
        if not any(pad.amounts) and all(r <= s for r, s in zip(reach, stride, strict=True)):
            if groups == 1 and max(side) <= FEW:
                if reach == (1, 1) and stride != (1, 1):
                    # Strides are taken after the permutation: the gradient of a slice is laid out like what was sliced.
                    x = x.permute(0, 2, 3, 1)[:, :: stride[0], :: stride[1]].permute(0, 3, 1, 2)
                if reach == (1, 1) or reach == stride == (weight.shape[2], weight.shape[3]):
                    return patch_conv2d(x, weight, bias)
            return require_size(F.conv2d(x, weight, bias, stride, 0, dilation, groups), side)
        near = Neighbourhood(self, sites.side, pad, stride, dilation, groups)
        self._require_output(near, (weight.shape[2], weight.shape[3]))
        return tile_conv2d(x, weight, bias, near)

    def _require_output(self, near: Neighbourhood, kernel: tuple[int, int]) -> None:
        """Refuse a window whose padding is not the one that keeps tiles in place."""
        left, right, top, bottom = near.pad.amounts
        found = [
            (grid * b + before + after - d * (k - 1) - 1) // s
            for grid, b, before, after, d, k, s in zip(
                self.grid, near.side, (top, left), (bottom, right), near.dilation, kernel, near.stride, strict=True
            )
        ]
        require_size(
            torch.empty(0, found[0] + 1, found[1] + 1),
            (self.grid[0] * near.out_side[0], self.grid[1] * near.out_side[1]),
        )


def _reflect(position: Tensor, size: int) -> Tensor:
    position = position.abs()
    return torch.where(position >= size, 2 * (size - 1) - position, position)
