"""The labelled images of a run: which ones they are, and the batches of each process."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.loader import Loader
from data.sources import ImageIndex
from data.transforms import EvalTransform, TrainAugment
from engine.config import ConfigError
from engine.world import World
from finetune.config import AugmentConfig, FinetuneData

VAL_FOLDERS = ("val", "test")
"""Sub-folders beside ``train`` that are taken for evaluation, the first that is there."""


@dataclass(frozen=True)
class Sets:
    """Training and evaluation images under one numbering of the classes."""

    train: ImageIndex
    val: ImageIndex

    @property
    def num_classes(self) -> int:
        return len(self.train.class_names)


def split_paths(data: FinetuneData) -> tuple[str, str]:
    """Paths of the training and of the evaluation images.

    A ``data.path`` that holds ``train/`` and ``val/`` (or ``test/``) means those; ``data.val_path`` overrides the second.
    """
    root = Path(data.path)
    val = next((root / name for name in VAL_FOLDERS if (root / name).is_dir()), None)
    if (root / "train").is_dir() and val is not None:
        return str(root / "train"), data.val_path or str(val)
    if not data.val_path:
        raise ConfigError(
            f"data.val_path is required: data.path={data.path} has no train/ and val/ (or test/) sub-folders"
        )
    return data.path, data.val_path


def find_sets(data: FinetuneData, seed: int) -> Sets:
    """Scan both sets; of the training set only the share ``data.labels``."""
    train_path, val_path = split_paths(data)
    train = _scan(train_path, data, read_classes(data.class_list))
    if len(train.class_names) < 2:
        raise ConfigError(f"{train_path} has the one class {train.class_names[0]!r}: classification needs two or more")
    val = _scan(val_path, data, train.class_names)
    # A float is a share; an int would be a number of images in all.
    return Sets(train.subset(float(data.labels), seed) if data.labels < 1 else train, val)


def read_classes(path: str) -> list[str] | None:
    """The classes that ``data.class_list`` names, in its order; None where it is unset.

    Raises:
        ValueError: the file is empty, or names a class twice.
    """
    if not path:
        return None
    names = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    if twice := {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set():
        raise ValueError(f"data.class_list={path} names {', '.join(sorted(twice)[:5])} more than once")
    if not names:
        raise ValueError(f"data.class_list={path} is empty: it holds a class per line, in the order of the classifier")
    return names


def find_val(data: FinetuneData, class_names: list[str] | None) -> ImageIndex:
    """The images that ``evaluate=true`` looks at, with their classes numbered as the classifier numbers them.

    ``class_names`` are known from the weights; else ``data.class_list`` has them, else the folders' names, sorted. They
    are ``data.val_path``, or ``val/`` (or ``test/``) in ``data.path``, or ``data.path`` itself.
    """
    root = Path(data.path)
    val = next((str(root / name) for name in VAL_FOLDERS if (root / name).is_dir()), "")
    if not (data.val_path or val) and (root / "train").is_dir():
        raise ConfigError(f"data.path={data.path} has train/ but no val/ or test/ beside it: give data.val_path")
    names = read_classes(data.class_list) or class_names
    if names is None and (data.val_path or val):
        # All classes of the training set, of which the images to evaluate may have some only.
        train = str(root / "train") if (root / "train").is_dir() else data.path if data.val_path else None
        names = None if train is None else _scan(train, data, None).class_names
    return _scan(data.val_path or val or data.path, data, names)


def _scan(path: str, data: FinetuneData, class_names: Sequence[str] | None) -> ImageIndex:
    return ImageIndex.scan(path, classes=True, class_names=class_names, retry_seconds=data.retry_seconds)


def at_eval_size(data: FinetuneData) -> FinetuneData:
    """``data`` for a network that meets evaluated images only: it is built for their size."""
    return dataclasses.replace(data, image_size=list(eval_size(data)))


def hold_out(index: ImageIndex, share: float, seed: int) -> tuple[ImageIndex, ImageIndex]:
    """Split off ``share`` of each class, at least one image where a class has two -> (the rest, what is held out).

    Raises:
        ValueError: no class has two images.
    """
    held = []
    for label in np.unique(index.labels):
        members = np.flatnonzero(index.labels == label)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held.append(np.random.default_rng([seed, int(label) + 1, 1]).permutation(members)[:count])
    chosen = np.sort(np.concatenate(held))
    if not len(chosen):
        raise ValueError(f"none of {len(index)} training images can be held out: every class has just one")
    return index.select(np.setdiff1d(np.arange(len(index)), chosen)), index.select(chosen)


def train_transform(data: FinetuneData, augment: AugmentConfig) -> TrainAugment:
    """Augmentation of single images; mixing happens in batches, on the device."""
    return TrainAugment(
        data.image_size,
        data.in_chans,
        scale=augment.crop_scale,
        ratio=augment.crop_ratio,
        hflip=augment.hflip,
        auto_augment=augment.rand_augment,
        color_jitter=augment.color_jitter,
        erase_prob=augment.erase_prob,
        erase_mode=augment.erase_mode,
        mean=data.mean,
        std=data.std,
    )


def train_loader(index: ImageIndex, config: Any, world: World, batch_size: int) -> Loader:
    """Shuffled, augmented batches of ``batch_size`` images on each process."""
    transform = train_transform(config.data, config.augment)
    return _loader(index, transform, config, world, batch_size, training=True, repeats=config.augment.repeats)


def eval_loader(index: ImageIndex, config: Any, world: World) -> Loader:
    """Every image once over all processes, resized and cropped in its middle, or squashed."""
    squash = config.data.eval_resize == "squash"
    transform = EvalTransform(eval_size(config.data), config.data.eval_crop_ratio, squash=squash)
    return _loader(index, transform, config, world, config.eval_batch_size, training=False)


def eval_size(data: FinetuneData) -> tuple[int, int]:
    """Height and width of evaluated images."""
    height, width = data.eval_image_size or data.image_size
    return height, width


def _loader(
    index: ImageIndex, transform: Any, config: Any, world: World, batch_size: int, *, training: bool, repeats: int = 1
) -> Loader:
    place = dict(seed=config.seed, rank=world.rank, world_size=world.size)
    return Loader.of(index, transform, config.data, batch_size=batch_size, training=training, repeats=repeats, **place)
