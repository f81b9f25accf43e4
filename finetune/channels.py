"""How the channels of a layer differ: class selectivity and cosine distance, as sums over a stream of images.

Class selectivity index: Leavitt and Morcos (arXiv:2003.01262, section 3.2); both as in ConvNeXt V2 (arXiv:2301.00808,
section 3.1, figures 3 and 4, and its appendix).

Shapes: ``B`` images, ``C`` channels (units), ``P`` positions, ``K`` classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.world import World


class ChannelSums:
    """Running sums of one layer, in float64; their size does not depend on the number of images."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.activity: Tensor | None = None
        """(K, C) sums over a class's images of each channel's mean activity."""
        self.images: Tensor = torch.zeros(num_classes, dtype=torch.float64)
        self.distance = 0.0

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Note a batch: features (B, C, P), labels (B,) int64, both on one device."""
        active = F.relu(features.double()).mean(dim=2)
        if self.activity is None:
            self.activity = active.new_zeros(self.num_classes, active.shape[1])
        self.activity.index_add_(0, labels, active)
        self.images += torch.bincount(labels.cpu(), minlength=self.num_classes)
        self.distance += float(cosine_distance(features).sum())

    def over(self, world: World, channels: int) -> None:
        """Add up what all processes have noted; one without images needs to be told the ``channels``."""
        if world.size == 1:
            return
        mine = torch.zeros(self.num_classes, channels) if self.activity is None else self.activity
        self.activity = world.sum(mine)
        total = world.sum([*self.images.tolist(), self.distance]).cpu()
        self.images, self.distance = total[:-1], float(total[-1])

    def selectivity(self) -> tuple[Tensor, Tensor]:
        """Class selectivity index of each unit (C,) float64 in [0, 1], and which of them are dead (C,) bool."""
        if self.activity is None:
            raise RuntimeError("this layer has met no image")
        seen = self.images > 0
        means = self.activity.cpu()[seen] / self.images[seen, None]
        return class_selectivity(means), (means == 0).all(dim=0)

    def mean_distance(self) -> float:
        """Mean over the images of :func:`cosine_distance`."""
        return self.distance / float(self.images.sum())


def class_selectivity(means: Tensor) -> Tensor:
    """(largest - rest) / (largest + rest) of class-conditional mean activities; (K, C) >= 0 -> (C,) in [0, 1].

    ``rest`` is the mean over the other classes. 1: active for one class only; 0: alike for all. A dead unit, which is
    active for none (0 / 0), prefers no class: 0.

    Raises:
        ValueError: fewer than two classes.
    """
    if len(means) < 2:
        raise ValueError(f"class selectivity compares classes, there is {len(means)}")
    largest = means.max(dim=0).values
    # Sorted, as a difference of sums would leave a rest where there is none.
    rest = means.sort(dim=0).values[:-1].mean(dim=0)
    total = largest + rest
    return torch.where(total > 0, (largest - rest) / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)


def cosine_distance(features: Tensor) -> Tensor:
    """Mean of (1 - cos) / 2 over all pairs of different channels; (B, C, P) -> (B,) float64 in [0, 1].

    Identical channels 0, orthogonal ones 0.5, opposite ones 1. A channel that is zero everywhere is orthogonal to all.
    ConvNeXt V2 averages over C x C pairs, each channel with itself among them: (C - 1) / C times this.

    Raises:
        ValueError: fewer than two channels.
    """
    channels = features.shape[1]
    if channels < 2:
        raise ValueError(f"cosine distance compares channels, there is {channels}")
    wide = features.double()
    norm = wide.norm(dim=2, keepdim=True)
    unit = torch.where(norm > 0, wide / norm.clamp(min=torch.finfo(wide.dtype).tiny), 0.0)
    # The sum over all pairs is the square of the sum: no C x C matrix.
    together = unit.sum(dim=1).square().sum(dim=1) - unit.square().sum(dim=(1, 2))
    return (1 - together / (channels * (channels - 1))) / 2
