"""Checkpoints that are complete or invisible, and the run they continue.

``checkpoints/stepNNNNNNNN/`` holds DeepSpeed's files (weights, optimiser, loss scaler), ``rankN.pt`` (buffers and
random states of each process), ``ema.pt`` and ``progress.json``. It is written under another name and renamed once
every process has finished, so that a kill at any moment leaves the ones before it as they were. ``latest`` names the
newest for DeepSpeed's own tools.
"""

import argparse
import json
import logging
import random
import re
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.config import ConfigError, getattr_path, settings
from engine.files import write_json, write_text
from engine.world import World

log = logging.getLogger(__name__)

_STEP = re.compile(r"step(\d{8,})$")
_DRAFT = "writing_"


def safe_checkpoint_engine(engine: Any) -> Any:
    """DeepSpeed's checkpoint files, read without executing what a pickle asks for.

    DeepSpeed loads with ``weights_only=False``; here only its own three classes and argparse's Namespace are known.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, argparse.Namespace]

    class SafeCheckpointEngine(TorchCheckpointEngine):
        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals(known):
                return torch.load(path, map_location=map_location, weights_only=True)

    return SafeCheckpointEngine(engine._config)


FREE_SETTINGS = {
    *("recipe", "output_dir", "resume", "threads"),
    *("data.path", "data.val_path", "data.workers", "data.max_broken", "encoder.pretrained", "eval_batch_size"),
    *(
        "optim.lr_batch",
        "cim.tokenizer",
        "train.log_steps",
        "train.save_epochs",
        "train.save_steps",
        "train.save_minutes",
        "train.keep_checkpoints",
    ),
    *("train.picture_epochs", "train.eval_epochs"),
}
"""What may change when a run is continued: where things are and what is written, but not what is computed. What stands
at a path that matters (training set, tokenizer) is compared by its contents, as part of the fingerprint."""


@dataclass
class Progress:
    """Where a run stands and what it must agree with to be continued.

    Attributes:
        data: fingerprint of the training set, wherever it is.
        settings: the configuration but for :data:`FREE_SETTINGS`, flat.
    """

    step: int
    world_size: int
    data: str
    settings: dict[str, Any]

    @classmethod
    def start(cls, config: Any, world_size: int, data: str) -> "Progress":
        """Progress of a new run."""
        every = {key: getattr_path(config, key) for key, _, _ in settings(type(config))}
        kept = {key: value for key, value in every.items() if key not in FREE_SETTINGS}
        # The weights may move: whether there are any, and whose, may not change.
        start = every.get("encoder.pretrained", "")
        return cls(0, world_size, data, kept | {"encoder.pretrained": start if start in ("", "true") else "a file"})

    def check(self, now: "Progress") -> None:
        """Refuse to continue with settings under which the run would not be the same one."""
        saved = {"processes": self.world_size, "training set": self.data, **self.settings}
        given = {"processes": now.world_size, "training set": now.data, **now.settings}
        differ = [key for key in {**saved, **given} if saved.get(key) != given.get(key)]
        if differ:
            named = ", ".join(f"{key}={saved.get(key)} (now {given.get(key)})" for key in differ)
            raise ConfigError(
                f"the checkpoint in output_dir was made with {named}: give another output_dir or the old settings"
            )


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, world: World, keep: int) -> None:
        self.folder, self.world, self.keep = folder, world, keep
        self.last: Path | None = None

    def complete(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        found = [path for path in self.folder.glob("step*") if _STEP.search(path.name)]
        return sorted(found, key=lambda path: int(_STEP.search(path.name)[1]))  # type: ignore[index]

    def save(self, engine: Any, progress: Progress, ema: nn.Module | None = None) -> Path:
        """Write one checkpoint; called on every process."""
        started = time.perf_counter()
        name = f"step{progress.step:08d}"
        draft, final = self.folder / f"{_DRAFT}{name}", self.folder / name
        if final.exists():
            return final
        engine.save_checkpoint(str(self.folder), tag=draft.name, save_latest=False)
        module = engine.module
        state = {"buffers": dict(module.named_buffers()), "random": _random_state()}
        torch.save(state, draft / f"rank{self.world.rank}.pt")
        if self.world.is_main:
            if ema is not None:
                torch.save(ema.state_dict(), draft / "ema.pt")
            write_json(draft / "progress.json", asdict(progress))
        self.world.barrier()  # every process has written its part
        if self.world.is_main:
            draft.rename(final)
            write_text(self.folder / "latest", name)
            for old in self.complete()[: -self.keep]:
                shutil.rmtree(old)
        self.world.barrier()  # nobody goes on, or looks for the checkpoint, before it is there
        self.last = final
        log.info("checkpoint %s (%.1f s)", final, time.perf_counter() - started)
        return final

    def check(self, now: Progress) -> None:
        """Refuse to continue the run that is there, if there is one, with settings that make it another."""
        if found := self.complete():
            read_progress(found[-1]).check(now)

    def resume(self, engine: Any, ema: nn.Module | None = None) -> int:
        """Load the newest checkpoint, if there is one -> the step to continue with (0 for a new run)."""
        if self.world.is_main:
            for draft in self.folder.glob(f"{_DRAFT}*"):
                shutil.rmtree(draft)
        self.world.barrier()
        found = self.complete()
        if not found:
            return 0
        newest = found[-1]
        progress = read_progress(newest)
        path, _ = engine.load_checkpoint(str(self.folder), tag=newest.name)
        if path is None:
            raise RuntimeError(f"DeepSpeed could not load {newest}: remove that folder to use the one before it")
        state = torch.load(newest / f"rank{self.world.rank}.pt", map_location="cpu", weights_only=True)
        buffers = dict(engine.module.named_buffers())
        for name, value in state["buffers"].items():
            buffers[name].copy_(value)
        _set_random_state(state["random"])
        if ema is not None:
            ema.load_state_dict(torch.load(newest / "ema.pt", map_location="cpu", weights_only=True))
        self.last = newest
        log.info("continuing from %s", newest)
        return progress.step


def read_progress(checkpoint: Path) -> Progress:
    """The progress.json of a checkpoint."""
    try:
        return Progress(**json.loads((checkpoint / "progress.json").read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{checkpoint} cannot be continued by this version ({error}): give another output_dir"
        ) from None


def _random_state() -> dict[str, Any]:
    numpy_state: Any = np.random.get_state()
    python_state: Any = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [numpy_state[0], torch.from_numpy(np.asarray(numpy_state[1]).astype(np.int64)), *numpy_state[2:]],
        "random": [python_state[0], list(python_state[1]), python_state[2]],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    with suppress(RuntimeError):  # fewer devices than when it was saved; every step seeds itself anyway
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["random"]
    random.setstate((version, tuple(internal), gauss))
