"""Weights of any kind that is known, written for timm, torchvision or the Hugging Face hub."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.interop.card import read_card
from models.interop.fit import check, fit
from models.interop.guess import empty, guess
from models.interop.hub import is_ours, write_hub
from models.interop.report import KeyReport, Weights
from models.interop.source import read_weights, weights_file
from models.interop.strict import InteropError, listed
from models.interop.torchvision import TORCHVISION, export_torchvision, image_side, torchvision_call, torchvision_name
from models.interop.zero import is_zero

TARGETS = ("timm", "torchvision", "hub")


class UnknownNetworkError(ValueError):
    """Nothing says which network some weights are of."""


@dataclass
class Network:
    """Some weights and the timm network they are of, without its numbers."""

    weights: Weights
    card: dict[str, Any]
    asked: dict[str, Any]
    model: Any
    arguments: dict[str, Any]


def network_of(
    source: Path,
    *,
    whole: bool = False,
    ema: bool | None = None,
    name: str | None = None,
    **asked: Any,
) -> Network:
    """Read ``source`` and build its network: the one its description names, else ``name``, else the one its tensors tell.

    ``asked``: ``in_chans`` and ``image_size`` where they are not to be those of the weights, and ``kwargs`` added to theirs.

    Raises:
        ValueError: no network is named, or two are.
    """
    file = weights_file(source, whole=whole, ema=ema)
    card, weights = read_card(file), read_weights(source, whole=whole, ema=ema)
    if name is not None and card.get("name", name) != name:
        raise ValueError(f"{file} was made with {card['name']}: leave out --name")
    told: Mapping[str, Any] = card or ({} if name else guess(weights))
    name = name or told.get("name")
    if name is None:
        raise UnknownNetworkError(
            f"{file} ({weights.kind}) has no .json beside it, nor do its tensors tell its network: give --name"
        )
    usual = {"kwargs": {}, "in_chans": 3, "image_size": weights.image_size or (224, 224)}
    found = {key: told.get(key, value) for key, value in usual.items()}
    kwargs = {**found["kwargs"], **(asked.pop("kwargs", None) or {})}
    found |= {"name": name, "kwargs": kwargs, **{key: value for key, value in asked.items() if value is not None}}
    model, arguments = empty(found, weights.state)
    return Network(weights, card, found, model, arguments)


def fitted(network: Network) -> tuple[dict[str, Tensor], KeyReport]:
    """The tensors, strictly all that the network has but what was never trained, and what became of every key."""
    state, report = fit(network.model, network.weights, tuple(network.asked["image_size"]))
    check(network.model, network.weights, report)
    for key in report.missing:
        like = network.model.state_dict()[key]
        if "norm" not in key:
            raise InteropError(f"{network.weights.source}", missing=[key], hint="it was never trained")
        state[key] = (torch.ones if key.endswith("weight") else torch.zeros)(like.shape)
    return {key: state[key].contiguous() for key in network.model.state_dict()}, report


def write(source: Path, out: Path, to: str, **asked: Any) -> str:
    """Write the weights of ``source`` for ``to``, one of :data:`TARGETS` -> how they are loaded there; see :func:`network_of`.

    Raises:
        ValueError: what does not fit, or the other library does not have.
    """
    if to != "hub" and out.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"{out} must end in .safetensors or .pth")
    network = network_of(source, **asked)
    name: str = network.asked["name"]
    renamed: Callable[[str], str] = str
    if to == "torchvision":
        kind = torchvision_name(name, network.asked["kwargs"])
        state, report = fitted(network)
        side, renamed = image_side(kind, state), TORCHVISION[kind].renamed
        state = export_torchvision(kind, state)
        told = torchvision_call(kind, state, side)
    elif to == "timm" and is_ours(name):
        hint = "it is a network of ours, which timm alone does not have; --to hub can hold it"
        raise InteropError(f"the encoder {name}", hint=hint)
    else:
        state, report = fitted(network)
        words = ", ".join(f"{key}={value!r}" for key, value in network.arguments.items())
        told = f"timm.create_model({name!r}, {words}, checkpoint_path={str(out)!r}) loads it"
    if to == "hub":
        write_hub(out, name, network.model, state, network.arguments, {**network.card, **network.asked})
        before = "after `import models` " if is_ours(name) else ""
        told = f"{before}timm.create_model('local-dir:{out}', pretrained=True) loads it"
    elif out.suffix == ".pth":
        torch.save(state, out)
    else:
        save_file(state, out, metadata={"format": "pt"})
    untouched = [*network.card.get("untouched", []), *report.missing]
    never = "; never trained, as they were before pre-training: " if untouched else ""
    file = Path(network.weights.source)
    chosen = is_zero(file) or is_zero(file.parent)  # which of a run's checkpoints, and its weights or their average
    read = f"; read from {file} ({network.weights.kind})" if chosen else ""
    return told + never + ", ".join(map(renamed, untouched)) + left_out(report) + read


def inspect(source: Path, **asked: Any) -> tuple[str, bool]:
    """What ``source`` holds, in lines, and whether it fits its network; see :func:`network_of`.

    Where no network is named or told, the groups of its keys alone.
    """
    weights = read_weights(source, whole=asked.get("whole", False), ema=asked.get("ema"))
    try:
        network = network_of(source, **asked)
    except UnknownNetworkError as error:
        left = [f"{len(keys)} left out: {what}: {listed(keys)}" for what, keys in weights.left_out.items()]
        held = f"{len(weights.state)} of the encoder: {listed(list(weights.state))}"
        return "\n  ".join([f"{weights.source}: {weights.kind}", held, *left, str(error)]), True
    _, report = fit(network.model, network.weights, tuple(network.asked["image_size"]))
    found = network.asked
    size = ", ".join(map(str, found["image_size"]))
    built = f"encoder.name={found['name']} data.image_size=[{size}] data.in_chans={found['in_chans']}"
    if found["kwargs"]:
        built += f" encoder.kwargs={found['kwargs']}"
    return f"{report}\n  {built}", report.fits and bool(report.matched)


def left_out(report: KeyReport) -> str:
    """What of the source is not there any more, in words."""
    groups = [f"{what} ({len(keys)})" for what, keys in report.left_out.items()]
    return f"; left out: {', '.join(groups)}" if groups else ""
