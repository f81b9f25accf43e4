"""What the published recipes must hold: the papers' tables, typed a second time, with what docs/errata.md changes in them.

CIM's tables 10 and 11 could not be read when this was written (docs/errata.md): table 10 is typed from memory and
BEiT's released command, table 11 from table 2 of "ResNet strikes back". SparK's tables 7 and 8 are typed from its released
command, ConvMAE's settings from its and MAE's. Whoever reads the papers corrects both places. ConvNeXt V2's tables 2 to 6
were read.
"""

from typing import Any

TABLE_10 = {
    # For each setting ViT-S/16, then ViT-B/16.
    "encoder.name": ("vit_small_patch16_224", "vit_base_patch16_224"),
    "optim.name": ("adamw", "adamw"),
    "optim.betas": ([0.9, 0.999], [0.9, 0.999]),
    "optim.eps": (1e-8, 1e-8),
    "optim.lr": (3e-3, 4e-3),
    "optim.lr_batch": (1024, 1024),
    "optim.min_lr": (1e-6, 1e-6),
    "optim.warmup_lr": (1e-6, 1e-6),
    "optim.weight_decay": (0.05, 0.05),
    "optim.weight_decay_end": (None, None),
    "optim.layer_decay": (0.8, 0.65),
    "optim.layer_decay_groups": ("beit", "beit"),
    "optim.schedule": ("beit", "beit"),
    "optim.clip_grad": (0.0, 0.0),
    "train.batch_size": (1024, 1024),
    "train.epochs": (200.0, 100.0),
    "train.warmup_epochs": (20.0, 20.0),
    "train.ema_decay": (0.0, 0.0),
    "encoder.drop_path_rate": (0.1, 0.1),
    "augment.crop_scale": ([0.08, 1.0], [0.08, 1.0]),
    "augment.hflip": (0.5, 0.5),
    "augment.rand_augment": ("rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1"),
    "augment.color_jitter": (0.0, 0.0),
    "augment.erase_prob": (0.25, 0.25),
    "augment.erase_mode": ("pixel", "pixel"),
    "augment.repeats": (1, 1),
    "augment.mixup": (0.8, 0.8),
    "augment.cutmix": (1.0, 1.0),
    "augment.mixup_prob": (1.0, 1.0),
    "augment.label_smoothing": (0.1, 0.1),
    "classify.loss": ("ce", "ce"),
    "classify.head_init_scale": (0.001, 0.001),
    "data.image_size": ([224, 224], [224, 224]),
    "data.eval_image_size": (None, None),
    "data.eval_crop_ratio": (0.875, 0.875),
}

TABLE_11 = {
    # For each setting 100, 300, then 600 epochs: procedures A3, A2 and A1.
    "encoder.name": ("resnet50",) * 3,
    "train.epochs": (100.0, 300.0, 600.0),
    "data.image_size": ([160, 160], [224, 224], [224, 224]),
    "data.eval_image_size": ([224, 224],) * 3,
    "data.eval_crop_ratio": (0.95,) * 3,
    "train.batch_size": (2048,) * 3,
    "optim.name": ("lamb",) * 3,
    "optim.lr": (8e-3, 5e-3, 5e-3),
    "optim.lr_batch": (2048,) * 3,
    "optim.min_lr": (1e-6,) * 3,
    "optim.weight_decay": (0.02, 0.02, 0.01),
    "optim.weight_decay_end": (None,) * 3,
    "optim.betas": ([0.9, 0.999],) * 3,
    "optim.eps": (1e-6,) * 3,
    "optim.layer_decay": (1.0,) * 3,
    "optim.clip_grad": (0.0,) * 3,
    "train.warmup_epochs": (5.0,) * 3,
    "train.ema_decay": (0.0,) * 3,
    "augment.label_smoothing": (0.0, 0.0, 0.1),
    "encoder.drop_path_rate": (0.0, 0.05, 0.05),
    "augment.repeats": (1, 3, 3),
    "augment.hflip": (0.5,) * 3,
    "augment.crop_scale": ([0.08, 1.0],) * 3,
    "augment.rand_augment": ("rand-m6-mstd0.5-inc1", "rand-m7-mstd0.5-inc1", "rand-m7-mstd0.5-inc1"),
    "augment.color_jitter": (0.0,) * 3,
    "augment.erase_prob": (0.0,) * 3,
    "augment.mixup": (0.1, 0.1, 0.2),
    "augment.cutmix": (1.0,) * 3,
    "augment.mixup_prob": (1.0,) * 3,
    "classify.loss": ("bce",) * 3,
    "classify.bce_threshold": (0.2,) * 3,
    "classify.head_init_scale": (1.0,) * 3,
}

# ConvNeXt V2 (arXiv:2301.00808), appendix: table 1 is pre-training, 2 to 6 are fine-tuning (8 to 13 on arXiv).


def each(count: int, **same: Any) -> dict[str, tuple[Any, ...]]:
    """``a__b=value`` -> {"a.b": (value, value, ...)}."""
    return {key.replace("__", "."): (value,) * count for key, value in same.items()}


def v2(count: int) -> dict[str, tuple[Any, ...]]:
    """What all of ConvNeXt V2's tables have, or its released code where they are silent."""
    return each(
        count,
        optim__name="adamw",
        optim__betas=[0.9, 0.999],
        optim__eps=1e-8,
        optim__lr=None,
        optim__min_lr=1e-6,
        optim__warmup_lr=0.0,
        optim__schedule="mae",
        optim__weight_decay_end=None,
        optim__clip_grad=0.0,
        augment__rand_augment="rand-m9-mstd0.5-inc1",
        augment__crop_scale=[0.08, 1.0],
        augment__hflip=0.5,
        augment__color_jitter=0.0,
        augment__erase_prob=0.25,
        augment__erase_mode="pixel",
        augment__repeats=1,
        augment__mixup_prob=1.0,
        classify__loss="ce",
        classify__head_init="fit",
        classify__head_init_scale=0.001,
        data__eval_image_size=None,
    )


def at(*sizes: int) -> dict[str, tuple[Any, ...]]:
    """Image sizes; from 384 px on images are squashed in evaluation."""
    return {
        "data.image_size": tuple([size, size] for size in sizes),
        "data.eval_resize": tuple("crop" if size < 384 else "squash" for size in sizes),
        "data.eval_crop_ratio": tuple(0.875 if size < 384 else 1.0 for size in sizes),
    }


TABLE_V2_2 = {
    # Atto, Femto, Pico, Nano
    "encoder.name": ("convnextv2_atto", "convnextv2_femto", "convnextv2_pico", "convnextv2_nano"),
    "optim.base_lr": (2e-4,) * 4,
    "optim.weight_decay": (0.3, 0.05, 0.3, 0.3),
    "optim.layer_decay": (0.9,) * 4,
    "optim.layer_decay_groups": ("convnextv2_layer",) * 4,
    "train.batch_size": (1024,) * 4,
    "train.warmup_epochs": (0.0,) * 4,
    "train.epochs": (600.0,) * 4,
    "augment.label_smoothing": (0.2,) * 4,
    "augment.mixup": (0.0, 0.3, 0.3, 0.5),
    "augment.cutmix": (0.0, 0.3, 0.3, 0.5),
    "encoder.drop_path_rate": (0.1, 0.0, 0.0, 0.1),
    "train.ema_decay": (0.9999,) * 4,
    **v2(4),
    **at(224, 224, 224, 224),
}

TABLE_V2_3 = {
    "encoder.name": ("convnextv2_tiny",),
    "optim.base_lr": (8e-4,),
    "optim.weight_decay": (0.05,),
    "optim.layer_decay": (0.9,),
    "optim.layer_decay_groups": ("convnextv2_layer",),
    "train.batch_size": (1024,),
    "train.warmup_epochs": (40.0,),
    "train.epochs": (300.0,),
    "augment.label_smoothing": (0.1,),
    "augment.mixup": (0.8,),
    "augment.cutmix": (1.0,),
    "encoder.drop_path_rate": (0.2,),
    "train.ema_decay": (0.9999,),
    **v2(1),
    **at(224),
}

TABLE_V2_4 = {
    # Base, Large, Huge
    "encoder.name": ("convnextv2_base", "convnextv2_large", "convnextv2_huge"),
    "optim.base_lr": (6.25e-3, 6.25e-3, 1.25e-3),
    "optim.weight_decay": (0.05,) * 3,
    "optim.layer_decay": (0.6, 0.6, 0.75),
    "optim.layer_decay_groups": ("convnext_group", "convnext_group", "convnextv2_layer"),
    "train.batch_size": (1024,) * 3,
    "train.warmup_epochs": (20.0, 20.0, 10.0),
    "train.epochs": (100.0, 100.0, 50.0),
    "augment.label_smoothing": (0.1,) * 3,
    "augment.mixup": (0.8,) * 3,
    "augment.cutmix": (1.0,) * 3,
    "encoder.drop_path_rate": (0.1, 0.2, 0.3),
    "train.ema_decay": (0.9999,) * 3,
    **v2(3),
    **at(224, 224, 224),
}
ERRATA_V2_4 = {"optim.base_lr": (6.25e-4, 6.25e-4, 1.25e-3)}
"""Table 4 prints ten times the rate of the authors' command."""

TABLE_V2_5 = {
    # Nano, Tiny, Base, Large, Huge
    "encoder.name": ("convnextv2_nano", "convnextv2_tiny", "convnextv2_base", "convnextv2_large", "convnextv2_huge"),
    "optim.base_lr": (2.5e-4,) * 5,
    "optim.weight_decay": (0.05,) * 5,
    "optim.layer_decay": (0.9, 0.9, 0.8, 0.8, 0.8),
    "optim.layer_decay_groups": (*("convnextv2_layer",) * 2, *("convnext_group",) * 2, "convnextv2_layer"),
    "train.batch_size": (4096,) * 5,
    "train.warmup_epochs": (5.0,) * 5,
    "train.epochs": (90.0,) * 5,
    "augment.label_smoothing": (0.1,) * 5,
    "augment.mixup": (0.8,) * 5,
    "augment.cutmix": (1.0,) * 5,
    "encoder.drop_path_rate": (0.0, 0.0, 0.1, 0.1, 0.3),
    "train.ema_decay": (0.0,) * 5,
    **v2(5),
    **at(224, 224, 224, 224, 224),
}

TABLE_V2_6 = {
    # Nano, Tiny, Base, Large, each at 224 and 384 px; Huge at 384 and 512 px
    "encoder.name": tuple(f"convnextv2_{size}" for size in ("nano", "tiny", "base", "large", "huge") for _ in range(2)),
    "optim.base_lr": (2.5e-5,) * 10,
    "optim.weight_decay": (1e-8,) * 10,
    "optim.layer_decay": (*(0.9,) * 4, *(0.8,) * 4, *(0.85,) * 2),
    "optim.layer_decay_groups": (*("convnextv2_layer",) * 4, *("convnext_group",) * 4, *("convnextv2_layer",) * 2),
    "train.batch_size": (512,) * 10,
    "train.warmup_epochs": (0.0,) * 10,
    "train.epochs": (*(90.0,) * 4, *(30.0,) * 6),
    "augment.label_smoothing": (0.1,) * 10,
    "augment.mixup": (0.0,) * 10,
    "augment.cutmix": (0.0,) * 10,
    "encoder.drop_path_rate": (*(0.1,) * 4, 0.2, 0.2, 0.3, 0.3, 0.5, 0.5),
    "train.ema_decay": (*(0.9999,) * 8, 0.0, 0.0),
    **v2(10),
    **at(*(224, 384) * 4, 384, 512),
}


def spark(count: int) -> dict[str, tuple[Any, ...]]:
    """What all of SparK's fine-tunings have."""
    return each(
        count,
        optim__lr=None,
        optim__betas=[0.9, 0.999],
        optim__schedule="spark",
        optim__weight_decay_end=None,
        optim__clip_grad=0.0,
        augment__crop_scale=[0.08, 1.0],
        augment__hflip=0.5,
        augment__color_jitter=0.0,
        augment__erase_prob=0.25,
        augment__erase_mode="pixel",
        augment__cutmix=1.0,
        augment__mixup_prob=1.0,
        augment__label_smoothing=0.1,
        classify__bce_threshold=None,
        classify__head_init_scale=1.0,
        data__eval_image_size=None,
    )


TABLE_SPARK_7 = {
    # ResNet-50, 101, 152, 200
    "encoder.name": ("resnet50", "resnet101", "resnet152", "resnet200"),
    "optim.name": ("lamb",) * 4,
    "optim.lamb_bias_correction": (False,) * 4,
    "optim.lamb_always_adapt": (True,) * 4,
    "optim.eps": (1e-6,) * 4,
    "train.batch_size": (2048,) * 4,
    "train.epochs": (300.0,) * 4,
    "train.warmup_epochs": (5.0,) * 4,
    "optim.base_lr": (2e-3, 1e-3, 1e-3, 1e-3),
    "optim.min_lr": (1.6e-5, 8e-6, 8e-6, 8e-6),
    "optim.warmup_lr": (8e-5, 4e-5, 4e-5, 4e-5),
    "optim.layer_decay": (0.7, 0.8, 0.8, 0.8),
    "optim.layer_decay_groups": ("spark_resnet",) * 4,
    "optim.weight_decay": (0.02,) * 4,
    "augment.rand_augment": ("trivial",) * 4,
    "augment.mixup": (0.1,) * 4,
    "augment.repeats": (1,) * 4,
    "encoder.drop_path_rate": (0.05, 0.2, 0.2, 0.2),
    "train.ema_decay": (0.9999,) * 4,
    "classify.loss": ("bce",) * 4,
    "data.image_size": ([224, 224],) * 4,
    "data.eval_resize": ("crop",) * 4,
    "data.eval_crop_ratio": (0.95,) * 4,
    **spark(4),
}

TABLE_SPARK_8 = {
    # ConvNeXt-S, B, L, and L at 384 px
    "encoder.name": ("convnext_small", "convnext_base", "convnext_large", "convnext_large"),
    "optim.name": ("adamw",) * 4,
    "optim.eps": (1e-8,) * 4,
    "train.batch_size": (4096, 4096, 4096, 1024),
    "train.epochs": (400.0, 400.0, 200.0, 200.0),
    "train.warmup_epochs": (20.0, 20.0, 10.0, 20.0),
    "optim.base_lr": (2e-4, 1e-4, 1e-4, 6e-5),
    "optim.min_lr": (3.2e-6, 1.6e-6, 1.6e-6, 2.4e-7),
    "optim.warmup_lr": (1.6e-5, 8e-6, 8e-6, 1.2e-6),
    "optim.layer_decay": (0.7,) * 4,
    "optim.layer_decay_groups": ("convnext_group",) * 4,
    "optim.weight_decay": (0.01, 0.01, 0.02, 0.01),
    "augment.rand_augment": ("trivial", "trivial", "trivial", "v0"),
    "augment.mixup": (0.8,) * 4,
    "augment.repeats": (3,) * 4,
    "encoder.drop_path_rate": (0.3, 0.4, 0.5, 0.5),
    "train.ema_decay": (0.9999, 0.9999, 0.9999, 0.99995),
    "classify.loss": ("ce",) * 4,
    "data.image_size": ([224, 224], [224, 224], [224, 224], [384, 384]),
    "data.eval_resize": ("crop", "crop", "crop", "squash"),
    "data.eval_crop_ratio": (0.95, 0.95, 0.95, 1.0),
    **spark(4),
}

CONVMAE = {
    # S, B, B*, L, H: MAE's recipe
    "encoder.name": ("convvit_small", "convvit_base", "convvit_base_star", "convvit_large", "convvit_huge"),
    "encoder.kwargs": ({"global_pool": "avg", "fc_norm": False},) * 5,
    "optim.base_lr": (5e-4, 5e-4, 5e-4, 1e-3, 1e-3),
    "optim.layer_decay": (0.65, 0.65, 0.65, 0.75, 0.85),
    "train.epochs": (100.0, 100.0, 100.0, 50.0, 50.0),
    "encoder.drop_path_rate": (0.1, 0.1, 0.1, 0.2, 0.3),
    **v2(5),
    **at(*(224,) * 5),
    **each(
        5,
        optim__weight_decay=0.05,
        optim__layer_decay_groups="convmae",
        train__batch_size=1024,
        train__warmup_epochs=5.0,
        train__ema_decay=0.0,
        augment__mixup=0.8,
        augment__cutmix=1.0,
        augment__label_smoothing=0.1,
    ),
}

AFTER_22K = tuple(
    f"convnextv2_{size}_22k_1k{'' if pixels == 224 else f'_{pixels}'}"
    for size, both in (("nano", (224, 384)), ("tiny", (224, 384)), ("base", (224, 384)), ("large", (224, 384)), ("huge", (384, 512)))
    for pixels in both
)  # fmt: skip

CASES = [
    (recipe, paper, table, column)
    for paper, table, recipes in (
        ("2202.03382", TABLE_10, ("vit_small", "vit_base")),
        ("2202.03382", TABLE_11, ("resnet50_100", "resnet50_300", "resnet50_600")),
        ("2301.00808", TABLE_V2_2, ("convnextv2_atto", "convnextv2_femto", "convnextv2_pico", "convnextv2_nano")),
        ("2301.00808", TABLE_V2_3, ("convnextv2_tiny",)),
        ("2301.00808", TABLE_V2_4 | ERRATA_V2_4, ("convnextv2_base", "convnextv2_large", "convnextv2_huge")),
        (
            "2301.00808",
            TABLE_V2_5,
            tuple(f"convnextv2_{size}_22k" for size in ("nano", "tiny", "base", "large", "huge")),
        ),
        ("2301.00808", TABLE_V2_6, AFTER_22K),
        ("2301.03580", TABLE_SPARK_7, ("spark_resnet50", "spark_resnet101", "spark_resnet152", "spark_resnet200")),
        (
            "2301.03580",
            TABLE_SPARK_8,
            ("spark_convnext_small", "spark_convnext_base", "spark_convnext_large", "spark_convnext_large_384"),
        ),
        (
            "2205.03892",
            CONVMAE,
            ("convvit_small", "convvit_base", "convvit_base_star", "convvit_large", "convvit_huge"),
        ),
    )
    for column, recipe in enumerate(recipes)
]
