"""The parts of ConvMAE's encoder (models/convvit.py): embeddings, blocks and stages, on maps that may be sparse."""

from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models import checkpoint
from torch import Tensor, nn

from models.sparse.tokens import as_map, token_places, tokens_of

CONV_EPS = 1e-5
"""of the norms of embeddings and convolution blocks, as released"""


class PatchEmbed(nn.Module):
    """Non-overlapping patches: convolution, norm over channels, GELU."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim, eps=CONV_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, h, w) -> (N, dim, h / patch_size, w / patch_size)."""
        return F.gelu(over_channels(self.norm, self.proj(x)))


class ConvBlock(nn.Module):
    """A transformer block with a depthwise convolution, between two 1x1 ones, in place of attention."""

    def __init__(self, dim: int, mlp_ratio: float, kernel_size: int, drop: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=CONV_EPS)
        self.conv1 = nn.Conv2d(dim, dim, 1)
        self.conv_dw = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.conv2 = nn.Conv2d(dim, dim, 1)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=CONV_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop, use_conv=True)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N, dim, h, w) -> the same."""
        x = x + self.drop_path1(self.conv2(self.conv_dw(self.conv1(over_channels(self.norm1, x)))))
        return x + self.drop_path2(self.mlp(over_channels(self.norm2, x)))


class Stage(nn.Module):
    """Patch embedding and blocks."""

    def __init__(self, embed: PatchEmbed, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embed = embed
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def run(self, x: Tensor) -> Tensor:
        """All blocks, one after another."""
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return x


class ConvStage(Stage):
    """A stage of convolution blocks."""

    def forward(self, x: Tensor) -> Tensor:
        """Map or image -> map."""
        return self.run(self.embed(x))


class TransformerStage(Stage):
    """The last stage: its maps' sites as tokens, with their positions."""

    def __init__(self, embed: PatchEmbed, blocks: Sequence[nn.Module], dim: int, drop: float) -> None:
        super().__init__(embed, blocks)
        self.proj = nn.Linear(dim, dim)
        self.pos_drop = nn.Dropout(drop)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Map, and positions (1, h * w, dim) of all sites of the result -> map."""
        x = self.embed(x)
        places = token_places(x)
        tokens = self.proj(tokens_of(x)) + (positions if places is None else positions[0][places])
        return as_map(self.run(self.pos_drop(tokens)), x)


def over_channels(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm of the last axis on the channels of a map (N, C, h, w)."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
