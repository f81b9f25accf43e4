"""Image classification: fine-tuning a pre-trained encoder, or training it from scratch.

As BEiT (arXiv:2106.08254, appendix) and CIM (arXiv:2202.03382, tables 10 and 11) do it: a timm model with its
classifier, layer-wise learning rates, mixup and cutmix, soft-target cross entropy or the binary cross entropy of
"ResNet strikes back" (arXiv:2110.00476).
"""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid

from data.loader import Loader
from engine import ds, faults, loop
from engine.blocks import block_options
from engine.config import ConfigError, user_errors
from engine.loop import Hooks
from engine.report import keep_settings, record
from engine.world import World, to_device
from finetune import heads, init, per_class, sets, weights
from finetune.config import ClassifyConfig, check_classify
from finetune.evaluate import Outcome, judge
from finetune.features import prepare
from finetune.targets import binary_cross_entropy, cross_entropy, mix, soft_target
from models.blocks import arrange
from models.pixels import denormalise, normalise, to_unit
from models.pretrained import describe

log = logging.getLogger(__name__)

NUM_PICTURES = 8
"""Training images shown as the network sees them."""


class Classifier(nn.Module):
    """A timm model and its training loss.

    ``forward`` takes {"image": (B, C, H, W) uint8 or float in [0, 1], "label": (B,) int64}.
    """

    def __init__(self, encoder: nn.Module, config: ClassifyConfig, class_names: list[str]) -> None:
        super().__init__()
        self.encoder, self.config, self.class_names = encoder, config, class_names
        threshold, smoothing = config.classify.bce_threshold, config.augment.label_smoothing
        if threshold is not None and threshold < smoothing / len(class_names):
            raise ConfigError(
                f"classify.bce_threshold={threshold} makes every class present: augment.label_smoothing={smoothing} gives "
                f"each {smoothing / len(class_names):.3g}; raise the one or lower the other"
            )
        with user_errors():
            arrange(self, **block_options(config))

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Normalise, mix, classify, compare."""
        image, target = self.prepare(batch["image"], batch["label"])
        logits = self.encoder(image).float()
        loss = self.loss(logits, target)
        agrees = logits.argmax(dim=1) == target.argmax(dim=1)
        return {"loss": loss, "train_top1": 100 * agrees.float().mean().detach()}

    def prepare(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images and soft targets (B, K), mixed with each other where the recipe says so."""
        augment, num_classes = self.config.augment, len(self.class_names)
        image = self._normalised(image)
        if not self.config.mixes:
            return image, soft_target(label, num_classes, augment.label_smoothing)
        return mix(
            image,
            label,
            num_classes,
            mixup=augment.mixup,
            cutmix=augment.cutmix,
            prob=augment.mixup_prob,
            smoothing=augment.label_smoothing,
        )

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of logits (B, K) float32 against soft targets (B, K)."""
        if self.config.classify.loss == "ce":
            return cross_entropy(logits, target)
        return binary_cross_entropy(logits, target, self.config.classify.bce_threshold)

    def logits(self, image: Tensor) -> Tensor:
        """(B, C, H, W) uint8 or float in [0, 1] -> (B, K) float32."""
        return self.encoder(self._normalised(image)).float()

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch as the network is given it in training; (3, rows, columns) in [0, 1]."""
        even = len(batch["image"]) // 2 * 2  # mixing pairs them; a broken image is missing
        image, _ = self.prepare(batch["image"][:even], batch["label"][:even])
        shown = denormalise(image, self.config.data.mean, self.config.data.std).clamp(0, 1)
        shown = shown if shown.shape[1] == 3 else shown[:, :1].expand(-1, 3, -1, -1)
        return {"augmented": make_grid(shown.cpu(), nrow=NUM_PICTURES // 2, padding=2, pad_value=1.0)}

    def export(self, folder: Path) -> None:
        """Write the model, and its encoder for another fine-tuning."""
        weights.save_model(self.encoder, self.config.encoder, self.config.data, self.class_names, folder)

    def _normalised(self, image: Tensor) -> Tensor:
        return normalise(to_unit(image), self.config.data.mean, self.config.data.std)


def check(config: ClassifyConfig) -> None:
    """Refuse what does not fit, before anything is built."""
    check_classify(config)
    if not config.evaluate:
        sets.split_paths(config.data)
    weights.resolve(config.encoder, config.data, whole=config.evaluate)


def run(config: ClassifyConfig, world: World) -> None:
    """Train, or continue, or only evaluate; the result goes to results.json."""
    if config.evaluate:
        _evaluate_only(config, world)
        return
    method, loader, found = build(config, world)
    val_loader = sets.eval_loader(found.val, config, world)
    with user_errors():
        shown = to_device(
            Loader.preview(found.train, loader.transform, config.data, NUM_PICTURES, config.seed), world.device
        )
    last: list[Outcome] = []

    def evaluate(model: Any) -> dict[str, float]:
        # With a moving average it comes first, the weights themselves after it: the first of the two is kept.
        last[:] = (
            [*last[-1:], judge(model, val_loader, world)]
            if config.train.ema_decay
            else [judge(model, val_loader, world)]
        )
        return last[-1].numbers()

    hooks = Hooks(
        evaluate=evaluate,
        pictures=lambda model: _of(model).pictures(shown),
        export=lambda model, folder: _of(model).export(folder),
    )
    started = time.perf_counter()
    summary = loop.fit(method, loader, config, world, hooks, found.train.fingerprint())
    row = {
        "task": config.task,
        "recipe": config.recipe,
        **{key: value for key, value in summary.results.items() if not key.startswith("eval_images")},
        "epochs": round(summary.steps / (len(loader) // config.train.accumulation), 3),
        "steps": summary.steps,
        "init": init.told(config.encoder.pretrained),
        "labels": config.data.labels,
        "train_images": len(found.train),
        "eval_images": int(summary.results["eval_images"]),
    }
    log.info("top-1 %.2f %%, top-5 %.2f %% on %d images", row["top1"], row["top5"], row["eval_images"])
    if world.is_main:
        per_class.save(last[0], found.train.class_names, Path(config.output_dir))
        record(Path(config.output_dir), row, time.perf_counter() - started)


def dry_run(config: ClassifyConfig, world: World) -> dict[str, Any]:
    """``--dry_run``."""
    if config.evaluate:
        raise ConfigError("--dry_run tries a training step: leave out evaluate=true")
    method, loader, found = build(config, world)
    return {"train_images": len(found.train), "eval_images": len(found.val)} | loop.dry_run(
        method, loader, config, world
    )


def build(config: ClassifyConfig, world: World) -> tuple[Classifier, Loader, sets.Sets]:
    """Method and data of one process; data first, it is quick to refuse."""
    micro_batch = ds.micro_batch_size(config, world.size)
    if config.mixes and micro_batch % 2:
        raise ConfigError(
            f"mixup and cutmix pair the images of a batch, {micro_batch} per process and part is odd: "
            "change train.batch_size or train.accumulation"
        )
    with user_errors():
        found = sets.find_sets(config.data, config.seed)
        loader = sets.train_loader(found.train, config, world, micro_batch)
        task = config.classify
        model = weights.build(
            config.encoder,
            config.data,
            config.seed,
            found.num_classes,
            head_init_scale=task.head_init_scale,
            classes=heads.Classes(found.train.class_names, task.head_init, task.class_map),
        )
    log.info("%d classes, %d training images, %d to evaluate", found.num_classes, len(found.train), len(found.val))
    return Classifier(model, config, found.train.class_names), loader, found


def _evaluate_only(config: ClassifyConfig, world: World) -> None:
    """Evaluate the whole model in ``encoder.pretrained``."""
    faults.unlisten()
    started = time.perf_counter()
    data = sets.at_eval_size(config.data)
    with user_errors():
        card = describe(config.encoder.pretrained, config.encoder.name, whole=True)
        names = card.get("class_names")
        listed = sets.read_classes(data.class_list)
        if names and listed and names != listed:
            raise ConfigError(
                f"data.class_list={data.class_list} is not the list of classes that {config.encoder.pretrained} was trained "
                "with: leave it unset"
            )
        val = sets.find_val(data, names)
        names = val.class_names
        model = weights.build(config.encoder, data, config.seed, len(names), whole=True)
        val_loader = sets.eval_loader(val, config, world)
    method = Classifier(prepare(model, world.device), config, names).eval()
    dtype = ds.autocast_dtype(ds.merge(config, world.size, world.device.type))
    with torch.autocast(world.device.type, dtype, enabled=dtype is not None):
        outcome = judge(method, val_loader, world)
    results = outcome.numbers()
    log.info("top-1 %.2f %%, top-5 %.2f %% on %d images", results["top1"], results["top5"], results["eval_images"])
    if world.is_main:
        folder = Path(config.output_dir)
        keep_settings(folder, config)
        row = {"task": "evaluate", "recipe": config.recipe, **results, "init": config.encoder.pretrained}
        row |= {"image_size": "x".join(map(str, data.image_size)), "crop_ratio": data.eval_crop_ratio}
        per_class.save(outcome, names, folder)
        record(folder, row, time.perf_counter() - started)


def _of(model: nn.Module) -> Classifier:
    assert isinstance(model, Classifier), type(model)
    return model
