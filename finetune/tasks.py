"""The tasks, by the name a recipe gives in ``task``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.world import World
from finetune import analyse, classify, knn, probe
from finetune.config import ClassifyConfig


@dataclass(frozen=True)
class Task:
    """What the entry point needs of a task: its settings, their check, the work, and one step of it."""

    schema: type
    check: Callable[[Any], None]
    run: Callable[[Any, World], None]
    dry_run: Callable[[Any, World], dict[str, Any]]


TASKS = {
    "classify": Task(ClassifyConfig, classify.check, classify.run, classify.dry_run),
    "probe": Task(probe.ProbeConfig, probe.check, probe.run, probe.dry_run),
    "knn": Task(knn.KNNConfig, knn.check, knn.run, knn.dry_run),
    "analyse": Task(analyse.AnalyseConfig, analyse.check, analyse.run, analyse.dry_run),
}

SCHEMAS = {name: task.schema for name, task in TASKS.items()}
