"""A feature map of which only the visible part is real: a tensor that carries its mask.

A network runs on a :class:`SparseTensor` unmodified: torch hands every function called on it, be it inside a module or
in the middle of a ``forward``, to models/sparse/functions.py, which knows what each does to such a map.

The mask travels with the data and nowhere else, so that checkpointed blocks recompute with the mask they began with,
and any number of masks can be in flight.

Shapes: ``N`` is the leading size of a map: ``B`` images, or ``B * K`` tiles; ``C`` channels; ``h`` x ``w`` sites.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.sparse.recompute import Again

if TYPE_CHECKING:
    from models.sparse.geometry import Geometry


class SparseError(ValueError):
    """Something that cannot be computed from visible patches alone, or not exactly."""


@dataclasses.dataclass(frozen=True)
class Pad:
    """Padding that was asked for and is yet to be done, by the convolution or pooling that follows."""

    amounts: tuple[int, int, int, int]
    """left, right, top, bottom, as in torch.nn.functional.pad"""
    mode: str = "constant"
    value: float = 0.0


def padded(x: Tensor, pad: Pad | None) -> Tensor:
    """``x`` with the padding done."""
    if pad is None:
        return x
    return F.pad(x, pad.amounts, pad.mode, pad.value if pad.mode == "constant" else None)


@dataclasses.dataclass(frozen=True)
class Window:
    """A function of the sites under a sliding window: pooling."""

    kernel: tuple[int, int]
    pad: Pad
    dilation: tuple[int, int]
    function: Callable[[Tensor], Tensor]
    """of maps that are padded already"""


@dataclasses.dataclass(frozen=True)
class Sites:
    """What a :class:`SparseTensor` knows of itself."""

    geometry: Geometry
    kind: str
    """"nchw" or "nhwc": a map, and where its channels are; "image": one value per image, repeated over its tiles;
    "other": a map's values under another view, fit for local functions only"""
    side: tuple[int, int]
    """sites per tile (or per image, where the map is dense), rows and columns; of an "image", those it came from"""
    clean: bool = True
    """hidden sites are known to hold zeros (always so where they are not stored)"""
    pad: Pad | None = None


class SparseTensor(Tensor):
    """See the module. Made by :meth:`Geometry.enter`, turned back by :func:`dense`."""

    sites: Sites
    again: Again | None = None
    """how to make the values again instead of keeping them, where that is cheap"""
    kept_version: int = 0
    """the values' version when ``sites`` was said of them"""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from models.sparse.functions import dispatch  # its rules make sparse tensors themselves

        with torch._C.DisableTorchFunctionSubclass():
            return dispatch(func, args, kwargs or {})


class _Wrap(torch.autograd.Function):
    """A change of type that is no view: autograd copies twice for every in-place operation on a view."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return Tensor._make_subclass(SparseTensor, tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # A reentrant checkpoint reads gradients as attributes of sparse tensors, and so hands on sparse ones.
        return plain(grad)


def wrap(tensor: Tensor, sites: Sites) -> SparseTensor:
    """``tensor`` with its ``sites``; the values are not copied."""
    wrapped = tensor if isinstance(tensor, SparseTensor) else _Wrap.apply(tensor)
    wrapped.sites, wrapped.again, wrapped.kept_version = sites, None, wrapped._version
    return wrapped


def known(x: SparseTensor) -> Sites:
    """What is known of ``x`` now; not that hidden sites hold zeros, if it was changed in place, perhaps through a view."""
    if x.kept_version != x._version and x.sites.clean:
        x.sites = dataclasses.replace(x.sites, clean=False)
    return x.sites


def dense(value: Any) -> Any:
    """Plain tensors of a network's output: maps as (B, C, H, W) with zeros where hidden, pooled values as (B, ...).

    Lists, tuples and dicts are walked; what never was sparse is returned as it is.
    """
    if isinstance(value, SparseTensor):
        with torch._C.DisableTorchFunctionSubclass():
            sites = value.sites
            if sites.kind == "image":
                return sites.geometry.images(plain(value))
            if sites.kind == "other" or sites.pad:
                raise SparseError(f"values of shape {tuple(value.shape)} are no map any more: return the map itself")
            return sites.geometry.dense(nchw(value), sites)
    if isinstance(value, dict):
        return {key: dense(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [dense(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def per_image(x: Tensor) -> Tensor:
    """A pooled value's rows, one per image (B, ...): what statistics over the batch must look at. Plain stays plain."""
    if not isinstance(x, SparseTensor):
        return x
    with torch._C.DisableTorchFunctionSubclass():
        if x.sites.kind != "image":
            raise SparseError(
                f"a {x.sites.kind} map of shape {tuple(x.shape)} is not one value per image: pool it first"
            )
        return x.sites.geometry.images(plain(x))


def like_image(values: Tensor, x: Tensor) -> Tensor:
    """``values`` (B, ...), one row per image, as something that multiplies or adds to ``x``; plain if ``x`` is."""
    if not isinstance(x, SparseTensor):
        return values
    with torch._C.DisableTorchFunctionSubclass():
        return image_values(values, x.sites)


def plain(x: Tensor) -> Tensor:
    """The same values as a torch.Tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)


def nchw(x: SparseTensor) -> Tensor:
    """A map's values as (N, C, h, w), whatever its order."""
    return plain(x).permute(0, 3, 1, 2) if x.sites.kind == "nhwc" else plain(x)


def image_values(values: Tensor, sites: Sites) -> SparseTensor:
    """One value per image (B, ...), repeated over the image's tiles."""
    return wrap(sites.geometry.spread(values), dataclasses.replace(sites, kind="image", clean=True, pad=None))


def map_values(values: Tensor, sites: Sites, *, kind: str = "nchw", clean: bool) -> SparseTensor:
    """A map (N, C, h, w) in the order of ``kind``."""
    side = (values.shape[-2], values.shape[-1])
    new = Sites(sites.geometry, kind, side, clean)
    return wrap(values.permute(0, 2, 3, 1) if kind == "nhwc" else values, new)
