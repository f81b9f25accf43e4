"""``python -m finetune RECIPE [key=value ...]``: fine-tune an encoder on labelled images, or measure it.

``python -m finetune compare RECIPE init=a,b,c``: the same from several starting points (finetune/compare.py).
``python -m finetune plan RECIPE nodes=1 gpus=8 memory=80``: what it needs of a cluster (finetune/plan.py).
"""

import sys
from pathlib import Path
from typing import Any

from engine import cli
from engine.world import World
from finetune import compare, init, plan
from finetune.tasks import SCHEMAS, TASKS


def check(config: Any) -> None:
    """What only the task knows about its settings."""
    TASKS[config.task].check(config)


def run(config: Any, world: World) -> None:
    """Do the task."""
    TASKS[config.task].run(config, world)


def try_out(config: Any, world: World) -> dict[str, Any]:
    """``--dry_run``."""
    return TASKS[config.task].dry_run(config, world)


PROGRAM = cli.Program(
    name="finetune",
    recipes=Path(__file__).parent / "recipes",
    kind="task",
    schemas=SCHEMAS,
    check=check,
    run=run,
    dry_run=try_out,
    commands={"compare": compare.main, "plan": plan.main},
    shorthands={"init": init.SHORTHAND},
)

if __name__ == "__main__":
    sys.exit(cli.main(PROGRAM, sys.argv[1:]))
