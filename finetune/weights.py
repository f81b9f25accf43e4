"""Weights of an encoder: building it, loading it strictly, and handing it on."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.config import ConfigError, user_errors
from engine.files import write_atomically, write_json
from engine.schema import EncoderConfig
from engine.world import seed_step
from finetune.config import FinetuneData
from finetune.sets import eval_size
from models.encoder import build_encoder, head_prefixes
from models.pretrained import TIMM, check_card, describe, load_pretrained

log = logging.getLogger(__name__)


def resolve(encoder: EncoderConfig, data: FinetuneData, *, whole: bool = False) -> None:
    """Check the network asked for against the one described beside the weights; an empty ``encoder.name`` means that one."""
    with user_errors():
        if not encoder.name and encoder.pretrained == TIMM:
            raise ConfigError(f"encoder.pretrained={TIMM} loads timm's own weights: say of which encoder.name")
        card = describe(encoder.pretrained, encoder.name, whole=whole)
        if not encoder.name:
            if not card:
                raise ConfigError("encoder.name is required where no encoder.json beside encoder.pretrained says it")
            encoder.name, encoder.kwargs = card["name"], {**card["kwargs"], **encoder.kwargs}
        check_card(
            encoder.pretrained,
            card,
            name=encoder.name,
            in_chans=data.in_chans,
            kwargs=encoder.kwargs,
            mean=data.mean,
            std=data.std,
        )


def build(
    encoder: EncoderConfig,
    data: FinetuneData,
    seed: int,
    num_classes: int,
    *,
    head_init_scale: float = 1.0,
    whole: bool = False,
) -> nn.Module:
    """The timm model of ``encoder`` for images of ``data.image_size``, with its weights if it has any.

    Pre-trained weights are loaded strictly, and resized for the image size: see ``models.pretrained``. ``num_classes`` 0
    leaves out the classifier; ``whole`` demands that it is in the file.
    A new classifier on a pre-trained encoder starts with its weights times ``head_init_scale``.
    """
    # The same initial weights on every process, whatever they have drawn so far.
    seed_step(seed, -1, 0)
    size = (data.image_size[0], data.image_size[1])
    asked: dict[str, Any] = dict(name=encoder.name, in_chans=data.in_chans, image_size=size, kwargs=encoder.kwargs)
    model: nn.Module = build_encoder(**asked, drop_path_rate=encoder.drop_path_rate, num_classes=num_classes)
    if eval_size(data) != size and hasattr(model, "set_input_size") and not encoder.kwargs.get("dynamic_img_size"):
        raise ConfigError(
            f"data.eval_image_size={data.eval_image_size}: {encoder.name} has a fixed image size, {data.image_size}; "
            "leave it unset, or set encoder.kwargs.dynamic_img_size=true"
        )
    if not encoder.pretrained:
        # BEiT's small classifier is for a trained encoder; from scratch it would only slow down the start.
        if head_init_scale != 1:
            log.info("classify.head_init_scale=%g is left out: the encoder is not pre-trained", head_init_scale)
        return model
    try:
        new = load_pretrained(model, encoder.pretrained, whole=whole, **asked)
    except ValueError as error:
        hint = (
            "; mean pooling keeps the encoder's own norm with encoder.kwargs.fc_norm=false"
            if "fc_norm" in str(error)
            else ""
        )
        raise ConfigError(f"{error}{hint}") from None
    if whole and new:
        raise ConfigError(
            f"encoder.pretrained={encoder.pretrained} has no classifier for these {num_classes} classes: "
            f"{', '.join(new)} missing or of another shape"
        )
    if new:
        scale_head(model, head_init_scale)
    return model


def scale_head(model: nn.Module, scale: float) -> None:
    """Multiply the classifier's weights and biases by ``scale`` (BEiT's ``init_scale``)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(head_prefixes(model)):
                parameter.mul_(scale)


def save_model(
    model: nn.Module, encoder: EncoderConfig, data: FinetuneData, class_names: list[str], folder: Path
) -> None:
    """Write ``model.safetensors`` and, without its classifier, ``encoder.safetensors``, each with its description.

    ``model`` is a timm model; the keys are its own.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    card = {
        **dataclasses.asdict(encoder),
        **dict(in_chans=data.in_chans, image_size=data.image_size, mean=data.mean, std=data.std),
    }
    _save(state, card | {"class_names": class_names}, folder / "model.safetensors")
    body = {key: value for key, value in state.items() if not key.startswith(head_prefixes(model))}
    _save(body, card, folder / "encoder.safetensors")


def _save(state: dict[str, Tensor], card: dict[str, Any], path: Path) -> None:
    write_atomically(path, lambda draft: save_file(state, draft, metadata={"format": "pt"}))
    write_json(path.with_suffix(".json"), card)
