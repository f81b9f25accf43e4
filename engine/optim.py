"""Parameter groups and optimisers: weight decay where it belongs, and a learning rate per layer."""

import logging
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from engine.config import ConfigError
from engine.layers import LAYER_RULES
from engine.schema import OptimConfig

log = logging.getLogger(__name__)


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


def factors_by_parts(model: nn.Module) -> dict[int, float]:
    """The ``id`` of every parameter that some part of ``model`` names in its method ``lr_factors`` -> that factor."""
    found: dict[int, float] = {}
    for module in model.modules():
        if callable(rule := getattr(module, "lr_factors", None)):
            own = dict(module.named_parameters(remove_duplicate=False))
            found |= {id(own[name]): factor for name, factor in rule().items()}
    return found


def param_groups(method: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups of ``method``: {params, names, lr_scale, wd_scale}, none of them empty.

    Not decayed: parameters of at most one dimension (norms, biases, layer scale) and those that a part of the model
    lists in ``no_weight_decay``; those listed in a part's ``weight_decay_also``, or in ``decay_also``, are decayed all the same. A part's
    ``lr_factors`` (name -> factor) is multiplied into the ``lr_scale`` of what it names. With
    ``layer_decay`` < 1 a layer's ``lr_scale`` is ``layer_decay ** (last - layer)``, counted in ``method.encoder``; what
    lies outside the encoder (a head) learns at the full rate.
    """
    keep, also = (named_by_parts(method, rule) for rule in ("no_weight_decay", "weight_decay_also"))
    also |= _named(method, optim.decay_also)
    factors = factors_by_parts(method)
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
        scale *= factors.get(id(parameter), 1.0)
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


def _named(method: nn.Module, ends: list[str]) -> set[int]:
    """The ``id`` of every parameter whose name ends in one of ``ends``."""
    found: set[int] = set()
    for end in ends:
        new = {id(p) for name, p in method.named_parameters(remove_duplicate=False) if end and name.endswith(end)}
        if not new:
            raise ConfigError(f"optim.decay_also: no parameter's name ends in {end!r}")
        found |= new
    return found


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
            plain,
            opt="lamb",
            lr=0.0,
            betas=tuple(optim.betas),
            eps=optim.eps,
            max_grad_norm=clip,
            bias_correction=optim.lamb_bias_correction,
            always_adapt=optim.lamb_always_adapt,
        )
    if optim.name == "lars":
        # Matrices keep their trust ratio where nothing decays, as released for MoCo v3 and MAE; timm's would be plain SGD.
        # Where something decays the ratio is that of LARS's paper (arXiv:1708.03888), |w| / (|g| + decay |w|).
        for group in plain:
            group["always_adapt"] = bool(group["wd_scale"])
        return create_optimizer_v2(plain, opt="lars", lr=0.0, momentum=optim.momentum)
    return torch.optim.SGD(plain, lr=0.0, momentum=optim.momentum, nesterov=optim.nesterov)


def set_step(optimizer: Any, lr: float, weight_decay: float) -> None:
    """Give every group its share of this step's learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = float(lr) * group["lr_scale"]
        group["weight_decay"] = float(weight_decay) * group["wd_scale"]
