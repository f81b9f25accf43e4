"""How the network of some weights is built: the description beside them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

_FREE = ("global_pool", "fc_norm", "img_size", "dynamic_img_size", "dynamic_img_pad", "weight_init")
"""Backbone arguments that may differ from pre-training, besides those about dropping; no weight tells of the others."""

AVERAGE = "ema.pt"
"""The moving average of one of our runs, in its checkpoint"""

HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def read_card(file: Path) -> dict[str, Any]:
    """The description beside weights, empty where there is none.

    ``encoder.json`` beside ``encoder.safetensors``, ``config.yaml`` of the run that a checkpoint belongs to, or
    ``config.json`` in a folder from the hub.
    """
    if file.is_dir() or file.name == AVERAGE:
        step = file if file.is_dir() else file.parent
        return _run_card(step.absolute().parents[1] / "config.yaml")
    card = file.with_suffix(".json")
    if file.suffix == ".safetensors" and card.is_file():
        found = json.loads(card.read_text())
        if not isinstance(found, dict) or not {"name", "kwargs", "in_chans", "image_size"} <= found.keys():
            raise ValueError(f"{card} does not describe an encoder: it must hold name, kwargs, in_chans and image_size")
        return found
    return _hub_card(file.parent / "config.json") if file.name in HUB_FILES else {}


def _run_card(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    config: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    try:
        encoder, data = config["encoder"], config["data"]
        card = {key: data[key] for key in ("in_chans", "image_size", "mean", "std")}
        return {"name": encoder["name"], "kwargs": encoder["kwargs"] or {}, **card}
    except (KeyError, TypeError):
        return {}


def _hub_card(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    config = json.loads(file.read_text())
    if not isinstance(config, dict) or "architecture" not in config:
        return {}
    asked, made = dict(config.get("model_args", {})), config.get("pretrained_cfg", {})
    channels, *size = made.get("input_size", (3, 224, 224))
    card = {"name": config["architecture"], "in_chans": asked.pop("in_chans", channels)}
    card |= {"image_size": list(asked.pop("img_size", size) or size), "kwargs": asked}
    asked.pop("num_classes", None)
    card |= {key: list(made[key]) for key in ("mean", "std") if key in made}
    names = config.get("label_names") or made.get("label_names")
    return card | ({"class_names": list(names)} if isinstance(names, list) else {})


def structure(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The backbone arguments among ``kwargs`` that make it another network."""
    return {key: value for key, value in kwargs.items() if key not in _FREE and "drop" not in key}
