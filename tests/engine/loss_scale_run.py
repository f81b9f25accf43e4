"""Runs in float16 with loss scales that are too large: ``python -m tests.engine.loss_scale_run ROOT``, once per process.

What each run did goes to ROOT/PROCESSES.json, by its name.
"""

import functools
import gc
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from engine import loss_scale
from engine.faults import NonFiniteLossError
from engine.loop import Hooks, _Run
from engine.world import World, join
from tests.engine import half
from tests.engine.faulty import RankLoader
from tests.engine.toy import ToyMethod, config, method

STAGES = ("zero0_fp16", "zero1_fp16", "zero2_fp16", "zero2_fp16_offload", "zero3_fp16", "zero3_fp16_offload")
CHANGES = (
    ("zero0_fp16", "zero2_fp16"),
    ("zero1_fp16", "zero0_fp16"),
    ("zero2_fp16_offload", "zero3_fp16"),
    ("zero3_fp16", "zero1_fp16"),
)
"""From a stage to another."""
SCALE, GROWTH = 2.0**24, 4
"""What runs begin with, and after how many good steps in a row the scale is doubled."""
COMMON = ("train.accumulation=2", "optim.clip_grad=0.3", "train.save_steps=5", "train.save_epochs=0")


class Hopeless(ToyMethod):
    """Its gradients are never finite."""

    def before_step(self, step: int, num_steps: int) -> None:
        self.step = self.poison_gradient_at


def digest(module: torch.nn.Module) -> float:
    """A number of what this process holds of the weights."""
    return sum(float(getattr(p, "ds_tensor", p).detach().double().abs().sum()) for p in module.parameters())


def run(
    folder: Path,
    world: World,
    *words: str,
    model: ToyMethod | None = None,
    scale: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Train, or continue -> log, why it ended, and of each process: scaler and digest of its weights before every step.

    ``scale``: entries of the scaler's state, for its first step.
    """
    model = model or method(batch_norm=False)
    settings = config(folder, *COMMON, *words)
    loader = RankLoader(world, settings.train.batch_size // settings.train.accumulation, folder / f"seen{world.rank}")
    trained = _Run(model, loader, settings, world, Hooks(), "toy")
    engine, before = trained.engine, []
    scaler = loss_scale.grad_scaler(engine)
    if scaler is not None and scale:
        scaler.load_state_dict(scaler.state_dict() | scale)

    def look(*_: Any) -> None:
        state = {} if scaler is None else scaler.state_dict()
        used = getattr(engine.optimizer, "external_loss_scale", state.get("scale"))
        before.append({"state": state, "used": used, "weights": digest(engine.module)})

    engine.module.register_forward_pre_hook(look, prepend=True)
    ended = ""
    try:
        trained.fit()
    except NonFiniteLossError as error:
        ended = str(error)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] if world.is_main else []
    ranks = world.gather(before[:: settings.train.accumulation])
    return {"log": lines, "ended": ended, "ranks": ranks, "skipped": trained.progress.skipped}


def main(root: Path) -> None:
    """All runs of this number of processes, those at ZeRO-3, which leaves a linear layer of its own behind, at last."""
    half.allow()
    gc.freeze()  # ZeRO-3 collects garbage at every start
    found: dict[str, Any] = {}
    large = {"scale": SCALE, "growth_interval": GROWTH}
    toy = functools.partial(method, batch_norm=False)
    with join(threads=1) as world:
        root = root / str(world.size)
        found["float32"] = run(root / "float32", world, "deepspeed=zero0_fp32", "train.steps=3")
        for stage in STAGES:
            how, folder = f"deepspeed={stage}", root / stage
            one = toy(poison_gradient_at=6 if world.rank == world.size - 1 else -1)
            never = Hopeless(batch_norm=False, poison_gradient_at=0)
            parts = "train.max_skipped=0"
            found[stage] = {
                "plain": run(folder / "plain", world, how, "train.steps=3"),
                "whole": run(folder / "whole", world, how, scale=large),
                "overflow": run(folder / "overflow", world, how, model=one),
                "hopeless": run(
                    folder / "hopeless", world, how, "train.max_skipped=1", model=never, scale={"scale": 4.0}
                ),
                "stopped": run(folder / "parts", world, how, parts, model=toy(poison_at=13), scale=large),
            }
            if world.is_main:
                for target in (target for source, target in CHANGES if source == stage):
                    shutil.copytree(folder / "parts", root / f"{stage}>{target}")
            world.barrier()
            found[stage]["resumed"] = run(folder / "parts", world, how)
        for source, target in CHANGES:
            name = f"{source}>{target}"
            found[name] = run(root / name, world, f"deepspeed={target}")
        if world.is_main:
            root.with_suffix(".json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
