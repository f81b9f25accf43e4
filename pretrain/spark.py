"""SparK: sparse and hierarchical masked modelling (Tian et al., ICLR 2023, arXiv:2301.03580).

A convnet encodes the visible patches of an image at each of its scales as sparse maps; mask embeddings fill in what is
hidden, and a light UNet decoder predicts the pixels of the hidden patches. Where the paper is silent, or differs from its
released code, docs/errata.md says what is done here.

The ablations of table 5 are ``spark.backend=dense`` (zero-outing), ``spark.hierarchy=false``, ``spark.pos_embed=true``
and ``spark.loss_on=all``.
"""

import dataclasses
from typing import Any

from torch import Tensor, nn

from engine.blocks import block_options
from engine.config import ConfigError
from engine.schema import EncoderConfig, option
from models.blocks import arrange
from models.encoder import stages
from models.light_decoder import NORMS, Densify, LightDecoder
from models.masking import upsample
from models.pixels import patchify
from models.sparse import sparse_images
from pretrain.masked import MaskedAutoencoder, MaskedConfig


@dataclasses.dataclass
class SparKConfig(MaskedConfig):
    """Choices of the paper; ``densify_norm`` follows the encoder's own norms and stands in the recipes."""

    num_stages: int = option(4, "scales of the encoder that are decoded, counted from the coarsest", ge=1)
    hierarchy: bool = option(True, "decode from num_stages scales; false: from the coarsest alone")
    densify_norm: str = option("batch", "norm of each scale before it is decoded", choices=NORMS)
    pos_embed: bool = option(False, "add absolute positions to the mask embedding of each scale")
    decoder_dim: int = option(768, "width of the decoder at the coarsest scale", ge=1)


class SparK(MaskedAutoencoder):
    """Encoder, one :class:`~models.light_decoder.Densify` per scale (coarsest first), and decoder."""

    section = "spark"
    sections = {"encoder": EncoderConfig, "spark": SparKConfig}  # noqa: RUF012

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse settings that do not fit each other, before anything is built."""
        super().check(config)
        if not config.spark.hierarchy and config.spark.num_stages != SparKConfig().num_stages:
            raise ConfigError(
                f"spark.num_stages={config.spark.num_stages} has no effect with spark.hierarchy=false: remove one of the two"
            )

    def __init__(self, config: Any) -> None:
        spark: SparKConfig = config.spark
        super().__init__(config, spark.num_stages if spark.hierarchy else 1)
        scales = stages(self.encoder, self.num_stages)[::-1]
        self.cells = [self._cell(scale["reduction"]) for scale in scales]
        self.decoder = LightDecoder([scale["reduction"] for scale in scales], spark.decoder_dim, config.data.in_chans)
        self.densify = nn.ModuleList(
            Densify(
                scale["num_chs"],
                width,
                spark.densify_norm,
                kernel_size=3 if index else 1,
                size=(self.grid[0] * cell[0], self.grid[1] * cell[1]) if spark.pos_embed else None,
            )
            for index, (scale, cell, width) in enumerate(zip(scales, self.cells, self.decoder.widths, strict=True))
        )
        arrange(self, **block_options(config))

    def predict(self, image: Tensor, mask: Tensor) -> Tensor:
        """Predicted (normalised) pixels of every patch, (B, h * w, p * q * C)."""
        maps = self.encode(image, mask)[::-1]
        if self.masked.backend == "dense":
            # The ablation is of the encoder: what it makes of hidden sites is dropped, so that the rest stays the same.
            maps = [sparse_images(found, mask, "masked") for found in maps]
        whole = [
            densify(found, upsample(mask, cell))
            for densify, found, cell in zip(self.densify, maps, self.cells, strict=True)
        ]
        return patchify(self.decoder(whole), self.patch)

    def _cell(self, stride: int) -> tuple[int, int]:
        """Sites (rows, columns) of a map that one mask patch covers."""
        if self.patch[0] % stride or self.patch[1] % stride:
            raise ValueError(
                f"spark.mask_patch={list(self.patch)} must be a multiple of the stride {stride} of "
                f"{self.config.encoder.name}: choose such a patch, or an encoder of smaller stride"
            )
        return self.patch[0] // stride, self.patch[1] // stride
