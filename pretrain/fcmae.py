"""FCMAE: a fully convolutional masked autoencoder (ConvNeXt V2; Woo et al., CVPR 2023, arXiv:2301.00808).

A convnet encodes the visible patches of an image, none looking through the mask; one ConvNeXt block decodes its last
map; the loss is on the pixels of hidden patches. Co-designed with it: global response normalisation (models/grn.py).
Where the paper is silent or its released code differs docs/errata.md says what is done here.

Shapes: ``B`` images of ``C`` x ``H`` x ``W``; patches of ``p`` x ``q`` pixels on an ``h`` x ``w`` grid; sites of
``s`` x ``s`` pixels (the encoder's stride), each of which the decoder predicts.
"""

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from engine.blocks import block_options
from engine.config import ConfigError
from engine.schema import EncoderConfig, option
from models.blocks import arrange
from models.conv_decoder import ConvDecoder
from models.encoder import stages
from models.grn import AGGREGATIONS, GRN, LAYERS, NORMALISATIONS, SCOPES, GRNForm, replace_grn
from models.masking import upsample
from models.pixels import patch_statistics, patchify, to_unit
from models.sparse import dense
from pretrain.export import save_encoder
from pretrain.masked import MaskedAutoencoder, MaskedConfig

log = logging.getLogger(__name__)


@dataclasses.dataclass
class FCMAEConfig(MaskedConfig):
    """Every choice of the paper; the defaults are its main setting."""

    decoder_dim: int = option(512, "width of the decoder", ge=1)
    decoder_depth: int = option(1, "ConvNeXt blocks of the decoder", ge=1)
    decoder_grn: bool = option(True, "global response normalisation (GRN) in the decoder, too")
    grn: str = option("grn", "what stands in GRN's place in the encoder (table 9, figure 6)", choices=LAYERS)
    grn_aggregation: str = option("l2", "a channel's response: a norm of its map, or its mean", choices=AGGREGATIONS)
    grn_normalisation: str = option(
        "divisive",
        "response over the channels' mean response; the inverse of that mean alone; standardised; or as it is",
        choices=NORMALISATIONS,
    )
    grn_residual: bool = option(True, "add GRN's input to its output")
    grn_scope: str = option(
        "image",
        "visible sites that a response is taken over; batch: of all images of a process, as released",
        choices=SCOPES,
    )
    grn_decay: bool = option(False, "decay GRN's gamma and beta, as the released pre-training does")
    init: str = option(
        "timm",
        "initial weights: timm's (deviation 0.02); or as released, where most are drawn with deviation 1",
        choices=("timm", "released"),
    )


class FCMAE(MaskedAutoencoder):
    """Encode what is visible, decode with a single block."""

    section = "fcmae"
    sections = {"encoder": EncoderConfig, "fcmae": FCMAEConfig}  # noqa: RUF012

    @staticmethod
    def num_visible(patches: int, mask_ratio: float) -> int:
        """Rounded down, as released: 19 of 49 at 0.6, where SparK shows 20."""
        return int(patches * (1 - mask_ratio))

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse settings that do not fit each other, before anything is built."""
        super().check(config)
        try:
            _form(config.fcmae)
        except ValueError as error:
            raise ConfigError(f"fcmae.grn*: {error}") from None

    def __init__(self, config: Any) -> None:
        fcmae: FCMAEConfig = config.fcmae
        super().__init__(config, num_stages=1)
        scale = stages(self.encoder, 1)[0]
        self.stride: int = scale["reduction"]
        self._check_stride()
        out_chans = self.stride**2 * config.data.in_chans
        self.decoder = ConvDecoder(
            scale["num_chs"], fcmae.decoder_dim, fcmae.decoder_depth, out_chans, grn=fcmae.decoder_grn
        )
        if fcmae.init == "released":
            _released_init(self.decoder, linear=False)
        if fcmae.grn_decay and not list(self.weight_decay_also()):
            raise ValueError("fcmae.grn_decay=true, but nothing here has GRN: leave it out")
        arrange(self, **block_options(config))

    def prepared(self, encoder: nn.Module) -> nn.Module:
        """The encoder with the form of GRN that was asked for, and the initial weights."""
        fcmae: FCMAEConfig = self.config.fcmae
        form = _form(fcmae)
        if not replace_grn(encoder, form) and form != GRNForm():
            raise ValueError(
                f"fcmae.grn* change GRN, which {self.config.encoder.name} does not have: leave them out, or choose a convnextv2_*"
            )
        if fcmae.init == "released":
            if not isinstance(encoder, ConvNeXt):
                raise ValueError(f"fcmae.init=released is ConvNeXt's, not {type(encoder).__name__}'s: leave it out")
            _released_init(encoder, linear=True)
        return encoder

    def predict(self, image: Tensor, mask: Tensor) -> Tensor:
        """Predicted (normalised) pixels of every patch, (B, h * w, p * q * C)."""
        features = dense(self.encode(image, mask)[-1])
        cells = self.decoder(features, self.hidden_sites(mask))
        pixels = rearrange(cells, "b (s t c) h w -> b c (h s) (w t)", s=self.stride, t=self.stride)
        return patchify(pixels, self.patch)

    def hidden_sites(self, mask: Tensor) -> Tensor:
        """bool (B, H / s, W / s): sites of the encoder's map that get the mask token.

        Where a site covers several patches (``backend=dense`` only) it is hidden if all of them are.
        """
        finer = tuple(max(side // self.stride, 1) for side in self.patch)
        coarser = tuple(max(self.stride // side, 1) for side in self.patch)
        mask = upsample(mask, (finer[0], finer[1]))
        return rearrange(mask, "b (h m) (w n) -> b h w (m n)", m=coarser[0], n=coarser[1]).all(dim=-1)

    def _check_stride(self) -> None:
        """Sites and patches must tile each other, and sites the image."""
        fits = all(side % self.stride == 0 or self.stride % side == 0 for side in self.patch)
        size = self.config.data.image_size
        if not fits or any(side % self.stride for side in size):
            raise ValueError(
                f"the encoder's stride {self.stride} does not fit fcmae.mask_patch={list(self.patch)} and "
                f"data.image_size={size}: one of stride and patch must divide the other, and the stride the image"
            )

    def weight_decay_also(self) -> set[str]:
        """Names of parameters that are decayed although they are vectors: GRN's, where asked for."""
        if not self.config.fcmae.grn_decay:
            return set()
        places = [name for name, module in self.named_modules() if isinstance(module, GRN)]
        return {f"{name}.{part}" for name in places for part in ("weight", "bias")}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[dict[str, Tensor]]) -> list[float]:
        """Sums over ``batches``, to be added over processes and read by :meth:`report`.

        An image's mask follows from its ``index`` (its place in the batch where it has none): the same at every
        evaluation and on any number of processes.
        """
        images = loss = squared = 0.0
        for batch in batches:
            image = self.normalised(to_unit(batch["image"]))
            numbers = batch.get("index", torch.arange(len(image))).tolist()
            mask = torch.cat([self.draw_mask(1, torch.Generator().manual_seed(n)) for n in numbers]).to(image.device)
            prediction = self.predict(image, mask).to(image.dtype)
            images += len(image)
            loss += float(self.loss(prediction, image, mask).double()) * len(image)
            squared += float(self._pixel_error(prediction, image, mask).double().sum())
        return [images, loss, squared]

    @staticmethod
    def report(sums: list[float]) -> dict[str, float]:
        """Mean loss, and mean squared error of hidden [0, 1] pixels: one scale for every mask patch and target."""
        images, loss, squared = sums
        return {"reconstruction_loss": loss / images, "reconstruction_mse": squared / images}

    def _pixel_error(self, prediction: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        """(B,): mean squared error of hidden pixels in [0, 1]; a normalised target is undone with the image's own statistics."""
        error = prediction - self.target(image)
        if self.masked.norm_target:
            error = error * patchify(patch_statistics(image, self.patch)[1].expand_as(image), self.patch)
        scale = image.new_tensor(self.config.data.std)
        error = (error.unflatten(-1, (-1, len(scale))) * scale).square().flatten(2).mean(dim=-1)
        return error[mask.flatten(1)].view(len(image), -1).mean(dim=1)

    def export(self, folder: Path) -> None:
        """Write what fine-tuning loads: a plain timm encoder, or by another name where GRN is not timm's."""
        save_encoder(self.encoder, dataclasses.replace(self.config, encoder=self.exported()), folder)

    def exported(self) -> EncoderConfig:
        """How fine-tuning builds the same network."""
        encoder: EncoderConfig = self.config.encoder
        form = _form(self.config.fcmae)
        if form.is_plain or encoder.name == "convnextv2_ablation":
            return encoder
        if form.layer == "none":
            return dataclasses.replace(encoder, kwargs={**encoder.kwargs, "use_grn": False})
        parts = dataclasses.asdict(form)
        del parts["scope"]  # fine-tuning's batches are whole images, each for itself (as released)
        kwargs = {**encoder.kwargs, "base": encoder.name, **parts}
        return dataclasses.replace(encoder, name="convnextv2_ablation", kwargs=kwargs)


def _form(fcmae: FCMAEConfig) -> GRNForm:
    """The form of GRN that the settings ask for."""
    return GRNForm(fcmae.grn, fcmae.grn_aggregation, fcmae.grn_normalisation, fcmae.grn_residual, fcmae.grn_scope)


def _released_init(network: nn.Module, *, linear: bool) -> None:
    """Initial weights as FCMAE's released class leaves them: normal numbers of deviation 1 cut at +-2, biases zero.

    Only the convolutions between the encoder's stages, which it knows by another class, get deviation 0.02. Linear
    layers are drawn so in the encoder, and keep torch's own in the decoder (not ``linear``).
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and not linear:
            module.reset_parameters()
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02 if ".downsample." in name else 1.0)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
