"""Sizes and names of the ResNets and ConvNeXts that the papers' released codes train."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from models.interop.strict import require

_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
    (True, (3, 24, 36, 3)): "resnet200",
}
"""timm's names by kind of block (bottleneck or not) and blocks per stage"""

_CONVNEXTS: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {
    ((3, 3, 9, 3), (96, 192, 384, 768)): "convnext_tiny",
    ((3, 3, 27, 3), (96, 192, 384, 768)): "convnext_small",
    ((3, 3, 27, 3), (128, 256, 512, 1024)): "convnext_base",
    ((3, 3, 27, 3), (192, 384, 768, 1536)): "convnext_large",
    ((3, 3, 27, 3), (256, 512, 1024, 2048)): "convnext_xlarge",
}
"""timm's names by blocks and channels per stage"""

_CONVNEXTS_V2: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {
    ((2, 2, 6, 2), (40, 80, 160, 320)): "convnextv2_atto",
    ((2, 2, 6, 2), (48, 96, 192, 384)): "convnextv2_femto",
    ((2, 2, 6, 2), (64, 128, 256, 512)): "convnextv2_pico",
    ((2, 2, 8, 2), (80, 160, 320, 640)): "convnextv2_nano",
    ((3, 3, 9, 3), (96, 192, 384, 768)): "convnextv2_tiny",
    ((3, 3, 27, 3), (96, 192, 384, 768)): "convnextv2_small",
    ((3, 3, 27, 3), (128, 256, 512, 1024)): "convnextv2_base",
    ((3, 3, 27, 3), (192, 384, 768, 1536)): "convnextv2_large",
    ((3, 3, 27, 3), (352, 704, 1408, 2816)): "convnextv2_huge",
}


def official_convnext_key(ours: str) -> str:
    """timm's name of a ConvNeXt tensor -> its authors': ``stages.1.blocks.0.mlp.fc1.bias`` -> ``stages.1.0.pwconv1.bias``."""
    key = re.sub(r"^stem\.", "downsample_layers.0.", ours)
    key = re.sub(r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1.", key)
    key = re.sub(r"^stages\.(\d+)\.blocks\.", r"stages.\1.", key)
    key = re.sub(r"^head\.norm\.", "norm.", re.sub(r"^head\.fc\.", "head.", key))
    key = key.replace(".mlp.grn.weight", ".grn.gamma").replace(".mlp.grn.bias", ".grn.beta")
    return key.replace(".conv_dw.", ".dwconv.").replace(".mlp.fc1.", ".pwconv1.").replace(".mlp.fc2.", ".pwconv2.")


def timm_convnext_key(official: str) -> str:
    """Inverse of :func:`official_convnext_key`."""
    key = re.sub(r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", official)
    key = re.sub(r"^downsample_layers\.0\.", "stem.", key)
    key = re.sub(r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample.", key)
    key = re.sub(r"^norm\.", "head.norm.", re.sub(r"^head\.", "head.fc.", key))
    key = key.replace(".grn.gamma", ".mlp.grn.weight").replace(".grn.beta", ".mlp.grn.bias")
    return key.replace(".dwconv.", ".conv_dw.").replace(".pwconv1.", ".mlp.fc1.").replace(".pwconv2.", ".mlp.fc2.")


def depths_by_stage(keys: Iterable[str], pattern: str) -> tuple[int, ...]:
    """Blocks per stage; ``pattern`` finds the numbers of stage and block at the beginning of a key."""
    last: dict[int, int] = {}
    for key in keys:
        if match := re.match(pattern, key):
            last[int(match[1])] = max(last.get(int(match[1]), 0), int(match[2]))
    return tuple(last[stage] + 1 for stage in sorted(last))


def resnet_of(what: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """timm's name and arguments of the ResNet whose tensors these are."""
    layers = depths_by_stage(weights, r"layer(\d+)\.(\d+)\.")
    firsts = [f"layer{stage + 1}.0.conv1.weight" for stage in range(len(layers))]
    require(what, weights, "conv1.weight", *firsts)
    bottleneck = "layer1.0.conv3.weight" in weights
    channels = tuple(weights[first].shape[0] for first in firsts)
    name = _RESNETS.get((bottleneck, layers))
    kwargs: dict[str, Any] = {} if name else {"layers": layers}
    if channels != (64, 128, 256, 512):
        kwargs["channels"] = channels
    return {"name": name or ("resnet50" if bottleneck else "resnet18"), "kwargs": kwargs}


def convnext_of(what: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """timm's name and arguments of the ConvNeXt whose tensors these are, in its authors' names."""
    depths = depths_by_stage(weights, r"stages\.(\d+)\.(\d+)\.")
    firsts = [f"stages.{stage}.0.dwconv.weight" for stage in range(len(depths))]
    require(what, weights, "downsample_layers.0.0.weight", *firsts)
    dims = tuple(weights[first].shape[0] for first in firsts)
    v2 = any(".grn." in key for key in weights)
    name = (_CONVNEXTS_V2 if v2 else _CONVNEXTS).get((depths, dims))
    kwargs: dict[str, Any] = {} if name else {"depths": depths, "dims": dims}
    if (kernel := weights[firsts[0]].shape[-1]) != 7:
        kwargs["kernel_sizes"] = kernel
    if (patch := weights["downsample_layers.0.0.weight"].shape[-1]) != 4:
        kwargs["patch_size"] = patch
    return {"name": name or ("convnextv2_tiny" if v2 else "convnext_tiny"), "kwargs": kwargs}
