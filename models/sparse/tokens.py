"""Between a map and its visible sites as a sequence: how a transformer goes on where a convnet's masked maps end.

Tokens are plain tensors (B, K, C), image by image, so that attention, and whatever else is done to them, is as usual.
Of a plain map they are all sites, row by row. Which site of the map a token is depends on the backend: ask
:func:`token_places`.
"""

import torch
from torch import Tensor

from models.sparse.geometry import Geometry
from models.sparse.tensor import SparseError, SparseTensor, map_values, nchw


def map_size(x: Tensor) -> tuple[int, int]:
    """Rows and columns of the whole map (or image) that ``x`` (N, C, h, w) is, or shows the visible part of."""
    if not isinstance(x, SparseTensor):
        return x.shape[-2], x.shape[-1]
    grid, tile = _geometry(x).grid, _geometry(x).tile(x.sites.side)
    return grid[0] * tile[0], grid[1] * tile[1]


def tokens_of(x: Tensor) -> Tensor:
    """Visible sites of a map -> (B, K, C)."""
    if not isinstance(x, SparseTensor):
        return x.flatten(2).transpose(1, 2)
    geometry = _geometry(x)
    with torch._C.DisableTorchFunctionSubclass():
        return geometry.rows(nchw(x), x.sites)


def token_places(x: Tensor) -> Tensor | None:
    """Which site of the map, counted row by row, each token is: (B, K) int64; None where all are there, in order."""
    return _geometry(x).places(x.sites) if isinstance(x, SparseTensor) else None


def as_map(tokens: Tensor, like: Tensor) -> Tensor:
    """Inverse of :func:`tokens_of`: a map with the sites of ``like``, of any number of channels."""
    if not isinstance(like, SparseTensor):
        return tokens.transpose(1, 2).unflatten(2, map_size(like))
    geometry = _geometry(like)
    with torch._C.DisableTorchFunctionSubclass():
        return map_values(geometry.from_rows(tokens, like.sites), like.sites, clean=True)


def _geometry(x: SparseTensor) -> Geometry:
    if x.sites.kind not in ("nchw", "nhwc") or x.sites.pad:
        raise SparseError(f"values of shape {tuple(x.shape)} are no map: tokens are made of the map itself")
    return x.sites.geometry
