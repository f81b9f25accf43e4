"""What an encoder starts from: timm's own weights, a file of weights, or the folder of one of our runs."""

import inspect
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from models.encoder import build_encoder, load_encoder, load_state, read_state_dict

log = logging.getLogger(__name__)

TIMM = "true"
"""The source that means timm's own weights; a file of that name is ``./true``."""

_FREE = ("global_pool", "fc_norm", "img_size", "dynamic_img_size", "dynamic_img_pad", "weight_init")
"""Backbone arguments that may differ from pre-training, besides those about dropping; no weight tells of the others."""


def weights_file(source: str | Path, *, whole: bool = False) -> Path:
    """The file that ``source`` means: of a run folder its encoder, or the ``whole`` model with its classifier.

    Raises:
        ValueError: the folder holds none.
    """
    if not Path(source).is_dir():
        return Path(source)
    name = "model.safetensors" if whole else "encoder.safetensors"
    if not (Path(source) / name).is_file():
        raise ValueError(f"encoder.pretrained={source} holds no {name}: has that run saved a checkpoint yet?")
    return Path(source) / name


def read_card(file: Path) -> dict[str, Any]:
    """The description beside weights (``encoder.json`` beside ``encoder.safetensors``); empty where there is none."""
    card = file.with_suffix(".json")
    if file.suffix != ".safetensors" or not card.is_file():
        return {}
    found = json.loads(card.read_text())
    if not isinstance(found, dict) or not {"name", "kwargs", "in_chans", "image_size"} <= found.keys():
        raise ValueError(f"{card} does not describe an encoder: it must hold name, kwargs, in_chans and image_size")
    return found


def describe(source: str, name: str, *, whole: bool = False) -> dict[str, Any]:
    """All that is known of the weights in ``source`` before they are read, empty where nothing is.

    Of a run it is its card (see :func:`read_card`); of timm's weights of ``name`` it is the ``mean`` and ``std`` of their
    images, as they fit other channels and image sizes.

    Raises:
        ValueError: ``source`` has no weights.
    """
    if not source:
        return {}
    if source != TIMM:
        return read_card(weights_file(source, whole=whole))
    published = _published(name)
    return {"mean": list(published.mean), "std": list(published.std)}


def check_card(
    source: str,
    card: Mapping[str, Any],
    *,
    name: str,
    in_chans: int,
    kwargs: Mapping[str, Any],
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Compare the network asked for with the one that ``card`` describes; another normalisation is only warned about.

    Raises:
        ValueError: naming the setting, its value and the one that the weights were made with.
    """
    for key, given, saved in (
        ("encoder.name", name, card.get("name", name)),
        ("data.in_chans", in_chans, card.get("in_chans", in_chans)),
        ("encoder.kwargs", structure(kwargs), structure(card.get("kwargs", kwargs))),
    ):
        if given != saved:
            raise ValueError(f"{key} is {given!r}, but {source} was made with {saved!r}: set {key} to that")
    for key, values in (("mean", mean), ("std", std)):
        saved = card.get(key, values)
        if values and len(saved) == len(values) and list(saved) != list(values):
            log.warning("data.%s=%s, but the encoder was pre-trained with %s", key, list(values), saved)


def structure(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The backbone arguments among ``kwargs`` that make it another network."""
    return {key: value for key, value in kwargs.items() if key not in _FREE and "drop" not in key}


def load_pretrained(
    model: nn.Module,
    source: str,
    *,
    name: str,
    in_chans: int,
    image_size: tuple[int, int],
    kwargs: Mapping[str, Any],
    whole: bool = False,
) -> list[str]:
    """Load the weights of ``source`` into ``model``, a timm model built with the other arguments, strictly.

    timm's own weights are made to fit other channels and image sizes as timm does it. Those of a file must be for
    ``in_chans`` channels; where they depend on the image size they are resized from the one they were made with. A
    classifier in ``source`` is loaded if it fits and left out if it does not. ``whole``: see :func:`weights_file`.

    Returns the classifier's keys that keep their initial values.

    Raises:
        ValueError: the weights cannot be had, or do not fit.
    """
    if source == TIMM:
        told = _tag(_published(name))
        fresh = load_state(model, _timm_state(name, in_chans, image_size, kwargs), f"timm's {told}")
    else:
        file = weights_file(source, whole=whole)
        told, fresh = str(file), _load_resized(model, file, image_size)
    log.info("loaded %s: %d tensors, new: %s", told, len(model.state_dict()) - len(fresh), ", ".join(fresh) or "none")
    return fresh


def _published(name: str) -> Any:
    """timm's description of its weights of a model."""
    try:
        found: Any = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # an unknown tag
        raise ValueError(f"encoder.name={name!r}: {error}") from None
    if found is None or not found.has_weights:
        known = timm.list_models(f"{name.partition('.')[0].split('_')[0]}*", pretrained=True)
        some = f"; it has of {', '.join(known[:6])}" if known else ""
        raise ValueError(f"encoder.pretrained={TIMM}, but timm has no weights of {name!r}{some}; or give a file")
    return found


def _tag(published: Any) -> str:
    return ".".join(part for part in (published.architecture, published.tag) if part)


def _timm_state(name: str, in_chans: int, image_size: tuple[int, int], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """State dict of timm's own weights, with their classifier, for other channels and image sizes."""
    try:
        # Built with the classifier of the weights: with another one timm would not mind if tensors were missing.
        # The copy draws numbers, which must not change what is drawn for the rest of the network.
        with torch.random.fork_rng(devices=[]):
            donor = build_encoder(
                name,
                in_chans=in_chans,
                image_size=image_size,
                drop_path_rate=0.0,
                num_classes=None,
                pretrained=True,
                kwargs=kwargs,
            )
    except Exception as error:  # a download fails in many ways, each library's its own
        published, reason = _published(name), " ".join(str(error).split())[:300] or type(error).__name__
        if "loading state_dict" in reason:
            raise ValueError(f"timm's {_tag(published)} does not fit this encoder: {reason}") from error
        where = published.file or published.hf_hub_id or published.url
        raise ValueError(
            f"encoder.pretrained={TIMM}: {_tag(published)} cannot be had from {where} ({reason}): it is fetched once and "
            "kept, which needs a network; without one give a file of weights"
        ) from error
    state: dict[str, Tensor] = donor.state_dict()
    return state


def _load_resized(model: nn.Module, file: Path, size: tuple[int, int]) -> list[str]:
    """Load a file; what depends on the image size is loaded at the one it was made for, and then resized by timm."""
    source = _source_size(model, file, size)
    resize = getattr(model, "set_input_size", None)
    # Windows of attention (Swin) do not follow the image: resizing would make the network another one.
    if source == size or resize is None or "window_size" in inspect.signature(resize).parameters:
        return load_encoder(model, file)
    resize(img_size=source)
    try:
        fresh = load_encoder(model, file)
    finally:
        resize(img_size=size)
    log.info("position embedding resized for images of %d x %d instead of %d x %d", *size, *source)
    return fresh


def _source_size(model: nn.Module, file: Path, size: tuple[int, int]) -> tuple[int, int]:
    """Image size that the weights in ``file`` were made for: as described beside it, else from its position embedding."""
    if card := read_card(file):
        return card["image_size"][0], card["image_size"][1]
    own, saved = getattr(model, "pos_embed", None), read_state_dict(file).get("pos_embed")
    if own is None or saved is None or own.ndim != 3 or saved.ndim != 3 or own.shape[1] == saved.shape[1]:
        return size
    patch_embed: Any = model.patch_embed
    tokens = saved.shape[1] - (own.shape[1] - patch_embed.num_patches)
    side = math.isqrt(max(tokens, 0))
    if side * side != tokens:
        raise ValueError(
            f"{file}: its {tokens} position embeddings are no square grid, and no JSON beside it names its image_size"
        )
    return side * patch_embed.patch_size[0], side * patch_embed.patch_size[1]
