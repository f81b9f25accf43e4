"""Fixed sine-cosine positions of a grid, as MAE has them (arXiv:2111.06377; Vaswani et al., arXiv:1706.03762, in two dimensions)."""

import torch
from torch import Tensor

PERIOD = 10000.0
"""Longest wavelength is 2 pi times this many sites."""


def sincos_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Position embedding (1, h * w, dim) float32 of a grid of h x w sites, row by row.

    The first half of the channels encodes the column, the second the row; of each half all sines come first. It is
    computed in float64, as released: in float32 the sines of far sites are off by 1e-6.

    Raises:
        ValueError: ``dim`` is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a position embedding of {dim} channels: give a multiple of 4")
    rate = PERIOD ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [place.flatten().unsqueeze(1) * rate for place in (column, row)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float().unsqueeze(0)
