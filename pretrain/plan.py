"""``python -m pretrain plan RECIPE nodes=8 gpus=8 memory=80``: what a recipe needs of a cluster, before there is one.

The method is built without weights and a step of it is traced on shapes alone (engine/traced.py); the sums over
DeepSpeed's stages are in engine/memory.py, the table in engine/planning.py.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import ConfigError, check_run, user_errors
from engine.memory import Tensors
from engine.optim import param_groups
from engine.plan_command import command
from engine.planning import Cluster, Subject
from engine.traced import Shapes, Step, ValueNeededError, trace, without_weights
from models.dvae import DVAE
from pretrain import cim
from pretrain.methods import METHODS

ASSUMED = "none given: of DALL-E's size"
"""In place of the path of the tokenizer, which recipes leave to the command line."""


def fill_in(config: Any, cluster: Cluster) -> None:
    """Settings that a plan can do without; the rest is checked as for a run."""
    if config.method == "cim" and config.cim.corruption == "generator":
        config.cim.tokenizer = config.cim.tokenizer or ASSUMED
    section = getattr(METHODS[config.method], "section", "")
    if section and getattr(config, section).backend == "minkowski":
        raise ConfigError(
            f"{section}.backend=minkowski cannot be planned, MinkowskiEngine wants values: give {section}.backend=tiles"
        )
    config.train.compile = False  # there is nothing to gain on shapes
    check_run(config)
    METHODS[config.method].check(config)


def build(config: Any, cluster: Cluster | None = None, *, gpu: bool = True) -> Subject:
    """The method of a recipe without weights, and how to trace its step as it runs on a GPU, else on a CPU."""
    load_tokenizer = _instead(cim, "load_tokenizer", lambda real: functools.partial(_tokenizer, real, config))
    with user_errors(), without_weights() as mode, load_tokenizer:
        method: nn.Module = METHODS[config.method](config)
        groups = param_groups(method, config.optim)
    tokenizer = getattr(method, "tokenizer", None)
    apart = [] if tokenizer is None else [tokenizer._dvae]
    network = getattr(getattr(config, "encoder", None), "name", "")
    told = f"of the tokenizer{f' ({ASSUMED})' if apart and config.cim.tokenizer == ASSUMED else ''}"
    title = " ".join(filter(None, (config.method, network)))
    tensors = Tensors.of(method, groups, apart)
    return Subject(config, title, tensors, functools.partial(_trace, config, method, mode, apart, gpu), told)


def _tokenizer(real: Callable[[str], DVAE], config: Any, path: str) -> DVAE:
    return DVAE(in_chans=config.data.in_chans) if path == ASSUMED else real(path)


def _trace(
    config: Any,
    method: nn.Module,
    mode: Shapes,
    apart: list[nn.Module],
    gpu: bool,
    images: int,
    dtype: torch.dtype | None,
) -> Step:
    values, accumulated = batch(config, images, apart), config.train.accumulation > 1
    try:
        return trace(method, values, mode, dtype, apart=apart, accumulated=accumulated, gpu=gpu)
    except ValueNeededError as error:
        raise ConfigError(f"{config.recipe} cannot be planned: {error}") from error


def batch(config: Any, images: int, apart: list[nn.Module]) -> dict[str, Tensor]:
    """As a loader gives it; the values do not matter."""
    data = config.data
    found = {"image": torch.empty(images, data.in_chans, *data.image_size, dtype=torch.uint8)}
    for tokenizer in apart:
        stride: Any = tokenizer.stride
        size = [side // patch * stride for side, patch in zip(data.image_size, config.cim.patch_size, strict=True)]
        found["token_image"] = torch.empty(images, data.in_chans, *size, dtype=torch.uint8)
    return found | {"index": torch.arange(images)}


@contextmanager
def _instead(module: Any, name: str, value: Callable[[Any], Any]) -> Iterator[None]:
    """``module.name`` replaced by ``value(what it was)``."""
    before = getattr(module, name)
    setattr(module, name, value(before))
    try:
        yield
    finally:
        setattr(module, name, before)


main = command(Cluster, fill_in, build)
