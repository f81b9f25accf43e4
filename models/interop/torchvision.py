"""timm's networks that are the same in torchvision: one's names into the other's."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor

from models.encoder import build_encoder
from models.interop.card import structure
from models.interop.strict import InteropError, rename_strictly


def torchvision_convnext_key(ours: str) -> str:
    """timm's name of a ConvNeXt tensor -> torchvision's: ``stages.1.blocks.0.mlp.fc1.bias`` -> ``features.3.0.block.3.bias``."""
    key = re.sub(r"^stem\.", "features.0.", ours)
    key = re.sub(r"^stages\.(\d+)\.downsample\.", lambda found: f"features.{2 * int(found[1])}.", key)
    key = re.sub(r"^stages\.(\d+)\.blocks\.(\d+)\.", lambda found: f"features.{2 * int(found[1]) + 1}.{found[2]}.", key)
    for timm_name, place in (("conv_dw", 0), ("norm", 2), ("mlp.fc1", 3), ("mlp.fc2", 5)):
        key = re.sub(rf"^(features\.\d+\.\d+)\.{re.escape(timm_name)}\.", rf"\1.block.{place}.", key)
    key = re.sub(r"\.gamma$", ".layer_scale", key)
    return re.sub(r"^head\.fc\.", "classifier.2.", re.sub(r"^head\.norm\.", "classifier.0.", key))


def timm_convnext_key(theirs: str) -> str:
    """Inverse of :func:`torchvision_convnext_key`."""
    key = re.sub(r"^classifier\.2\.", "head.fc.", re.sub(r"^classifier\.0\.", "head.norm.", theirs))
    for timm_name, place in (("conv_dw", 0), ("norm", 2), ("mlp.fc1", 3), ("mlp.fc2", 5)):
        key = re.sub(rf"^(features\.\d+\.\d+)\.block\.{place}\.", rf"\1.{timm_name}.", key)
    key = re.sub(r"\.layer_scale$", ".gamma", re.sub(r"^features\.0\.", "stem.", key))

    def place_of(found: re.Match[str]) -> str:
        number = int(found[1])
        return f"stages.{number // 2}." + (f"blocks.{found[2]}." if number % 2 else f"downsample.{found[2]}.")

    return re.sub(r"^features\.(\d+)\.(\d+)\.", place_of, key)


_VIT_NAMES = (
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^norm\.", "encoder.ln."),
    (r"^head\.", "heads.head."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
)
"""Pattern of timm's name, torchvision's"""

_VIT_NAMES_BACK = (
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
)


def _renamed(key: str, names: tuple[tuple[str, str], ...]) -> str:
    for pattern, name in names:
        key = re.sub(pattern, name, key)
    return key


def torchvision_vit_key(ours: str) -> str:
    """timm's name of a tensor of a ViT -> torchvision's: ``blocks.0.attn.qkv.bias`` -> ``...self_attention.in_proj_bias``."""
    return _renamed(ours, _VIT_NAMES)


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """torchvision's state dict in timm's names; None where the names are the same, or not torchvision's."""
    if "encoder.layers.encoder_layer_0.ln_1.weight" in state:
        return {_renamed(key, _VIT_NAMES_BACK): value for key, value in state.items()}
    if "features.1.0.layer_scale" in state and "features.1.0.block.0.weight" in state:
        return {timm_convnext_key(key): value for key, value in state.items()}
    return None


_VITS = {
    "base_patch16": "b_16",
    "base_patch32": "b_32",
    "large_patch16": "l_16",
    "large_patch32": "l_32",
    "huge_patch14": "h_14",
}
_SAME_NAMES = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
)
_DENSE = ("densenet121", "densenet161", "densenet169", "densenet201")


@dataclass(frozen=True)
class Twin:
    """A network of torchvision's that is the same as one of timm's.

    Attributes:
        name: torchvision's.
        renamed: timm's name of a tensor -> torchvision's.
        last: its classifier.
    """

    name: str
    renamed: Callable[[str], str]
    last: str


TORCHVISION: dict[str, Twin] = {
    **{name: Twin(name, str, "fc") for name in _SAME_NAMES},
    **{name: Twin(name, str, "classifier") for name in _DENSE},
    **{
        name: Twin(name, torchvision_convnext_key, "classifier.2")
        for name in ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")
    },
    **{f"vit_{size}_224": Twin(f"vit_{name}", torchvision_vit_key, "heads.head") for size, name in _VITS.items()},
}
"""Networks that are the same in timm and torchvision, by timm's name"""


def torchvision_name(name: str, kwargs: Mapping[str, Any]) -> str:
    """Key in :data:`TORCHVISION` of the network that timm builds by ``name`` (whatever its tag) with ``kwargs``.

    Raises:
        InteropError: torchvision does not have the very same.
    """
    kind, what = name.partition(".")[0], f"the encoder {name}"
    if kind not in TORCHVISION:
        raise InteropError(what, hint=f"torchvision does not have that very network; it has {', '.join(TORCHVISION)}")
    if other := structure(kwargs):
        raise InteropError(what, hint=f"torchvision's {kind} cannot be built with encoder.kwargs={other}")
    return kind


def export_torchvision(kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of the timm network ``kind``, with or without its classifier -> torchvision's, with or without it.

    ``kind`` is what :func:`torchvision_name` finds. All of torchvision's tensors are there but the classifier's, where
    ``state`` has none.
    """
    twin = TORCHVISION[kind]
    heads = [key for key in state if twin.renamed(key) == f"{twin.last}.weight"]
    num_classes = state[heads[0]].shape[0] if heads else 0
    size = image_side(kind, state)
    with torch.device("meta"):
        ours = build_encoder(kind, in_chans=3, image_size=(size, size), drop_path_rate=0.0, num_classes=num_classes)
        theirs = torchvision_network(kind, size, num_classes or 1).state_dict()
    expected = {name: (twin.renamed(name), value.shape) for name, value in ours.state_dict().items()}
    found = rename_strictly(
        f"the encoder {kind}",
        state,
        expected,
        hint="torchvision's networks have 3 input channels, square images and their own layers",
    )
    # Layer scale is (C, 1, 1) there.
    return {name: found[name].reshape(value.shape) for name, value in theirs.items() if name in found}


def image_side(kind: str, state: Mapping[str, Tensor]) -> int:
    """Height and width that the positions in timm's ``state`` are for; 224 of a convnet, which takes any."""
    if not kind.startswith("vit_") or "pos_embed" not in state:
        return 224
    return math.isqrt(state["pos_embed"].shape[1] - 1) * int(TORCHVISION[kind].name.rpartition("_")[2])


def torchvision_network(kind: str, image_side: int, num_classes: int) -> Any:
    """torchvision's network."""
    sized = {"image_size": image_side} if kind.startswith("vit_") else {}
    return torchvision.models.get_model(TORCHVISION[kind].name, num_classes=num_classes, **sized)


def torchvision_call(kind: str, state: Mapping[str, Tensor], image_side: int) -> str:
    """How torchvision loads ``state``, which is in its names."""
    twin = TORCHVISION[kind]
    size = f"image_size={image_side}" if kind.startswith("vit_") and image_side != 224 else ""
    if f"{twin.last}.weight" in state:
        words = ", ".join(filter(None, (size, f"num_classes={state[f'{twin.last}.weight'].shape[0]}")))
        return f"torchvision.models.{twin.name}({words}) loads it"
    place = twin.last.replace(".2", "[2]")
    absent = f"it has no {twin.last}.weight and {twin.last}.bias, as the encoder has no classifier"
    return f"torchvision.models.{twin.name}({size}) loads it after model.{place} = torch.nn.Identity(); {absent}"
