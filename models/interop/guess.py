"""Which network some weights are of, told by the names and shapes of their tensors."""

import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor

from models.encoder import create, head_prefixes
from models.interop.convmae import convert_convmae, official_convmae_key
from models.interop.convnets import convnext_of, official_convnext_key, resnet_of
from models.interop.fit import fit
from models.interop.report import Weights
from models.interop.strict import InteropError

_VITS = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}
"""timm's word for a transformer's width and depth; their heads, which no tensor tells, are 64 wide, or 80 of the last"""


def guess(weights: Weights) -> dict[str, Any]:
    """``name``, ``kwargs``, ``in_chans`` and ``image_size`` of the timm network of ``weights``; empty where none is found.

    What is found takes all of the weights as they are, without resizing. Of plain files in timm's names nothing is
    guessed: some of its networks differ in what has no weights, such as activations.
    """
    state = weights.state
    if weights.plain:
        return {}
    try:
        if "stages.0.embed.proj.weight" in state:
            found = _convvit(state, weights.image_size)
        elif "stem.0.weight" in state and any(".conv_dw." in key for key in state):
            found = convnext_of("it", {official_convnext_key(key): value for key, value in state.items()})
            found["stem"] = "stem.0.weight"
        elif "conv1.weight" in state and "layer1.0.conv1.weight" in state:
            found = resnet_of("it", state) | {"stem": "conv1.weight"}
        elif "cls_token" in state and "patch_embed.proj.weight" in state:
            found = _vit(state)
        else:
            return {}
        channels = state[found.pop("stem")].shape[1]
        found = {"image_size": weights.image_size or (224, 224), "in_chans": channels, **found}
        size = found["image_size"][0], found["image_size"][1]
        _, report = fit(empty(found)[0], weights, size)
    except (InteropError, ValueError, KeyError):
        return {}
    return found if report.fits and not report.resized else {}


def empty(asked: Mapping[str, Any], state: Mapping[str, Tensor] | None = None) -> tuple[Any, dict[str, Any]]:
    """The network that ``asked`` names, without numbers, and the arguments it is built with; ``state`` tells its classes."""
    kwargs = dict(image_size=tuple(asked["image_size"]), drop_path_rate=0.0, kwargs=asked["kwargs"])
    options = dict(num_classes=0, in_chans=asked["in_chans"])
    with torch.device("meta"):
        model, given = create(asked["name"], **kwargs, **options)
        if state:
            heads = [f"{prefix}weight" for prefix in head_prefixes(model)]
            options["num_classes"] = max((state[head].shape[0] for head in heads if head in state), default=0)
            model, given = create(asked["name"], **kwargs, **options)
    return model, {**options, **given}


def _side(tokens: int) -> int:
    """Rows of a square of ``tokens``."""
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError("no square")
    return side


def _convvit(state: Mapping[str, Tensor], image_size: tuple[int, int] | None) -> dict[str, Any]:
    """As the importer of the released files reads it."""
    config, _ = convert_convmae({official_convmae_key(key): value for key, value in state.items()}, image_size)
    found = {key: config[key] for key in ("name", "kwargs", "image_size")}
    return found | {"stem": "stages.0.embed.proj.weight"}


def _vit(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """``vit_*`` or ``beit_*`` of a usual size."""
    patch = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key)))
    size = _VITS[patch[0], depth]
    kwargs: dict[str, Any] = {}
    found: dict[str, Any] = {"kwargs": kwargs, "stem": "patch_embed.proj.weight"}
    pooled = "fc_norm.weight" in state
    if "blocks.0.attn.q_bias" in state:
        found["name"] = next(iter(timm.list_models(f"beit_{size}_patch{patch[2]}_224")))
        if "pos_embed" in state:
            kwargs["use_abs_pos_emb"] = True
        if not any("relative_position_bias_table" in key for key in state):
            kwargs["use_rel_pos_bias"] = False
        if not pooled:
            kwargs["use_fc_norm"] = False
        if "blocks.0.gamma_1" not in state:
            kwargs["init_values"] = 0
    else:
        found["name"] = next(iter(timm.list_models(f"vit_{size}_patch{patch[2]}_224")))
        kwargs |= {"global_pool": "avg"} if pooled else {}
        kwargs |= {"init_values": 0.1} if "blocks.0.ls1.gamma" in state else {}
    if "pos_embed" in state:
        side = patch[2] * _side(state["pos_embed"].shape[1] - 1)
    else:
        table = next(value for key, value in state.items() if "relative_position_bias_table" in key)
        side = patch[2] * ((_side(table.shape[0] - 3) + 1) // 2)
    return found | {"image_size": (side, side)}
