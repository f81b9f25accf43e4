"""The reference backend: dense maps, set to zero at hidden sites after every layer that looks at neighbours.

This is how SparK's released code encodes; it computes everything and then throws the hidden part away.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from models.masking import upsample
from models.sparse.geometry import Geometry, require_size
from models.sparse.tensor import Pad, Sites, SparseTensor, Window, padded, wrap


class Masked(Geometry):
    """Maps are (B, C, H, W)."""

    backend = "masked"

    def __init__(self, mask: Tensor, image_size: tuple[int, int]) -> None:
        super().__init__(mask, image_size)
        self._hidden: dict[tuple[int, int], Tensor] = {}
        self._visible: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    @property
    def rows_of_batch(self) -> int:
        return self.batch

    def hidden(self, side: tuple[int, int]) -> Tensor:
        """bool (B, H, W), True = hidden, at a map of ``side``."""
        if side not in self._hidden:
            self._hidden[side] = upsample(self.mask, self.tile(side))
        return self._hidden[side]

    def visible_sites(self, side: tuple[int, int]) -> tuple[Tensor, ...]:
        """Image, row and column of every visible site, image by image, row by row."""
        if side not in self._visible:
            self._visible[side] = (~self.hidden(side)).nonzero(as_tuple=True)
        return self._visible[side]

    def tile(self, side: tuple[int, int]) -> tuple[int, int]:
        return side[0] // self.grid[0], side[1] // self.grid[1]

    def enter(self, images: Tensor) -> SparseTensor:
        side = (images.shape[2], images.shape[3])
        return wrap(self._erased(images, side), Sites(self, "nchw", side))

    def _erased(self, x: Tensor, side: tuple[int, int]) -> Tensor:
        return x * (~self.hidden(side)).unsqueeze(1).to(x.dtype)

    def images(self, x: Tensor) -> Tensor:
        return x

    def spread(self, values: Tensor) -> Tensor:
        return values

    def rows(self, x: Tensor, sites: Sites) -> Tensor:
        return x.permute(0, 2, 3, 1)[self.visible_sites(sites.side)].view(self.batch, -1, x.shape[1])

    def from_rows(self, rows: Tensor, sites: Sites) -> Tensor:
        out = rows.new_zeros(self.batch, *sites.side, rows.shape[-1])
        out[self.visible_sites(sites.side)] = rows.flatten(0, 1)
        return out.permute(0, 3, 1, 2)

    def places(self, sites: Sites) -> Tensor:
        _, row, column = self.visible_sites(sites.side)
        return (row * sites.side[1] + column).view(self.batch, -1)

    def dense(self, x: Tensor, sites: Sites) -> Tensor:
        # Not a product: a hidden site may hold anything, infinities too.
        return x if sites.clean else x.masked_fill(self.hidden(sites.side).unsqueeze(1), 0.0)

    def batch_norm(self, x: Tensor, sites: Sites, norm: Callable[[Tensor], Tensor]) -> Tensor:
        return self.from_rows(norm(self.rows(x, sites).flatten(0, 1)).view(self.batch, -1, x.shape[1]), sites)

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
        if not local:
            if fill != 0.0:
                x = x.masked_fill(self.hidden(sites.side).unsqueeze(1), fill)
            elif not sites.clean:
                x = self.dense(x, sites)
            x = padded(x, sites.pad)
        out = require_size(function(x), side)
        # What a window without any visible site makes (-inf) is no number to multiply.
        return self._erased(out, side) if fill == 0.0 else out.masked_fill(self.hidden(side).unsqueeze(1), 0.0)

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
        left, right, top, bottom = pad.amounts
        if not sites.clean and (weight.shape[2] > 1 or weight.shape[3] > 1):
            x = self.dense(x, sites)
        if pad.mode == "constant" and pad.value == 0 and left == right and top == bottom:
            out = F.conv2d(x, weight, bias, stride, (top, left), dilation, groups)
        else:
            out = F.conv2d(padded(x, pad), weight, bias, stride, 0, dilation, groups)
        return self._erased(require_size(out, side), side)
