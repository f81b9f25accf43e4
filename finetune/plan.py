"""``python -m finetune plan RECIPE nodes=1 gpus=8 memory=80``: what fine-tuning needs of a cluster.

As ``python -m pretrain plan`` does it (pretrain/plan.py), of the task classify.
"""

import dataclasses
import functools
from typing import Any

import torch
from torch import nn

from engine import ds
from engine.config import ConfigError, check_run, user_errors
from engine.memory import Tensors
from engine.optim import param_groups
from engine.plan_command import command
from engine.planning import Cluster, Subject
from engine.schema import option
from engine.traced import Shapes, Step, ValueNeededError, trace, without_weights
from engine.world import seed_step
from finetune import weights
from finetune.classify import Classifier
from finetune.config import check_classify


@dataclasses.dataclass
class FinetuneCluster(Cluster):
    """The words of the command."""

    classes: int = option(1000, "classes of the images, which are not looked at", ge=2)


def fill_in(config: Any, cluster: FinetuneCluster) -> None:
    """Settings that a plan can do without; the rest is checked as for a run."""
    if config.task != "classify" or config.evaluate:
        raise ConfigError(f"plan is for training with task=classify, {config.recipe} is {config.task}: see --dry_run")
    config.train.compile = False  # there is nothing to gain on shapes
    check_run(config)
    check_classify(config)
    weights.resolve(config.encoder, config.data)
    config.encoder.pretrained = ""  # whatever the weights are, they are as many
    micro_batch = ds.micro_batch_size(config, cluster.size)
    if config.mixes and micro_batch % 2:
        raise ConfigError(
            f"mixup and cutmix pair the images of a batch, {micro_batch} per GPU and part is odd: change train.batch_size or "
            "train.accumulation"
        )


def build(config: Any, cluster: FinetuneCluster) -> Subject:
    """The network of a recipe without weights, and how to trace its step as it runs on a GPU."""
    with user_errors(), without_weights() as mode:
        model = weights.build(config.encoder, config.data, config.seed, cluster.classes)
        method = Classifier(model, config, [str(number) for number in range(cluster.classes)])
        groups = param_groups(method, config.optim)
    title = f"classify {config.encoder.name}, {cluster.classes} classes"
    return Subject(config, title, Tensors.of(method, groups), functools.partial(_trace, config, method, mode))


def _trace(config: Any, method: nn.Module, mode: Shapes, images: int, dtype: torch.dtype | None) -> Step:
    data = config.data
    seed_step(config.seed, 0, 0)
    image = torch.empty(images, data.in_chans, *data.image_size, dtype=torch.uint8)
    values = {"image": image, "label": torch.zeros(images, dtype=torch.long)}
    try:
        return trace(method, values, mode, dtype, accumulated=config.train.accumulation > 1)
    except ValueNeededError as error:
        raise ConfigError(f"{config.recipe} cannot be planned: {error}") from error


main = command(FinetuneCluster, fill_in, build)
