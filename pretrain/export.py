"""What a pre-training run starts from, and what it hands on."""

import dataclasses
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from engine.config import user_errors
from formats.files import write_atomically, write_json
from models.pretrained import check_card, describe, load_pretrained


def check_start(config: Any) -> None:
    """Refuse an ``encoder.pretrained`` that was made with another network, before anything is built."""
    encoder, data = config.encoder, config.data
    with user_errors():
        card = describe(encoder.pretrained, encoder.name)
        check_card(
            encoder.pretrained,
            card,
            name=encoder.name,
            in_chans=data.in_chans,
            kwargs=encoder.kwargs,
            mean=data.mean,
            std=data.std,
        )


def start_encoder(encoder: nn.Module, config: Any) -> None:
    """Load ``encoder.pretrained`` into the encoder built from ``config``; nothing where it is empty."""
    asked, data = config.encoder, config.data
    if asked.pretrained:
        size = (data.image_size[0], data.image_size[1])
        load_pretrained(
            encoder, asked.pretrained, name=asked.name, in_chans=data.in_chans, image_size=size, kwargs=asked.kwargs
        )


def save_encoder(encoder: nn.Module, config: Any, folder: Path) -> None:
    """``encoder.safetensors`` in plain timm keys and ``encoder.json``, which says how to build it.

    There, ``untouched`` lists the parameters that pre-training did not train: they are as they were at its start.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}
    write_atomically(folder / "encoder.safetensors", lambda draft: save_file(state, draft, metadata={"format": "pt"}))
    data = config.data
    described = dict(in_chans=data.in_chans, image_size=data.image_size, mean=data.mean, std=data.std)
    untouched = [name for name, parameter in encoder.named_parameters() if not parameter.requires_grad]
    card = {**dataclasses.asdict(config.encoder), "method": config.method, **described, "untouched": untouched}
    write_json(folder / "encoder.json", card)
