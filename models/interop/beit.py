"""Weights of BEiT's pre-training (microsoft/unilm), into ``models.beit.BEiT`` and back."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.beit import BEiT
from models.interop.strict import rename_strictly, require


def convert_beit(
    official: Mapping[str, Tensor], image_size: tuple[int, int] | None = None, num_heads: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """State dict of unilm's ``VisionTransformerForMaskedImageModeling`` -> (arguments of ``models.beit.BEiT``, its state dict).

    Sizes are read from the tensors, except ``image_size`` (default: square) and ``num_heads`` (default: heads of width 64, as
    in all released models). The official query and value biases become timm's, with a key bias of zero.
    """
    what, weight = "the BEiT checkpoint", "patch_embed.proj.weight"
    require(what, official, weight, "pos_embed", "lm_head.weight", "blocks.0.mlp.fc1.weight")
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
