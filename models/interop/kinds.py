"""Which released code, library or run a file of weights is from, told by its keys; and its names as timm's."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from models.interop import fcmae
from models.interop.convnets import timm_convnext_key
from models.interop.torchvision import from_torchvision
from models.interop.vit import BEIT_BUFFERS

State = Mapping[str, Tensor]
Found = tuple[dict[str, Tensor], dict[str, list[str]]]
"""A state dict in timm's names, and group -> keys that were left out of it"""

HEAD_NORM = ("head.norm.", "norm_pre.")
POOLED_NORM = ("fc_norm.",)
"""The norm after mean pooling, new in fine-tuning; the one before pooling, of pre-training, is then not used"""


@dataclass(frozen=True)
class Kind:
    """One origin of files: its name, how its keys tell it, and what becomes of them.

    ``untrained`` and ``unused``: as in :class:`models.interop.report.Weights`.
    """

    name: str
    is_it: Callable[[State], bool]
    convert: Callable[[State], Found]
    untrained: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def sort_out(state: State, groups: Mapping[str, str]) -> Found:
    """The tensors that no pattern of ``groups`` (group -> pattern of a name's beginning) takes out, and those taken."""
    kept: dict[str, Tensor] = {}
    left: dict[str, list[str]] = {}
    for key, value in state.items():
        group = next((group for group, pattern in groups.items() if re.match(pattern, key)), None)
        if group is None:
            kept[key] = value
        else:
            left.setdefault(group, []).append(key)
    return kept, left


def _spark(state: State) -> Found:
    groups = {
        "buffers that nobody reads": r"imn_m$|imn_s$|norm_black$",
        "mask tokens and densifying layers": r"mask_tokens\.|densify_",
        "decoder": r"dense_decoder\.",
    }
    kept, left = sort_out(state, groups)
    names = {key: key.removeprefix("sparse_encoder.sp_cnn.") for key in kept}
    convnext = any(name.startswith("downsample_layers.") for name in names.values())
    return {(timm_convnext_key(name) if convnext else name): kept[key] for key, name in names.items()}, left


def _convnext(state: State) -> Found:
    return {timm_convnext_key(key): value for key, value in state.items()}, {}


def _convnextv2(state: State) -> Found:
    dense = fcmae.dense_names(state)
    kept, left = sort_out(dense, {"mask token": r"mask_token$", "decoder": r"(decoder|proj|pred)\."})
    return _convnext(kept)[0], left


def _beit(state: State) -> Found:
    groups = {"head of pre-training": r"lm_head\.", "mask token": r"mask_token$", **BEIT_BUFFERS}
    return sort_out(state, groups)


def _mae(state: State) -> Found:
    return sort_out(state, {"mask token": r"mask_token$", "decoder": r"decoder_"})


def _convmae(state: State) -> Found:
    groups = {
        "mask token": r"mask_token$",
        "decoder": r"decoder_",
        "multi-scale layers of pre-training": r"stage\d_output_decode\.",
    }
    kept, left = sort_out(state, groups)
    return {timm_convvit_key(key): value for key, value in kept.items()}, left


def timm_convvit_key(official: str) -> str:
    """``blocks1.0.attn.bias`` -> ``stages.0.blocks.0.conv_dw.bias``; see ``models.convvit``."""
    key = re.sub(r"^patch_embed4\.", "stages.2.proj.", official)
    key = re.sub(r"^patch_embed(\d)\.", lambda found: f"stages.{int(found[1]) - 1}.embed.", key)
    key = re.sub(r"^blocks(\d)\.", lambda found: f"stages.{int(found[1]) - 1}.blocks.", key)
    return re.sub(r"^(stages\.[01]\.blocks\.\d+)\.attn\.", r"\1.conv_dw.", key)


def _torchvision(state: State) -> Found:
    return from_torchvision(state) or {}, {}


def _method(state: State) -> Found:
    """Of one of our own methods: its ``encoder``; all else belongs to the method."""
    kept = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    left: dict[str, list[str]] = {}
    for key in state:
        if not key.startswith("encoder."):
            left.setdefault(f"{key.partition('.')[0]}, of pre-training", []).append(key)
    return kept, left


def _plain(state: State) -> Found:
    return dict(state), {}


def _has(*keys: str) -> Callable[[State], bool]:
    return lambda state: all(key in state for key in keys)


def _grn(state: State) -> bool:
    return any(".grn.gamma" in key for key in state)


_STEM = ("downsample_layers.0.0.weight", "encoder.downsample_layers.0.0.weight")


def _is_convnext(state: State) -> bool:
    return any(key in state for key in _STEM)


def _is_beit(state: State) -> bool:
    return "blocks.0.attn.q_bias" in state or "lm_head.weight" in state or any("rel_pos_bias." in key for key in state)


KINDS = (
    Kind("SparK, pre-training", lambda state: any("sparse_encoder." in key for key in state), _spark, HEAD_NORM),
    Kind(
        "ConvNeXt V2, pre-training (FCMAE)",
        lambda state: _is_convnext(state) and _grn(state) and "mask_token" in state,
        _convnextv2,
        HEAD_NORM,
    ),
    Kind(
        "ConvNeXt V2, with its classifier",
        lambda state: _is_convnext(state) and _grn(state) and "head.weight" in state,
        _convnextv2,
    ),
    Kind("ConvNeXt V2, encoder (FCMAE)", lambda state: _is_convnext(state) and _grn(state), _convnextv2, HEAD_NORM),
    Kind("ConvNeXt in its authors' names", _has("downsample_layers.0.0.weight", "norm.weight"), _convnext),
    Kind("ConvNeXt in its authors' names, encoder (SparK)", _has(_STEM[0]), _convnext, HEAD_NORM),
    Kind(
        "ConvMAE, pre-training",
        lambda state: "patch_embed4.weight" in state and "head.weight" not in state and "fc_norm.weight" not in state,
        _convmae,
        POOLED_NORM,
        ("norm.",),
    ),
    Kind("ConvMAE, fine-tuned", _has("patch_embed4.weight"), _convmae),
    Kind(
        "BEiT, pre-training",
        lambda state: _is_beit(state) and ("lm_head.weight" in state or "mask_token" in state),
        _beit,
        POOLED_NORM,
        ("norm.",),
    ),
    Kind("BEiT, fine-tuned", _is_beit, _beit),
    Kind(
        "MAE, pre-training",
        _has("patch_embed.proj.weight", "decoder_embed.weight"),
        _mae,
        POOLED_NORM,
        ("norm.",),
    ),
    Kind("torchvision", lambda state: from_torchvision(state) is not None, _torchvision),
    Kind("training checkpoint of ours", lambda state: any(key.startswith("encoder.") for key in state), _method),
    Kind("timm's names", lambda state: True, _plain),
)
"""Tried in this order"""


def plain(name: str) -> Kind:
    """Of files that are known to be in timm's names."""
    return Kind(f"timm's names, {name}", lambda state: True, _plain)


def kind_of(state: State) -> Kind:
    """Where a state dict is from; timm's own names are what is left."""
    return next(kind for kind in KINDS if kind.is_it(state))
