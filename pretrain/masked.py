"""What masked autoencoders share: a mask, an encoder of visible patches, and the pixels of hidden ones as the target.

A method adds how it decodes: :meth:`MaskedAutoencoder.predict`. Shapes: ``B`` images of ``C`` x ``H`` x ``W``, patches of
``p`` x ``q`` pixels on an ``h`` x ``w`` grid.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid

from data.transforms import CropResize
from engine.config import ConfigError
from engine.schema import CropConfig, DataConfig, EncoderConfig, option
from models.encoder import build_encoder, stage_features, unused_parameters
from models.masking import random_mask, upsample
from models.pixels import as_rgb, denormalise, normalise, patch_statistics, patchify, to_unit, unpatchify
from models.sparse import BACKENDS, sparse_images
from models.sparse.check import check as check_sparse
from models.sparse.sparsify import geometry_of
from pretrain.export import check_start, save_encoder, start_encoder

log = logging.getLogger(__name__)

SMALL_GRID = 6
"""Mask grids with fewer rows or columns leave too little context (DESIGN: small images)."""


@dataclasses.dataclass
class MaskedConfig:
    """Choices that all masked autoencoders share."""

    mask_patch: list[int] = option([32, 32], "pixels of a mask patch, height and width", ge=1, kind="pair")
    mask_ratio: float = option(0.6, "share of patches hidden from the encoder", gt=0, lt=1)
    backend: str = option(
        "tiles",
        "how the encoder is kept from seeing through the mask; dense: not at all, hidden pixels are set to zero",
        choices=BACKENDS,
    )
    norm_target: bool = option(True, "normalise the target by each patch's own mean and variance")
    loss_on: str = option("masked", "patches that count", choices=("masked", "all"))


class MaskedSettings(Protocol):
    """The parts of a resolved configuration that every masked autoencoder reads."""

    data: DataConfig
    crop: CropConfig
    encoder: EncoderConfig


class MaskedAutoencoder(nn.Module):
    """Mask, encode what is visible, decode, compare the pixels of hidden patches.

    Sub-classes give ``section`` (the name of their settings), ``num_visible``, how many scales they decode from, and
    :meth:`predict`.
    """

    section: str

    @staticmethod
    def num_visible(patches: int, mask_ratio: float) -> int:
        """Patches of an image that the encoder sees."""
        return round(patches * (1 - mask_ratio))

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse settings that do not fit each other, before anything is built."""
        check_start(config)
        masked: MaskedConfig = getattr(config, cls.section)
        size, patch = config.data.image_size, masked.mask_patch
        if any(side % p for side, p in zip(size, patch, strict=True)):
            raise ConfigError(f"{cls.section}.mask_patch={patch} does not divide data.image_size={size}")
        grid = (size[0] // patch[0], size[1] // patch[1])
        visible = cls.num_visible(grid[0] * grid[1], masked.mask_ratio)
        if not 0 < visible < grid[0] * grid[1]:
            raise ConfigError(
                f"{cls.section}.mask_ratio={masked.mask_ratio} leaves {visible} of {grid[0] * grid[1]} patches visible: "
                "choose a smaller mask_patch or another ratio"
            )
        if min(grid) < SMALL_GRID:
            log.warning(
                "a mask grid of %d x %d is very coarse: choose a smaller %s.mask_patch and an encoder of smaller stride",
                *grid,
                cls.section,
            )

    def __init__(self, config: Any, num_stages: int) -> None:
        super().__init__()
        self.config = config
        self.masked: MaskedConfig = getattr(config, self.section)
        data, masked = config.data, self.masked
        self.patch = (masked.mask_patch[0], masked.mask_patch[1])
        self.grid = (data.image_size[0] // self.patch[0], data.image_size[1] // self.patch[1])
        self.num_stages = num_stages
        size = (data.image_size[0], data.image_size[1])
        self.encoder = self.prepared(
            build_encoder(
                config.encoder.name,
                in_chans=data.in_chans,
                image_size=size,
                drop_path_rate=config.encoder.drop_path_rate,
                kwargs=config.encoder.kwargs,
            )
        )
        start_encoder(self.encoder, config)
        if masked.backend != "dense":  # the network itself runs on sparse images as it is
            check_sparse(self.encoder, geometry_of(masked.backend), self.patch, data.in_chans, self.used_features)
        for name in unused_parameters(self.encoder, size, data.in_chans, self.used_features):
            # Left trainable they would only be decayed towards zero, and handed on like that.
            log.info("encoder.%s is not used in pre-training: it keeps its initial value", name)
            self.encoder.get_parameter(name).requires_grad_(False)

    def used_features(self, encoder: nn.Module, x: Tensor) -> list[Tensor]:
        """All that pre-training uses of an encoder: what is checked, and whose parameters are trained."""
        return stage_features(encoder, x, self.num_stages)

    def prepared(self, encoder: nn.Module) -> nn.Module:
        """The encoder after whatever the method changes in it, before weights are loaded."""
        return encoder

    @staticmethod
    def transform(config: MaskedSettings) -> CropResize:
        """Random resized crop and flip."""
        return CropResize(
            image_size=(config.data.image_size[0], config.data.image_size[1]),
            scale=(config.crop.crop_scale[0], config.crop.crop_scale[1]),
            ratio=(config.crop.crop_ratio[0], config.crop.crop_ratio[1]),
            hflip=config.crop.hflip,
            token_size=None,
        )

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Mask, encode, decode, compare -> loss."""
        image = self.normalised(to_unit(batch["image"]))
        mask = self.draw_mask(len(image), generator).to(image.device)
        prediction = self.predict(image, mask)
        return {"loss": self.loss(prediction, image, mask)}

    def draw_mask(self, batch: int, generator: torch.Generator | None) -> Tensor:
        """bool (B, h, w), True = hidden, equally many patches of every image."""
        patches = self.grid[0] * self.grid[1]
        return random_mask(batch, self.grid, patches - self.num_visible(patches, self.masked.mask_ratio), generator)

    def encode(self, image: Tensor, mask: Tensor) -> list[Tensor]:
        """Sparse feature maps (plain ones where ``backend=dense``) of the last ``num_stages`` scales, finest first."""
        return stage_features(self.encoder, sparse_images(image, mask, self.masked.backend), self.num_stages)

    def predict(self, image: Tensor, mask: Tensor) -> Tensor:
        """Predicted (normalised) pixels of every patch, (B, h * w, p * q * C)."""
        raise NotImplementedError

    def target(self, image: Tensor) -> Tensor:
        """Pixels of every patch, (B, h * w, p * q * C), float32 or wider."""
        if self.masked.norm_target:
            mean, std = self.statistics(image)
            image = (image - mean) / std
        return patchify(image, self.patch)

    def statistics(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation that a target is normalised with, each (B, 1, H, W)."""
        return patch_statistics(image, self.patch)

    def loss(self, prediction: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error over a patch, then over the patches that count, of the whole batch."""
        error = (prediction.to(image.dtype) - self.target(image)).square().mean(dim=-1)
        return error.mean() if self.masked.loss_on == "all" else error[mask.flatten(1)].mean()

    def pictures(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Grids of one row per image, (3, rows, columns) in [0, 1]: original | masked | reconstruction.

        A normalised target is undone with the statistics of the *original's* patches, which tells the picture much that
        the network did not know: the name says so. The second grid goes without: every hidden patch gets the mean
        and deviation of the visible pixels of its image.
        """
        unit = to_unit(batch["image"])
        image = self.normalised(unit)
        mask = self.draw_mask(len(image), generator).to(image.device)
        prediction = unpatchify(self.predict(image, mask).to(image.dtype), self.patch, self.grid)
        hidden = upsample(mask, self.patch).unsqueeze(1)
        if not self.masked.norm_target:
            return {"original_masked_reconstruction": self._grid(unit, hidden, prediction)}
        mean, std = self.statistics(image)
        seen = image[(~hidden).expand_as(image)].view(len(image), -1)
        own = (prediction * seen.std(dim=1).view(-1, 1, 1, 1)) + seen.mean(dim=1).view(-1, 1, 1, 1)
        return {
            "original_masked_reconstruction_with_target_statistics": self._grid(unit, hidden, prediction * std + mean),
            "original_masked_reconstruction_without_target_statistics": self._grid(unit, hidden, own),
        }

    def _grid(self, unit: Tensor, hidden: Tensor, filled: Tensor) -> Tensor:
        filled = torch.where(hidden, denormalise(filled, self.config.data.mean, self.config.data.std), unit)
        rows = torch.stack([unit, unit.masked_fill(hidden, 0.5), filled], dim=1).flatten(0, 1).clamp(0, 1)
        return make_grid(as_rgb(rows).cpu(), nrow=3, padding=2, pad_value=1.0)

    def export(self, folder: Path) -> None:
        """Write what fine-tuning loads."""
        save_encoder(self.encoder, self.config, folder)

    def fingerprint(self) -> str:
        """Nothing but its images must be found again by a continued run."""
        return ""

    def normalised(self, unit: Tensor) -> Tensor:
        """Images in [0, 1] as the encoder sees them."""
        return normalise(unit, self.config.data.mean, self.config.data.std)
