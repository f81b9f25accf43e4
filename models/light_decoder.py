"""SparK's way from the sparse maps of several scales back to pixels (arXiv:2301.03580).

Shapes: ``B`` images; scales are listed coarsest first, the order in which they are decoded.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from timm.layers import LayerNorm2d, build_sincos2d_pos_embed
from torch import Tensor, nn

from models.sparse import dense

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "layer": LayerNorm2d,
    "none": lambda _: nn.Identity(),
}
"""Norms of :class:`Densify` by name; released: the encoder's own kind, batch for ResNet and layer for ConvNeXt"""


class Densify(nn.Module):
    """A sparse map made whole: norm over visible sites, a mask embedding at hidden ones, and a projection.

    ``size``: rows and columns of the map; given, fixed sine-cosine positions are added to the mask embedding, so that
    hidden sites, all alike otherwise, know where they are. The paper's table 5 tries an absolute position embedding; this
    place and form are those of its first released code (commit 6fda3bf, ``spark.py``). The encoder stays as it is.

    Raises:
        ValueError: positions for a number of channels that is no multiple of 4.
    """

    pos_embed: Tensor | None

    def __init__(
        self, in_chans: int, out_chans: int, norm: str, kernel_size: int, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.norm = NORMS[norm](in_chans)
        self.mask_embed = nn.Parameter(torch.empty(1, in_chans, 1, 1))
        # As released: cut at one standard deviation.
        nn.init.trunc_normal_(self.mask_embed, std=0.02, a=-0.02, b=0.02)
        self.register_buffer("pos_embed", None if size is None else _positions(in_chans, size), persistent=False)
        same = kernel_size == 1 and in_chans == out_chans
        self.proj = nn.Identity() if same else nn.Conv2d(in_chans, out_chans, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Sparse map of ``in_chans`` channels, bool (B, h, w) True = hidden -> dense (B, out_chans, h, w)."""
        # In float32 at least: few visible sites may stand behind a statistic.
        x = dense(self.norm(x.to(torch.promote_types(x.dtype, torch.float32))))
        if x.device.type == "cpu":
            # There torch's batch norm of channels-last maps, which sparse ones are, sums float32 numbers one after
            # another: over the decoder's 1e5 sites a mean is off by 1e-5 of a deviation, a hundred times the usual.
            x = x.contiguous()
        filling = self.mask_embed if self.pos_embed is None else self.mask_embed + self.pos_embed
        return self.proj(torch.where(hidden.unsqueeze(1), filling, x))

    def no_weight_decay(self) -> set[str]:
        """The embedding is not decayed (as released)."""
        return {"mask_embed"}


def _positions(chans: int, size: tuple[int, int]) -> Tensor:
    """Fixed embedding (1, chans, rows, columns): columns in the first half of the channels, rows in the second."""
    if chans % 4:
        raise ValueError(f"a position embedding of {chans} channels: give an encoder whose scales have multiples of 4")
    rows_first = build_sincos2d_pos_embed(list(size), chans, interleave_sin_cos=True)  # (sites, chans)
    return rearrange(rows_first.roll(chans // 2, dims=1), "(h w) c -> 1 c h w", h=size[0])


class UpBlock(nn.Module):
    """Sides times ``ratio`` (a prime; 1: none), then two 3x3 convolutions of which the second is linear."""

    def __init__(self, in_chans: int, out_chans: int, ratio: int) -> None:
        super().__init__()
        # The smallest overlapping kernel that covers every pixel equally often: 4 for a ratio of 2, as released.
        kernel_size = (3 if ratio % 2 else 2) * ratio
        padding = (kernel_size - ratio) // 2
        self.up = nn.ConvTranspose2d(in_chans, in_chans, kernel_size, ratio, padding) if ratio > 1 else nn.Identity()
        self.conv1 = nn.Conv2d(in_chans, in_chans, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(in_chans)
        self.act = nn.ReLU6(inplace=True)
        self.conv2 = nn.Conv2d(in_chans, out_chans, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, h, w) -> (B, out_chans, h * ratio, w * ratio)."""
        x = self.act(self.norm1(self.conv1(self.up(x))))
        return self.norm2(self.conv2(x))


class LightDecoder(nn.Module):
    """A UNet's decoder: the map of each scale is added where the resolution reaches it.

    Args:
        strides: pixels per site of the scales, coarsest first, each a multiple of the next. Between two scales, and
            from the last to pixels, one block per prime factor of the ratio (a block without upsampling where the
            ratio is 1); strides of 32, 16, 8, 4 give the paper's five blocks of 2.
        dim: channels at the coarsest scale, halved by every block.
        out_chans: channels of the image.

    Raises:
        ValueError: strides that do not divide each other, or a ``dim`` that cannot be halved so often.
    """

    def __init__(self, strides: Sequence[int], dim: int, out_chans: int) -> None:
        super().__init__()
        ratios = [_factors(coarse, fine, strides) for coarse, fine in itertools.pairwise((*strides, 1))]
        halvings = sum(map(len, ratios))
        if dim >> halvings == 0:
            raise ValueError(
                f"a decoder of width {dim} cannot be halved by each of its {halvings} blocks from stride {strides[0]} "
                f"to pixels: give at least {2**halvings}"
            )
        self.widths: list[int] = []
        """channels at which the map of each scale is added"""
        self.stages = nn.ModuleList()
        for factors in ratios:
            self.widths.append(dim)
            blocks = []
            for ratio in factors:
                blocks.append(UpBlock(dim, dim // 2, ratio))
                dim //= 2
            self.stages.append(nn.Sequential(*blocks))
        self.proj = nn.Conv2d(dim, out_chans, 1)
        self.apply(_initialise)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Dense maps (B, widths[i], H / strides[i], W / strides[i]), coarsest first -> pixels (B, out_chans, H, W)."""
        x = self.stages[0](maps[0])
        for stage, found in zip(self.stages[1:], maps[1:], strict=True):
            x = stage(x + found)
        return self.proj(x)


def _factors(coarse: int, fine: int, strides: Sequence[int]) -> list[int]:
    """Prime factors of a ratio of strides, smallest first; [1] for a ratio of 1."""
    if coarse % fine:
        raise ValueError(f"scales of strides {list(strides)} cannot be decoded: each must be a multiple of the next")
    left, found = coarse // fine, []
    for prime in range(2, left + 1):
        while left % prime == 0:
            found.append(prime)
            left //= prime
    return found or [1]


def _initialise(module: nn.Module) -> None:
    """As released: convolutions from a normal of 0.02, transposed ones by He's rule, biases zero."""
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
