"""Weights of ConvNeXt V2 (facebookresearch/ConvNeXt-V2), into ``pretrain.fcmae.FCMAE`` or plain timm, and back."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from models.conv_decoder import ConvDecoder
from models.encoder import build_encoder, stages
from models.interop.convnets import convnext_of, depths_by_stage, official_convnext_key
from models.interop.strict import InteropError, rename_strictly, require


def official_fcmae_key(ours: str) -> str:
    """Our name of a tensor of ``pretrain.fcmae.FCMAE`` -> that of the released pre-training, with ordinary convolutions."""
    half, _, rest = ours.partition(".")
    if half == "encoder":
        return f"encoder.{official_convnext_key(rest)}"
    if rest.startswith("blocks."):
        return official_convnext_key(f"decoder.{rest.removeprefix('blocks.')}")
    return rest


def dense_names(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of ConvNeXt V2 in the names and shapes of its ordinary network, without the prefix ``encoder.``.

    Of MinkowskiEngine's layers a kernel is (sites, in, out), or (sites, channels) where depthwise, its sites listed
    column by column; norms and linear layers are wrapped in another module; biases, gamma and beta have leading axes
    of one, as many as the exporting script left. As released: ``utils.py::remap_checkpoint_keys``.
    """
    found: dict[str, Tensor] = {}
    for key, value in official.items():
        name = re.sub(r"\.(ln|linear)\.(weight|bias)$", r".\2", key.removeprefix("encoder."))
        if name.endswith(".kernel") and value.dim() in (2, 3):
            name, side = f"{name.removesuffix('.kernel')}.weight", math.isqrt(value.shape[0])
            if side * side == value.shape[0]:
                pattern = (
                    "(column row) c -> c 1 row column" if value.dim() == 2 else "(column row) i o -> o i row column"
                )
                value = rearrange(value, pattern, row=side)
        if name.endswith((".bias", ".grn.gamma", ".grn.beta")) and value.numel() == value.shape[-1]:
            value = value.flatten()
        if name in found:
            raise InteropError("the ConvNeXt V2 checkpoint", unexpected=[key], hint="it holds that tensor twice")
        found[name] = value
    return found


def convert_fcmae(official: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """State dict of a released ConvNeXt V2 -> (its settings, its state dict in our names).

    Of pre-training: with ordinary or with MinkowskiEngine's convolutions, or the authors' export of either, whose keys
    lack ``encoder.``; our names are then those of ``pretrain.fcmae.FCMAE``. Or an encoder alone, or a fine-tuned
    network with its norm and classifier; our names are then plain timm's. The sizes are read from the tensors.

    The settings are ``name``, ``kwargs``, ``in_chans`` and ``num_classes`` of the timm encoder, ``initial`` (our keys
    that pre-training has not trained, so that they are here at their initial values), and of a whole pre-training
    ``decoder_dim``, ``decoder_depth`` and ``decoder_grn``.
    """
    what = "the ConvNeXt V2 checkpoint"
    weights = dense_names(official)
    config = convnext_of(what, {key: value for key, value in weights.items() if not key.startswith("decoder.")})
    config["in_chans"] = weights["downsample_layers.0.0.weight"].shape[1]
    config["num_classes"] = weights["head.weight"].shape[0] if "head.weight" in weights else 0
    try:
        with torch.device("meta"):
            encoder = build_encoder(**config, image_size=(224, 224), drop_path_rate=0.0)
    except ValueError as error:
        raise InteropError(what, hint=str(error)) from error
    whole = "mask_token" in weights
    ours = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    config["initial"] = [
        name for name in ours if name.startswith("encoder.head.norm.") and "norm.weight" not in weights
    ]
    if whole:
        ours |= _fcmae_decoder(what, weights, encoder, config)
    # A linear layer is a 1x1 convolution in some of timm's sizes, and released as a matrix.
    expected = {
        official_fcmae_key(name).removeprefix("encoder."): (
            name,
            value.shape[:2] if ".mlp.fc" in name else value.shape,
        )
        for name, value in ours.items()
        if name not in config["initial"]
    }
    state = rename_strictly(what, weights, expected)
    for name in config["initial"]:
        state[name] = (torch.ones if name.endswith("weight") else torch.zeros)(ours[name].shape)
    state = {name: state[name].reshape(value.shape) for name, value in ours.items()}
    if not whole:
        config["initial"] = [name.removeprefix("encoder.") for name in config["initial"]]
        state = {name.removeprefix("encoder."): value for name, value in state.items()}
    return config, state


def _fcmae_decoder(
    what: str, weights: Mapping[str, Tensor], encoder: nn.Module, config: dict[str, Any]
) -> dict[str, Tensor]:
    """Names and (empty) tensors of the decoder that a whole pre-training state must hold; its settings are added to ``config``."""
    require(what, weights, "proj.weight", "decoder.0.dwconv.weight", "pred.weight")
    config["decoder_dim"] = weights["proj.weight"].shape[0]
    config["decoder_depth"] = depths_by_stage([f"0.{key}" for key in weights], r"(\d+)\.decoder\.(\d+)\.")[0]
    config["decoder_grn"] = "decoder.0.grn.gamma" in weights
    scale = stages(encoder, 1)[0]
    with torch.device("meta"):
        decoder = ConvDecoder(
            scale["num_chs"],
            config["decoder_dim"],
            config["decoder_depth"],
            scale["reduction"] ** 2 * config["in_chans"],
            grn=config["decoder_grn"],
        )
    return {f"decoder.{name}": value for name, value in decoder.state_dict().items()}


def export_fcmae(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of ``convert_fcmae`` for a state dict of ``pretrain.fcmae.FCMAE`` or for gradients, with ordinary convolutions.

    The norm before the classifier, which pre-training has none of, is left out.
    """
    official: dict[str, Tensor] = {}
    for name, value in ours.items():
        if not name.startswith("encoder.head."):
            shape = (1, 1, 1, -1) if ".grn." in name else value.shape[:2] if ".mlp.fc" in name else value.shape
            official[official_fcmae_key(name)] = value.reshape(shape)
    return official
