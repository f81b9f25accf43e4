"""Parameter groups and optimisers: weight decay where it belongs, and a learning rate per layer."""

import logging
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.models._manipulate import group_with_matcher
from timm.optim import create_optimizer_v2
from torch import nn

from engine.config import ConfigError
from engine.schema import OptimConfig

log = logging.getLogger(__name__)


def timm_layers(encoder: Any) -> dict[str, int]:
    """Layer of every parameter of a timm model, 0 next to the pixels, from its ``group_matcher``.

    The classifier has its place even where ``num_classes=0`` has left it out: what is trained on top counts as one.

    Raises:
        ConfigError: the model states no order, or leaves out a parameter that is not of its classifier.
    """
    if not hasattr(encoder, "group_matcher"):
        raise ConfigError(f"{type(encoder).__name__} states no layer order (group_matcher): use optim.layer_decay=1")
    matcher = encoder.group_matcher(coarse=False)
    names = [name for name, _ in encoder.named_parameters()]
    layers = group_with_matcher(((name, None) for name in (*names, _classifier(encoder))), matcher, reverse=True)
    # timm counts what no pattern matches to the last layer: right for a final norm or a classifier, silently wrong for
    # a token that the model registers ahead of its layers.
    if isinstance(matcher, dict):
        patterns = [re.compile(pattern) for pattern in _patterns(matcher)]
        matched = [any(p.match(name) for p in patterns) for name in names]
    else:
        matched = [matcher(name) != math.inf for name in names]
    deepest = max((i for i, found in enumerate(matched) if found), default=0)
    if lost := [name for i, name in enumerate(names) if i < deepest and not matched[i]]:
        raise ConfigError(f"no layer of {type(encoder).__name__} holds {', '.join(lost[:5])}: use optim.layer_decay=1")
    return layers


def _classifier(encoder: Any) -> str:
    """A parameter that the classifier of a timm model has, or would have."""
    name = getattr(encoder, "default_cfg", {}).get("classifier") or "head"
    return f"{name if isinstance(name, str) else name[0]}.weight"


def _patterns(matcher: dict[str, Any]) -> Iterator[str]:
    """Regular expressions of a timm group matcher: values are a pattern, or a list of (pattern, suffix)."""
    for value in matcher.values():
        if isinstance(value, str):
            yield value
        elif value is not None:
            yield from (pattern for pattern, _ in value)


LAYER_RULES: dict[str, Callable[[Any], dict[str, int]]] = {"timm": timm_layers}
"""Names of ``optim.layer_decay_groups``: encoder -> layer of each parameter, 0 next to the pixels."""


def named_by_parts(model: nn.Module, rule: str) -> set[int]:
    """The ``id`` of every parameter that some part of ``model`` names in its method ``rule``, such as timm's ``no_weight_decay``.

    Not its name: a parameter that two parts share goes by the name of either.
    """
    found = set()
    for module in model.modules():
        if callable(names := getattr(module, rule, None)):
            own = dict(module.named_parameters(remove_duplicate=False))
            found |= {id(own[name]) for name in names() if name in own}
    return found


def param_groups(method: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups of ``method``: {params, names, lr_scale, wd_scale}, none of them empty.

    Not decayed: parameters of at most one dimension (norms, biases, layer scale) and those that a part of the model
    lists in ``no_weight_decay``; those listed in a part's ``weight_decay_also`` are decayed all the same. With
    ``layer_decay`` < 1 a layer's ``lr_scale`` is ``layer_decay ** (last - layer)``, counted in ``method.encoder``; what
    lies outside the encoder (a head) learns at the full rate.
    """
    keep, also = (named_by_parts(method, rule) for rule in ("no_weight_decay", "weight_decay_also"))
    ids: dict[int, int] = {}
    last = 0
    if optim.layer_decay < 1:
        encoder: Any = method.encoder
        named = LAYER_RULES[optim.layer_decay_groups](encoder)
        ids = {id(p): named[name] for name, p in encoder.named_parameters()}
        last = max(named.values())
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = optim.layer_decay ** (last - ids.get(id(parameter), last)) if ids else 1.0
        spared = (parameter.ndim <= 1 or id(parameter) in keep) and id(parameter) not in also
        decay = 0.0 if spared else 1.0
        group = groups.setdefault((scale, decay), dict(params=[], names=[], lr_scale=scale, wd_scale=decay))
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ConfigError("nothing to train: every parameter is frozen")
    ordered = [groups[key] for key in sorted(groups)]
    for line in table(ordered):
        log.info(line)
    return ordered


def table(groups: list[dict[str, Any]]) -> list[str]:
    """The groups as lines of text: scale of the learning rate and of the weight decay, parameters, an example."""
    lines = ["lr scale  decay  tensors  parameters  first"]
    for group in groups:
        count = sum(p.numel() for p in group["params"])
        lines.append(
            f"{group['lr_scale']:8.4f}  {group['wd_scale']:5.0f}  {len(group['params']):7d}  {count:10,d}  {group['names'][0]}"
        )
    return lines


def build_optimizer(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """Optimiser over the groups; learning rate and weight decay are set at every step by :func:`set_step`."""
    plain = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    # DeepSpeed and timm both read these fields before the first step sets them.
    for group in plain:
        group.update(lr=0.0, weight_decay=0.0)
    if optim.name == "adamw":
        return torch.optim.AdamW(plain, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps)
    if optim.name == "lamb":
        # timm's Lamb clips on its own, at 1 where nothing is said.
        clip = optim.clip_grad or None
        return create_optimizer_v2(
            plain, opt="lamb", lr=0.0, betas=tuple(optim.betas), eps=optim.eps, max_grad_norm=clip
        )
    return create_optimizer_v2(plain, opt=optim.name, lr=0.0, momentum=optim.momentum)


def set_step(optimizer: Any, lr: float, weight_decay: float) -> None:
    """Give every group its share of this step's learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = float(lr) * group["lr_scale"]
        group["weight_decay"] = float(weight_decay) * group["wd_scale"]
