"""Weights of SparK (keyu-tian/SparK), into ``pretrain.spark.SparK`` or plain timm."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.encoder import build_encoder, stages
from models.interop.convnets import convnext_of, official_convnext_key, resnet_of
from models.interop.strict import InteropError, rename_strictly, require
from models.light_decoder import Densify, LightDecoder

_SPARK_ENCODER = "sparse_encoder.sp_cnn."
_SPARK_UNUSED = ("imn_m", "imn_s", "norm_black")
"""Buffers of the released model that nothing reads; they have no counterpart here."""


def spark_keys(official: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, tuple[str, torch.Size]]]:
    """What a released SparK checkpoint holds, and official key -> (our key, shape), of all that it must hold.

    Either the whole pre-training state (``*_spark_style.pth``; our keys are those of ``pretrain.spark.SparK``), or the
    weights-only export of the encoder (``*_timm_style.pth``, ``*_official_style.pth``; our keys are plain timm's). The
    sizes are read from the tensors: any ResNet or ConvNeXt, any width of the decoder.

    Returns ``name``, ``kwargs`` and ``in_chans`` of the timm encoder, ``initial`` (our keys, with their shapes, that were
    never trained, so that the file lacks them), and of a whole state ``num_stages``, ``densify_norm``, ``decoder_dim``.
    """
    what = "the SparK checkpoint"
    whole = any(key.startswith(_SPARK_ENCODER) for key in official)
    prefix = _SPARK_ENCODER if whole else ""
    weights = {key.removeprefix(prefix): value for key, value in official.items() if key.startswith(prefix)}
    convnext = any(key.startswith("downsample_layers.") for key in weights)
    config = (convnext_of if convnext else resnet_of)(what, weights)
    config["in_chans"] = weights["downsample_layers.0.0.weight" if convnext else "conv1.weight"].shape[1]
    try:
        with torch.device("meta"):
            encoder = build_encoder(**config, image_size=(224, 224), drop_path_rate=0.0)
    except ValueError as error:
        raise InteropError(what, hint=str(error)) from error
    ours = {f"encoder.{name}" if whole else name: value.shape for name, value in encoder.state_dict().items()}
    # The released ConvNeXt of pre-training has no norm before its head.
    config["initial"] = {name: tuple(shape) for name, shape in ours.items() if ".head.norm." in f".{name}"}
    expected = {
        prefix + (official_convnext_key if convnext else str)(name.removeprefix("encoder.")): (name, shape)
        for name, shape in ours.items()
        if name not in config["initial"]
    }
    if whole:
        expected |= _spark_decoder_keys(what, official, encoder, config)
    return config, expected


def _spark_decoder_keys(
    what: str, official: Mapping[str, Tensor], encoder: nn.Module, config: dict[str, Any]
) -> dict[str, tuple[str, torch.Size]]:
    """The part of :func:`spark_keys` that is not the encoder's; its settings are added to ``config``."""
    first = "dense_decoder.dec.0.up_sample.weight"
    require(what, official, "mask_tokens.0", first)
    config["num_stages"] = sum(key.startswith("mask_tokens.") for key in official)
    config["decoder_dim"] = official[first].shape[0]
    config["densify_norm"] = (
        "batch"
        if "densify_norms.0.running_mean" in official
        else ("layer" if "densify_norms.0.weight" in official else "none")
    )
    scales = stages(encoder, config["num_stages"])[::-1]
    with torch.device("meta"):
        decoder = LightDecoder([s["reduction"] for s in scales], config["decoder_dim"], config["in_chans"])
        densify = nn.ModuleList(
            Densify(scale["num_chs"], width, config["densify_norm"], kernel_size=3 if index else 1)
            for index, (scale, width) in enumerate(zip(scales, decoder.widths, strict=True))
        )
    names = {key: (key, official[key].shape) for key in _SPARK_UNUSED if key in official}
    parts = {"up": "up_sample", "conv1": "conv.0", "norm1": "conv.1", "conv2": "conv.3", "norm2": "conv.4"}
    blocks = [f"stages.{i}.{j}" for i, stage in enumerate(decoder.stages) for j, _ in enumerate(stage.children())]
    for name, value in decoder.state_dict().items():
        key = name
        if match := re.fullmatch(r"(stages\.\d+\.\d+)\.(\w+)\.(\w+)", name):
            key = f"dec.{blocks.index(match[1])}.{parts[match[2]]}.{match[3]}"
        names[f"dense_decoder.{key}"] = (f"decoder.{name}", value.shape)
    for name, value in densify.state_dict().items():
        index, _, rest = name.partition(".")
        kind, _, tensor = rest.partition(".")
        key = f"mask_tokens.{index}" if kind == "mask_embed" else f"densify_{kind}s.{index}.{tensor}"
        names[key] = (f"densify.{name}", value.shape)
    return names


def convert_spark(official: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A released SparK checkpoint -> (its settings, its state dict in our names); see :func:`spark_keys`.

    What the file lacks because it was never trained is there with its initial value; the three buffers that nothing
    reads are left out.
    """
    config, expected = spark_keys(official)
    state = rename_strictly("the SparK checkpoint", official, expected)
    initial = {
        name: (torch.ones if name.endswith("weight") else torch.zeros)(shape)
        for name, shape in config["initial"].items()
    }
    return config, {name: value for name, value in state.items() if name not in _SPARK_UNUSED} | initial
