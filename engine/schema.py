"""The settings of a run: a dataclass per section, in which every default, range and meaning stands, and nowhere else."""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Iterable[str] = (),
    kind: str = "",
    words: tuple[str, ...] = (),
    instead_of: tuple[str, ...] = (),
) -> Any:
    """A schema field: its default, meaning, allowed range or choices.

    ``kind`` is "pair" for two numbers that may be given as one, "two" for two numbers, "range" for two that do not
    fall, "path" for one that must exist, "paths" for several of them with commas between, "folder" for one to be made;
    one of ``words`` may stand in place of a path (a file of that name is ``./word``). Given on the command line, the
    setting unsets those named in ``instead_of``, which a recipe may give in its place.
    """
    limits = dict(ge=ge, gt=gt, le=le, lt=lt, choices=tuple(choices))
    metadata = dict(help=help, kind=kind, words=words, instead_of=instead_of, **limits)
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class DataConfig:
    """Where the images are and how they are read."""

    path: str = option(
        "",
        "folder, text file of paths, tar shards (a folder of them, x-{000..099}.tar, x-*.tar, pipe:COMMAND, http(s)://...), or "
        "a comma-separated list of these (required)",
        kind="paths",
    )
    image_size: list[int] = option([224, 224], "height and width in pixels; one number for both", ge=1, kind="pair")
    in_chans: int = option(3, "channels every image is converted to", ge=1)
    mean: list[float] = option([], "per channel, of [0, 1] pixels; empty: ImageNet's for 3 channels, else 0.5")
    std: list[float] = option([], "per channel, of [0, 1] pixels; empty: ImageNet's for 3 channels, else 0.5", gt=0)
    value_range: list[float] = option([], "(low, high) of 16-bit and float images, mapped to [0, 1]; empty: 0-65535")
    workers: int = option(4, "loader processes per rank; 0 loads in the main process", ge=0)
    max_broken: float = option(0.05, "share of unreadable images above which a run stops", ge=0, le=1)
    retry_seconds: float = option(
        120.0, "how long a folder, address or pipe that is gone is waited for before the run stops", ge=0
    )
    shuffle_block: int = option(
        0,
        "images of a tar shard shuffled among each other, the shards in random order, so that disks read nearly in order; "
        "0: 1000 for pipes and addresses, for all else any image may follow any",
        ge=0,
    )
    streams: int = option(
        0,
        "shards that all processes together read at once, best a multiple of their number; 0: one each of pipes and "
        "addresses, and in a run that is continued as many as it began with",
        ge=0,
    )


@dataclasses.dataclass
class CropConfig:
    """The random crop of pre-training."""

    crop_scale: list[float] = option(
        [0.08, 1.0], "smallest and largest share of the image's area", gt=0, le=1, kind="range"
    )
    crop_ratio: list[float] = option([0.75, 4 / 3], "narrowest and widest aspect ratio", gt=0, kind="range")
    hflip: float = option(0.5, "probability of a horizontal flip", ge=0, le=1)


@dataclasses.dataclass
class EncoderConfig:
    """The network that is kept."""

    name: str = option("vit_small_patch16_224", "any timm model")
    drop_path_rate: float = option(0.0, "stochastic depth rate of the last block", ge=0, lt=1)
    pretrained: str = option(
        "",
        "weights to start from: true: timm's own of that name; or a file, a run folder or a checkpoint of ours, timm, torchvision "
        "or the papers' released code; empty: from scratch",
        kind="path",
        words=("true",),
    )
    kwargs: dict[str, Any] = option({}, "further arguments of the backbone, checked against its signature")


@dataclasses.dataclass
class OptimConfig:
    """Optimiser, learning rate and weight decay."""

    name: str = option("adamw", "optimiser", choices=("adamw", "sgd", "lamb", "lars"))
    base_lr: float | None = option(
        None, "peak learning rate per 256 images of batch; or give lr", gt=0, instead_of=("lr", "lr_batch")
    )
    lr: float | None = option(
        None, "absolute peak learning rate; or give base_lr", gt=0, instead_of=("base_lr", "lr_batch")
    )
    lr_batch: int | None = option(None, "the batch size lr was given for; another batch size is warned about", ge=1)
    min_lr: float = option(0.0, "learning rate at the end", ge=0)
    warmup_lr: float = option(0.0, "learning rate at the first step of the warm-up", ge=0)
    schedule: str = option(
        "beit", "whose cosine: they differ by a step at the ends (engine/schedule.py)", choices=("beit", "mae", "spark")
    )
    betas: list[float] = option([0.9, 0.999], "coefficients of Adam and Lamb", ge=0, lt=1, kind="two")
    eps: float = option(1e-8, "added to the denominator of Adam and Lamb", gt=0)
    lamb_bias_correction: bool = option(True, "correct Lamb's moments for their start at zero")
    lamb_always_adapt: bool = option(False, "Lamb's trust ratio also for what is not decayed")
    momentum: float = option(0.9, "of SGD and LARS", ge=0, lt=1)
    nesterov: bool = option(False, "Nesterov's momentum in SGD")
    weight_decay: float = option(
        0.05, "weight decay of matrices and kernels; decoupled in AdamW and LAMB, added to the gradient in SGD", ge=0
    )
    weight_decay_end: float | None = option(None, "weight decay at the end, by a cosine; unset: constant", ge=0)
    decay_also: list[str] = option(
        [], "ends of names of parameters to decay all the same, such as relative_position_bias_table"
    )
    clip_grad: float = option(0.0, "largest norm of the gradient; 0: no clipping", ge=0)
    layer_decay: float = option(1.0, "learning rate of a layer over that of the next", gt=0, le=1)
    layer_decay_groups: str = option(
        "timm",
        "which parameters form a layer: timm's order of the model, or that of a released code (engine/layers.py)",
        choices=("timm", "beit", "convnext_group", "convnextv2_layer", "convmae", "spark_resnet"),
    )


@dataclasses.dataclass
class TrainConfig:
    """How long, how much at once, and what is written when."""

    epochs: float | None = option(None, "passes over the training set; or give steps", gt=0, instead_of=("steps",))
    steps: int | None = option(None, "optimiser steps; or give epochs", ge=1, instead_of=("epochs",))
    warmup_epochs: float = option(0.0, "epochs of linear warm-up", ge=0, instead_of=("warmup_steps",))
    warmup_steps: int | None = option(None, "optimiser steps of linear warm-up; overrides warmup_epochs", ge=0)
    batch_size: int = option(256, "images per optimiser step, over all processes and accumulated parts", ge=1)
    accumulation: int = option(1, "parts a process splits its share of the batch into", ge=1)
    checkpoint_blocks: bool = option(
        False, "compute each block again in the backward pass instead of keeping what it made: less memory, more time"
    )
    compile: bool = option(False, "compile the blocks with torch.compile, which needs a C++ compiler; not at ZeRO-3")
    sync_batchnorm: bool = option(True, "batch norms use the images of all processes; false: each process its own")
    ema_decay: float = option(0.0, "decay of the exponential moving average of the weights; 0: none", ge=0, lt=1)
    log_steps: int = option(20, "steps between two lines of the log", ge=1)
    save_epochs: int = option(1, "epochs between checkpoints; 0: only by steps, minutes and at the end", ge=0)
    save_steps: int = option(0, "steps between checkpoints; 0: never by steps", ge=0)
    save_minutes: float = option(0.0, "minutes between checkpoints; 0: never by time", ge=0)
    keep_checkpoints: int = option(2, "newest checkpoints kept", ge=1)
    keep_every: int = option(0, "checkpoints of every so many steps are kept as well; 0: none", ge=0)
    keep_best: str = option(
        "", "an evaluated value whose best checkpoint is kept as well: top1 (the higher the better), -loss (the lower)"
    )
    max_skipped: int = option(
        3, "steps in a row that are left out because loss or gradients are not finite, before nonfinite acts", ge=0
    )
    nonfinite: str = option(
        "stop",
        "stop; or rollback: to the last checkpoint, with the rate times rollback_lr",
        choices=("stop", "rollback"),
    )
    rollback_lr: float = option(0.5, "factor of the learning rate at each rollback", gt=0, le=1)
    max_rollbacks: int = option(3, "rollbacks after which the run stops", ge=1)
    timeout_minutes: float = option(
        30.0, "a process that does not get on for so long is named and ended; 0: never", ge=0
    )
    picture_epochs: int = option(10, "epochs between pictures (also at start and end); 0: none", ge=0)
    eval_epochs: int = option(1, "epochs between evaluations (and at the end); 0: only at the end", ge=0)


@dataclasses.dataclass
class BaseConfig:
    """What every run has."""

    recipe: str = option("", "name of the recipe (set by the entry point)")
    output_dir: str = option("", "run folder; empty: output/<recipe>", kind="folder")
    resume: str = option(
        "auto", "auto: continue the run in output_dir; never: refuse if there is one", choices=("auto", "never")
    )
    seed: int = option(0, "everything random follows from it", ge=0)
    deepspeed: str = option("zero0_fp32", "name in ds_configs/ or path of a DeepSpeed JSON")
    threads: int = option(0, "CPU threads per process; 0: torch's default", ge=0)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)


@dataclasses.dataclass
class RunConfig(BaseConfig):
    """A run with an encoder."""

    encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)


def with_sections(base: type[T], sections: dict[str, type]) -> type[T]:
    """The schema ``base`` plus the named sections: a run has the settings of its own method only."""
    fields = [(name, section, dataclasses.field(default_factory=section)) for name, section in sections.items()]
    return dataclasses.make_dataclass(f"{base.__name__}_{'_'.join(sections)}", fields, bases=(base,))
