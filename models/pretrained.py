"""What an encoder starts from: timm's own weights, a file of weights, or the folder of one of our runs."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from models.encoder import build_encoder
from models.interop.card import read_card, structure
from models.interop.fit import load_weights
from models.interop.report import KeyReport, Weights
from models.interop.source import read_weights, weights_file

log = logging.getLogger(__name__)

TIMM = "true"
"""The source that means timm's own weights; a file of that name is ``./true``."""


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
        ("encoder.kwargs", _but_patches(kwargs), _but_patches(card.get("kwargs", kwargs))),
    ):
        if given != saved:
            raise ValueError(f"{key} is {given!r}, but {source} was made with {saved!r}: set {key} to that")
    if card and card.get("in_chans", in_chans) != in_chans:
        log.warning(
            "data.in_chans=%d, but %s was made with %d: its first layer is adapted", in_chans, source, card["in_chans"]
        )
    for key, values in (("mean", mean), ("std", std)):
        saved = card.get(key, values)
        if values and len(saved) == len(values) and list(saved) != list(values):
            log.warning("data.%s=%s, but the encoder was pre-trained with %s", key, list(values), saved)


def _but_patches(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What makes it another network, less the patch size: patch embeddings are resized."""
    return {key: value for key, value in structure(kwargs).items() if key != "patch_size"}


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
    """:func:`load_reported` -> the keys that keep their initial values."""
    asked: dict[str, Any] = dict(name=name, in_chans=in_chans, image_size=image_size, kwargs=kwargs)
    return load_reported(model, source, **asked, whole=whole).missing


def load_reported(
    model: nn.Module,
    source: str,
    *,
    name: str,
    in_chans: int,
    image_size: tuple[int, int],
    kwargs: Mapping[str, Any],
    whole: bool = False,
    ema: bool | None = None,
) -> KeyReport:
    """Load the weights of ``source`` into ``model``, a timm model built with the other arguments, strictly.

    ``source`` is :data:`TIMM`, a run folder, a checkpoint of a run in progress, or a file of any kind that
    ``models.interop`` knows: a released one of the papers' codes, timm's, torchvision's. Channels, position embeddings
    and patch embeddings are made to fit as timm does it. A classifier in ``source`` is loaded if it fits and left out
    if it does not. ``whole``: see :func:`weights_file`; ``ema``: the moving average beside the weights, see
    :func:`read_weights`.

    Returns what became of every key; it is logged, too.

    Raises:
        ValueError: the weights cannot be had, or do not fit.
    """
    if source == TIMM:
        state = _timm_state(name, in_chans, image_size, kwargs)
        found = Weights(f"timm's {_tag(_published(name))}", "timm's own weights", state, image_size=image_size)
    else:
        found = read_weights(source, whole=whole, ema=ema)
    return load_weights(model, found, image_size)


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
