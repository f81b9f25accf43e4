"""``python -m pretrain RECIPE [key=value ...]``: pre-train an encoder, or a tokenizer, on unlabelled images.

``python -m pretrain plan RECIPE nodes=8 gpus=8 memory=80``: what that needs of a cluster (pretrain/plan.py).
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch

from data.loader import Loader
from data.sources import ImageIndex
from engine import cli
from engine.config import ConfigError, user_errors
from engine.ds import micro_batch_size
from engine.faults import until_stopped
from engine.loop import Hooks, dry_run, fit
from engine.report import record
from engine.world import World, seed_step, to_device
from pretrain import plan
from pretrain.methods import METHODS, SCHEMAS

NUM_PICTURES = 8
"""Images in a picture grid, spread over the training set."""


def check(config: Any) -> None:
    """What only the method knows about its settings."""
    kind = METHODS[config.method]
    if config.data.val_path and not hasattr(kind, "evaluate"):
        raise ConfigError(
            f"data.val_path has no effect on {config.method}, which measures nothing but its loss: remove it"
        )
    kind.check(config)


def build(config: Any, world: World) -> tuple[Any, Loader, ImageIndex]:
    """The method and the training set of one process; data first, it is quick to refuse."""
    kind = METHODS[config.method]
    with user_errors():
        index = ImageIndex.scan(config.data.path, classes=False, retry_seconds=config.data.retry_seconds)
        loader = _loader(config, world, index, kind.transform(config), training=True)
        # The same weights on every process, whatever they have drawn so far.
        seed_step(config.seed, -1, 0)
        method: Any = kind(config)
    return method, loader, index


def _loader(config: Any, world: World, index: ImageIndex, transform: Any, *, training: bool) -> Loader:
    batch_size = micro_batch_size(config, world.size)
    place = dict(seed=config.seed, rank=world.rank, world_size=world.size)
    return Loader.of(index, transform, config.data, batch_size=batch_size, training=training, **place)


def run(config: Any, world: World) -> None:
    """Pre-train, or continue."""
    method, loader, index = build(config, world)
    with user_errors():
        shown = Loader.preview(index, loader.transform, config.data, NUM_PICTURES, config.seed)
    shown = to_device(shown, world.device)
    hooks = Hooks(
        evaluate=_evaluator(config, world, index, loader.named) if hasattr(method, "evaluate") else None,
        pictures=lambda model: model.pictures(shown, torch.Generator().manual_seed(config.seed)),
        export=lambda model, folder: model.export(folder),
    )
    started = time.perf_counter()
    summary = fit(method, loader, config, world, hooks, index.fingerprint() + method.fingerprint())
    if world.is_main:
        result = {"task": "pretrain", "recipe": config.recipe, "steps": summary.steps, **summary.results}
        record(Path(config.output_dir), result, time.perf_counter() - started)


def _evaluator(config: Any, world: World, index: ImageIndex, named: set[str]) -> Any:
    """Evaluate on ``data.val_path`` or a fixed part of the training set, each image counted once over all processes."""
    from data.transforms import EvalTransform

    transform = EvalTransform(tuple(config.data.image_size), crop_ratio=1.0)
    if config.data.val_path:
        with user_errors():
            part = ImageIndex.scan(config.data.val_path, classes=False, retry_seconds=config.data.retry_seconds)
    else:
        part = index.subset(min(len(index), 2048), config.seed)
    loader = _loader(config, world, part, transform, training=False)
    loader.named = named

    def evaluate(model: Any) -> dict[str, float]:
        batches = until_stopped(loader.batches(0), world)
        sums = model.evaluate(to_device(batch, world.device) for batch in batches)
        return model.report(world.sum(sums).tolist())

    return evaluate


def try_out(config: Any, world: World) -> dict[str, Any]:
    """``--dry_run``."""
    method, loader, _ = build(config, world)
    return dry_run(method, loader, config, world)


PROGRAM = cli.Program(
    name="pretrain",
    recipes=Path(__file__).parent / "recipes",
    kind="method",
    schemas=SCHEMAS,
    check=check,
    run=run,
    dry_run=try_out,
    commands={"plan": plan.main},
)

if __name__ == "__main__":
    sys.exit(cli.main(PROGRAM, sys.argv[1:]))
