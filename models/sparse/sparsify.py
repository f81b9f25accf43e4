"""Sparse encoding of a network as it is: in place, reversible, with a mask given per call."""

import functools
from typing import Any

from torch import Tensor, nn

from models.sparse.check import check
from models.sparse.geometry import Geometry
from models.sparse.masked import Masked
from models.sparse.tensor import SparseError, dense
from models.sparse.tiles import Tiles

BACKENDS = ("tiles", "masked", "minkowski", "dense")


def sparse_images(images: Tensor, mask: Tensor, backend: str = "tiles") -> Tensor:
    """``images`` (B, C, H, W) of which ``mask`` (bool (B, h, w), True = hidden) hides patches, for any network to run on.

    ``backend``: "tiles" computes visible patches only; "masked" computes everything and sets the hidden part to zero
    after each layer; "minkowski" runs on MinkowskiEngine; "dense" is a plain image with hidden pixels set to zero,
    through which the network sees that something is hidden (SparK, table 5: zero-outing).

    Raises:
        SparseError: the mask's grid does not divide the image, images show different numbers of patches, or shapes do
            not belong together.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 3 or images.dim() != 4 or len(mask) != len(images):
        given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise SparseError(
            f"images of shape {tuple(images.shape)} with a mask {given}: give images (B, C, H, W) and a mask (B, h, w)"
        )
    size = (images.shape[2], images.shape[3])
    if backend == "dense":
        return dense(Masked(mask, size).enter(images))
    return geometry_of(backend)(mask, size).enter(images)


def geometry_of(backend: str) -> type[Geometry]:
    """The class behind a backend's name.

    Raises:
        SparseError: no such backend, or MinkowskiEngine is not installed.
    """
    if backend == "minkowski":
        from models.sparse.minkowski import Minkowski

        return Minkowski
    known: dict[str, type[Geometry]] = {"tiles": Tiles, "masked": Masked}
    if backend not in known:
        raise SparseError(f"backend={backend!r} is unknown; there are: {', '.join(BACKENDS)}")
    return known[backend]


class Sparse:
    """A network that also takes masked images: ``model(images, mask=mask)``. Made by :func:`sparsify`; a context.

    Nothing of the network is copied or renamed: its keys, weights and behaviour on plain images stay. Leaving the
    context, or :meth:`restore`, takes the mask argument away again.
    """

    def __init__(self, model: nn.Module, backend: str) -> None:
        self.model, self.backend = model, backend
        self._handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave),
        ]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if "mask" not in kwargs:
            return None
        kwargs = dict(kwargs)
        mask = kwargs.pop("mask")
        return (sparse_images(args[0], mask, self.backend), *args[1:]), kwargs

    @staticmethod
    def _leave(module: nn.Module, args: Any, output: Any) -> Any:
        return dense(output)

    def restore(self) -> None:
        """Take the mask argument away."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> "Sparse":
        return self

    def __exit__(self, *_: Any) -> None:
        self.restore()


def sparsify(
    model: nn.Module,
    mask_patch: int | tuple[int, int],
    backend: str = "tiles",
    *,
    in_chans: int | None = None,
    head: bool = True,
) -> Sparse:
    """Let ``model`` run on visible patches of ``mask_patch`` pixels (height and width, or one number for both).

    ``in_chans``: channels of an image; by default what the model's first convolution takes. ``head=False`` tries a timm
    model's ``forward_features`` alone, for heads that need a map of a certain size.

    ``model(images, mask=mask)`` then gives what the dense network gives when nothing is seen through the mask, maps as
    (B, C, H, W) with zeros where hidden; ``model(images)`` is what it was. For feature maps before they are made
    dense, run any part of the model on :func:`sparse_images`.

    The network is tried first (see models/sparse/check.py).

    Raises:
        SparseError: naming the module that cannot be computed from visible patches exactly.
    """
    patch = (mask_patch, mask_patch) if isinstance(mask_patch, int) else mask_patch
    if backend != "dense":
        check(model, geometry_of(backend), patch, in_chans or _in_chans(model), functools.partial(_run, head=head))
    return Sparse(model, backend)


def _run(model: Any, x: Tensor, *, head: bool) -> Any:
    """What ``model(x)`` computes; of a timm model the last map beside the head's output, whose pooling hides differences."""
    if not hasattr(model, "forward_features"):
        return model(x)
    features = model.forward_features(x)
    return [features, model.forward_head(features)] if head and hasattr(model, "forward_head") else features


def _in_chans(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise SparseError(f"{type(model).__name__} has no convolution: give in_chans")
