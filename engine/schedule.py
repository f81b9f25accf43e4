"""Learning rate and weight decay as arrays, one value per optimiser step."""

import math
from dataclasses import dataclass

import numpy as np

from engine.config import ConfigError, exactly_one
from engine.schema import OptimConfig, TrainConfig


def cosine(
    peak: float, end: float, steps: int, warmup_steps: int = 0, start: float = 0.0, schedule: str = "beit"
) -> np.ndarray:
    """Linear warm-up from ``start`` to ``peak``, then half a cosine to ``end`` -> (steps,) float64.

    The released codes differ in their ends (goldens/schedules.json). ``beit``: the warm-up ends on the peak, which the
    cosine repeats, and the run ends one step before the cosine does. ``mae``, which is ConvNeXt V2's and ConvMAE's, too:
    the warm-up ends one step before the peak. ``spark``: that, and the last step has ``end``.
    """
    warmup = np.linspace(start, peak, warmup_steps, endpoint=schedule == "beit")
    rest = np.arange(steps - warmup_steps)
    span = len(rest) - (schedule == "spark")
    falling = end + 0.5 * (peak - end) * (1 + np.cos(np.pi * rest / max(span, 1)))
    return np.concatenate([warmup, falling])


def peak_lr(optim: OptimConfig, batch_size: int) -> float:
    """The peak learning rate: ``lr`` as it is, or ``base_lr * batch_size / 256``."""
    exactly_one(optim__lr=optim.lr, optim__base_lr=optim.base_lr)
    return optim.lr if optim.lr is not None else optim.base_lr * batch_size / 256  # type: ignore[operator]


@dataclass(frozen=True)
class Plan:
    """A run in optimiser steps; every duration of the recipe is converted here, once."""

    steps: int
    steps_per_epoch: int
    lr: np.ndarray
    weight_decay: np.ndarray

    @property
    def epochs(self) -> int:
        """Epochs begun."""
        return math.ceil(self.steps / self.steps_per_epoch)

    @classmethod
    def make(cls, optim: OptimConfig, train: TrainConfig, batches_per_epoch: int) -> "Plan":
        """Plan of a run whose processes each see ``batches_per_epoch`` micro batches in an epoch."""
        per_epoch = batches_per_epoch // train.accumulation
        if per_epoch == 0:
            raise ConfigError(
                f"an epoch of {batches_per_epoch} batches holds no step of train.accumulation={train.accumulation}: "
                "lower train.batch_size or train.accumulation"
            )
        steps = train.steps if train.steps is not None else round(train.epochs * per_epoch)  # type: ignore[operator]
        steps = max(steps, 1)
        warmup = train.warmup_steps if train.warmup_steps is not None else round(train.warmup_epochs * per_epoch)
        if warmup > steps:
            raise ConfigError(
                f"a warm-up of {warmup} steps does not fit a run of {steps}: give a smaller train.warmup_steps, or more steps"
            )
        peak = peak_lr(optim, train.batch_size)
        lr = cosine(peak, optim.min_lr, steps, warmup, optim.warmup_lr, optim.schedule)
        end = optim.weight_decay if optim.weight_decay_end is None else optim.weight_decay_end
        return cls(steps, per_epoch, lr, cosine(optim.weight_decay, end, steps, schedule=optim.schedule))
