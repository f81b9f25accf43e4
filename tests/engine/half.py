"""float16 on a CPU: torch computes it there, slowly, and the engine refuses it."""

from typing import Any

from engine import ds
from engine.schema import BaseConfig


def allow() -> None:
    """Let runs of this process have float16 wherever they are."""
    original = ds.merge

    def merge(config: BaseConfig, world_size: int, device_type: str) -> dict[str, Any]:
        return original(config, world_size, "cuda")

    ds.merge = merge
