"""Pixels as the methods see them: normalisation, patches and reconstruction targets.

Shapes: ``B`` images, ``C`` channels, ``H`` x ``W`` pixels, patches of ``p`` x ``q`` pixels on an ``h`` x ``w`` grid.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

EPS = 1e-6
"""Added to a variance before its square root, as MAE and the methods after it do."""


def to_unit(image: Tensor) -> Tensor:
    """Image as float32 in [0, 1]: uint8 is divided by 255, floating point (already in [0, 1]) only cast."""
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    if len(values) != like.shape[1]:
        raise ValueError(f"{len(values)} mean/std values for {like.shape[1]} channels: give one value per channel")
    return like.new_tensor(values).view(1, -1, 1, 1)


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(x - mean) / std`` per channel; ``x`` is (B, C, H, W) float."""
    return (x - _per_channel(mean, x)) / _per_channel(std, x)


def denormalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Inverse of :func:`normalise`."""
    return x * _per_channel(std, x) + _per_channel(mean, x)


def patchify(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """[B, C, h*p, w*q] -> [B, h*w, p*q*C], a patch flattened as (row, column, channel)."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=patch[0], q=patch[1])


def unpatchify(patches: Tensor, patch: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """[B, h*w, p*q*C] -> [B, C, h*p, w*q], the inverse of :func:`patchify`."""
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=patch[0], q=patch[1])


def patch_statistics(x: Tensor, patch: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each non-overlapping patch, channels together (MAE, section 3).

    ``x`` (B, C, H, W) float with sides that ``patch`` divides -> two of (B, 1, H, W), constant over a patch; the
    variance is unbiased and has :data:`EPS` added.
    """
    height, width = x.shape[-2:]
    if height % patch[0] or width % patch[1]:
        raise ValueError(f"a patch of {patch} does not divide an image of {(height, width)}: choose one that does")
    var, mean = torch.var_mean(patchify(x, patch), dim=-1, keepdim=True)
    grid = (height // patch[0], width // patch[1])
    wide = (values.expand(-1, -1, patch[0] * patch[1]) for values in (mean, torch.sqrt(var + EPS)))
    mean_map, std_map = (unpatchify(values, patch, grid) for values in wide)
    return mean_map, std_map


def window_statistics(x: Tensor, window: int, *, per_channel: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the window around every pixel (CIM, section 3.2).

    The window of pixel (i, j) is rows ``i - window//2 .. i + window - 1 - window//2`` and likewise columns, over a
    border reflected at the image's edge; the channels share one mean and variance unless ``per_channel``; the
    variance is unbiased and has :data:`EPS` added. The paper leaves these open: docs/errata.md lists our choices.

    ``x`` (B, C, H, W) float, sides of at least ``window`` -> two of (B, 1 or C, H, W), same dtype (sums run in
    float64: a variance as a difference of sums loses half the digits).
    """
    C, H, W = x.shape[1:]
    if min(H, W) < window:
        raise ValueError(f"a sliding window of {window} needs an image of at least that size, got {(H, W)}")
    low, high = window // 2, window - 1 - window // 2
    wide = x.double()
    # Sums are taken around the image's own mean, so that they cancel as little as possible.
    centre = wide.mean(dim=(2, 3) if per_channel else (1, 2, 3), keepdim=True)
    padded = F.pad(wide - centre, (low, high, low, high), mode="reflect")
    sums = torch.stack([padded, padded.square()])
    if not per_channel:
        sums = sums.sum(dim=2, keepdim=True)
    sums = _box_sum(_box_sum(sums, window, -1), window, -2)
    count = window * window * (1 if per_channel else C)
    mean = sums[0] / count
    var = (sums[1] - count * mean.square()).clamp_min(0) / (count - 1)
    return (centre + mean).to(x.dtype), torch.sqrt(var + EPS).to(x.dtype)


def _box_sum(x: Tensor, window: int, dim: int) -> Tensor:
    """Sums over every run of ``window`` neighbours along ``dim`` (which shrinks by ``window - 1``)."""
    total = x.cumsum(dim)
    last = total.narrow(dim, window - 1, x.shape[dim] - window + 1)
    first = torch.zeros_like(last)
    first.narrow(dim, 1, last.shape[dim] - 1).copy_(total.narrow(dim, 0, last.shape[dim] - 1))
    return last - first


def as_rgb(images: Tensor) -> Tensor:
    """(N, C, H, W) as something to look at: 3 channels stay, others show their first as grey."""
    return images if images.shape[1] == 3 else images[:, :1].expand(-1, 3, -1, -1)
