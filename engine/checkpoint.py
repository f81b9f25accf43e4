"""Checkpoints that are complete or invisible, and the run they continue.

``checkpoints/stepNNNNNNNN/`` holds DeepSpeed's files (weights, optimiser, loss scaler), ``rankN.pt`` (buffers and
random states of each process), ``ema.pt``, ``progress.json`` and ``hashes.json``. It is written under another name and
renamed once every process has finished, so that a kill at any moment leaves the ones before it as they were. ``latest``
names the newest for DeepSpeed's own tools.
"""

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
from torch import Tensor

from engine import loss_scale, reshape
from engine.config import ConfigError, getattr_path, settings, user_errors
from engine.safe_files import damage, is_whole, write_hashed
from engine.world import World
from formats.files import sync, write_json, write_text
from formats.hashes import HASHES, file_digest

log = logging.getLogger(__name__)

_STEP = re.compile(r"step(\d{8,})$")
_DRAFT, _REMOVED, _DAMAGED = "writing_", "removing_", "damaged_"

FREE_SETTINGS = {
    *("recipe", "output_dir", "resume", "threads", "deepspeed"),
    *("data.path", "data.val_path", "data.workers", "data.max_broken", "data.retry_seconds"),
    *("encoder.pretrained", "eval_batch_size"),
    *(
        "optim.lr_batch",
        "cim.tokenizer",
        "train.log_steps",
        "train.save_epochs",
        "train.save_steps",
        "train.save_minutes",
        "train.keep_checkpoints",
        "train.keep_every",
        "train.keep_best",
        "train.accumulation",
        "train.checkpoint_blocks",
        "train.compile",
        "train.nonfinite",
        "train.max_skipped",
        "train.rollback_lr",
        "train.max_rollbacks",
        "train.timeout_minutes",
    ),
    *("train.picture_epochs", "train.eval_epochs"),
}
"""What may change when a run is continued: where things are, what is written, and how the work is shared out, but not
what is computed. What stands at a path that matters (training set, tokenizer) is compared by its contents, as part of
the fingerprint."""


@dataclass(frozen=True)
class Layout:
    """How a run is spread: two legs of the same layout continue bit for bit."""

    processes: int
    stage: int
    offload: bool
    precision: str
    accumulation: int

    def __str__(self) -> str:
        offload = " with offload" if self.offload else ""
        return f"{self.processes} processes, ZeRO-{self.stage}{offload}, {self.precision}, {self.accumulation} parts"


@dataclass
class Progress:
    """Where a run stands and what it must agree with to be continued.

    Attributes:
        layout: fields of the :class:`Layout` it was saved in.
        data: fingerprint of the training set, wherever it is.
        settings: its :func:`identity`.
        skipped: steps left out so far because of values that were not finite.
        rollbacks: how often the run went back to an earlier checkpoint.
    """

    step: int
    layout: dict[str, Any]
    data: str
    settings: dict[str, Any]
    skipped: int = 0
    rollbacks: int = 0

    @classmethod
    def start(cls, config: Any, layout: Layout, data: str) -> "Progress":
        """Progress of a new run."""
        return cls(0, asdict(layout), data, identity(config))

    def check(self, now: "Progress") -> None:
        """Refuse to continue with settings under which the run would not be the same one."""
        saved = {"training set": self.data, **self.settings}
        given = {"training set": now.data, **now.settings}
        differ = [key for key in {**saved, **given} if saved.get(key) != given.get(key)]
        if differ:
            named = ", ".join(f"{key}={saved.get(key)} (now {given.get(key)})" for key in differ)
            raise ConfigError(
                f"the checkpoint in output_dir was made with {named}: give another output_dir or the old settings"
            )


def identity(config: Any) -> dict[str, Any]:
    """The settings that make a run this one and no other, flat: all but :data:`FREE_SETTINGS`."""
    every = {key: getattr_path(config, key) for key, _, _ in settings(type(config))}
    kept = {key: value for key, value in every.items() if key not in FREE_SETTINGS}
    # The weights may move: whether there are any, and whose, may not change.
    start = every.get("encoder.pretrained", "")
    return kept | {"encoder.pretrained": start if start in ("", "true") else "a file"}


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, world: World, *, keep: int, keep_every: int = 0) -> None:
        """``keep``: newest ones to keep; ``keep_every``: those of multiples of so many steps stay, 0 for none."""
        self.folder, self.world, self.keep, self.keep_every = folder, world, keep, keep_every
        self.last: Path | None = None

    def complete(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        found = [path for path in self.folder.glob("step*") if _STEP.match(path.name)]
        return sorted(found, key=_step_of)

    def save(self, engine: Any, progress: Progress, average: dict[str, Tensor] | None = None) -> Path | None:
        """Write one checkpoint; called on every process -> it, or None where it could not be written."""
        started = time.perf_counter()
        name = f"step{progress.step:08d}"
        draft, final = self.folder / f"{_DRAFT}{name}", self.folder / name
        if self.world.agree(final.exists()):
            return final
        if problem := self._first(self._made(draft)):
            return self._gave_up(draft, problem)
        written = engine.checkpoint_engine.begin()
        # DeepSpeed writes down neither whose parameters a group holds at ZeRO-0, nor autocast's loss scaler.
        names = {reshape.GROUP_NAMES: reshape.group_names(engine)}
        engine.save_checkpoint(str(self.folder), tag=draft.name, client_state=names, save_latest=False)
        problem = engine.checkpoint_engine.problem
        try:
            scaler = loss_scale.grad_scaler(engine)
            state = {
                "buffers": dict(engine.module.named_buffers()),
                "random": _random_state(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            files = {f"rank{self.world.rank}.pt": state} | ({} if average is None else {"ema.pt": average})
            for file, content in files.items():
                if file != "ema.pt" or self.world.is_main:
                    written[file] = write_hashed(draft / file, content)
            if self.world.is_main:
                write_json(draft / "progress.json", asdict(progress))
                written["progress.json"] = file_digest(draft / "progress.json")
        except OSError as error:
            problem = problem or str(error)
        hashes = self.world.gather(written)
        if problem := self._first(problem):
            return self._gave_up(draft, problem)
        if self.world.is_main:
            try:
                write_json(draft / HASHES, {file: digest for part in hashes for file, digest in part.items()})
                draft.rename(final)
                sync(self.folder)  # it is on the disk before older ones leave it
            except OSError as error:
                problem = str(error)
        if problem := self._first(problem):
            return self._gave_up(draft, problem)
        self.last = final
        if self.world.is_main:
            try:
                write_text(self.folder / "latest", name)
                self._prune()
            except OSError as error:
                log.warning("older checkpoints of %s cannot be tidied up: %s", self.folder, error)
        log.info("checkpoint %s (%.1f s)", final, time.perf_counter() - started)
        return final

    def _made(self, draft: Path) -> str:
        """Make the folder of a draft -> what went wrong, empty if nothing."""
        try:
            if self.world.is_main:
                shutil.rmtree(draft, ignore_errors=True)  # of an attempt that failed
                draft.mkdir(parents=True)
        except OSError as error:
            return str(error)
        return ""

    def _first(self, problem: str) -> str:
        """The first process's problem, on all of them; nobody goes on before every process has said whether it has one."""
        found = self.world.gather(problem)
        return next((f"{said} (rank {rank})" for rank, said in enumerate(found) if said), "")

    def _gave_up(self, draft: Path, problem: str) -> Path | None:
        if self.world.is_main:
            shutil.rmtree(draft, ignore_errors=True)
            kept = f"{self.last} is the last one" if self.last else "there is none yet"
            log.error("checkpoint %s cannot be written: %s; %s", draft.name.removeprefix(_DRAFT), problem, kept)
        return None

    def mark_best(self, step: int, of: str, value: float) -> None:
        """Keep the checkpoint of ``step`` if ``value``, of which higher is better, is the best so far; on rank 0.

        ``of``: which value it is; the best of another one does not count.
        """
        best = self._best()
        if not (self.folder / f"step{step:08d}").is_dir():
            log.warning("step %d was evaluated, but has no checkpoint that could be kept (train.save_epochs)", step)
        elif best.get("of") != of or value > best["value"]:
            try:
                write_json(self.folder / "best.json", {"step": step, "of": of, "value": value})
            except OSError as error:
                log.warning("best.json cannot be written: %s", error)

    def _best(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / "best.json").read_text())
        except (OSError, ValueError):  # none yet
            return {}

    def _prune(self) -> None:
        found = self.complete()
        kept = {_step_of(path) for path in found[-self.keep :]} | {self._best().get("step")}
        for path in found:
            step = _step_of(path)
            if step not in kept and not (self.keep_every and step % self.keep_every == 0):
                removed = path.with_name(f"{_REMOVED}{path.name}")  # half removed it must not look whole
                path.rename(removed)
                shutil.rmtree(removed)

    def check(self, now: Progress) -> None:
        """Refuse to continue the run that is there, if there is one, with settings that make it another."""
        if (begun := self.begun()) is not None:
            begun.check(now)

    def begun(self) -> Progress | None:
        """Where the run that is there stands; None where there is none."""
        for newest in reversed(self._listed()):
            if is_whole(newest, "progress.json"):  # else the one before it counts, which is told when it is loaded
                return read_progress(newest)
        return None

    def _listed(self) -> list[Path]:
        """Finished checkpoints as rank 0 sees them: a network disk may show each machine others."""
        return self.world.gather(self.complete())[0]

    def resume(self, engine: Any, average: Any, now: Progress) -> Progress:
        """Load the newest checkpoint that is whole -> where it stands; ``now`` where there is none.

        Args:
            average: has ``load_average(state)``; None where the run keeps none.
        """
        if self.world.is_main:
            for left in (*self.folder.glob(f"{_DRAFT}*"), *self.folder.glob(f"{_REMOVED}*")):
                shutil.rmtree(left, ignore_errors=True)
        found = self._listed()
        while found:
            newest = found.pop()
            if wrong := damage(newest, self.world):
                older = f"{found[-1].name}, the one before it, is used" if found else "there is none before it"
                log.warning("checkpoint %s is damaged: %s; it is set aside, and %s", newest, wrong, older)
                self._set_aside(newest)
                continue
            return self._load(newest, engine, average, now)
        if any(self.folder.glob(f"{_DAMAGED}*")):
            raise ConfigError(
                f"no checkpoint in {self.folder} is whole: remove that folder, or give another output_dir, to begin anew"
            )
        return now

    def _set_aside(self, checkpoint: Path) -> None:
        if self.world.is_main:
            aside = checkpoint.with_name(f"{_DAMAGED}{checkpoint.name}")
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
        self.world.barrier()

    def _load(self, newest: Path, engine: Any, average: Any, now: Progress) -> Progress:
        progress = read_progress(newest)
        own = newest / f"rank{self.world.rank}.pt"
        state = torch.load(own if own.is_file() else newest / "rank0.pt", map_location="cpu", weights_only=True)
        # DeepSpeed's own way is for an engine that has done nothing yet, and for its own kind of files.
        if progress.layout == now.layout and not engine.global_steps:
            path, _ = engine.load_checkpoint(str(self.folder), tag=newest.name)
            if path is None:
                raise ConfigError(f"DeepSpeed could not load {newest}: remove that folder to use the one before it")
            buffers = dict(engine.module.named_buffers())
            for name, value in state["buffers"].items():
                buffers[name].copy_(value)
            if (scaler := loss_scale.grad_scaler(engine)) is not None and state["scaler"]:
                scaler.load_state_dict(state["scaler"])
        else:
            if progress.layout != now.layout:
                then, here = Layout(**progress.layout), Layout(**now.layout)
                log.info("the checkpoint is of %s, this run has %s: it is shared out anew", then, here)
            with user_errors():
                reshape.load(engine, newest)
        _set_random_state(state["random"])
        if average is not None:
            average.load_average(torch.load(newest / "ema.pt", map_location="cpu", weights_only=True))
        self.last = newest
        log.info("continuing from %s", newest)
        progress.layout = now.layout
        return progress


def take_over(config: Any, world: World) -> None:
    """Settings that a run works out for itself where they are 0 (``data.streams``) stay what they were when it is continued."""
    data = config.data
    if getattr(data, "streams", None) == 0:
        begun = Checkpoints(Path(config.output_dir) / "checkpoints", world, keep=1).begun()
        if begun is not None:
            data.streams = begun.settings.get("data.streams", 0)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step"))


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
