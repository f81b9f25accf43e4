"""Every method, small: the recipes for the digits with narrow networks."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.cli import read_config
from pretrain.__main__ import PROGRAM
from pretrain.methods import METHODS

RESNET = "encoder.kwargs={output_stride: 8, layers: [1, 1, 1, 1], channels: [8, 8, 16, 16]}"
CONVNEXT = "encoder.kwargs={output_stride: 8, depths: [1, 1, 1, 1], dims: [8, 16, 16, 24], conv_mlp: false}"
VIT = "encoder.kwargs={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}"
CONVVIT = "encoder.kwargs={patch_sizes: [1, 2, 2], embed_dims: [8, 16, 32], depths: [1, 1, 2], num_heads: 2, mlp_ratios: [2, 2, 2]}"
CIM = ["digits_cim", VIT, "cim.generator_dim=32", "cim.generator_heads=2", "cim.generator_depth=2"]
SMALL: dict[str, list[str]] = {
    "spark_resnet": ["digits_spark", RESNET, "spark.decoder_dim=32", "data.image_size=48"],
    "spark_convnext": [
        *("digits_spark", "encoder.name=convnextv2_atto", CONVNEXT, "spark.decoder_dim=32", "data.image_size=48"),
        "spark.densify_norm=layer",
    ],
    "fcmae": ["digits_fcmae", CONVNEXT, "fcmae.decoder_dim=16"],
    "convmae": ["digits_convmae", CONVVIT, "convmae.decoder_dim=32", "convmae.decoder_heads=2"],
    "cim_respix": CIM,
    "cim_revdet": [*CIM, "cim.objective=revdet"],
    "cim_resnet": [
        *("digits_cim", "encoder.name=resnet18", RESNET, "cim.generator_dim=32", "cim.generator_heads=2"),
        *("cim.generator_depth=2", "cim.shared_blocks=-1"),
    ],
    "dvae": ["digits_dvae", "dvae.width=8", "dvae.decoder_init_width=8", "dvae.vocab_size=16"],
}
"""A recipe and what is changed in it."""

BATCH = 4


def build(name: str, tokenizer: Path, *overrides: str) -> Any:
    """A method of :data:`SMALL`, in training, with the same weights every time."""
    recipe, *words = SMALL[name]
    words += ["data.path=.", *overrides]
    if recipe == "digits_cim":
        words.append(f"cim.tokenizer={tokenizer}")
    config = read_config(PROGRAM, recipe, words)
    kind: Any = METHODS[config.method]
    kind.check(config)
    torch.manual_seed(0)
    method = kind(config)
    for parameter in method.parameters():
        if parameter.dim() == 1 and not bool(parameter.any()):  # branches that begin silent
            torch.nn.init.normal_(parameter, std=0.2)
    return method.train()


def batch_of(method: Any, seed: int = 1) -> dict[str, Tensor]:
    """Images of its size, and the smaller ones that a tokenizer reads."""
    draw = torch.Generator().manual_seed(seed)
    found = {"image": torch.randint(0, 256, (BATCH, *_size(method)), dtype=torch.uint8, generator=draw)}
    tokenizer = getattr(method, "tokenizer", None)
    if tokenizer is not None:
        token_size = [side * tokenizer.stride for side in method.grid]
        found["token_image"] = torch.randint(0, 256, (BATCH, 3, *token_size), dtype=torch.uint8, generator=draw)
    return found


def _size(method: Any) -> tuple[int, int, int]:
    if not hasattr(method, "config"):  # the tokenizer's training, of images of any size
        return 3, 32, 32
    data = method.config.data
    return data.in_chans, data.image_size[0], data.image_size[1]
