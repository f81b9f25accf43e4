"""Convolutions and pooling by MinkowskiEngine (Choy et al., arXiv:1904.08755), which FCMAE's encoder was built on.

Maps are stored as *tiles* store them, so that everything local and all statistics are theirs. A site is a row of ``C``
values either way: MinkowskiEngine is told the coordinates (image, y, x) of the rows as they lie, finds the neighbours
by its own hash tables, and computes with its own kernels. It is here as a comparison and a third opinion: it is no
faster than *tiles*, on the CPU only, in float32 and float64 only (lower precisions are computed in float32), and has

* convolutions of one group, and depthwise ones position by position as its own ``MinkowskiChannelwiseConvolution``,
* a centred kernel where its size is odd (a padding of ``dilation * (size - 1) / 2``) and one that begins at the site
  itself where it is even (no padding before); pooling whose kernel is its stride begins at the site too,
* max, sum and hence average pooling.

All else that looks at neighbours is refused by name. With more than one thread the gradients of weights differ in
their last bits from run to run: its threads add up in the order they come.
"""

import dataclasses
import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.sparse.conv import Neighbourhood, flat, unflat
from models.sparse.functions import pair
from models.sparse.geometry import require_size
from models.sparse.tensor import Pad, Sites, SparseError, SparseTensor, Window, plain
from models.sparse.tiles import Tiles


def _engine() -> tuple[Any, Any]:
    """MinkowskiEngine and its compiled part, imported without what that does to the process.

    It warns of being built for the CPU, puts its folder into the search path, and sets a number of threads for
    processes to come.

    Raises:
        SparseError: it is missing, or was compiled for another torch.
    """
    path, threads = list(sys.path), os.environ.get("OMP_NUM_THREADS")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import MinkowskiEngine
            from MinkowskiEngineBackend import _C
    except ImportError as error:
        raise SparseError("backend=minkowski needs MinkowskiEngine: run `bash run/install_minkowski.sh`") from error
    finally:
        sys.path[:] = path
        if threads is None:
            os.environ.pop("OMP_NUM_THREADS", None)
    return MinkowskiEngine, _C


ME, _C = _engine()


class Minkowski(Tiles):
    """Maps are (B * K, C, h, w) tiles. Coordinates are pixels of the image; each resolution's are inserted once."""

    backend = "minkowski"
    recomputes = False  # what it is compared with keeps everything

    def __init__(self, mask: Tensor, image_size: tuple[int, int]) -> None:
        super().__init__(mask, image_size)
        # Without a number of threads it would change torch's.
        self.manager = ME.CoordinateManager(
            D=2, num_threads=torch.get_num_threads(), coordinate_map_type=_C.CoordinateMapType.CPU
        )
        self._keys: dict[tuple[int, int], Any] = {}
        self._tables: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def enter(self, images: Tensor) -> SparseTensor:
        if images.device.type != "cpu" or self.mask.device.type != "cpu":
            raise SparseError(
                f"backend=minkowski runs on the CPU, the images are on {images.device}: use backend=tiles"
            )
        return super().enter(images)

    def key(self, side: tuple[int, int]) -> Any:
        """MinkowskiEngine's name for the sites of a map with tiles of ``side``."""
        if side not in self._keys:
            steps = [pixels // sites for pixels, sites in zip(self.mask_patch, side, strict=True)]
            if any(step * sites != pixels for step, sites, pixels in zip(steps, side, self.mask_patch, strict=True)):
                raise SparseError(
                    f"tiles of {side} sites lie between the pixels of a mask patch of {self.mask_patch}: use backend=tiles"
                )
            patch, (rows, columns) = self.patches.view(-1, 1, 1), self.grid
            y = patch // columns % rows * side[0] + torch.arange(side[0]).view(1, -1, 1)
            x = patch % columns * side[1] + torch.arange(side[1]).view(1, 1, -1)
            where = torch.broadcast_tensors(patch // (rows * columns), y * steps[0], x * steps[1])
            coordinates = torch.stack(where, -1).view(-1, 3).int()
            self._keys[side], _ = self.manager.insert_and_map(coordinates, steps, "sites")
        return self._keys[side]

    def tables(self, region: "Region") -> tuple[Tensor, Tensor]:
        """Neighbours at each position in a kernel, int32: (positions, output sites) the input site there, or the number
        of input sites where there is none; and, for the way back, (positions, input sites) the output site.
        """
        key = (region.side, region.out_side, region.kernel, region.dilation)
        if key not in self._tables:
            kernel_map = self.manager.kernel_map(
                *region.keys, list(region.stride), list(region.kernel), list(region.dilation)
            )
            num_inputs, num_outputs = (self.manager.size(key) for key in region.keys)
            positions = region.kernel[0] * region.kernel[1]
            sources = torch.full((positions, num_outputs), num_inputs, dtype=torch.int32)
            readers = torch.full((positions, num_inputs), num_outputs, dtype=torch.int32)
            for position, (inputs, outputs) in kernel_map.items():
                sources[position, outputs.long()] = inputs
                readers[position, inputs.long()] = outputs
            self._tables[key] = sources, readers
        return self._tables[key]

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
        name, given = "this function", {}
        if isinstance(function, functools.partial):
            name, given = function.func.__name__.strip("_"), function.keywords
        if name not in ("max_pool2d", "avg_pool2d"):
            raise SparseError(f"{name} is not computed by backend=minkowski: use backend=tiles")
        if sites.pad is not None:
            raise SparseError(f"{name} of a map that was padded before is not computed by backend=minkowski")
        kernel, dilation = pair(given["kernel_size"]), pair(given.get("dilation", 1))
        rows, columns = pair(given.get("padding", 0))
        more = (stride[0] - 1, stride[1] - 1) if given.get("ceil_mode") else (0, 0)  # a last, incomplete window
        region = Region(self, sites.side, side, kernel, stride, dilation)
        pad = Pad((columns, columns + more[1], rows, rows + more[0]))
        region.require(name, pad, (0, 0) if kernel == stride and dilation == (1, 1) else None)
        if name == "max_pool2d":
            self._require_output(Neighbourhood(self, sites.side, pad, stride, dilation, 1), kernel)
            return _Pool.apply(x, None, region)
        return _Pool.apply(x, self._shares(function, given, sites.side, side), region)

    def _shares(
        self,
        function: Callable[[Tensor], Tensor],
        given: dict[str, Any],
        side: tuple[int, int],
        out_side: tuple[int, int],
    ) -> Tensor:
        """What an average pooling multiplies the sums with, (output sites, 1) float64; other at borders, it may be."""
        ones = torch.ones(1, 1, self.grid[0] * side[0], self.grid[1] * side[1], dtype=torch.float64)
        sums = F.avg_pool2d(ones, **given | {"divisor_override": 1})
        size = (self.grid[0] * out_side[0], self.grid[1] * out_side[1])
        shares = require_size(function(ones), size) / sums
        return flat(self.from_canvas(shares.expand(self.batch, -1, -1, -1), out_side))

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
        kernel = (weight.shape[2], weight.shape[3])
        if kernel == stride == (1, 1) and not any(pad.amounts):  # one site alone
            return super().conv2d(x, sites, weight, bias, stride=stride, pad=pad, dilation=dilation, groups=groups)
        if groups != 1 and not groups == x.shape[1] == weight.shape[0]:
            raise SparseError(
                f"MinkowskiEngine has no grouped convolution ({groups} groups of {x.shape[1]} channels, "
                f"{weight.shape[0]} out), only depthwise ones: use backend=tiles"
            )
        region = Region(self, sites.side, self.scaled(sites.side, stride), kernel, stride, dilation)
        region.require("conv2d", pad)
        self._require_output(Neighbourhood(self, sites.side, pad, stride, dilation, groups), kernel)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return (_Conv if groups == 1 else _ChannelwiseConv).apply(x, weight, bias, region)


@dataclasses.dataclass(frozen=True)
class Region:
    """A kernel between the sites of two maps."""

    geometry: Minkowski
    side: tuple[int, int]
    """sites per tile of the input"""
    out_side: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]

    def require(self, name: str, pad: Pad, padding: tuple[int, int] | None = None) -> None:
        """Refuse a padding other than what MinkowskiEngine's kernels amount to, or ``padding``, rows and columns.

        (Only what is before the first row and column says where a kernel begins.)
        """
        if padding is None:
            rows, columns = (d * (k - 1) // 2 if k % 2 else 0 for k, d in zip(self.kernel, self.dilation, strict=True))
            padding = rows, columns
        left, _, top, _ = pad.amounts
        if pad.mode != "constant" or pad.value != 0 or (top, left) != padding:
            how = f" of {pad.value}" if pad.mode == "constant" else f" by {pad.mode}"
            raise SparseError(
                f"{name} with a kernel of {self.kernel}, a stride of {self.stride}, a dilation of {self.dilation} and a "
                f"padding of {(top, left)}{how if any(pad.amounts) else ''}: MinkowskiEngine can pad by {padding} with "
                "zeros only; use backend=tiles"
            )

    @property
    def keys(self) -> tuple[Any, Any]:
        """The maps' names: input, output."""
        return self.geometry.key(self.side), self.geometry.key(self.out_side)

    def run(self, function: Callable[..., Any], tensors: tuple[Tensor, ...], *mode: Any) -> Any:
        """One of MinkowskiEngine's compiled functions, which all end in the same arguments."""
        kernel = (list(self.kernel), list(self.stride), list(self.dilation), _C.RegionType.HYPER_CUBE)
        return function(
            *tensors, *kernel, torch.empty(0, dtype=torch.int32), *mode, *self.keys, self.geometry.manager._manager
        )


def _rows(x: Tensor) -> Tensor:
    """(N, C, h, w) -> (N * h * w, C), contiguous, of a precision that MinkowskiEngine has.

    Plain, too: between two checkpointed blocks a gradient may be a sparse tensor.
    """
    return _computed(flat(plain(x))).contiguous()


def _computed(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _positions(weight: Tensor) -> Tensor:
    """(O, C, kh, kw) -> (kw * kh, C, O), contiguous: MinkowskiEngine counts a kernel's positions column by column."""
    return _computed(weight).permute(3, 2, 1, 0).flatten(0, 1).contiguous()


def _weight_like(positions: Tensor, weight: Tensor) -> Tensor:
    """The inverse of :func:`_positions`."""
    return positions.view(weight.shape[::-1]).permute(3, 2, 1, 0).to(weight.dtype)


class _Conv(torch.autograd.Function):
    """MinkowskiEngine's function keeps its arguments where autograd does not see that they change: ours does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, region: Region) -> Tensor:
        ctx.region, ctx.has_bias = region, bias is not None
        ctx.save_for_backward(x, weight)
        tensors = _rows(x), _positions(weight)
        out = region.run(_C.ConvolutionForwardCPU, tensors, False, _C.ConvolutionMode.DEFAULT)
        return unflat((out if bias is None else out.add_(bias)).to(x.dtype), region.out_side)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grads = _rows(grad)
        tensors = _rows(x), grads, _positions(weight)
        grad_x, grad_weight = ctx.region.run(_C.ConvolutionBackwardCPU, tensors, _C.ConvolutionMode.DEFAULT)
        grad_bias = grads.sum(0).to(grad.dtype) if ctx.has_bias else None
        return unflat(grad_x.to(x.dtype), ctx.region.side), _weight_like(grad_weight, weight), grad_bias, None


class _ChannelwiseConv(torch.autograd.Function):
    """Depthwise: MinkowskiEngine has no kernel for it, only maps of neighbours; the sum is written in Python there too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, region: Region) -> Tensor:
        ctx.region, ctx.has_bias = region, bias is not None
        ctx.save_for_backward(x, weight)
        out = _weighted(_rows(x), _positions(weight)[:, 0], region.geometry.tables(region)[0])
        return unflat((out if bias is None else out.add_(bias)).to(x.dtype), region.out_side)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        region: Region = ctx.region
        x, weight = ctx.saved_tensors
        sources, readers = region.geometry.tables(region)
        grads, rows, taps = _rows(grad), _with_absent(_rows(x)), _positions(weight)
        grad_x = _weighted(grads, taps[:, 0], readers)
        grad_taps = torch.stack([(rows.index_select(0, source) * grads).sum(0) for source in sources])
        grad_weight = _weight_like(grad_taps.view_as(taps), weight)
        grad_bias = grads.sum(0).to(grad.dtype) if ctx.has_bias else None
        return unflat(grad_x.to(x.dtype), region.side), grad_weight, grad_bias, None


def _weighted(rows: Tensor, taps: Tensor, sources: Tensor) -> Tensor:
    """``rows`` (sites, C) at each position, times that position's ``taps`` (positions, C), summed."""
    rows = _with_absent(rows)
    out = rows.new_zeros(sources.shape[1], rows.shape[1])
    for source, tap in zip(sources, taps, strict=True):
        out.addcmul_(rows.index_select(0, source), tap)
    return out


def _with_absent(rows: Tensor) -> Tensor:
    """One more row, of zeros: the neighbour that is not there."""
    return F.pad(rows, (0, 0, 0, 1))


class _Pool(torch.autograd.Function):
    """The largest of a window's visible sites, or, with ``shares`` (output sites, 1), their sum times that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: Tensor | None, region: Region) -> Tensor:
        mode = _C.PoolingMode.LOCAL_MAX_POOLING if shares is None else _C.PoolingMode.LOCAL_SUM_POOLING
        rows = _rows(x)
        out, where = region.run(_C.LocalPoolingForwardCPU, (rows,), mode)
        if shares is None:
            # Where nothing is larger than the least number, as among NaNs, its backward pass would write to row -1.
            lost = where < 0
            if lost.any():
                out.masked_fill_(lost, float("nan"))
                where.masked_fill_(lost, 0)
        else:
            shares = shares.to(out.dtype)
            out.mul_(shares)
        ctx.region, ctx.mode, ctx.shape = region, mode, rows.shape
        ctx.save_for_backward(where, shares)
        return unflat(out.to(x.dtype), region.out_side)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        where, shares = ctx.saved_tensors
        grads = _rows(grad)
        grads = grads if shares is None else grads * shares
        like = grads.new_empty(ctx.shape)  # of the input it asks for the shape and type only
        found = ctx.region.run(_C.LocalPoolingBackwardCPU, (like, grads, where), ctx.mode)
        return unflat(found.to(grad.dtype), ctx.region.side), None, None
