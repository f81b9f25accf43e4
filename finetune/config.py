"""Settings that the fine-tuning tasks share."""

import dataclasses

from engine.config import ConfigError
from engine.schema import CropConfig, DataConfig, EncoderConfig, RunConfig, option


@dataclasses.dataclass
class FinetuneData(DataConfig):
    """Labelled images for training and evaluation; the class is the first directory level, or a list's second column."""

    val_path: str = option("", "images to evaluate on; empty: val/ (or test/) beside train/ in data.path", kind="paths")
    labels: float = option(1.0, "share of the training labels used, stratified by class, fixed by the seed", gt=0, le=1)
    class_list: str = option(
        "",
        "text file with a class per line, in the order of the classifier; unset: the folders' names, sorted",
        kind="path",
    )
    eval_image_size: list[int] | None = option(
        None, "height and width in evaluation; unset: image_size", ge=1, kind="pair"
    )
    eval_crop_ratio: float = option(0.875, "share of the image's shorter side that is evaluated", gt=0, le=1)
    eval_resize: str = option(
        "crop", "crop: the image's middle; squash: all of it, whatever its shape", choices=("crop", "squash")
    )


@dataclasses.dataclass
class AugmentConfig(CropConfig):
    """What happens to training images and their labels."""

    rand_augment: str = option("", "timm's policy, such as rand-m9-mstd0.5-inc1, or trivial; empty: none")
    color_jitter: float = option(
        0.0, "strength of brightness, contrast and saturation changes; not with rand_augment", ge=0
    )
    erase_prob: float = option(0.0, "probability of random erasing", ge=0, le=1)
    erase_mode: str = option("pixel", "what is put there: noise or the mean", choices=("pixel", "const"))
    repeats: int = option(1, "differently augmented copies of an image in an epoch (of the same length)", ge=1)
    mixup: float = option(0.0, "alpha of mixup; 0: none", ge=0)
    cutmix: float = option(0.0, "alpha of cutmix; 0: none", ge=0)
    mixup_prob: float = option(1.0, "probability that a batch is mixed", gt=0, le=1)
    label_smoothing: float = option(0.0, "share of the target spread over all classes", ge=0, lt=1)


@dataclasses.dataclass
class MeasureConfig:
    """What is measured of an encoder as it is, without any training."""

    task: str = option("", "the task, one of finetune/tasks.py (set by the recipe)")
    recipe: str = option("", "name of the recipe (set by the entry point)")
    output_dir: str = option("", "folder of results.json; empty: output/<recipe>", kind="folder")
    seed: int = option(0, "of the untrained network and of the choice of labels or images", ge=0)
    threads: int = option(0, "CPU threads per process; 0: torch's default", ge=0)
    eval_batch_size: int = option(128, "images per process and step", ge=1)
    data: FinetuneData = dataclasses.field(default_factory=FinetuneData)
    encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)


@dataclasses.dataclass
class ClassifySection:
    """What only classification has."""

    loss: str = option("ce", "cross entropy, or binary cross entropy of every class", choices=("ce", "bce"))
    bce_threshold: float | None = option(
        None,
        "bce targets above it become 1, others 0 (ResNet strikes back, section 3.1); unset: targets stay soft",
        ge=0,
        lt=1,
    )
    head_init: str = option(
        "fit",
        "the classifier on pre-trained weights. fit: theirs, where it is of the same classes (where nothing names them: of "
        "as many), else new; new; transfer: theirs for the classes that it has, new for the others",
        choices=("fit", "new", "transfer"),
    )
    class_map: str = option(
        "",
        "for head_init=transfer, where the classes are named otherwise: a file of lines 'theirs<TAB>ours', or of the row "
        "of each of ours, -1 for none",
        kind="path",
    )
    head_init_scale: float = option(
        1.0, "factor of the new classifier's initial weights on a pre-trained encoder", gt=0
    )


@dataclasses.dataclass
class ClassifyConfig(RunConfig):
    """Fine-tuning, or training from scratch, for classification."""

    task: str = option("classify", "the task, one of finetune/tasks.py (set by the recipe)")
    evaluate: bool = option(
        False, "only evaluate the model in encoder.pretrained: a run folder, a file of weights, or true for timm's own"
    )
    eval_batch_size: int = option(128, "images per process in evaluation", ge=1)
    data: FinetuneData = dataclasses.field(default_factory=FinetuneData)
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    classify: ClassifySection = dataclasses.field(default_factory=ClassifySection)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return bool(self.augment.mixup or self.augment.cutmix)


def check_classify(config: ClassifyConfig) -> None:
    """Refuse settings that have no effect or do not fit each other, before anything is built."""
    augment, task = config.augment, config.classify
    if augment.mixup_prob != 1 and not config.mixes:
        raise ConfigError(
            "augment.mixup_prob has no effect without augment.mixup or augment.cutmix: remove it or set one of them"
        )
    if augment.erase_mode != "pixel" and not augment.erase_prob:
        raise ConfigError("augment.erase_mode has no effect with augment.erase_prob=0: remove one of them")
    if augment.color_jitter and augment.rand_augment and "3a" not in augment.rand_augment:
        raise ConfigError(
            f"augment.color_jitter={augment.color_jitter} has no effect with augment.rand_augment={augment.rand_augment}, "
            "which replaces it: remove one of them"
        )
    if config.data.eval_resize == "squash" and config.data.eval_crop_ratio != 1:
        raise ConfigError(
            f"data.eval_crop_ratio={config.data.eval_crop_ratio} has no effect with data.eval_resize=squash: set it to 1"
        )
    if task.class_map and task.head_init != "transfer":
        raise ConfigError(f"classify.class_map has no effect with classify.head_init={task.head_init}: use transfer")
    if task.bce_threshold is not None and task.loss != "bce":
        raise ConfigError(f"classify.bce_threshold has no effect with classify.loss={task.loss}: remove it or use bce")
    if config.evaluate and not config.encoder.pretrained:
        raise ConfigError(
            "evaluate=true needs encoder.pretrained: a run folder of a fine-tuning, a file with a classifier, or true"
        )
