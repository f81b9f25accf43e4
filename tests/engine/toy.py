"""A network and a data set small enough to train hundreds of times, for the tests of the engine."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import load
from engine.schema import BaseConfig


class ToyEncoder(nn.Module):
    """Three layers with a batch norm, a group matcher and dropout."""

    def __init__(self, batch_norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1, bias=False)  # under a norm a bias has no gradient but noise
        self.norm = nn.BatchNorm2d(8) if batch_norm else nn.GroupNorm(2, 8)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(8, 3)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^conv|norm", "blocks": [(r"^fc", None)]}

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(F.relu(self.norm(self.conv(x))).mean((2, 3))))


class ToyMethod(nn.Module):
    """Classify by the label, on noisy pixels: uses the random state of the step."""

    def __init__(self, batch_norm: bool = True, poison_at: int = -1, poison_gradient_at: int = -1) -> None:
        super().__init__()
        self.encoder = ToyEncoder(batch_norm)
        self.poison_at, self.poison_gradient_at, self.step = poison_at, poison_gradient_at, 0

    def before_step(self, step: int, num_steps: int) -> None:
        self.step = step

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        x = batch["image"] + 0.01 * torch.randn(batch["image"].shape)
        loss = F.cross_entropy(self.encoder(x).float(), batch["label"])
        if self.step == self.poison_gradient_at:
            loss.register_hook(lambda gradient: gradient * float("nan"))  # the loss itself stays finite
        return {"loss": loss * (float("nan") if self.step == self.poison_at else 1.0)}


class ToyLoader:
    """``images`` random 5 x 4 images of 2 channels, in an order that depends on the epoch."""

    def __init__(self, images: int = 24, batch_size: int = 4) -> None:
        draw = torch.Generator().manual_seed(1)
        self.images = torch.randn(images, 2, 5, 4, generator=draw)
        self.labels = torch.randint(0, 3, (images,), generator=draw)
        self.batch_size = batch_size
        self.broken: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def name_broken(self, broken: Mapping[str, str]) -> None:
        self.named = sorted(broken)

    def batches(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(epoch))
        for i in range(start, len(self)):
            chosen = order[i * self.batch_size : (i + 1) * self.batch_size]
            yield {"image": self.images[chosen], "label": self.labels[chosen], "index": chosen}


def config(folder: Path, *overrides: str) -> BaseConfig:
    """A run of 4 epochs of 6 steps."""
    settings = ["data.path=.", "optim.lr=0.01", "train.epochs=4", "train.batch_size=4", "train.log_steps=1"]
    settings += ["train.warmup_steps=3", f"output_dir={folder}", "train.picture_epochs=0"]
    return load(BaseConfig, {}, [*settings, *overrides], "toy")


def method(**kwargs: Any) -> ToyMethod:
    """The same initial weights every time."""
    torch.manual_seed(0)
    return ToyMethod(**kwargs)
