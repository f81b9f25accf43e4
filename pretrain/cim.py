"""Corrupted image modelling (CIM; Fang et al., ICLR 2023, arXiv:2202.03382).

A small BEiT generator predicts the visual tokens of hidden patches; tokens sampled from it are painted by the frozen
decoder of a discrete VAE into a corrupted image; an enhancer, the encoder that is kept, restores the pixels (RESPIX)
or tells which tokens were replaced (REVDET). Where the paper is silent docs/errata.md says what is done here.

Shapes: ``B`` images of ``C`` x ``H`` x ``W``; tokens on an ``h`` x ``w`` grid of one per patch.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.utils import make_grid

from data.transforms import CropResize
from engine.blocks import block_options
from engine.config import ConfigError
from engine.schema import CropConfig, DataConfig, EncoderConfig, option
from formats.hashes import file_digest
from models.beit import BEiT
from models.blocks import arrange
from models.dvae import FrozenTokenizer, load_tokenizer
from models.encoder import build_encoder, feature_stride, spatial_features, unused_parameters
from models.masking import blockwise_mask, mask_range, num_masked, random_mask, upsample
from models.pixels import as_rgb, denormalise, normalise, patch_statistics, to_unit, window_statistics
from pretrain.export import check_start, save_encoder, start_encoder

log = logging.getLogger(__name__)


@dataclasses.dataclass
class CIMConfig:
    """Every choice of the paper; the defaults are its main setting for ViTs."""

    tokenizer: str = option(
        "", "tokenizer.safetensors of a discrete VAE (required; see models.interop and the dvae recipe)", kind="path"
    )
    objective: str = option(
        "respix", "what the enhancer learns: pixels or replaced tokens", choices=("respix", "revdet")
    )
    patch_size: list[int] = option(
        [16, 16], "pixels per token, height and width; one number for both", ge=1, kind="pair"
    )
    num_masked: list[float] = option(
        [100, 120], "hidden patches: a count, a share below 1, or a range of either", gt=0, kind="pair"
    )
    masking: str = option("random", "which patches are hidden", choices=("random", "blockwise"))
    corruption: str = option("generator", "what replaces them", choices=("generator", "erase"))
    sampling: str = option(
        "softmax", "how tokens follow from the generator's output", choices=("softmax", "argmax", "uniform")
    )
    generator_dim: int = option(384, "width of the generator", ge=1)
    generator_depth: int = option(4, "blocks of the generator, shared ones included", ge=1)
    generator_heads: int = option(6, "attention heads of the generator", ge=1)
    generator_init_values: float = option(0.0, "initial layer scale of the generator; 0: no layer scale", ge=0)
    shared_blocks: int = option(
        2, "first blocks that generator and ViT enhancer share, besides the patch embedding; -1: share nothing", ge=-1
    )
    target: str = option("sliding", "normalisation of RESPIX's target", choices=("sliding", "non_overlapping", "none"))
    target_window: int = option(8, "side of the normalisation window in pixels", ge=2)
    target_per_channel: bool = option(False, "normalise each channel alone (sliding window only)")
    enhancer_weight: float | None = option(
        None, "weight of the enhancer's loss; unset: 10 for RESPIX, 1 for REVDET", gt=0
    )


class _Config(Protocol):
    """The parts of a resolved configuration that CIM reads."""

    data: DataConfig
    crop: CropConfig
    encoder: EncoderConfig
    cim: CIMConfig


class CIM(nn.Module):
    """Generator, painter and enhancer.

    The tokenizer is no part of the run: not registered, not optimised, not saved.
    """

    sections = {"encoder": EncoderConfig, "cim": CIMConfig}  # noqa: RUF012

    @staticmethod
    def check(config: _Config) -> None:
        """Refuse settings that do not fit each other, before anything is built."""
        check_start(config)
        cim, data = config.cim, config.data
        if not cim.tokenizer and cim.corruption == "generator":
            raise ConfigError(
                "cim.tokenizer is required: train one with `python -m pretrain dvae` or convert DALL-E's with models.interop"
            )
        if any(side % patch for side, patch in zip(data.image_size, cim.patch_size, strict=True)):
            raise ConfigError(f"cim.patch_size={cim.patch_size} does not divide data.image_size={data.image_size}")
        grid = _grid(config)
        try:
            fewest, _ = mask_range((cim.num_masked[0], cim.num_masked[1]), grid[0] * grid[1])
        except ValueError as error:
            raise ConfigError(f"cim.num_masked on the grid {grid}: {error}") from None
        if not fewest:
            raise ConfigError(f"cim.num_masked={cim.num_masked} hides no patch of the grid {grid}: raise it")
        if cim.objective == "respix" and cim.target != "none":
            sides = data.image_size
            if min(sides) < cim.target_window or (
                cim.target == "non_overlapping" and any(side % cim.target_window for side in sides)
            ):
                raise ConfigError(f"cim.target_window={cim.target_window} does not fit data.image_size={sides}")
        if cim.shared_blocks > cim.generator_depth:
            raise ConfigError(
                f"cim.shared_blocks={cim.shared_blocks} exceeds cim.generator_depth={cim.generator_depth}"
            )
        if cim.generator_dim % cim.generator_heads:
            raise ConfigError(
                f"cim.generator_heads={cim.generator_heads} does not divide cim.generator_dim={cim.generator_dim}"
            )
        if cim.target_per_channel and cim.target != "sliding":
            raise ConfigError(f"cim.target_per_channel has no effect with cim.target={cim.target}: remove one of them")

    def __init__(self, config: _Config) -> None:
        super().__init__()
        cim, data = config.cim, config.data
        self.config, self.cim, self.grid = config, cim, _grid(config)
        size = (data.image_size[0], data.image_size[1])
        self.tokenizer = _tokenizer(config)
        if self.tokenizer is None:
            log.info("cim.corruption=erase: no generator, so that its settings, sampling and tokenizer play no part")
        self.encoder = build_encoder(
            config.encoder.name,
            in_chans=data.in_chans,
            image_size=size,
            drop_path_rate=config.encoder.drop_path_rate,
            kwargs=config.encoder.kwargs,
        )
        start_encoder(self.encoder, config)
        if self.tokenizer is not None:
            shared = self._shared_parts() if cim.shared_blocks >= 0 else {}
            self.generator = BEiT(
                image_size=size,
                patch_size=(cim.patch_size[0], cim.patch_size[1]),
                in_chans=data.in_chans,
                vocab_size=self.tokenizer.vocab_size,
                embed_dim=cim.generator_dim,
                depth=cim.generator_depth,
                num_heads=cim.generator_heads,
                init_values=cim.generator_init_values or None,
                **shared,
            )
        for name in unused_parameters(self.encoder, size, data.in_chans):
            # Left trainable they would only be decayed towards zero, and handed on like that.
            log.info("encoder.%s is not used in pre-training: it keeps its initial value", name)
            self.encoder.get_parameter(name).requires_grad_(False)
        stride = feature_stride(self.encoder)
        if any(side % s for side, s in zip(size, stride, strict=True)):
            raise ValueError(
                f"the enhancer's stride {stride} does not divide data.image_size={list(size)}: choose a multiple"
            )
        self.cell = _cell(stride, cim)
        outputs = data.in_chans * stride[0] * stride[1] if cim.objective == "respix" else self.cell[0] * self.cell[1]
        self.stride = stride
        self.head: nn.Module = nn.Conv2d(self.encoder.num_features, outputs, 1)
        nn.init.trunc_normal_(self.head.get_parameter("weight"), std=0.02)
        nn.init.zeros_(self.head.get_parameter("bias"))
        arrange(self, **block_options(config))

    def _shared_parts(self) -> dict[str, Any]:
        """Patch embedding and first blocks of a ViT enhancer, for the generator to use as its own (CIM, section 3.1)."""
        encoder, cim = self.encoder, self.cim
        if not hasattr(encoder, "blocks") or not hasattr(encoder, "num_prefix_tokens"):
            raise ValueError(
                f"{self.config.encoder.name} is no plain ViT, the generator cannot share its first blocks: set cim.shared_blocks=-1"
            )
        if encoder.embed_dim != cim.generator_dim or encoder.blocks[0].attn.num_heads != cim.generator_heads:
            raise ValueError(
                f"sharing blocks needs cim.generator_dim={encoder.embed_dim} and cim.generator_heads="
                f"{encoder.blocks[0].attn.num_heads} as the enhancer has, got {cim.generator_dim} and {cim.generator_heads}; "
                "or set cim.shared_blocks=-1"
            )
        if feature_stride(encoder) != tuple(cim.patch_size):
            raise ValueError(
                f"sharing the patch embedding needs cim.patch_size={list(feature_stride(encoder))}, got {cim.patch_size}"
            )
        if len(encoder.blocks) < cim.shared_blocks:
            raise ValueError(
                f"cim.shared_blocks={cim.shared_blocks}, but the enhancer has {len(encoder.blocks)} blocks"
            )
        return dict(patch_embed=encoder.patch_embed, shared_blocks=tuple(encoder.blocks[: cim.shared_blocks]))

    @staticmethod
    def transform(config: _Config) -> CropResize:
        """One random crop, resized for the networks and for the tokenizer (BEiT, as released)."""
        tokenizer = _tokenizer(config)
        grid = _grid(config)
        return CropResize(
            image_size=(config.data.image_size[0], config.data.image_size[1]),
            scale=(config.crop.crop_scale[0], config.crop.crop_scale[1]),
            ratio=(config.crop.crop_ratio[0], config.crop.crop_ratio[1]),
            hflip=config.crop.hflip,
            token_size=None if tokenizer is None else (grid[0] * tokenizer.stride, grid[1] * tokenizer.stride),
        )

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Corrupt, enhance, compare -> loss, its parts, and the share of tokens that were replaced."""
        image = self._normalised(to_unit(batch["image"]))
        mask = self.draw_mask(len(image), generator).to(image.device)
        corrupted, replaced, scalars = self.corrupt(image, batch.get("token_image"), mask, generator)
        prediction = self.enhance(corrupted)
        enhancer_loss = self.enhancer_loss(prediction, image, replaced)
        weight = self.cim.enhancer_weight or {"respix": 10.0, "revdet": 1.0}[self.cim.objective]
        scalars[f"{self.cim.objective}_loss"] = enhancer_loss.detach()
        scalars["replaced"] = replaced.float().mean()
        loss = weight * enhancer_loss + scalars.pop("generator_objective", 0.0)
        return {"loss": loss, **scalars}

    def draw_mask(self, batch: int, generator: torch.Generator | None) -> Tensor:
        """bool (B, h, w), True = hidden; one number of hidden patches for the whole batch."""
        sites = self.grid[0] * self.grid[1]
        hidden = num_masked((self.cim.num_masked[0], self.cim.num_masked[1]), sites, generator)
        draw = random_mask if self.cim.masking == "random" else blockwise_mask
        return draw(batch, self.grid, hidden, generator)

    def corrupt(
        self, image: Tensor, token_image: Tensor | None, mask: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Corrupted images (B, C, H, W), which tokens differ (bool (B, h, w)), and the generator's loss and scalars."""
        if self.tokenizer is None:
            noise = _random("normal", image.shape, image.device, generator)
            pixels = upsample(mask, (self.cim.patch_size[0], self.cim.patch_size[1])).unsqueeze(1)
            return torch.where(pixels, noise, image), mask, {}
        if token_image is None:
            raise ValueError('CIM needs batch["token_image"]: load its images with CIM.transform')
        golden = self.tokenizer.tokens(to_unit(token_image))
        logits = self.generator(image, mask, masked_only=True).float()
        generator_loss = F.cross_entropy(logits, golden[mask])
        sampled = sample_tokens(logits.detach(), self.cim.sampling, generator)
        tokens = golden.masked_scatter(mask, sampled)
        painted = self.tokenizer.paint(tokens)
        corrupted = F.interpolate(painted, image.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)
        accuracy = (logits.detach().argmax(-1) == golden[mask]).float().mean()
        scalars = {
            "generator_objective": generator_loss,
            "generator_loss": generator_loss.detach(),
            "generator_accuracy": accuracy,
        }
        return self._normalised(corrupted), tokens != golden, scalars

    def enhance(self, corrupted: Tensor) -> Tensor:
        """RESPIX: predicted (normalised) pixels (B, C, H, W); REVDET: logits of "replaced" (B, 1, h, w). float32."""
        features = spatial_features(self.encoder, corrupted)
        if self.cim.objective == "respix":
            output = self.head(features).float()
            return rearrange(output, "b (p q c) h w -> b c (h p) (w q)", p=self.stride[0], q=self.stride[1])
        if self.stride[0] < self.cim.patch_size[0] or self.stride[1] < self.cim.patch_size[1]:
            features = F.adaptive_avg_pool2d(features, self.grid)
        output = self.head(features).float()
        return rearrange(output, "b (p q) h w -> b 1 (h p) (w q)", p=self.cell[0], q=self.cell[1])

    def enhancer_loss(self, prediction: Tensor, image: Tensor, replaced: Tensor) -> Tensor:
        """RESPIX: l1 + l2 over all pixels (CIM, section 3.2); REVDET: binary cross entropy over all tokens."""
        if self.cim.objective == "revdet":
            return F.binary_cross_entropy_with_logits(prediction.squeeze(1), replaced.float())
        mean, std = self.target_statistics(image)
        target = (image - mean) / std
        return F.l1_loss(prediction, target) + F.mse_loss(prediction, target)

    def target_statistics(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation by which RESPIX's target is normalised, broadcastable to (B, C, H, W)."""
        window = self.cim.target_window
        if self.cim.target == "sliding":
            return window_statistics(image, window, per_channel=self.cim.target_per_channel)
        if self.cim.target == "non_overlapping":
            return patch_statistics(image, (window, window))
        return image.new_zeros(1, 1, 1, 1), image.new_ones(1, 1, 1, 1)

    def pictures(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One row per image: original | masked | corrupted | enhancer output (3, rows, columns) in [0, 1].

        RESPIX's output is shown after undoing its target's normalisation with the *original's* statistics, as the
        name says; REVDET's is the probability that a token was replaced, over the corrupted image.
        """
        unit = to_unit(batch["image"])
        image = self._normalised(unit)
        mask = self.draw_mask(len(image), generator).to(image.device)
        corrupted, _, _ = self.corrupt(image, batch.get("token_image"), mask, generator)
        prediction = self.enhance(corrupted)
        shown = self._denormalised(corrupted)
        hidden = upsample(mask, (self.cim.patch_size[0], self.cim.patch_size[1])).unsqueeze(1)
        if self.cim.objective == "respix":
            mean, std = self.target_statistics(image)
            output = self._denormalised(prediction * std + mean)
            name = "original_masked_corrupted_restored"
            name += "" if self.cim.target == "none" else "_with_target_statistics"
        else:
            output = shown * F.interpolate(prediction.sigmoid(), shown.shape[-2:])
            name = "original_masked_corrupted_replaced"
        rows = torch.stack([unit, unit.masked_fill(hidden, 0.5), shown, output], dim=1).flatten(0, 1).clamp(0, 1)
        return {name: make_grid(as_rgb(rows).cpu(), nrow=4, padding=2, pad_value=1.0)}

    def fingerprint(self) -> str:
        """What a continued run must find again beside its images: the tokenizer's contents."""
        return "" if self.tokenizer is None else file_digest(self.config.cim.tokenizer)

    def export(self, folder: Path) -> None:
        """Write what fine-tuning loads."""
        save_encoder(self.encoder, self.config, folder)

    def _normalised(self, unit: Tensor) -> Tensor:
        return normalise(unit, self.config.data.mean, self.config.data.std)

    def _denormalised(self, image: Tensor) -> Tensor:
        return denormalise(image, self.config.data.mean, self.config.data.std)


def sample_tokens(logits: Tensor, how: str, generator: torch.Generator | None = None) -> Tensor:
    """One token per row of ``logits`` (N, V) -> (N,) int64.

    "softmax" draws from the float32 softmax at temperature 1 by the Gumbel trick: the largest of
    ``logits - log(E)``, E exponential; "uniform" ignores the logits.
    """
    if how == "argmax":
        return logits.argmax(-1)
    noise = _random("exponential", logits.shape, logits.device, generator).log()
    return (-noise if how == "uniform" else logits.float() - noise).argmax(-1)


def _random(kind: str, shape: torch.Size, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """float32 noise, drawn where ``generator`` lives."""
    where = device if generator is None else generator.device
    values = torch.empty(shape, device=where)
    values = values.exponential_(generator=generator) if kind == "exponential" else values.normal_(generator=generator)
    return values.to(device)


def _grid(config: _Config) -> tuple[int, int]:
    """Tokens per column and row of an image."""
    size, patch = config.data.image_size, config.cim.patch_size
    return size[0] // patch[0], size[1] // patch[1]


def _cell(stride: tuple[int, int], cim: CIMConfig) -> tuple[int, int]:
    """Tokens (rows, columns) that one site of the enhancer's feature map covers, at least 1."""
    for s, p in zip(stride, cim.patch_size, strict=True):
        if s % p and p % s:
            raise ValueError(
                f"an enhancer of stride {stride} does not fit cim.patch_size={cim.patch_size}: one must divide the other"
            )
    return max(stride[0] // cim.patch_size[0], 1), max(stride[1] // cim.patch_size[1], 1)


def _tokenizer(config: _Config) -> FrozenTokenizer | None:
    """The frozen tokenizer, None where random erasing needs none."""
    if config.cim.corruption == "erase":
        return None
    tokenizer = FrozenTokenizer(load_tokenizer(config.cim.tokenizer))
    if tokenizer.in_chans != config.data.in_chans:
        raise ValueError(
            f"cim.tokenizer has {tokenizer.in_chans} channels, data.in_chans={config.data.in_chans}: train a tokenizer on such images"
        )
    return tokenizer
