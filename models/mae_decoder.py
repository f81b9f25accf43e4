"""The decoder of masked autoencoders with a transformer (MAE, arXiv:2111.06377; ConvMAE, arXiv:2205.03892).

Shapes: ``B`` images, ``h`` x ``w`` sites of which ``K`` are visible.
"""

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from models.sincos import sincos_positions
from models.sparse import dense
from models.sparse.tokens import as_map


class MAEDecoder(nn.Module):
    """Projection, mask tokens where nothing is visible, fixed positions, transformer blocks, prediction.

    Raises:
        ValueError: a width that is no multiple of 4 and of the heads.
    """

    pos_embed: Tensor

    def __init__(
        self,
        in_chans: int,
        dim: int,
        depth: int,
        num_heads: int,
        grid: tuple[int, int],
        out_chans: int,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if dim % num_heads or dim % 4:
            raise ValueError(
                f"a decoder of width {dim} with {num_heads} heads: the width must be a multiple of both 4 and the heads"
            )
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(in_chans, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_buffer("pos_embed", sincos_positions(grid, dim))
        self.blocks = nn.Sequential(
            *(
                Block(dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm_layer)  # type: ignore[arg-type]
                for _ in range(depth)
            )
        )
        self.norm = norm_layer(dim)
        self.pred = nn.Linear(dim, out_chans)
        nn.init.normal_(self.mask_token, std=0.02)
        self.apply(initialise)

    def forward(self, tokens: Tensor, like: Tensor, hidden: Tensor) -> Tensor:
        """Tokens (B, K, in_chans) of the visible sites of the map ``like``, and ``hidden`` (B, h, w) -> (B, h * w, out_chans)."""
        x = dense(as_map(self.embed(tokens), like)).flatten(2).transpose(1, 2)
        x = torch.where(hidden.flatten(1).unsqueeze(2), self.mask_token.to(x.dtype), x) + self.pos_embed
        return self.pred(self.norm(self.blocks(x)))


def initialise(module: nn.Module) -> None:
    """As released: linear layers by Glorot's rule, biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
