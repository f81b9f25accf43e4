"""ConvMAE: a masked autoencoder whose encoder begins with convolutions (Gao et al., NeurIPS 2022, arXiv:2205.03892).

Patches of the transformer's size are hidden. Two stages of masked convolutions and a transformer encode the visible
ones, strided convolutions bring the maps of all three stages to the transformer's resolution, their sum is decoded as
MAE does it. Where the paper is silent, or differs from its released code, docs/errata.md says what is done here.

The ablations of the paper are ``convmae.backend=dense`` (no masked convolution), ``convmae.masking=random``,
``encoder.kwargs.kernel_size=7``, ``convmae.multi_scale=false`` and ``convmae.mask_ratio=...``.

Shapes: ``B`` images of ``C`` x ``H`` x ``W``; patches of ``p`` x ``q`` pixels on an ``h`` x ``w`` grid; sites of
``s`` x ``s`` pixels (the encoder's stride), of which ``K`` are visible.
"""

import dataclasses
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from engine.blocks import block_options
from engine.config import ConfigError
from engine.schema import EncoderConfig, option
from models.blocks import arrange
from models.convvit import ConvViT
from models.convvit_blocks import over_channels
from models.mae_decoder import MAEDecoder, initialise
from models.masking import upsample
from models.pixels import patch_statistics, patchify, unpatchify
from models.sparse import BACKENDS
from models.sparse.sparsify import geometry_of
from models.sparse.tokens import map_size, tokens_of
from pretrain.masked import MaskedAutoencoder, MaskedConfig

MASKINGS = ("blockwise", "random")


@dataclasses.dataclass
class ConvMAEConfig(MaskedConfig):
    """Every choice of the paper; the defaults are its main setting."""

    mask_patch: list[int] = option(
        [16, 16], "pixels of a mask patch, height and width; a multiple of the encoder's stride", ge=1, kind="pair"
    )
    mask_ratio: float = option(0.75, "share of patches hidden from the encoder", gt=0, lt=1)
    backend: str = option(
        "tiles",
        "how the convolutions are kept from seeing hidden patches; dense: not at all, they see the whole image, and "
        "the transformer alone sees visible patches only",
        choices=BACKENDS,
    )
    masking: str = option(
        "blockwise",
        "what is drawn at random: patches of the last stage, hidden as blocks in the stages before; or (random) single "
        "sites of the first stage, so that the last sees something of every patch (needs backend=dense)",
        choices=MASKINGS,
    )
    multi_scale: bool = option(True, "decode from the sum of all three stages; false: from the last alone")
    decoder_dim: int = option(512, "width of the decoder", ge=1)
    decoder_depth: int = option(8, "transformer blocks of the decoder", ge=1)
    decoder_heads: int = option(16, "heads of the decoder's attention", ge=1)
    decoder_mlp_ratio: float = option(4.0, "widening of the decoder's MLPs", gt=0)


class ConvMAE(MaskedAutoencoder):
    """Encode what is visible, add up the scales, decode with a transformer."""

    section = "convmae"
    sections = {"encoder": EncoderConfig, "convmae": ConvMAEConfig}  # noqa: RUF012
    encoder: ConvViT

    @staticmethod
    def num_visible(patches: int, mask_ratio: float) -> int:
        """Rounded down, as released."""
        return int(patches * (1 - mask_ratio))

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse settings that do not fit each other, before anything is built."""
        super().check(config)
        convmae: ConvMAEConfig = config.convmae
        # Whoever builds the encoder again, from its description or the run's settings, gets the norm that it was trained with.
        if config.encoder.name.startswith("convvit_") and config.encoder.kwargs.setdefault("fc_norm", False):
            raise ConfigError(
                "encoder.kwargs.fc_norm=true is of networks that pool, pre-training does not: leave it out"
            )
        if convmae.masking == "random" and convmae.backend != "dense":
            raise ConfigError(
                f"convmae.masking=random hides sites of the first stage, finer than convmae.backend={convmae.backend} can "
                "keep apart: set convmae.backend=dense, or masking=blockwise"
            )

    def __init__(self, config: Any) -> None:
        convmae: ConvMAEConfig = config.convmae
        super().__init__(config, num_stages=3 if convmae.multi_scale else 1)
        self.stride = self.encoder.stride
        if convmae.masking == "random":
            self.patch = (self.encoder.patch_sizes[0],) * 2
            self.grid = (config.data.image_size[0] // self.patch[0], config.data.image_size[1] // self.patch[1])
        *finer, last = self.encoder.feature_info
        self.fuse = nn.ModuleList(
            nn.Conv2d(scale["num_chs"], last["num_chs"], ratio, stride=ratio)
            for scale in finer[: self.num_stages - 1]
            for ratio in [self.stride // scale["reduction"]]
        )
        size = config.data.image_size
        self.sites = (size[0] // self.stride, size[1] // self.stride)
        self.decoder = MAEDecoder(
            last["num_chs"],
            convmae.decoder_dim,
            convmae.decoder_depth,
            convmae.decoder_heads,
            self.sites,
            self.stride**2 * config.data.in_chans,
            convmae.decoder_mlp_ratio,
        )
        arrange(self, **block_options(config))

    def prepared(self, encoder: nn.Module) -> nn.Module:
        """The encoder with its last norm before any pooling, fixed positions, and the released initial weights."""
        if not isinstance(encoder, ConvViT):
            raise ValueError(
                f"encoder.name={self.config.encoder.name} has no convolution stages before a transformer: choose a convvit_*"
            )
        if any(side % encoder.stride for side in self.patch):
            raise ValueError(
                f"convmae.mask_patch={list(self.patch)} must be a multiple of the stride {encoder.stride} of "
                f"{self.config.encoder.name}: choose such a patch, or an encoder of smaller stride"
            )
        if isinstance(encoder.norm, nn.Identity):
            encoder.norm, encoder.fc_norm = encoder.fc_norm, encoder.norm
        encoder.pos_embed.requires_grad_(False)
        encoder.apply(initialise)
        weight = encoder.stages[2].get_parameter("embed.proj.weight")
        nn.init.xavier_uniform_(weight.data.view(len(weight), -1))  # as released, of this embedding alone
        return encoder

    def used_features(self, encoder: nn.Module, x: Tensor) -> list[Tensor]:
        """Maps of the stages; and the last norm, though here it follows the sum of all of them."""
        maps = super().used_features(encoder, x)
        return [*maps, over_channels(encoder.get_submodule("norm"), maps[-1])]

    def encode(self, image: Tensor, mask: Tensor) -> list[Tensor]:
        """Maps of the stages that are decoded, finest first; sparse, but for ``masking=random``."""
        if self.config.convmae.backend != "dense" or self.config.convmae.masking == "random":
            return super().encode(image, mask)
        geometry = geometry_of("masked")(mask, map_size(image))
        first = self.encoder.stages[0](image)
        second = self.encoder.stages[1](first)
        # From here on visible patches only; no function that follows looks beyond one.
        first, second = geometry.enter(first), geometry.enter(second)
        maps = [first, second, self.encoder.stages[2](second, self.encoder.pos_embed)]
        return maps[-self.num_stages :]

    def predict(self, image: Tensor, mask: Tensor) -> Tensor:
        """Predicted (normalised) pixels of every patch, (B, h * w, p * q * C)."""
        *finer, last = self.encode(image, mask)
        tokens = tokens_of(last)
        for fuse, found in zip(self.fuse, finer, strict=True):
            tokens = tokens + tokens_of(fuse(found))
        cells = self.decoder(self.encoder.norm(tokens), last, self.hidden_sites(mask))
        side = (self.stride, self.stride)
        return cells if self.patch == side else patchify(unpatchify(cells, side, self.sites), self.patch)

    def hidden_sites(self, mask: Tensor) -> Tensor:
        """bool (B, H / s, W / s): sites of the last stage of which nothing is visible; they get the mask token."""
        finer = (max(self.patch[0] // self.stride, 1), max(self.patch[1] // self.stride, 1))
        coarser = (max(self.stride // self.patch[0], 1), max(self.stride // self.patch[1], 1))
        mask = upsample(mask, finer)
        return rearrange(mask, "b (h m) (w n) -> b h w (m n)", m=coarser[0], n=coarser[1]).all(dim=-1)

    def statistics(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Of patches of ``convmae.mask_patch``, whatever is hidden of them."""
        side = self.masked.mask_patch
        return patch_statistics(image, (side[0], side[1]))
