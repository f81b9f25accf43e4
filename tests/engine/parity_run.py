"""``python -m tests.engine.parity_run FOLDER CASES``: run the cases, one after another in the same processes.

Started once per process. CASES is a JSON list of the fields of :class:`tests.engine.parity.Case`; what a case did goes to
FOLDER/NAME.pt.
"""

import dataclasses
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from engine.log import read_log
from engine.loop import Hooks, fit
from engine.world import World, join
from tests.engine import half
from tests.engine.parity import Case
from tests.engine.parity_methods import SUBJECTS
from tests.engine.plain import Trace

Call = tuple[int, float, float, int]
"""A group in a step of an optimiser: step (-1: before the first), learning rate, weight decay, numbers in it.

From ZeRO-1 on each group is a step of the optimiser of its own, in their order."""


def run(case: Case, folder: Path, world: World) -> tuple[Trace, list[Call], int]:
    """Train as the case says, through the engine -> what it did, the optimiser's steps, and parameters held in the end."""
    subject = SUBJECTS[case.subject]
    method, config = subject.make(case, folder)
    loader = subject.loader(config, world.rank, world.size)
    states: list[dict[str, torch.Tensor]] = []
    calls: list[Call] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        # With a moving average it comes first, the weights themselves after it.
        states.append({name: value.detach().cpu().clone() for name, value in model.state_dict().items()})
        return {"evaluated": 1.0}

    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    def record(optimizer: Any, *_: Any) -> None:
        step = (forwards - 1) // case.parts
        for group in optimizer.param_groups:
            if group["params"]:
                numbers = sum(p.numel() for p in group["params"])
                calls.append((step, group["lr"], group["weight_decay"], numbers))

    hooks = [register_optimizer_step_pre_hook(record), method.register_forward_pre_hook(count)]
    fit(method, loader, config, world, Hooks(evaluate=evaluate), case.name)
    for hook in hooks:
        hook.remove()
    lines = read_log(Path(config.output_dir) / "log.jsonl") if world.is_main else []
    losses = [line["loss"] for line in lines if line["event"] == "train"]
    held = sum(parameter.numel() for parameter in method.parameters())
    return Trace(losses, states[-1], states[-2] if config.train.ema_decay else {}), calls, held


def main(folder: Path, cases: list[dict[str, Any]]) -> None:
    """Run the cases."""
    half.allow()
    gc.freeze()  # ZeRO-3 collects garbage at every start, among a million objects of imported modules
    with join() as world:
        for fields in cases:
            case = Case(**fields | {"words": tuple(fields["words"])})
            trace, calls, held = run(case, folder, world)
            if world.is_main:
                torch.save(dataclasses.asdict(trace) | {"calls": calls, "held": held}, folder / "draft")
                (folder / "draft").rename(folder / f"{case.name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
