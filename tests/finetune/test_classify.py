"""The classification task, whole."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from engine.cli import read_config
from engine.config import ConfigError, check_run
from engine.log import read_log
from engine.optim import param_groups
from engine.schema import OptimConfig
from engine.world import World
from finetune import classify
from finetune.__main__ import PROGRAM
from finetune.classify import Classifier
from finetune.config import ClassifyConfig
from finetune.targets import binary_cross_entropy, soft_target
from models.encoder import build_encoder
from tests import launch

ALONE = World(0, 1, torch.device("cpu"))
TINY = (
    "encoder.kwargs={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, global_pool: avg, fc_norm: false}",
    "data.labels=1.0",
    "optim.layer_decay=0.8",
    "train.epochs=2",
    "train.warmup_epochs=0.5",
    "train.batch_size=64",
    "train.save_epochs=0",
    "train.eval_epochs=1",
    "eval_batch_size=100",
)


def configure(digits: Path, folder: Path, *overrides: str) -> ClassifyConfig:
    config = read_config(PROGRAM, "digits_vit", [f"data.path={digits}", f"output_dir={folder}", *TINY, *overrides])
    check_run(config)
    PROGRAM.check(config)
    assert isinstance(config, ClassifyConfig)
    return config


class Mirror(nn.Module):
    """A network whose logits are the first pixels of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.flatten(1)[:, :10]


def batch(images: int = 6) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    image = torch.randint(256, (images, 3, 4, 7), generator=draw, dtype=torch.uint8)
    return {"image": image, "label": torch.arange(images) % 10}


def test_the_loss_is_that_of_the_normalised_images(digits: Path, tmp_path: Path) -> None:
    config = configure(digits, tmp_path, "data.mean=[0.1,0.2,0.3]", "data.std=[1,2,4]", "augment.label_smoothing=0.1")
    found = Classifier(Mirror(), config, [str(i) for i in range(10)])(batch())
    x = (batch()["image"].double() / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([1, 2, 4])[
        :, None, None
    ]
    logits = x.flatten(1)[:, :10]
    wanted = nn.functional.cross_entropy(logits, batch()["label"], label_smoothing=0.1)
    assert found["loss"].item() == pytest.approx(float(wanted), rel=1e-5)
    assert float(found["train_top1"]) == pytest.approx(
        100 * float((logits.argmax(1) == batch()["label"]).double().mean())
    )
    assert found["loss"].requires_grad and not found["train_top1"].requires_grad


def test_bce_takes_both_classes_of_a_mixed_image_as_present(digits: Path, tmp_path: Path) -> None:
    config = configure(
        digits,
        tmp_path,
        "classify.loss=bce",
        "classify.bce_threshold=0",
        "augment.mixup=1",
        "augment.label_smoothing=0",
    )
    method = Classifier(Mirror(), config, [str(i) for i in range(10)])
    np.random.seed(0)
    image, target = method.prepare(**batch())
    assert [len(row.nonzero()) for row in target] == [2] * 6
    present = torch.maximum(soft_target(batch()["label"], 10, 0), soft_target(batch()["label"].flip(0), 10, 0))
    np.random.seed(0)
    wanted = binary_cross_entropy(Mirror()(image), present, None)
    assert method(batch())["loss"].item() == pytest.approx(wanted.item())


def test_a_threshold_below_the_smoothing_is_refused(digits: Path, tmp_path: Path) -> None:
    config = configure(
        digits, tmp_path, "classify.loss=bce", "classify.bce_threshold=0.005", "augment.label_smoothing=0.1"
    )
    with pytest.raises(ConfigError, match="makes every class present"):
        Classifier(Mirror(), config, [str(i) for i in range(10)])


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["augment.mixup_prob=0.5"], "mixup_prob has no effect"),
        (["augment.erase_mode=const"], "erase_mode has no effect"),
        (["augment.color_jitter=0.4", "augment.rand_augment=rand-m9"], "color_jitter=0.4 has no effect"),
        (["classify.bce_threshold=0.2"], "bce_threshold has no effect"),
        (["evaluate=true"], r"needs encoder\.pretrained"),
        (["data.path=/"], r"data\.val_path is required"),
        (["encoder.pretrained=nowhere"], "does not exist"),
        (["augment.label_smoothing=1"], "must be >= 0 and < 1"),
        (["classify.loss=mse"], "must be one of ce, bce"),
        (["task=knn"], "belongs to the recipe"),
        (["augment.mixups=1"], "unknown key"),
    ],
)
def test_settings_that_do_nothing_or_do_not_fit_are_refused(
    digits: Path, tmp_path: Path, overrides: list[str], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        configure(digits, tmp_path, *overrides)


def test_what_shows_only_with_the_data_is_refused_before_the_network_is_built(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classify.weights, "build", lambda *a, **k: pytest.fail("built"))
    for overrides, told in (
        (["augment.cutmix=1", "train.batch_size=63"], "is odd"),
        (["augment.cutmix=1", "train.batch_size=62", "train.accumulation=2"], "is odd"),
        (["data.in_chans=2", "data.mean=[0,0]", "data.std=[1,1]", "augment.rand_augment=rand-m9"], "8-bit pictures"),
        (["augment.rand_augment=nothing-m9"], "is no policy"),
        (["train.batch_size=2000"], "less than one batch"),
        ([f"data.val_path={tmp_path}"], "no images"),
    ):
        with pytest.raises(ConfigError, match=told):
            classify.build(configure(digits, tmp_path, *overrides), ALONE)


def forward_order(model: nn.Module, image: Tensor) -> list[str]:
    """Parameter names in the order in which the forward pass first comes to their module."""
    order: list[str] = []

    def note(prefix: str) -> Any:
        return lambda module, *_: order.extend(f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False))

    handles = [module.register_forward_pre_hook(note(name)) for name, module in model.named_modules() if name]
    model.eval()(image)
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys(order))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny_patch16_224", 32),
        ("deit3_small_patch16_224", 32),
        ("beit_base_patch16_224", 32),
        ("convnext_atto", 64),
        ("convnextv2_atto", 64),
        ("resnet18", 32),
        ("resnet50", 32),
        ("efficientnet_b0", 32),
        ("regnety_002", 32),
        ("swin_tiny_patch4_window7_224", 224),
    ],
)
def test_layer_decay_is_complete_and_rises_towards_the_classifier(
    digits: Path, tmp_path: Path, name: str, size: int
) -> None:
    kwargs = {"embed_dim": 24, "num_heads": 2} if name.startswith(("vit", "deit", "beit")) else {}
    encoder = build_encoder(
        name, in_chans=3, image_size=(size, size), drop_path_rate=0.0, num_classes=10, kwargs=kwargs
    )
    method = Classifier(encoder, configure(digits, tmp_path), [str(i) for i in range(10)])
    groups = param_groups(method, OptimConfig(layer_decay=0.5))
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    named = [name for group in groups for name in group["names"]]
    assert sorted(named) == sorted(name for name, _ in method.named_parameters())  # each once
    order = forward_order(method.encoder, torch.rand(1, 3, size, size))
    risen = [scales[f"encoder.{name}"] for name in order]
    assert risen == sorted(risen)
    head = [
        f"encoder.{name}"
        for name, _ in encoder.named_parameters()
        if name.startswith(("head.fc.", "fc.", "classifier."))
    ]
    head = head or ["encoder.head.weight", "encoder.head.bias"]
    assert {scales[name] for name in head} == {1.0}
    lowest = min(scales.values())
    assert risen[0] == lowest < 0.5 and all(math.log2(scale).is_integer() for scale in scales.values())
    for token in ("cls_token", "pos_embed"):
        assert scales.get(f"encoder.{token}", lowest) == lowest
    undecayed = {name for group in groups if not group["wd_scale"] for name in group["names"]}
    for path, parameter in method.named_parameters():
        assert parameter.ndim > 1 or path in undecayed


def test_every_classifier_prefix_is_known_to_timm() -> None:
    for name in ("vit_tiny_patch16_224", "resnet18", "convnext_atto"):
        assert timm.get_pretrained_cfg(name).classifier  # type: ignore[union-attr]


def test_training_improves_and_everything_is_written(digits: Path, tmp_path: Path, world: World) -> None:
    folder = tmp_path / "run"
    mixing = (
        "augment.mixup=0.2",
        "augment.cutmix=0.2",
        "augment.mixup_prob=0.5",
        "train.ema_decay=0.5",
        "optim.lr=4e-3",
    )
    config = configure(digits, folder, *mixing, "train.epochs=8", "train.eval_epochs=4", "augment.erase_prob=0.1")
    classify.run(config, world)
    (row,) = json.loads((folder / "results.json").read_text())
    assert row["top1"] > 25 and row["top1"] <= row["top5"] <= 100
    told = {"task": "classify", "recipe": "digits_vit", "init": "scratch", "labels": 1.0, "epochs": 8.0, "steps": 176}
    assert told.items() <= row.items() and row["train_images"] == 1438 and row["eval_images"] == 359
    assert "top1_without_ema" in row and row["seconds"] > 0
    evaluated = [line for line in read_log(folder / "log.jsonl") if line["event"] == "evaluate"]
    assert len(evaluated) == 2 and evaluated[-1]["top1"] == row["top1"]
    for name in (
        "model.safetensors",
        "model.json",
        "encoder.safetensors",
        "encoder.json",
        "report.html",
        "config.yaml",
    ):
        assert (folder / name).is_file(), name
    assert list((folder / "pictures").glob("augmented_step*.png"))

    # What was exported is what was evaluated.
    classify.run(
        configure(digits, folder, *mixing, "evaluate=true", f"encoder.pretrained={folder}", "eval_batch_size=7"), world
    )
    again = json.loads((folder / "results.json").read_text())[-1]
    assert again["task"] == "evaluate"
    assert {key: again[key] for key in ("top1", "top5", "eval_images")} == {
        key: row[key] for key in ("top1", "top5", "eval_images")
    }
    assert again["eval_loss"] == pytest.approx(row["eval_loss"])

    # A finished run that is started again keeps its result.
    classify.run(config, world)
    assert len(json.loads((folder / "results.json").read_text())) == 2

    # Its encoder is where the next fine-tuning starts.
    following = configure(
        digits, tmp_path / "next", f"encoder.pretrained={folder}", "train.epochs=1", "classify.head_init_scale=0.001"
    )
    classify.run(following, world)
    assert json.loads((tmp_path / "next" / "results.json").read_text())[0]["init"] == str(folder)


def test_dry_run_reports_and_writes_nothing(digits: Path, tmp_path: Path, world: World) -> None:
    config = configure(digits, tmp_path / "none", "classify.loss=bce")
    report = classify.dry_run(config, world)
    assert report["train_images"] == 1438 and report["parameters"] > 10_000 and math.isfinite(report["loss"])
    assert not (tmp_path / "none").exists()


def test_two_processes_evaluate_what_they_export(digits: Path, tmp_path: Path, world: World) -> None:
    # A network with batch norms: each process has running statistics of its own.
    network = [
        "encoder.name=resnet18",
        "encoder.kwargs={}",
        "optim.layer_decay=0.8",
        "data.labels=0.2",
        f"data.path={digits}",
    ]
    words = [
        "-m",
        "finetune",
        "digits_vit",
        *network,
        f"output_dir={tmp_path}",
        "train.epochs=1",
        "train.warmup_epochs=0",
    ]
    launch.run(words, processes=2, log=tmp_path / "rank")
    (row,) = json.loads((tmp_path / "results.json").read_text())
    config = read_config(
        PROGRAM, "digits_vit", [*network, "evaluate=true", f"encoder.pretrained={tmp_path}", f"output_dir={tmp_path}"]
    )
    check_run(config)
    PROGRAM.check(config)
    classify.run(config, world)
    again = json.loads((tmp_path / "results.json").read_text())[-1]
    assert {key: again[key] for key in ("top1", "top5", "eval_images")} == {
        key: row[key] for key in ("top1", "top5", "eval_images")
    }
    assert again["eval_loss"] == pytest.approx(row["eval_loss"], rel=1e-5)
