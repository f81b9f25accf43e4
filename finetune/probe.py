"""Linear probe: one linear layer per learning rate on frozen features, the best rate chosen without the test images.

As MAE (arXiv:2111.06377, table 10) and, before it, MoCo v3 do it: LARS without weight decay, a batch norm without gain
and bias in front of the layer. Several learning rates are tried at once: each has a layer of its own on the same
features. The rate is chosen on a part of the training images that no layer is trained on.

Two ways: ``probe.augment=true`` shows the encoder new crops in every epoch, by the one training loop (engine/loop.py);
``probe.augment=false`` extracts the features of fixed crops once and trains the layers on those, in seconds.

Shapes: ``B`` images, ``D`` features, ``K`` classes, ``R`` learning rates.
"""

import dataclasses
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.loader import Loader
from data.sources import ImageIndex
from data.transforms import CropResize
from engine import ds, loop
from engine.config import ConfigError, user_errors
from engine.log import RunLog, progress
from engine.loop import Hooks
from engine.optim import build_optimizer, param_groups, set_step
from engine.report import keep_settings, record
from engine.schedule import Plan, peak_lr
from engine.schema import CropConfig, RunConfig, option
from engine.world import World, seed_step
from finetune import sets, weights
from finetune.config import FinetuneData
from finetune.features import KINDS, Extracted, Frozen, extract, stream
from finetune.targets import hits

log = logging.getLogger(__name__)


@dataclasses.dataclass
class ProbeSection:
    """What only the probe has."""

    augment: bool = option(False, "new random crops in every epoch (MAE's way); false: features of fixed crops, once")
    features: str = option(
        "mean", "mean of the last map, class token, or what the model's own head gets", choices=KINDS
    )
    batch_norm: bool = option(True, "batch norm without gain and bias before the layer, as MAE")
    lr_factors: list[float] = option([1.0], "learning rates tried at once, in units of the peak that optim gives", gt=0)
    held_out: float = option(0.1, "share of each class's training images kept back to choose the rate", ge=0, lt=1)


@dataclasses.dataclass
class ProbeConfig(RunConfig):
    """Linear probe of an encoder; without ``encoder.pretrained`` of the untrained network."""

    task: str = option("probe", "the task, one of finetune/tasks.py (set by the recipe)")
    eval_batch_size: int = option(128, "images per process in evaluation and extraction", ge=1)
    data: FinetuneData = dataclasses.field(default_factory=FinetuneData)
    augment: CropConfig = dataclasses.field(default_factory=CropConfig)
    probe: ProbeSection = dataclasses.field(default_factory=ProbeSection)


class FeatureNorm(nn.BatchNorm1d):
    """Batch norm without gain and bias; its statistics are those of the batch of all processes, summed in float64."""

    over_processes = True  # needs no help of engine/batch_norm.py

    def __init__(self, dim: int, world: World) -> None:
        super().__init__(dim, eps=1e-6, affine=False)  # MAE's released eps
        self.world = world

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) float32 -> the same; there is no gradient to the features."""
        if not self.training:
            return super().forward(x)
        wide = x.detach().double()
        sums = torch.stack((torch.ones_like(wide), wide, wide**2)).sum(dim=1)
        count, total, squares = self.world.sum(sums) if self.world.size > 1 else sums
        mean = total / count
        var = (squares / count - mean**2).clamp(min=0)
        with torch.no_grad():
            self.num_batches_tracked += 1  # type: ignore[assignment, operator]
            self.running_mean.lerp_(mean.float(), self.momentum)  # type: ignore[union-attr, arg-type]
            unbiased = var * count / (count - 1).clamp(min=1)
            self.running_var.lerp_(unbiased.float(), self.momentum)  # type: ignore[union-attr, arg-type]
        return ((wide - mean) / (var + self.eps).sqrt()).float()


class Heads(nn.Module):
    """One linear layer per learning rate, all with the same initial weights."""

    def __init__(self, dim: int, num_classes: int, probe: ProbeSection, seed: int, world: World) -> None:
        super().__init__()
        seed_step(seed, -2, 0)
        first = nn.init.trunc_normal_(torch.empty(num_classes, dim), std=0.01)  # MAE's released initialisation
        self.factors = probe.lr_factors
        self.norm = FeatureNorm(dim, world) if probe.batch_norm else nn.Identity()
        self.weights = nn.ParameterList(first.clone() for _ in self.factors)
        self.biases = nn.ParameterList(torch.zeros(num_classes) for _ in self.factors)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, D) float32 -> logits (R, B, K) float32."""
        with torch.autocast(x.device.type, enabled=False):
            x = self.norm(x.float())
            logits = F.linear(x, torch.cat(list(self.weights)), torch.cat(list(self.biases)))
        return logits.unflatten(1, (len(self.factors), -1)).transpose(0, 1)

    def lr_factors(self) -> dict[str, float]:
        """What :func:`engine.optim.param_groups` multiplies each parameter's learning rate by."""
        return {f"{kind}.{i}": f for i, f in enumerate(self.factors) for kind in ("weights", "biases")}


def head_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the images of each head's cross entropy; (R, B, K), (B,) -> (R,)."""
    return torch.stack([F.cross_entropy(one, labels, reduction="sum") for one in logits])


class Probe(nn.Module):
    """The heads and their training loss on augmented images; the encoder is frozen and no part of it."""

    def __init__(self, frozen: Frozen, heads: Heads) -> None:
        super().__init__()
        self.frozen, self.heads = frozen, heads

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"image": (B, C, H, W), "label": (B,)} -> the sum of the heads' losses, as none is to feel another's."""
        logits = self.heads(self.frozen(batch["image"]))
        losses = head_losses(logits, batch["label"]) / len(batch["label"])
        return {"loss": losses.sum(), "lowest_loss": losses.min().detach()}


def check(config: ProbeConfig) -> None:
    """Refuse settings that have no effect or do not fit each other, before anything is built."""
    probe = config.probe
    if not probe.lr_factors or len(set(probe.lr_factors)) != len(probe.lr_factors):
        raise ConfigError(
            f"probe.lr_factors={probe.lr_factors}: give one or more different factors, such as [0.1,1,10]"
        )
    if not probe.held_out and len(probe.lr_factors) > 1:
        raise ConfigError(
            "probe.held_out=0 leaves no images to choose one of the probe.lr_factors on (never the test images): "
            "hold some out, or give a single factor"
        )
    for key, off in (
        ("encoder.drop_path_rate", 0),
        ("optim.layer_decay", 1),
        ("optim.clip_grad", 0),
        ("train.ema_decay", 0),
        ("train.checkpoint_blocks", False),
        ("train.compile", False),
    ):
        section, name = key.split(".")
        if getattr(getattr(config, section), name) != off:
            raise ConfigError(
                f"{key} has no place in a probe, whose encoder is frozen and whose heads are apart: remove it"
            )
    sets.split_paths(config.data)
    weights.resolve(config.encoder, config.data)


@dataclasses.dataclass
class Parts:
    """What a probe is made of: ``fit`` are the training images that are not held out."""

    frozen: Frozen
    heads: Heads
    found: sets.Sets
    fit: Any
    held_out: Any


def build(config: ProbeConfig, world: World) -> Parts:
    """Frozen encoder, untrained heads and the images of one process."""
    with user_errors():
        found = sets.find_sets(config.data, config.seed)
        fit, held_out = found.train, None
        if config.probe.held_out:
            fit, held_out = sets.hold_out(found.train, config.probe.held_out, config.seed)
        data = config.data if config.probe.augment else sets.at_eval_size(config.data)
        encoder = weights.build(config.encoder, data, config.seed, num_classes=0)
        frozen = Frozen(encoder, config.data, config.probe.features, world.device)
    heads = Heads(frozen.dim, found.num_classes, config.probe, config.seed, world).to(world.device)
    log.info(
        "%d classes, %d images to train on, %d held out, %d to test, %d features",
        *(found.num_classes, len(fit), len(held_out or ()), len(found.val), frozen.dim),
    )
    return Parts(frozen, heads, found, fit, held_out)


def run(config: ProbeConfig, world: World) -> None:
    """Train the heads, choose one, and append the result to results.json."""
    started = time.perf_counter()
    parts = build(config, world)
    done = _augmented(parts, config, world) if config.probe.augment else _fixed(parts, config, world)
    best = choose(done.table)
    row = {
        "task": config.task,
        "recipe": config.recipe,
        "crops": "random, every epoch" if config.probe.augment else "fixed, extracted once",
        "features": config.probe.features,
        **best,
        "init": config.encoder.pretrained or "random",
        "labels": config.data.labels,
        "train_images": len(parts.fit),
        "held_out_images": len(parts.held_out or ()),
        "eval_images": done.eval_images,
        "epochs": round(done.steps / done.steps_per_epoch, 3),
        "steps": done.steps,
        "rates": done.table,
    }
    log.info("linear probe: top-1 %.2f %%, top-5 %.2f %% at learning rate %g", best["top1"], best["top5"], best["lr"])
    if world.is_main:
        record(Path(config.output_dir), row, time.perf_counter() - started)


def dry_run(config: ProbeConfig, world: World) -> dict[str, Any]:
    """``--dry_run``: one step of the augmented way, whichever is asked for: it is the larger."""
    fixed = not config.probe.augment
    config = dataclasses.replace(config, probe=dataclasses.replace(config.probe, augment=True))
    parts = build(config, world)
    if fixed and (batch := _whole_batch(config, len(parts.fit))) < config.train.batch_size:
        even = max(batch // world.size, 1) * world.size
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=even, accumulation=1))
    loader = train_loader(parts.fit, config, world)
    counts = {"train_images": len(parts.fit), "held_out_images": len(parts.held_out or ())}
    counts |= {"eval_images": len(parts.found.val), "features": parts.frozen.dim}
    return counts | loop.dry_run(Probe(parts.frozen, parts.heads), loader, config, world)


def train_loader(index: Any, config: ProbeConfig, world: World) -> Loader:
    """Shuffled random crops."""
    augment, data = config.augment, config.data
    with user_errors():
        transform = CropResize(data.image_size, augment.crop_scale, augment.crop_ratio, augment.hflip)
        place = dict(seed=config.seed, rank=world.rank, world_size=world.size)
        size = ds.micro_batch_size(config, world.size)
        return Loader.of(index, transform, data, batch_size=size, training=True, **place)


@dataclasses.dataclass
class Done:
    """How the training of the heads ended; ``table`` has a row per learning rate."""

    table: list[dict[str, float]]
    eval_images: int
    steps: int
    steps_per_epoch: int


def _augmented(parts: Parts, config: ProbeConfig, world: World) -> Done:
    """MAE's way, through the training loop: checkpoints, curves and resuming are the loop's."""
    loader = train_loader(parts.fit, config, world)
    test = sets.eval_loader(parts.found.val, config, world)
    kept = None if parts.held_out is None else sets.eval_loader(parts.held_out, config, world)
    peak, last = peak_lr(config.optim, config.train.batch_size), Done([], 0, 0, 1)

    def evaluate(model: Any) -> dict[str, float]:
        def score(one: Loader) -> tuple[Tensor, int]:
            return tally(model.heads, ((x, y) for x, y, _ in stream(parts.frozen, one, world)), world)

        tested = score(test)
        last.table = tabulate(config.probe.lr_factors, peak, None if kept is None else score(kept), tested)
        last.eval_images = tested[1]
        return choose(last.table)

    # What is trained is small, the encoder beside it is not saved: a continued run must find the same one.
    fingerprint = parts.fit.fingerprint() + parts.frozen.digest()
    summary = loop.fit(Probe(parts.frozen, parts.heads), loader, config, world, Hooks(evaluate=evaluate), fingerprint)
    last.steps, last.steps_per_epoch = summary.steps, len(loader) // config.train.accumulation
    return last


def _fixed(parts: Parts, config: ProbeConfig, world: World) -> Done:
    """Extract all features once, then train on them."""
    folder = Path(config.output_dir)
    if world.is_main:
        keep_settings(folder, config)
    fit = extract(parts.frozen, sets.eval_loader(parts.fit, config, world), world)
    plan = train_on(fit, len(parts.fit), parts.heads, config, world)
    peak = peak_lr(config.optim, _whole_batch(config, len(parts.fit)))
    kept = None if parts.held_out is None else _score(parts, parts.held_out, config, world)
    tested = _score(parts, parts.found.val, config, world)
    table = tabulate(config.probe.lr_factors, peak, kept, tested)
    return Done(table, tested[1], plan.steps, plan.steps_per_epoch)


def _score(parts: Parts, index: Any, config: ProbeConfig, world: World) -> tuple[Tensor, int]:
    loader = sets.eval_loader(index, config, world)
    return tally(parts.heads, ((x, y) for x, y, _ in stream(parts.frozen, loader, world)), world)


def _whole_batch(config: ProbeConfig, images: int) -> int:
    """Images of a step on extracted features: a batch larger than the set is the set."""
    return min(config.train.batch_size, images)


def room(config: ProbeConfig, index: ImageIndex) -> tuple[int, int]:
    """Images of a labelled set that are not held out, and the fewest to train on: random crops come in whole batches."""
    held_out = config.probe.held_out
    fit = sets.hold_out(index, held_out, config.seed)[0] if held_out else index
    return len(fit), config.train.batch_size if config.probe.augment else 1


def train_on(fit: Extracted, images: int, heads: Heads, config: ProbeConfig, world: World) -> Plan:
    """Train the heads on extracted features, each process on its own of every batch.

    The batches are the same for any number of processes: of each every process computes the sum of the losses of the
    images that it holds; batch statistics and gradients are added up in float64. ``images`` is the number in the set.
    """
    batch = _whole_batch(config, images)
    plan = Plan.make(config.optim, dataclasses.replace(config.train, batch_size=batch, accumulation=1), images // batch)
    optimizer = build_optimizer(param_groups(heads, config.optim), config.optim)
    trained = [p for p in heads.parameters() if p.requires_grad]
    rows = torch.full((images,), -1)
    rows[fit.indices] = torch.arange(len(fit.indices))
    labels = fit.labels.to(world.device)
    run_log = RunLog(Path(config.output_dir), world, 0)
    heads.train()
    order = rows
    for step in progress(range(plan.steps), world, config.recipe, leave=False, unit="step"):
        epoch, part = divmod(step, plan.steps_per_epoch)
        if part == 0:
            seed_step(config.seed, epoch, 0)  # the same order on every process
            order = rows[torch.randperm(images)]
        mine = order[part * batch : (part + 1) * batch]
        mine = mine[mine >= 0].to(world.device)  # elsewhere, or broken
        set_step(optimizer, plan.lr[step], plan.weight_decay[step])
        sums = head_losses(heads(fit.features[mine]), labels[mine])
        found = torch.autograd.grad(sums.sum(), trained)
        total = [torch.tensor([float(len(mine))], device=world.device), sums.detach(), *(g.flatten() for g in found)]
        joined = torch.cat(total)
        if world.size > 1:
            joined = world.sum(joined).float()
        count, losses, rest = joined.split([1, len(sums), len(joined) - 1 - len(sums)])
        for p, gradient in zip(trained, rest.split([p.numel() for p in trained]), strict=True):
            p.grad = (gradient / count).view_as(p)
        optimizer.step()
        if part == plan.steps_per_epoch - 1 or step == plan.steps - 1:
            mean = losses / count
            values = {"loss": float(mean.sum()), "lowest_loss": float(mean.min()), "lr": float(plan.lr[step])}
            run_log.write(step + 1, values | {"epoch": round((step + 1) / plan.steps_per_epoch, 4)})
    run_log.close()
    heads.eval()
    return plan


def tally(heads: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], world: World) -> tuple[Tensor, int]:
    """Top-1 and top-5 in per cent and mean loss of each head over all processes (R, 3) float64, and the number of images.

    ``batches`` are this process's features (B, D) and labels (B,).
    """
    heads.eval()
    total: Tensor | None = None
    with torch.inference_mode():
        for x, labels in batches:
            logits = heads(x)
            found = [[hits(one, labels, 1), hits(one, labels, 5), len(labels)] for one in logits]
            loss = head_losses(logits.double(), labels)
            rows = torch.cat([torch.tensor(found, dtype=torch.float64), loss.cpu()[:, None]], dim=1)
            total = rows if total is None else total + rows
    width = len(heads.factors)  # type: ignore[arg-type]
    everyone = world.sum((torch.zeros(width, 4) if total is None else total).clone()).cpu()
    count = int(everyone[0, 2])
    if not count:
        raise RuntimeError("no image could be evaluated")
    return everyone[:, [0, 1, 3]] * torch.tensor([100.0, 100.0, 1.0], dtype=torch.float64) / count, count


def tabulate(
    factors: list[float], peak: float, kept: tuple[Tensor, int] | None, test: tuple[Tensor, int]
) -> list[dict[str, float]]:
    """One row per learning rate from the scores (:func:`tally`) on the held-out and on the test images."""
    table = []
    for i, factor in enumerate(factors):
        row = {"lr": float(f"{peak * factor:.6g}")}
        for prefix, scores in (("held_out_", kept), ("", test)):
            if scores is not None:
                names = (f"{prefix}top1", f"{prefix}top5", f"{prefix or 'eval_'}loss")
                row |= {name: float(value) for name, value in zip(names, scores[0][i], strict=True)}
        table.append(row)
    return table


def choose(table: list[dict[str, float]]) -> dict[str, float]:
    """The row with the best held-out top-1, of equal ones the one with the smallest held-out loss; the test plays no part."""
    if len(table) == 1:
        return table[0]
    return max(table, key=lambda row: (row["held_out_top1"], -row["held_out_loss"]))
