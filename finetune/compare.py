"""``python -m finetune compare RECIPE init=a,b,c [seeds=3] [labels=0.01,0.1,1]``: is pre-training worth it, and how much?

For every share of the labels, starting point and seed one ordinary run of the recipe, in a folder of its own, all with
the budget of the recipe and, under one seed, the same labelled images. What is compared is top-1 after the last epoch:
the best epoch would be chosen on the images that are to judge it. Finished runs are not repeated, so that a command
that was stopped is simply given again.
"""

import dataclasses
import gc
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from data.sources import ImageIndex
from engine import cli, ds
from engine.checkpoint import identity, take_over
from engine.config import ConfigError, user_errors
from engine.faults import NonFiniteLossError, StoppedRunError, listen
from engine.log import setup
from engine.world import World, join
from finetune import compare_report, heads, sets
from finetune.comparison import KEPT, WORDS, Request, Run, make_runs, read_request, root_of
from finetune.tasks import TASKS
from formats.files import write_json

log = logging.getLogger(__name__)

RECORD = "compared.json"
"""In each run's folder: what it was asked, and how it ended."""

USAGE = """python -m finetune compare RECIPE init=a,b,c [--flag ...] [key=value ...] [NAME.key=value ...]

  Fine-tunes from each starting point with the same budget, images and seeds, and prints and plots top-1, mean and
  standard deviation, against the share of the labels. NAME.key=value is a setting for the starting point NAME alone
  (scratch.optim.layer_decay=1). --show lists the runs, --dry_run takes one step from each starting point.
"""


def main(program: cli.Program, flags: list[str], words: list[str]) -> int:
    """Do the command -> exit code: 1 where a run failed.

    Raises:
        ConfigError: the request is wrong; nothing has been run then.
    """
    if "--help" in flags:
        cli.say("\n".join([USAGE, *(f"  {word:12s} {meaning}" for word, meaning in WORDS.items())]))
        if words:
            cli.say_settings(program, *cli.take_recipe(program, [word for word in words if _is_common(word)]))
        return 0
    request = read_request(program, words)
    runs = make_runs(program, request)
    comparison = Comparison(program, request, runs)
    if "--show" in flags:
        for line in comparison.plan():
            cli.say(line)
        return 0
    if "--dry_run" not in flags:
        cli.make_folder(root_of(runs))
    setup(int(os.environ.get("RANK", "0")))
    listen()
    with join(runs[0].config.threads) as world:
        if hasattr(runs[0].config, "deepspeed"):
            for run in runs:
                ds.merge(run.config, world.size, world.device.type)
        if "--dry_run" in flags:
            comparison.dry_run(world)
            return 0
        return comparison.run(world)


def _is_common(word: str) -> bool:
    return word.partition("=")[0] not in WORDS


class Comparison:
    """The runs of one comparison, and what is known of each."""

    def __init__(self, program: cli.Program, request: Request, runs: list[Run]) -> None:
        self.program, self.request, self.runs = program, request, runs
        config = runs[0].config
        self.task = TASKS[getattr(config, program.kind)]
        with user_errors():
            # One scan for all: the share of a run is drawn from the same index.
            found = sets.find_sets(dataclasses.replace(config.data, labels=1.0), config.seed)
        first = {run.init: run.config for run in runs[: len(request.inits)]}
        shares = {float(run.labels) for run in runs}
        index = {s: found.train.subset(s, config.seed) if s < 1 else found.train for s in sorted(shares)}
        self.images = {share: len(index[share]) for share in index}
        images = found.train.fingerprint() + found.val.fingerprint()
        with user_errors():
            weights = {i.name: i.identity(_classes(first[i.name], found.train.class_names)) for i in request.inits}
        self.smaller = False
        self.asked = {
            run.name: _plain(
                identity(run.config) | {"encoder.pretrained": weights[run.init], "images": images[:16] + images[64:80]}
            )
            for run in runs
        }
        self._check_room(index)
        self._check_settings()

    def _check_room(self, index: dict[float, ImageIndex]) -> None:
        """Refuse a share that is too small for the task. The seed plays no part: it chooses images, not their number."""
        for run in self.runs[: len(self.request.inits) * len(index)]:
            try:
                images, least = self.task.room(run.config, index[run.labels])
            except ValueError as error:
                raise ConfigError(f"labels={run.labels:g}: {error}") from None
            if images < least:
                raise ConfigError(
                    f"labels={run.labels:g} leaves {images} training images, less than one batch of {least}: lower "
                    "train.batch_size, or leave this share out"
                )
            self.smaller |= hasattr(run.config, "train") and images < run.config.train.batch_size

    def _check_settings(self) -> None:
        """Refuse to mix runs of different settings."""
        for run in self.runs:
            before, now = _read(run), self.asked[run.name]
            if before.get("state") != "finished" and not any((run.folder / "checkpoints").glob("step*")):
                continue
            saved = before.get("asked", {})
            if differ := [key for key in {**saved, **now} if saved.get(key) != now.get(key)]:
                named = ", ".join(f"{key}={saved.get(key)} (now {now.get(key)})" for key in differ)
                raise ConfigError(f"{run.folder} was made with {named}: give another output_dir or the old settings")

    def plan(self) -> list[str]:
        """What will be done, for people: the budget and the list of runs."""
        lines = [f"{key}: {value}" for key, value in self.facts().items()]
        lines += [f"{_read(run).get('state', 'to do'):9s} {run.folder}" for run in self.runs]
        return lines

    def facts(self) -> dict[str, str]:
        """The conditions that all runs share, and where they differ."""
        config, request = self.runs[0].config, self.request
        facts = {"recipe": f"{config.recipe} ({getattr(config, self.program.kind)})", "images": config.data.path}
        if hasattr(config, "train"):
            train = config.train
            long = f"{train.steps} steps" if train.steps is not None else f"{train.epochs:g} epochs"
            smaller = " (all images, where they are fewer)" if self.smaller else ""
            facts["budget of every run"] = f"{long}, batches of {train.batch_size}{smaller}"
            facts["measured"] = "top-1 after the last epoch: the best one would be chosen on the images that judge it"
        facts["training images"] = ", ".join(f"{n:,} at labels={share:g}" for share, n in self.images.items())
        facts["seeds"] = ", ".join(map(str, request.seeds))
        for init in request.inits:
            facts[init.name] = " ".join([init.word, *init.overrides])
        if told := self._handicaps():
            facts["handicap from scratch"] = told
        return facts

    def _handicaps(self) -> str:
        """Which starting points train from scratch with what is meant for pre-trained layers."""
        found = {}
        for run in self.runs[: len(self.request.inits)]:
            decay = run.config.optim.layer_decay if hasattr(run.config, "optim") else 1
            if not run.config.encoder.pretrained and decay < 1:
                found[run.init] = f"{run.init} trains from scratch with optim.layer_decay={decay:g}"
        if not found:
            return ""
        usual = " ".join(f"{name}.optim.layer_decay=1" for name in found)
        return f"{', '.join(found.values())}, which is meant for pre-trained layers; as it is usually done: {usual}"

    def dry_run(self, world: World) -> None:
        """One step from each starting point, on the smallest share."""
        for run in self.runs[: len(self.request.inits)]:
            found = self.program.dry_run(run.config, world)
            if world.is_main:
                for key, value in found.items():
                    shown = f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
                    cli.say(f"{run.init:16s} {key:24s} {shown}")

    def _try(self, world: World) -> None:
        """Build what each starting point needs once, before the hours that the others take.

        Raises:
            ConfigError: one does not fit.
        """
        left = {run.init for run in self.runs if _read(run).get("state") != "finished"}
        for run in self.runs[: len(self.request.inits)]:
            if self.task.build is None or not world.agree(run.init in left):
                continue
            log.info("trying whether %s can be built", run.init)
            try:
                self.task.build(run.config, world)
            except ConfigError as error:
                raise ConfigError(f"{run.init}: {error}") from error
            except Exception as error:  # the run itself tells of it, and those of the others may go on
                log.warning("%s cannot be built: %s", run.init, error)
            _free()

    def run(self, world: World) -> int:
        """Do what is not done yet, and tell after every run what is known -> 1 where one failed, else 0."""
        for line in self.plan()[: len(self.facts())]:
            log.info(line)
        self._try(world)
        for number, run in enumerate(self.runs, 1):
            done = world.agree(_read(run).get("state") == "finished")
            log.info("run %d of %d: %s%s", number, len(self.runs), run.name, " is done already" if done else "")
            if not done:
                self._one(run, world)
            if world.is_main:
                _thin_out(run, self.request.keep)
                if not done or run is self.runs[-1]:
                    compare_report.write(root_of(self.runs), self.facts(), self.entries())
        entries = self.entries()
        if world.is_main:
            cli.say(compare_report.text(entries))
            cli.say(f"\nreport: {root_of(self.runs) / 'report.html'}")
        return int(world.agree(any(entry["state"] != "finished" for entry in entries)))

    def entries(self) -> list[dict[str, Any]]:
        """One object per run, in the order of the runs: what it is, its state and what it measured."""
        found = []
        for run in self.runs:
            record = _read(run)
            entry = {"labels": run.labels, "init": run.init, "seed": run.seed, "folder": run.name}
            entry["state"] = record.get("state", "to do")
            row = record.get("row", {})
            entry |= {key: row[key] for key in ("top1", "top5", "steps", "epochs") if key in row}
            entry["train_images"] = self.images[run.labels]
            found.append(entry | {key: record[key] for key in ("reason", "seconds") if key in record})
        return found

    def _one(self, run: Run, world: World) -> None:
        """One run, from where it stands; where it fails alone, that is noted and the others go on."""
        record: dict[str, Any] = {"asked": self.asked[run.name]}
        if world.is_main:
            write_json(run.folder / RECORD, record | {"state": "started"})
        started = time.perf_counter()
        try:
            take_over(run.config, world)
            self.program.run(run.config, world)
            reason = ""
        except StoppedRunError:
            raise  # all that follow are stopped as well
        except Exception as error:
            # Several processes all meet a loss that is not finite. Anything else may be the trouble of one of them,
            # for which the others wait in the middle of a step: that ends the command.
            if world.size > 1 and not isinstance(error, NonFiniteLossError):
                raise
            # Before anything is finished a wrong setting is simply mended; all the runs would fail of it.
            if isinstance(error, ConfigError) and all(_read(run).get("state") != "finished" for run in self.runs):
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            log.warning(
                "%s failed: %s", run.name, reason, exc_info=not isinstance(error, ConfigError | NonFiniteLossError)
            )
        _free()
        if world.is_main:
            row = {} if reason else _measured(run.folder)
            if row:
                record |= {"state": "finished", "row": row, "seconds": round(time.perf_counter() - started, 1)}
            else:
                record |= {"state": "failed", "reason": reason or "it left no top-1 in results.json"}
            write_json(run.folder / RECORD, record)
        world.barrier()


def _classes(config: Any, names: list[str]) -> heads.Classes | None:
    """What the classifier of a run starts with, where it has one."""
    task = getattr(config, "classify", None)
    return None if task is None else heads.Classes(names, task.head_init, task.class_map)


def _free() -> None:
    """Give memory back: the engine and its networks hang together in circles."""
    gc.collect()
    torch.cuda.empty_cache()


def _measured(folder: Path) -> dict[str, Any]:
    """The last row of results.json with a top-1."""
    try:
        rows = json.loads((folder / "results.json").read_text())
    except (OSError, ValueError):
        return {}
    found: list[dict[str, Any]] = [row for row in rows if "top1" in row]
    return found[-1] if found else {}


def _read(run: Run) -> dict[str, Any]:
    """What is noted of a run so far."""
    try:
        found: dict[str, Any] = json.loads((run.folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return found


def _thin_out(run: Run, keep: str) -> None:
    """Remove from a finished run what is not to be kept."""
    if _read(run).get("state") != "finished":
        return
    for name in KEPT[keep]:
        path = run.folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Values as JSON gives them back."""
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found
