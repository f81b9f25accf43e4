"""Weights of DALL-E's discrete VAE (openai/DALL-E), into ``models.dvae.DVAE``."""

import os
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from models.dvae import DVAE
from models.interop.strict import InteropError, rename_strictly, require
from models.safe_pickle import read_pickled_tensors


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
    require("the DALL-E encoder", encoder_sd, "blocks.input.w", "blocks.output.conv.w")
    require("the DALL-E decoder", decoder_sd, "blocks.input.w")
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
