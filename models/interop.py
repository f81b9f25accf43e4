"""Weights of the papers' released code, renamed for our networks: strictly, or not at all.

A conversion knows every key it expects, with its shape. Anything missing, left over or of another shape is an
``InteropError`` that lists the keys; no tensor is silently dropped or left at its initial value.

    python -m models.interop dalle ENCODER.pkl DECODER.pkl OUT.safetensors
    python -m models.interop spark IN.pth OUT.safetensors
    python -m models.interop fcmae IN.pt OUT.safetensors
    python -m models.interop export RUN OUT.safetensors --to torchvision
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
import torchvision
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn

from models.beit import BEiT
from models.conv_decoder import ConvDecoder
from models.dvae import DVAE, load_tokenizer, save_tokenizer
from models.encoder import build_encoder, create, head_prefixes, read_state_dict, stages
from models.light_decoder import Densify, LightDecoder
from models.pretrained import read_card, structure, weights_file
from models.safe_pickle import read_pickled_tensors

LISTED_KEYS = 8
"""Keys that an error message spells out before it only counts."""


class InteropError(ValueError):
    """A checkpoint does not fit; ``missing``, ``unexpected`` and ``misshapen`` list the official keys."""

    def __init__(
        self,
        what: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        misshapen: Sequence[str] = (),
        hint: str = "",
    ):
        self.missing, self.unexpected, self.misshapen = list(missing), list(unexpected), list(misshapen)
        lists = (("missing keys", missing), ("unexpected keys", unexpected), ("keys of another shape", misshapen))
        parts = [f"{len(keys)} {label}: {_listed(keys)}" for label, keys in lists if keys]
        super().__init__("; ".join([f"{what} does not fit", *parts]) + (f" ({hint})" if hint else ""))


def _listed(keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:LISTED_KEYS])
    return shown if len(keys) <= LISTED_KEYS else f"{shown}, ... and {len(keys) - LISTED_KEYS} more"


def rename_strictly(
    what: str, official: Mapping[str, Tensor], expected: Mapping[str, tuple[str, torch.Size]], hint: str = ""
) -> dict[str, Tensor]:
    """State dict in our names. ``expected``: official key -> (our key, shape); both sides must hold exactly the same keys."""
    missing = [key for key in expected if key not in official]
    unexpected = [key for key in official if key not in expected]
    misshapen = [
        f"{key} {tuple(official[key].shape)}, expected {tuple(shape)}"
        for key, (_, shape) in expected.items()
        if key in official and official[key].shape != shape
    ]
    if missing or unexpected or misshapen:
        raise InteropError(what, missing, unexpected, misshapen, hint)
    return {ours: official[key] for key, (ours, _) in expected.items()}


def _require(what: str, official: Mapping[str, Tensor], *keys: str) -> None:
    """The keys from which the sizes are read must be there before anything can be compared."""
    missing = [key for key in keys if key not in official]
    if missing:
        raise InteropError(what, missing=missing, hint=f"found {len(official)} keys: {_listed(list(official))}")


# ---------------------------------------------------------------------------------------------------------- DALL-E's dVAE


def official_dalle_key(ours: str) -> str:
    """``groups.0.1.conv_2.weight`` -> ``blocks.group_1.block_2.res_path.conv_2.w``."""
    module, kind = ours.rsplit(".", 1)
    kind = {"weight": "w", "bias": "b"}[kind]
    if match := re.fullmatch(r"groups\.(\d+)\.(\d+)\.(\w+)", module):
        group, block, conv = int(match[1]) + 1, int(match[2]) + 1, match[3]
        path = conv if conv == "id_path" else f"res_path.{conv}"
        return f"blocks.group_{group}.block_{block}.{path}.{kind}"
    return f"blocks.{'output.conv' if module == 'output' else module}.{kind}"


def convert_dalle(
    encoder_sd: Mapping[str, Tensor], decoder_sd: Mapping[str, Tensor]
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Official state dicts of ``dall_e.Encoder`` and ``dall_e.Decoder`` -> (arguments of ``DVAE``, its state dict).

    The sizes are read from the tensors: any width, blocks per group, channels and vocabulary.
    """
    _require("the DALL-E encoder", encoder_sd, "blocks.input.w", "blocks.output.conv.w")
    _require("the DALL-E decoder", decoder_sd, "blocks.input.w")
    if encoder_sd["blocks.input.w"].shape[2:] == (1, 1) and decoder_sd["blocks.input.w"].shape[2:] == (7, 7):
        raise InteropError("the DALL-E encoder", hint="this is a decoder: the two files are swapped")
    places = [match for key in encoder_sd if (match := re.match(r"blocks\.group_(\d+)\.block_(\d+)\.", key))]
    config = {
        "vocab_size": encoder_sd["blocks.output.conv.w"].shape[0],
        "width": encoder_sd["blocks.input.w"].shape[0],
        "blocks_per_group": max((int(place[2]) for place in places), default=1),
        "in_chans": encoder_sd["blocks.input.w"].shape[1],
        "decoder_init_width": decoder_sd["blocks.input.w"].shape[0],
        "groups": max((int(place[1]) for place in places), default=1),
    }
    try:
        with torch.device("meta"):
            dvae = DVAE(**config)
    except ValueError as error:
        raise InteropError("the DALL-E encoder", hint=str(error)) from error
    state: dict[str, Tensor] = {}
    for half, official in (("encoder", encoder_sd), ("decoder", decoder_sd)):
        expected = {
            official_dalle_key(name): (f"{half}.{name}", value.shape)
            for name, value in dvae.get_submodule(half).state_dict().items()
        }
        state |= rename_strictly(f"the DALL-E {half}", official, expected)
    return config, state


def load_dalle(encoder_path: str | os.PathLike[str], decoder_path: str | os.PathLike[str]) -> DVAE:
    """The released ``encoder.pkl`` and ``decoder.pkl`` as a ``DVAE``, read without running anything in them."""
    config, state = convert_dalle(read_pickled_tensors(encoder_path), read_pickled_tensors(decoder_path))
    dvae = DVAE(**config)
    dvae.load_state_dict(state, strict=True)
    return dvae


# ------------------------------------------------------------------------------------------------------------------- BEiT


def convert_beit(
    official: Mapping[str, Tensor], image_size: tuple[int, int] | None = None, num_heads: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """State dict of unilm's ``VisionTransformerForMaskedImageModeling`` -> (arguments of ``models.beit.BEiT``, its state dict).

    Sizes are read from the tensors, except ``image_size`` (default: square) and ``num_heads`` (default: heads of width 64, as
    in all released models). The official query and value biases become timm's, with a key bias of zero.
    """
    what, weight = "the BEiT checkpoint", "patch_embed.proj.weight"
    _require(what, official, weight, "pos_embed", "lm_head.weight", "blocks.0.mlp.fc1.weight")
    embed_dim, in_chans, *patch_size = official[weight].shape
    hidden = official["blocks.0.mlp.fc1.weight"].shape[0]
    mlp_ratio = hidden / embed_dim
    while int(embed_dim * mlp_ratio) < hidden:  # the quotient may round down
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    if image_size is None:
        side = math.isqrt(official["pos_embed"].shape[1] - 1)
        image_size = (side * patch_size[0], side * patch_size[1])
    config: dict[str, Any] = {
        "image_size": image_size,
        "patch_size": tuple(patch_size),
        "in_chans": in_chans,
        "vocab_size": official["lm_head.weight"].shape[0],
        "embed_dim": embed_dim,
        "depth": 1 + max(int(match[1]) for key in official if (match := re.match(r"blocks\.(\d+)\.", key))),
        "num_heads": num_heads or max(1, embed_dim // 64),
        "mlp_ratio": mlp_ratio,
        "init_values": 0.1 if "blocks.0.gamma_1" in official else None,
        "qkv_bias": "blocks.0.attn.q_bias" in official,
    }
    with torch.device("meta"):
        ours = BEiT(**config).state_dict()
    expected: dict[str, tuple[str, torch.Size]] = {}
    for name, value in ours.items():
        key = name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        if name.endswith("attn.qkv.bias"):
            for part in ("q", "v"):
                expected[name.replace("qkv.bias", f"{part}_bias")] = (f"{name}/{part}", torch.Size((embed_dim,)))
        else:
            expected[key] = (name, value.shape)
    relative = any("relative_position" in key for key in official)
    hint = "relative position bias is not supported, absolute positions are" if relative else ""
    state = rename_strictly(what, official, expected, hint)
    for name in [name for name in ours if name.endswith("attn.qkv.bias")]:
        query, value = state.pop(f"{name}/q"), state.pop(f"{name}/v")
        state[name] = torch.cat([query, torch.zeros_like(query), value])
    return config, {name: state[name] for name in ours}


def export_beit(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of ``convert_beit`` for a state dict or for gradients; the key bias, which changes no output, is left out."""
    official: dict[str, Tensor] = {}
    for name, value in ours.items():
        if name.endswith("attn.qkv.bias"):
            query, _, val = value.chunk(3)
            official |= {name.replace("qkv.bias", "q_bias"): query, name.replace("qkv.bias", "v_bias"): val}
        else:
            official[name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")] = value
    return official


# --------------------------------------------------------------------------------------- convnets of the released codes

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


def _depths(keys: Iterable[str], pattern: str) -> tuple[int, ...]:
    """Blocks per stage; ``pattern`` finds the numbers of stage and block at the beginning of a key."""
    last: dict[int, int] = {}
    for key in keys:
        if match := re.match(pattern, key):
            last[int(match[1])] = max(last.get(int(match[1]), 0), int(match[2]))
    return tuple(last[stage] + 1 for stage in sorted(last))


def _resnet(what: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """timm's name and arguments of the ResNet whose tensors these are."""
    layers = _depths(weights, r"layer(\d+)\.(\d+)\.")
    firsts = [f"layer{stage + 1}.0.conv1.weight" for stage in range(len(layers))]
    _require(what, weights, "conv1.weight", *firsts)
    bottleneck = "layer1.0.conv3.weight" in weights
    channels = tuple(weights[first].shape[0] for first in firsts)
    name = _RESNETS.get((bottleneck, layers))
    kwargs: dict[str, Any] = {} if name else {"layers": layers}
    if channels != (64, 128, 256, 512):
        kwargs["channels"] = channels
    return {"name": name or ("resnet50" if bottleneck else "resnet18"), "kwargs": kwargs}


def _convnext(what: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """timm's name and arguments of the ConvNeXt whose tensors these are, in its authors' names."""
    depths = _depths(weights, r"stages\.(\d+)\.(\d+)\.")
    firsts = [f"stages.{stage}.0.dwconv.weight" for stage in range(len(depths))]
    _require(what, weights, "downsample_layers.0.0.weight", *firsts)
    dims = tuple(weights[first].shape[0] for first in firsts)
    v2 = any(".grn." in key for key in weights)
    name = (_CONVNEXTS_V2 if v2 else _CONVNEXTS).get((depths, dims))
    kwargs: dict[str, Any] = {} if name else {"depths": depths, "dims": dims}
    if (kernel := weights[firsts[0]].shape[-1]) != 7:
        kwargs["kernel_sizes"] = kernel
    if (patch := weights["downsample_layers.0.0.weight"].shape[-1]) != 4:
        kwargs["patch_size"] = patch
    return {"name": name or ("convnextv2_tiny" if v2 else "convnext_tiny"), "kwargs": kwargs}


# ------------------------------------------------------------------------------------------------------------------ SparK

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
    config = (_convnext if convnext else _resnet)(what, weights)
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
    _require(what, official, "mask_tokens.0", first)
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


# ------------------------------------------------------------------------------------------------------------------ FCMAE


def official_fcmae_key(ours: str) -> str:
    """Our name of a tensor of ``pretrain.fcmae.FCMAE`` -> that of the released pre-training, with ordinary convolutions."""
    half, _, rest = ours.partition(".")
    if half == "encoder":
        return f"encoder.{official_convnext_key(rest)}"
    if rest.startswith("blocks."):
        return official_convnext_key(f"decoder.{rest.removeprefix('blocks.')}")
    return rest


def _dense_fcmae(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
    weights = _dense_fcmae(official)
    config = _convnext(what, {key: value for key, value in weights.items() if not key.startswith("decoder.")})
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
    _require(what, weights, "proj.weight", "decoder.0.dwconv.weight", "pred.weight")
    config["decoder_dim"] = weights["proj.weight"].shape[0]
    config["decoder_depth"] = _depths([f"0.{key}" for key in weights], r"(\d+)\.decoder\.(\d+)\.")[0]
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


# ------------------------------------------------------------------------------------------------- to other libraries


def torchvision_convnext_key(ours: str) -> str:
    """timm's name of a ConvNeXt tensor -> torchvision's: ``stages.1.blocks.0.mlp.fc1.bias`` -> ``features.3.0.block.3.bias``."""
    key = re.sub(r"^stem\.", "features.0.", ours)
    key = re.sub(r"^stages\.(\d+)\.downsample\.", lambda found: f"features.{2 * int(found[1])}.", key)
    key = re.sub(r"^stages\.(\d+)\.blocks\.(\d+)\.", lambda found: f"features.{2 * int(found[1]) + 1}.{found[2]}.", key)
    for timm_name, place in (("conv_dw", 0), ("norm", 2), ("mlp.fc1", 3), ("mlp.fc2", 5)):
        key = re.sub(rf"^(features\.\d+\.\d+)\.{re.escape(timm_name)}\.", rf"\1.block.{place}.", key)
    key = re.sub(r"\.gamma$", ".layer_scale", key)
    return re.sub(r"^head\.fc\.", "classifier.2.", re.sub(r"^head\.norm\.", "classifier.0.", key))


_TORCHVISION: dict[str, Callable[[str], str]] = {
    **dict.fromkeys(["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"], str),
    **dict.fromkeys(["resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"], str),
    **dict.fromkeys(["wide_resnet50_2", "wide_resnet101_2"], str),
    **dict.fromkeys(["convnext_tiny", "convnext_small", "convnext_base", "convnext_large"], torchvision_convnext_key),
}
"""Networks that are the same in timm and torchvision, by their name in both: timm's name of a tensor -> torchvision's."""


def torchvision_name(name: str, kwargs: Mapping[str, Any]) -> str:
    """torchvision's name of the network that timm builds by ``name`` (whatever its tag) with the arguments ``kwargs``.

    Raises:
        InteropError: torchvision does not have the very same.
    """
    kind, what = name.partition(".")[0], f"the encoder {name}"
    if kind not in _TORCHVISION:
        raise InteropError(what, hint=f"torchvision does not have that very network; it has {', '.join(_TORCHVISION)}")
    if other := structure(kwargs):
        raise InteropError(what, hint=f"torchvision's {kind} cannot be built with encoder.kwargs={other}")
    return kind


def export_torchvision(kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of the timm network ``kind``, with or without its classifier -> torchvision's, with or without it.

    ``kind`` is what :func:`torchvision_name` finds. All of torchvision's tensors are there but the classifier's, where
    ``state`` has none.
    """
    renamed, classifier = _TORCHVISION[kind], "fc.weight" if "fc.weight" in state else "head.fc.weight"
    num_classes = state[classifier].shape[0] if classifier in state else 0
    with torch.device("meta"):
        ours = build_encoder(kind, in_chans=3, image_size=(224, 224), drop_path_rate=0.0, num_classes=num_classes)
        theirs = torchvision.models.get_model(kind, num_classes=num_classes or 1).state_dict()
    expected = {name: (renamed(name), value.shape) for name, value in ours.state_dict().items()}
    found = rename_strictly(
        f"the encoder {kind}", state, expected, hint="torchvision's networks have 3 input channels and its own layers"
    )
    # Layer scale is (C, 1, 1) there.
    return {name: found[name].reshape(value.shape) for name, value in theirs.items() if name in found}


# ----------------------------------------------------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 when the file was written, 2 with one line on stderr otherwise."""
    parser = _Parser(prog="python -m models.interop", description="Convert released checkpoints, and ours.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    dalle = commands.add_parser("dalle", help="DALL-E's encoder.pkl and decoder.pkl to one tokenizer file")
    for name in ("encoder", "decoder", "out"):
        dalle.add_argument(name, type=Path, metavar=f"{name.upper()}{'.safetensors' if name == 'out' else '.pkl'}")
    dalle.set_defaults(write=_write_dalle)
    spark = commands.add_parser("spark", help="SparK's checkpoint, with or without decoder, to a plain timm encoder")
    spark.add_argument("checkpoint", type=Path, metavar="IN.pth")
    spark.add_argument("out", type=Path, metavar="OUT.safetensors")
    spark.add_argument("--whole", action="store_true", help="keep the decoder too, in the names of pretrain.spark")
    spark.set_defaults(write=_write_spark)
    fcmae = commands.add_parser("fcmae", help="a ConvNeXt V2 checkpoint, pre-trained or fine-tuned, to plain timm")
    fcmae.add_argument("checkpoint", type=Path, metavar="IN.pt")
    fcmae.add_argument("out", type=Path, metavar="OUT.safetensors")
    fcmae.add_argument("--whole", action="store_true", help="keep the decoder too, in the names of pretrain.fcmae")
    fcmae.set_defaults(write=_write_fcmae)
    export = commands.add_parser("export", help="an encoder of ours, or a fine-tuned model, for another library")
    export.add_argument("checkpoint", type=Path, metavar="RUN_OR_FILE")
    export.add_argument("out", type=Path, metavar="OUT.safetensors|OUT.pth")
    export.add_argument("--to", choices=("timm", "torchvision"), required=True, help="whose names the tensors get")
    export.add_argument("--name", help="the timm network, where no .json beside the weights says it")
    export.set_defaults(write=_write_export)
    args = parser.parse_args(argv)
    try:
        if args.out.exists():
            raise ValueError(f"{args.out} exists; name another file or remove it")
        if not args.out.absolute().parent.is_dir():
            raise ValueError(f"folder {args.out.absolute().parent} does not exist")
        told = args.write(args)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    sys.stdout.write(f"wrote {args.out}: {told}\n")
    return 0


def _write_dalle(args: argparse.Namespace) -> str:
    save_tokenizer(load_dalle(args.encoder, args.decoder), args.out)
    dvae = load_tokenizer(args.out)
    parameters = sum(p.numel() for p in dvae.parameters())
    return f"{dvae.config}, {parameters / 1e6:.1f} M parameters"


def _write_spark(args: argparse.Namespace) -> str:
    config, state = convert_spark(read_state_dict(args.checkpoint))
    return _write_network("the SparK checkpoint", args, config, state)


def _write_network(what: str, args: argparse.Namespace, config: dict[str, Any], state: dict[str, Tensor]) -> str:
    """Write an encoder, or with ``--whole`` the network of a pre-training -> how it is built, for the person to see."""
    if args.whole and "decoder_dim" not in config:
        raise InteropError(what, hint="it holds the encoder alone: convert it without --whole")
    if not args.whole and "decoder_dim" in config:
        names = {name: name.removeprefix("encoder.") for name in state if name.startswith("encoder.")}
        state = {ours: state[name] for name, ours in names.items()}
    save_file({name: value.contiguous() for name, value in state.items()}, args.out, metadata={"format": "pt"})
    kwargs = {key: list(value) if isinstance(value, tuple) else value for key, value in config["kwargs"].items()}
    named = f"encoder.name={config['name']}" + (f" encoder.kwargs={kwargs}" if kwargs else "")
    initial = ", ".join(name.removeprefix("encoder.") for name in config["initial"])
    return named + (f"; never trained, at their initial values: {initial}" if initial else "")


def _write_fcmae(args: argparse.Namespace) -> str:
    # What the released training saves has its command line beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        official = read_state_dict(args.checkpoint)
    config, state = convert_fcmae(official)
    return _write_network("the ConvNeXt V2 checkpoint", args, config, state)


def _write_export(args: argparse.Namespace) -> str:
    if args.out.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"{args.out} must end in .safetensors or .pth")
    file = weights_file(args.checkpoint)
    card, state = read_card(file), read_state_dict(file)
    name, kwargs = args.name or card.get("name"), card.get("kwargs", {})
    if name is None or card.get("name", name) != name:
        made = f"was made with {card['name']}: leave out --name" if card else "has no .json beside it: give --name"
        raise ValueError(f"{file} {made}")
    renamed: Callable[[str], str] = str
    if args.to == "torchvision":
        kind = torchvision_name(name, kwargs)
        renamed, out = _TORCHVISION[kind], export_torchvision(kind, state)
        told = _torchvision_call(kind, out)
    else:
        out, told = state, _timm_call(name, card, state, args.out)
    whole = {key: value.contiguous() for key, value in out.items()}
    if args.out.suffix == ".pth":
        torch.save(whole, args.out)
    else:
        save_file(whole, args.out, metadata={"format": "pt"})
    untouched = ", ".join(renamed(key) for key in card.get("untouched", []))
    return told + (f"; never trained, as they were before pre-training: {untouched}" if untouched else "")


def _torchvision_call(kind: str, state: Mapping[str, Tensor]) -> str:
    """How torchvision loads what was written."""
    last = "classifier.2" if kind.startswith("convnext") else "fc"
    if f"{last}.weight" in state:
        return f"torchvision.models.{kind}(num_classes={state[f'{last}.weight'].shape[0]}) loads it"
    place = last.replace(".2", "[2]")
    absent = f"it has no {last}.weight and {last}.bias, as the encoder has no classifier"
    return f"torchvision.models.{kind}() loads it after model.{place} = torch.nn.Identity(); {absent}"


def _timm_call(name: str, card: Mapping[str, Any], state: Mapping[str, Tensor], out: Path) -> str:
    """How timm loads what was written, found out by doing so without the numbers."""
    asked: dict[str, Any] = dict(
        image_size=tuple(card.get("image_size", (224, 224))), drop_path_rate=0.0, kwargs=card.get("kwargs", {})
    )
    options = dict(num_classes=0, in_chans=card.get("in_chans", 3))
    if timm.is_model(name) and not timm.models.model_entrypoint(name).__module__.startswith("timm."):
        raise InteropError(f"the encoder {name}", hint="it is a network of ours, which timm alone does not have")
    with torch.device("meta"):
        heads = [f"{prefix}weight" for prefix in head_prefixes(create(name, **asked, **options)[0])]
        options["num_classes"] = max((state[head].shape[0] for head in heads if head in state), default=0)
        model, given = create(name, **asked, **options)
    rename_strictly(
        f"the encoder {name}", state, {key: (key, value.shape) for key, value in model.state_dict().items()}
    )
    words = ", ".join(f"{key}={value!r}" for key, value in {**options, **given}.items())
    return f"timm.create_model({name!r}, {words}, checkpoint_path={str(out)!r}) loads it"


if __name__ == "__main__":
    sys.exit(main())
