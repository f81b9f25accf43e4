"""Training the tokenizer: DALL-E's discrete VAE (Ramesh et al., arXiv:2102.12092, section 2.1 and appendix A).

The evidence lower bound of a VAE whose latents are one of ``vocab_size`` tokens per site, relaxed by Gumbel-softmax;
temperature and KL weight are annealed.
"""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid

from data.transforms import CropResize
from engine.blocks import block_options
from engine.config import ConfigError
from engine.schema import CropConfig, DataConfig, OptimConfig, option
from formats.files import write_atomically
from models.blocks import arrange
from models.dvae import DVAE, logit_laplace_nll, map_pixels, save_tokenizer
from models.pixels import to_unit


@dataclasses.dataclass
class DVAEConfig:
    """The network and its annealing; the defaults are DALL-E's (appendix A.1 and A.2)."""

    vocab_size: int = option(8192, "number of tokens", ge=2)
    width: int = option(256, "channels of the first group of the encoder", ge=4)
    blocks_per_group: int = option(2, "residual blocks per group", ge=1)
    groups: int = option(4, "groups of blocks; the stride is 2 ** (groups - 1)", ge=1)
    decoder_init_width: int = option(128, "channels the decoder starts with", ge=1)
    kl_weight: float = option(6.6, "final weight of the KL term per site, over the pixels' sum", ge=0)
    kl_steps: int = option(5000, "steps over which the KL weight rises from 0", ge=0)
    min_log_scale: float | None = option(
        None, "floor of the log scale of a pixel; unset: none (flat images have no bound)"
    )
    temperature: float = option(1.0, "first temperature of the relaxation", gt=0)
    temperature_end: float = option(1 / 16, "last temperature", gt=0)
    temperature_steps: int = option(150_000, "steps over which the temperature falls", ge=0)


class _Config(Protocol):
    data: DataConfig
    crop: CropConfig
    optim: OptimConfig
    dvae: DVAEConfig


class DVAETraining(nn.Module):
    """The relaxed evidence lower bound of a :class:`models.dvae.DVAE`."""

    sections = {"dvae": DVAEConfig}  # noqa: RUF012

    @staticmethod
    def check(config: _Config) -> None:
        """Refuse settings that do not fit each other."""
        stride = 2 ** (config.dvae.groups - 1)
        if any(side % stride for side in config.data.image_size):
            raise ConfigError(
                f"data.image_size={config.data.image_size} must be a multiple of the tokenizer's stride {stride}"
            )
        if config.optim.layer_decay < 1:
            raise ConfigError("optim.layer_decay has no meaning for a tokenizer: remove it")

    def __init__(self, config: _Config) -> None:
        super().__init__()
        self.dvae = DVAE(
            vocab_size=config.dvae.vocab_size,
            width=config.dvae.width,
            blocks_per_group=config.dvae.blocks_per_group,
            groups=config.dvae.groups,
            in_chans=config.data.in_chans,
            decoder_init_width=config.dvae.decoder_init_width,
        )
        self.settings = config.dvae
        self.before_step(0, 1)
        arrange(self, **block_options(config))

    @property
    def encoder(self) -> nn.Module:
        """The half that makes tokens."""
        return self.dvae.encoder

    @staticmethod
    def transform(config: _Config) -> CropResize:
        """A random crop at the size the tokenizer is trained on."""
        return CropResize(
            image_size=(config.data.image_size[0], config.data.image_size[1]),
            scale=(config.crop.crop_scale[0], config.crop.crop_scale[1]),
            ratio=(config.crop.crop_ratio[0], config.crop.crop_ratio[1]),
            hflip=config.crop.hflip,
        )

    def before_step(self, step: int, num_steps: int) -> None:
        """Anneal the temperature and the KL weight (DALL-E, appendix A.2: both by a cosine)."""
        s = self.settings
        self.temperature = _anneal(s.temperature, s.temperature_end, step, s.temperature_steps)
        self.kl_weight = _anneal(0.0, s.kl_weight, step, s.kl_steps)

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Encode, relax, decode -> loss per pixel and channel, and its parts."""
        pixels = map_pixels(to_unit(batch["image"]))
        logits = self.dvae.encode_logits(pixels).float()
        soft = relax(logits, self.temperature, generator)
        nll = logit_laplace_nll(pixels, self.dvae.decode_stats(soft).float(), self.settings.min_log_scale).mean()
        # The loss is the sum over an image divided by its number of values (appendix A.2: beta / 192 at 8 px a site).
        divergence = kl_to_uniform(logits).sum(dim=(1, 2)).mean() / pixels[0].numel()
        return {
            "loss": nll + self.kl_weight * divergence,
            "reconstruction_nll": nll.detach(),
            "kl_per_site": kl_to_uniform(logits.detach()).mean(),
            "temperature": torch.tensor(self.temperature),
            "kl_weight": torch.tensor(self.kl_weight),
        }

    @torch.no_grad()
    def evaluate(self, batches: Iterable[dict[str, Tensor]]) -> list[float]:
        """Sums over ``batches``, to be added over processes and read by :meth:`report`: images, error, token counts."""
        counts: Tensor | None = None
        error = images = 0.0
        for batch in batches:
            unit = to_unit(batch["image"])
            tokens = self.dvae.tokens(unit)
            error += float((self.dvae.decode(tokens) - unit).square().mean(dim=(1, 2, 3)).double().sum())
            images += len(unit)
            found = torch.bincount(tokens.flatten(), minlength=self.settings.vocab_size).double()
            counts = found if counts is None else counts + found
        if counts is None:
            counts = torch.zeros(self.settings.vocab_size, dtype=torch.float64)
        return [images, error, *counts.tolist()]

    @staticmethod
    def report(sums: list[float]) -> dict[str, float]:
        """Mean squared reconstruction error of [0, 1] pixels through hard tokens, and how the codebook is used."""
        images, error, *counts = sums
        shares = torch.tensor(counts, dtype=torch.float64) / sum(counts)
        return {
            "reconstruction_mse": error / images,
            "codebook_use": float((shares > 0).double().mean()),
            "codebook_perplexity": float(torch.exp(-torch.xlogy(shares, shares).sum())),
        }

    def pictures(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One row per image: original | through the tokens and back; (3, rows, columns) in [0, 1]."""
        unit = to_unit(batch["image"])
        painted = self.dvae.decode(self.dvae.tokens(unit)).float()
        rows = torch.stack([unit, painted], dim=1).flatten(0, 1).clamp(0, 1)
        rows = rows if rows.shape[1] == 3 else rows[:, :1].expand(-1, 3, -1, -1)
        return {"original_painted": make_grid(rows.cpu(), nrow=2, padding=2, pad_value=1.0)}

    def fingerprint(self) -> str:
        """Nothing but the images."""
        return ""

    def export(self, folder: Path) -> None:
        """Write the tokenizer that CIM loads."""
        write_atomically(folder / "tokenizer.safetensors", lambda draft: save_tokenizer(self.dvae, draft))


def relax(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Gumbel-softmax over dim 1 of (B, V, h, w): a draw that is nearly one-hot at low ``temperature``, differentiable."""
    where = logits.device if generator is None else generator.device
    noise = torch.empty(logits.shape, device=where).exponential_(generator=generator).log().to(logits.device)
    return ((logits - noise) / temperature).softmax(dim=1)


def kl_to_uniform(logits: Tensor) -> Tensor:
    """KL divergence of the categorical over dim 1 of (B, V, h, w) from the uniform one -> (B, h, w), in nats."""
    log_q = logits.log_softmax(dim=1)
    return (log_q.exp() * log_q).sum(dim=1) + math.log(logits.shape[1])


def _anneal(start: float, end: float, step: int, steps: int) -> float:
    """Half a cosine from ``start`` to ``end`` over ``steps``, ``end`` from then on."""
    share = min(step / steps, 1.0) if steps else 1.0
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))
