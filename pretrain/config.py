"""Settings that all pre-training methods share."""

import dataclasses

from engine.schema import BaseConfig, CropConfig, DataConfig, option


@dataclasses.dataclass
class PretrainData(DataConfig):
    """Unlabelled images."""

    val_path: str = option(
        "", "images a method is evaluated on, where it can be; empty: a fixed part of the training set", kind="paths"
    )


@dataclasses.dataclass
class PretrainConfig(BaseConfig):
    """A pre-training run; the method adds its own section (and ``encoder`` where it has one)."""

    method: str = option("", "the method, one of pretrain/methods.py (set by the recipe)")
    data: PretrainData = dataclasses.field(default_factory=PretrainData)
    crop: CropConfig = dataclasses.field(default_factory=CropConfig)
