"""The tasks, by the name a recipe gives in ``task``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data.sources import ImageIndex
from engine.world import World
from finetune import analyse, classify, knn, probe
from finetune.config import ClassifyConfig


def _all(config: Any, index: ImageIndex) -> tuple[int, int]:
    return len(index), 1


def _batch(config: Any, index: ImageIndex) -> tuple[int, int]:
    return len(index), config.train.batch_size


@dataclass(frozen=True)
class Task:
    """What the entry point and ``compare`` need of a task.

    Attributes:
        schema: its settings.
        check: refuses those that do not go together.
        run: the work.
        dry_run: one step of it.
        build: its networks and data, for ``compare`` to find out whether they can be had.
        room: images of a labelled set that it trains on, and the fewest that it can work with.
    """

    schema: type
    check: Callable[[Any], None]
    run: Callable[[Any, World], None]
    dry_run: Callable[[Any, World], dict[str, Any]]
    build: Callable[[Any, World], Any] | None = None
    room: Callable[[Any, ImageIndex], tuple[int, int]] = _all


TASKS = {
    "classify": Task(ClassifyConfig, classify.check, classify.run, classify.dry_run, classify.build, _batch),
    "probe": Task(probe.ProbeConfig, probe.check, probe.run, probe.dry_run, probe.build, probe.room),
    "knn": Task(knn.KNNConfig, knn.check, knn.run, knn.dry_run, knn.build),
    "analyse": Task(analyse.AnalyseConfig, analyse.check, analyse.run, analyse.dry_run),
}

SCHEMAS = {name: task.schema for name, task in TASKS.items()}
