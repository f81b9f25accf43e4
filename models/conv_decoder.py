"""FCMAE's decoder: a few ConvNeXt blocks over the encoder's last map (arXiv:2301.00808, section 3.1).

Shapes: ``B`` images, ``h`` x ``w`` sites of the encoder's last map.
"""

import torch
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from models.grn import GRNForm, replace_grn


class ConvDecoder(nn.Module):
    """Project to ``dim`` channels, put a learned token at hidden sites, ``depth`` blocks, predict ``out_chans`` per site.

    ``grn``: the blocks are ConvNeXt V2's, with global response normalisation over each image; otherwise V1's without
    layer scale.
    """

    def __init__(self, in_chans: int, dim: int, depth: int, out_chans: int, *, grn: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 1)
        self.mask_token = nn.Parameter(torch.empty(1, dim, 1, 1))
        self.blocks = nn.Sequential(*(ConvNeXtBlock(dim, use_grn=grn, ls_init_value=None) for _ in range(depth)))
        self.pred = nn.Conv2d(dim, out_chans, 1)
        replace_grn(self.blocks, GRNForm())  # computes in float32
        self.apply(_init)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, features: Tensor, hidden: Tensor) -> Tensor:
        """Dense map (B, in_chans, h, w), bool (B, h, w) True = hidden -> (B, out_chans, h, w)."""
        x = torch.where(hidden.unsqueeze(1), self.mask_token, self.proj(features))
        return self.pred(self.blocks(x))


def _init(module: nn.Module) -> None:
    """As timm's ConvNeXt: a normal of deviation 0.02 cut at +-2, biases zero."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
