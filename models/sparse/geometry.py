"""What a backend of sparse encoding provides: where the visible sites of a batch are, and functions that need to know.

The semantics are one for all backends. The features at visible sites are those of the dense network whose every
convolution, resizing and average pooling sees zeros at hidden sites, whose max pooling ignores them, and whose
statistics (norms, global pooling) run over visible sites only. The image's border is where it always was.
"""

import abc
from collections.abc import Callable

import torch
from torch import Tensor

from models.sparse.tensor import Pad, Sites, SparseError, SparseTensor, Window


class Geometry(abc.ABC):
    """The visible patches of one batch. ``mask`` is bool (B, h, w), True = hidden, equally many in every image."""

    backend: str
    recomputes = False
    """whether values that are cheap to make again are not kept for the backward pass"""

    def __init__(self, mask: Tensor, image_size: tuple[int, int]) -> None:
        if mask.dim() != 3 or mask.dtype != torch.bool:
            raise SparseError(f"a mask is bool (B, h, w), got {mask.dtype} of shape {tuple(mask.shape)}")
        self.mask = mask
        self.batch, *grid = mask.shape
        self.grid = (grid[0], grid[1])
        self.image_size = image_size
        if any(size % cells for size, cells in zip(image_size, self.grid, strict=True)):
            raise SparseError(
                f"a mask grid of {self.grid} does not divide an image of {image_size}: choose a multiple of the mask patch"
            )
        visible = (~mask).flatten(1).sum(1)
        self.visible = int(visible[0])
        if not bool((visible == self.visible).all()) or self.visible == 0:
            raise SparseError(
                f"every image must show the same number of patches, at least one; this mask shows {sorted(set(visible.tolist()))}"
            )

    @property
    @abc.abstractmethod
    def rows_of_batch(self) -> int:
        """Leading size of a map."""

    @abc.abstractmethod
    def enter(self, images: Tensor) -> SparseTensor:
        """The visible part of ``images`` (B, C, H, W)."""

    @abc.abstractmethod
    def images(self, x: Tensor) -> Tensor:
        """One row per image (B, ...) of a value that is equal over an image's rows."""

    @abc.abstractmethod
    def spread(self, values: Tensor) -> Tensor:
        """The inverse of :meth:`images`."""

    @abc.abstractmethod
    def rows(self, x: Tensor, sites: Sites) -> Tensor:
        """Visible sites of a map, image by image -> (B, sites, C)."""

    @abc.abstractmethod
    def from_rows(self, rows: Tensor, sites: Sites) -> Tensor:
        """The inverse of :meth:`rows`; hidden sites, where stored, are zeros."""

    @abc.abstractmethod
    def places(self, sites: Sites) -> Tensor:
        """Where each of :meth:`rows` lies on the dense map, counted row by row through an image: (B, sites) int64."""

    @abc.abstractmethod
    def dense(self, x: Tensor, sites: Sites) -> Tensor:
        """The map (B, C, H, W), zeros at hidden sites."""

    @abc.abstractmethod
    def batch_norm(self, x: Tensor, sites: Sites, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """``norm`` over the visible sites of a map."""

    @abc.abstractmethod
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
        """``function`` of the dense map that holds ``fill`` at hidden sites, at the visible sites of the result.

        ``side`` is the side of the result's tiles; ``local``: each tile's result depends on that tile alone.
        ``window``: the same function said in another way, where there is one.
        """

    @abc.abstractmethod
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
        """A convolution that sees zeros at hidden sites, as a map (N, C, h, w) with zeros where hidden and stored."""

    def scaled(self, side: tuple[int, int], stride: tuple[int, int], *, up: bool = False) -> tuple[int, int]:
        """Sites per tile after a stride (``up``: after growing by it).

        Raises:
            SparseError: the stride does not divide a tile.
        """
        if up:
            return side[0] * stride[0], side[1] * stride[1]
        if any(b % s for b, s in zip(self.tile(side), stride, strict=True)):
            raise SparseError(
                f"a stride of {stride} does not divide tiles of {self.tile(side)} sites: the mask patch "
                f"{self.mask_patch} must be a multiple of the network's stride; choose a larger one or backend=dense"
            )
        return side[0] // stride[0], side[1] // stride[1]

    def tile(self, side: tuple[int, int]) -> tuple[int, int]:
        """Sites that a mask patch owns on a map whose stored side is ``side``."""
        return side

    @property
    def mask_patch(self) -> tuple[int, int]:
        """Pixels of a mask patch, height and width."""
        return self.image_size[0] // self.grid[0], self.image_size[1] // self.grid[1]


def require_size(found: Tensor, size: tuple[int, int]) -> Tensor:
    """A dense result of the size that keeps tiles in place.

    Raises:
        SparseError: of another size, as where a convolution is not padded.
    """
    if tuple(found.shape[-2:]) != size:
        raise SparseError(
            f"a layer makes a map of {tuple(found.shape[-2:])} where tiles ask for {size}: its padding moves sites across tiles"
        )
    return found
