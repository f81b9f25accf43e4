"""Weights of an encoder: building it, loading it strictly, and handing it on."""

import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from engine.config import ConfigError, user_errors
from engine.schema import EncoderConfig
from engine.world import seed_step
from finetune import heads
from finetune.config import FinetuneData
from finetune.sets import eval_size
from formats.files import write_atomically, write_json
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
    classes: heads.Classes | None = None,
    whole: bool = False,
) -> nn.Module:
    """The timm model of ``encoder`` for images of ``data.image_size``, with its weights if it has any.

    Pre-trained weights are loaded strictly, and resized for the image size: see ``models.pretrained``. ``num_classes`` 0
    leaves out the classifier; ``whole`` demands that it is in the file.
    A new classifier on a pre-trained encoder starts with its weights times ``head_init_scale``; ``classes`` say
    whether it is new (see ``finetune.heads``); without them it is, unless one in the file fits.
    """
    # The same initial weights on every process, whatever they have drawn so far.
    seed_step(seed, -1, 0)
    size = (data.image_size[0], data.image_size[1])
    asked: dict[str, Any] = dict(name=encoder.name, in_chans=data.in_chans, image_size=size, kwargs=encoder.kwargs)
    build = partial(build_encoder, **asked, drop_path_rate=encoder.drop_path_rate, num_classes=num_classes)
    model: nn.Module = build()
    if eval_size(data) != size and hasattr(model, "set_input_size") and "dynamic_img_size" not in encoder.kwargs:
        seed_step(seed, -1, 0)
        try:
            model = build(kwargs={**encoder.kwargs, "dynamic_img_size": True})
        except ValueError:
            raise ConfigError(
                f"data.eval_image_size={data.eval_image_size}: {encoder.name} takes images of {data.image_size} only; leave it "
                "unset"
            ) from None
    if not encoder.pretrained:
        # BEiT's small classifier is for a trained encoder; from scratch it would only slow down the start.
        if head_init_scale != 1:
            log.info("classify.head_init_scale=%g is left out: the encoder is not pre-trained", head_init_scale)
        if classes is not None and classes.head_init == "transfer":
            log.info("classify.head_init=transfer is left out: the encoder is not pre-trained")
        return model
    fresh, wanted = heads.classifier(model), classes or heads.Classes()
    ours = bool(num_classes) and not whole and heads.is_ours(encoder.pretrained, wanted)
    try:
        new = load_pretrained(model, encoder.pretrained, whole=whole or ours, **asked)
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
            f"{', '.join(new)} missing or of another shape; "
            "data.class_list=FILE names the classifier's classes as their folders are called, one per line in its order"
        )
    if num_classes and not whole:
        kept = not fresh.keys() & set(new)
        heads.begin(model, fresh, encoder.pretrained, kept, head_init_scale, wanted, whole=ours)
    return model


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
