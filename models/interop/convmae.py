"""Weights of ConvMAE (Alpha-VL/ConvMAE), into ``pretrain.convmae.ConvMAE`` or ``models.convvit.ConvViT``, and back."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.convvit import SIZES
from models.encoder import build_encoder
from models.interop.strict import InteropError, rename_strictly, require
from models.mae_decoder import MAEDecoder

WHAT = "the ConvMAE checkpoint"
_DECODER = re.compile(r"mask_token|decoder_|stage\d+_output_decode\.")
"""Beginnings of the official keys that only pre-training has."""


def official_convmae_key(ours: str) -> str:
    """Our name of a tensor, of the encoder alone or of ``pretrain.convmae.ConvMAE`` -> that of the released code."""
    if ours.startswith("decoder."):
        rest = ours.removeprefix("decoder.")
        return rest if rest == "mask_token" else f"decoder_{rest}"
    if match := re.fullmatch(r"fuse\.(\d+)\.(.+)", ours):
        return f"stage{int(match[1]) + 1}_output_decode.{match[2]}"
    key = ours.removeprefix("encoder.")
    if match := re.fullmatch(r"stages\.(\d+)\.(embed|blocks)\.(.+)", key):
        rest = match[3].replace(".conv_dw.", ".attn.")
        return f"{'patch_embed' if match[2] == 'embed' else 'blocks'}{int(match[1]) + 1}.{rest}"
    return key.replace("stages.2.proj.", "patch_embed4.")


def convert_convmae(
    official: Mapping[str, Tensor], image_size: tuple[int, int] | None = None, num_heads: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """State dict of a released ConvMAE -> (its settings, its state dict in our names).

    Of a whole pre-training (our names are those of ``pretrain.convmae.ConvMAE``); or an encoder, with the rest of the
    decoder or without it, or a fine-tuned classifier with mean pooling or of the first token (our names are those of
    ``models.convvit.ConvViT``). Sizes are read from the tensors, except ``image_size`` (default: square) and
    ``num_heads`` (default: the published size's, else heads of width 64).

    The settings are ``name``, ``kwargs``, ``in_chans``, ``image_size`` and ``num_classes`` of the encoder, ``initial``
    (empty: all of it was trained, or is fixed), ``left_out`` (official keys of an incomplete decoder, as in the released
    ConvMAE-B, that have no place here), and of a whole pre-training ``decoder_dim``, ``decoder_depth``, ``decoder_heads``,
    ``decoder_mlp_ratio`` and ``multi_scale``.
    """
    config = _encoder(official, image_size, num_heads)
    try:
        with torch.device("meta"):
            encoder = build_encoder(
                config["name"],
                in_chans=config["in_chans"],
                image_size=config["image_size"],
                drop_path_rate=0.0,
                num_classes=config["num_classes"],
                kwargs=config["kwargs"],
            )
    except ValueError as error:
        raise InteropError(WHAT, hint=str(error)) from error
    whole = "mask_token" in official
    ours = {f"encoder.{name}" if whole else name: value.shape for name, value in encoder.state_dict().items()}
    weights = dict(official)
    config["left_out"] = [] if whole else [key for key in official if _DECODER.match(key)]
    if whole:
        ours |= _decoder(official, encoder, config)
    for key in config["left_out"]:
        del weights[key]
    second = "cls_token" in official
    hint = "a class token: ConvMAE's second version, another network, is not supported" if second else ""
    return config, rename_strictly(
        WHAT, weights, {official_convmae_key(name): (name, shape) for name, shape in ours.items()}, hint
    )


def export_convmae(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of :func:`convert_convmae` for a state dict or for gradients."""
    return {official_convmae_key(name): value for name, value in ours.items()}


def _encoder(
    official: Mapping[str, Tensor], image_size: tuple[int, int] | None, num_heads: int | None
) -> dict[str, Any]:
    """The encoder's settings, read from its tensors."""
    stages = (1, 2, 3)
    embeds = [f"patch_embed{stage}.proj.weight" for stage in stages]
    hidden = [f"blocks{stage}.0.mlp.fc1.weight" for stage in stages]
    require(WHAT, official, *embeds, *hidden, "blocks1.0.attn.weight", "pos_embed")
    dims = [official[key].shape[0] for key in embeds]
    patches = [official[key].shape[-1] for key in embeds]
    depths = [
        1 + max(int(match[1]) for key in official if (match := re.match(rf"blocks{stage}\.(\d+)\.", key)))
        for stage in stages
    ]
    ratios = [_ratio(official[key].shape[0], dim) for key, dim in zip(hidden, dims, strict=True)]
    kwargs: dict[str, Any] = {"embed_dims": dims, "depths": depths, "mlp_ratios": ratios}
    name = next(
        (name for name, size in SIZES.items() if all(list(size[key]) == value for key, value in kwargs.items())), None
    )
    heads = num_heads or (SIZES[name]["num_heads"] if name else max(1, dims[-1] // 64))
    if name is None or heads != SIZES[name]["num_heads"]:
        kwargs["num_heads"] = heads
    if name is not None:
        kwargs = {key: value for key, value in kwargs.items() if key == "num_heads"}
    if (kernel := official["blocks1.0.attn.weight"].shape[-1]) != 5:
        kwargs["kernel_size"] = kernel
    if patches != [4, 2, 2]:
        kwargs["patch_sizes"] = patches
    if "blocks3.0.attn.qkv.bias" not in official:
        kwargs["qkv_bias"] = False
    num_classes = official["head.weight"].shape[0] if "head.weight" in official else 0
    if "fc_norm.weight" not in official:
        # A norm before pooling: of the first token's classifier; or of pre-training, which pools nothing.
        kwargs |= {"global_pool": "token"} if num_classes else {"fc_norm": False}
    stride = math.prod(patches)
    if image_size is None:
        side = math.isqrt(official["pos_embed"].shape[1])
        image_size = (side * stride, side * stride)
    return {
        "name": name or "convvit_base",
        "kwargs": kwargs,
        "in_chans": official[embeds[0]].shape[1],
        "image_size": image_size,
        "num_classes": num_classes,
        "initial": [],
    }


def _ratio(hidden: int, dim: int) -> float:
    """The smallest ratio that makes ``hidden`` of ``dim``, rounding down."""
    ratio = hidden / dim
    while int(dim * ratio) < hidden:  # the quotient may round down
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _decoder(official: Mapping[str, Tensor], encoder: Any, config: dict[str, Any]) -> dict[str, torch.Size]:
    """Names and shapes of what a whole pre-training state holds beside its encoder; its settings are added to ``config``."""
    hidden = "decoder_blocks.0.mlp.fc1.weight"
    require(WHAT, official, "decoder_embed.weight", hidden, "decoder_pred.weight")
    dim = official["decoder_embed.weight"].shape[0]
    numbers = [int(match[1]) for key in official if (match := re.match(r"decoder_blocks\.(\d+)\.", key))]
    config |= {
        "decoder_dim": dim,
        "decoder_depth": 1 + max(numbers),
        "decoder_heads": 16 if dim % 16 == 0 else 1,  # as released, and no tensor tells
        "decoder_mlp_ratio": _ratio(official[hidden].shape[0], dim),
        "multi_scale": any(key.startswith("stage1_output_decode.") for key in official),
    }
    *finer, last = encoder.feature_info
    parts = nn.Module()
    with torch.device("meta"):
        parts.decoder = MAEDecoder(
            last["num_chs"],
            dim,
            config["decoder_depth"],
            config["decoder_heads"],
            encoder.grid_size,
            encoder.stride**2 * config["in_chans"],
            config["decoder_mlp_ratio"],
        )
        parts.fuse = nn.ModuleList(
            nn.Conv2d(scale["num_chs"], last["num_chs"], encoder.stride // scale["reduction"])
            for scale in (finer if config["multi_scale"] else [])
        )
    return {name: value.shape for name, value in parts.state_dict().items()}
