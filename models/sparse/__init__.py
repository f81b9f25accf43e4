"""Sparse encoding: any convolutional network on the visible patches of a masked image, at the visible share's cost."""

from models.sparse.sparsify import BACKENDS, Sparse, sparse_images, sparsify
from models.sparse.tensor import SparseError, SparseTensor, dense, like_image, per_image

__all__ = [
    "BACKENDS",
    "Sparse",
    "SparseError",
    "SparseTensor",
    "dense",
    "like_image",
    "per_image",
    "sparse_images",
    "sparsify",
]
