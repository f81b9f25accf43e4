"""The one training loop, for every method and every task."""

import itertools
import logging
import math
import resource
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from engine import batch_norm, ds, faults, loss_scale, slurm
from engine.checkpoint import Checkpoints, Progress
from engine.config import ConfigError, to_yaml
from engine.faults import NonFiniteLossError, UnwrittenError
from engine.lock import lock
from engine.log import RunLog, progress
from engine.optim import build_optimizer, param_groups, set_step
from engine.report import save_picture, write_report
from engine.schedule import Plan
from engine.schema import BaseConfig
from engine.watchdog import Watchdog
from engine.whole import Gathered, Statistics, Whole
from engine.world import World, seed_step, to_device
from formats.files import write_json, write_text

log = logging.getLogger(__name__)


class Loader(Protocol):
    """What the loop needs of a data loader (data/loader.py)."""

    broken: dict[str, str]

    def __len__(self) -> int: ...
    def name_broken(self, broken: Mapping[str, str]) -> None: ...
    def batches(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]: ...


@dataclass
class Hooks:
    """What a method or task does beside its training step; all of it optional.

    Attributes:
        evaluate: called on every process with the model -> values to log; the same on every process.
        pictures: called on rank 0 with the model -> name to image (3, H, W) in [0, 1].
        export: called on rank 0 with the model and the run folder; writes what the next stage loads.
    """

    evaluate: Callable[[Any], dict[str, float]] | None = None
    pictures: Callable[[Any], dict[str, Tensor]] | None = None
    export: Callable[[Any, Path], None] | None = None


@dataclass
class Summary:
    """How a run ended: its last evaluation and how long the steps took."""

    steps: int
    seconds: float
    results: dict[str, float]


def fit(method: nn.Module, loader: Loader, config: BaseConfig, world: World, hooks: Hooks, fingerprint: str) -> Summary:
    """Train ``method`` as ``config`` says, continuing the run in ``config.output_dir`` if there is one.

    Args:
        method: ``forward(batch) -> {"loss": scalar, ...scalars}``; may have ``before_step(step, num_steps)``.
        loader: this process's batches of ``micro_batch_size`` images.
        fingerprint: identifies the training set, so that a run is not continued on another one.
    """
    return _Run(method, loader, config, world, hooks, fingerprint).fit()


class _Run:
    def __init__(
        self, method: nn.Module, loader: Loader, config: BaseConfig, world: World, hooks: Hooks, fingerprint: str
    ) -> None:
        self.config, self.train, self.world, self.hooks, self.loader = config, config.train, world, hooks, loader
        self.folder = Path(config.output_dir)
        if config.train.keep_best and hooks.evaluate is None:
            raise ConfigError(f"train.keep_best={config.train.keep_best}: this run evaluates nothing; remove it")
        merged = ds.merge(config, world.size, world.device.type)
        self.stage, self.autocast = ds.stage_of(merged), ds.autocast_dtype(merged)
        self.plan = Plan.make(config.optim, config.train, len(loader))
        if config.optim.lr and config.optim.lr_batch not in (None, config.train.batch_size):
            (log.warning if world.is_main else log.info)(
                "optim.lr=%g was given for batches of %d, this run has %d: scaled with it, it would be %.4g",
                *(config.optim.lr, config.optim.lr_batch, config.train.batch_size),
                config.optim.lr * config.train.batch_size / config.optim.lr_batch,
            )
        self.progress = Progress.start(config, ds.layout(merged, world.size), fingerprint)
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints",
            world,
            keep=config.train.keep_checkpoints,
            keep_every=config.train.keep_every,
        )
        self.lock = lock(self.folder, world)
        self.checkpoints.check(self.progress)  # before anything of the run that is there is touched
        self.optimizer = build_optimizer(param_groups(method, config.optim), config.optim)
        _prepare_folder(self.folder, config, merged, world)
        batch_norm.share(method, world, config.train.sync_batchnorm)
        self.whole = (Gathered if self.stage == 3 else Whole)(method, config.train.ema_decay, world)
        self.engine = ds.initialize(method, self.optimizer, merged, world)
        self.whole.begin()
        self.results: dict[str, float] = {}
        self.bad_steps = 0
        """Steps in a row that were left out."""
        self.wrong = ""
        """What was not finite in the last step, in words; empty if nothing."""

    def fit(self) -> Summary:
        plan, started = self.plan, time.perf_counter()
        faults.listen()
        self.watchdog = Watchdog(self.world, 60 * self.train.timeout_minutes)
        bar = progress(None, self.world, self.config.recipe, total=plan.steps, unit="step")
        with self._naming_lost_processes():
            step, batches = self._resume(bar)
        try:
            with self._naming_lost_processes():
                if step == plan.steps:
                    log.info("%s has finished its %d steps already", self.folder, plan.steps)
                    self._export()
                self._look(step, again=True)
                while step < plan.steps:
                    values = self._step(step, batches)
                    if self.bad_steps > self.train.max_skipped:
                        step, batches = self._roll_back(step, bar)
                        continue
                    step += 1
                    bar.update()
                    bar.set_postfix({key: f"{values[key]:.4g}" for key in ("loss", "images_per_second")}, refresh=False)
                    self._after_step(step, values)
        finally:
            bar.close()
            self.run_log.close()
            self.watchdog.close()
            self.lock.release()
            faults.unlisten()
        return Summary(plan.steps, time.perf_counter() - started, self.results)

    def _naming_lost_processes(self) -> AbstractContextManager[None]:
        return faults.naming_lost_processes(lambda: self.checkpoints.last)

    def _resume(self, bar: Any) -> tuple[int, Iterator[dict[str, Tensor]]]:
        """Continue from the newest checkpoint, or begin -> steps done, and the batches that follow."""
        self.watchdog.beat(0, "loading a checkpoint")
        keeps_average = self.whole if self.train.ema_decay else None
        self.progress = self.checkpoints.resume(self.engine, keeps_average, self.progress)
        step = self.progress.step
        self.run_log = RunLog(self.folder, self.world, step)
        # A rollback that was followed by no checkpoint yet stands in the log alone.
        told = self.world.gather(self.run_log.last("rollback"))[0]
        self.progress.rollbacks = max(self.progress.rollbacks, told.get("rollbacks", 0))
        self.progress.skipped = max(self.progress.skipped, told.get("skipped_steps", 0))
        self.saved_at = time.monotonic()
        self.statistics = Statistics(self.engine.module)
        bar.n = bar.initial = step
        return step, self._batches(step)

    def _roll_back(self, step: int, bar: Any) -> tuple[int, Iterator[dict[str, Tensor]]]:
        """Too many steps in a row were left out: go back to the last checkpoint with a lower rate, or stop."""
        done = self.progress.rollbacks
        last = self.checkpoints.last
        told = f"{self.wrong} at step {step + 1}, the last of {self.bad_steps} such steps in a row (train.max_skipped={self.train.max_skipped})"
        if self.train.nonfinite == "stop" or last is None or done == self.train.max_rollbacks:
            good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
            tried = f" after {done} rollbacks" if done else ""
            raise NonFiniteLossError(
                f"{told}{tried}; {good}. "
                "Try a lower optim.lr, optim.clip_grad=1, a *_fp32 configuration, or train.nonfinite=rollback"
            )
        self.run_log.close()
        skipped = self.progress.skipped
        step, batches = self._resume(bar)
        self.progress.rollbacks, self.progress.skipped = done + 1, skipped
        self.bad_steps = 0
        log.warning(
            "%s: back to %s, with %g times the learning rate",
            told,
            last,
            self.train.rollback_lr**self.progress.rollbacks,
        )
        counted = {"rollbacks": self.progress.rollbacks, "skipped_steps": self.progress.skipped}
        self.run_log.write(step, counted, event="rollback")
        return step, batches

    def _batches(self, first_step: int) -> Iterator[dict[str, Tensor]]:
        """Micro batches from ``first_step`` on, epoch after epoch, in the order a run without a break has."""
        per_epoch, parts = self.plan.steps_per_epoch, self.train.accumulation
        epoch, step = divmod(first_step, per_epoch)
        while True:
            # What is left of an epoch after its last whole step is dropped, as the last partial batch is.
            yield from itertools.islice(self.loader.batches(epoch, start=step * parts), (per_epoch - step) * parts)
            epoch, step = epoch + 1, 0

    def _step(self, step: int, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
        """One optimiser step (0-based) -> what the method returned, on average over the accumulated parts.

        A step whose loss or gradients are not finite on any process is left out on all of them, and counted. With fp16 a
        loss scale that was too large is no such step: it is left out, too, but not counted.
        """
        started = time.perf_counter()
        parts, beat = self.train.accumulation, self.watchdog.beat
        rate = self.train.rollback_lr**self.progress.rollbacks
        set_step(self.optimizer, rate * self.plan.lr[step], self.plan.weight_decay[step])
        if hook := getattr(self.engine.module, "before_step", None):
            hook(step, self.plan.steps)
        total: dict[str, float] = {}
        for part in range(parts):
            beat(step + 1, "waiting for data")
            batch = to_device(next(batches), self.world.device)
            seed_step(self.config.seed, step * parts + part, self.world.rank)
            beat(step + 1, "in the forward pass")
            output = self.engine(batch)
            beat(step + 1, "in the backward pass")
            loss = output["loss"]
            # Gradients may be finite all the same: ZeRO looks at them alone, and would take the step.
            self.engine.backward(loss if math.isfinite(loss.item()) else loss * math.nan)
            if part < parts - 1:
                self.engine.step()
            for key, value in output.items():
                total[key] = total.get(key, 0.0) + float(value.detach()) / parts
        beat(step + 1, "agreeing on the step")
        grad_norm = self._grad_norm()
        self._agree(step + 1, total["loss"], grad_norm)
        beat(step + 1, "in the optimiser step")
        if self.wrong and not self.stage and self.autocast is not torch.float16:
            ds.leave_out_step(self.engine)
        elif loss_scale.step(self.engine) and not self.wrong:
            self.wrong = "the gradient is not finite"
        if self.stage:
            grad_norm = self.engine.get_global_grad_norm()
        if self.wrong:
            self.bad_steps += 1
            self.progress.skipped += 1
            self.statistics.restore()
            log.warning("%s at step %d: the step is left out", self.wrong, step + 1)
            self.run_log.write(step + 1, {"skipped_steps": self.progress.skipped}, event="skip")
        else:
            self.bad_steps = 0
            self.statistics.keep()
            self.whole.update()
        images = self.train.batch_size / (time.perf_counter() - started)
        if grad_norm is not None and math.isfinite(grad_norm):
            total["grad_norm"] = float(grad_norm)
        if (scaler := loss_scale.grad_scaler(self.engine)) is not None:
            total["loss_scale"] = scaler.get_scale()
        return total | {"images_per_second": images}

    def _grad_norm(self) -> Tensor | None:
        """Norm of the gradients before clipping, the same on every process. ZeRO computes its own."""
        if self.stage or self.autocast is torch.float16:  # scaled there, and watched by the scaler
            return None
        return nn.utils.get_total_norm([p.grad for p in self.engine.module.parameters() if p.grad is not None])

    def _agree(self, step: int, loss: float, grad_norm: Tensor | None) -> None:
        """Tell each other, once per step, what all must act upon: values that are not finite, signals, the clock."""
        bad_loss = not math.isfinite(loss)
        bad_gradient = grad_norm is not None and not bool(torch.isfinite(grad_norm))
        minutes = self.train.save_minutes
        due = self.world.is_main and bool(minutes) and time.monotonic() - self.saved_at >= 60 * minutes
        mine = [float(bad_loss), float(bad_gradient), float(due), *faults.shares()]
        losses, gradients, time_to_save, *signals = self.world.sum(mine).tolist() if self.world.size > 1 else mine
        self.stopped_by = faults.told(signals)
        self.time_to_save = bool(time_to_save)
        self.wrong = ""
        if losses:
            ranks = ", ".join(str(rank) for rank, found in enumerate(self.world.gather(bad_loss)) if found)
            self.wrong = f"the loss is not finite on rank {ranks}"
        elif gradients:
            self.wrong = "the gradient is not finite"

    def _is_logged(self, step: int) -> bool:
        return step % self.train.log_steps == 0 or step in (1, self.plan.steps)

    def _after_step(self, step: int, values: dict[str, float]) -> None:
        """Log, save, evaluate and draw, each at its own interval; ``step`` steps are done."""
        plan, train = self.plan, self.train
        last = step == plan.steps
        if self._is_logged(step) and not self.wrong:
            shared = self.world.mean(values) | {
                "epoch": round(step / plan.steps_per_epoch, 4),
                "lr": float(plan.lr[step - 1]) * train.rollback_lr**self.progress.rollbacks,
                "weight_decay": float(plan.weight_decay[step - 1]),
                "broken_images": self._count_broken(),
                "skipped_steps": self.progress.skipped,
            }
            self.run_log.write(step, shared)
        # Saved before it is evaluated or drawn: nothing already computed is lost to an error in either.
        due = bool(train.save_steps) and step % train.save_steps == 0
        due |= self._ends_epochs(step, train.save_epochs) or last or self.time_to_save
        if due or self.stopped_by:
            self._save(step, last)
        if self.stopped_by and not last:
            self._leave(step)
        self._look(step)

    def _look(self, step: int, again: bool = False) -> None:
        """Evaluate and draw, if that is due after ``step``; ``again``: what an earlier leg of the run has not done by then."""
        last = step == self.plan.steps
        drawn = any((self.folder / "pictures").glob(f"*_step{step:08d}.png"))
        evaluated, drawn = self.world.gather([self.run_log.last("evaluate").get("step") == step, drawn])[0]
        # The last evaluation is also what this leg ends with.
        if last or (step and self._ends_epochs(step, self.train.eval_epochs) and not (again and evaluated)):
            self._evaluate(step)
        if (last or self._ends_epochs(step, self.train.picture_epochs)) and not (again and drawn):
            self._pictures(step)

    def _save(self, step: int, last: bool) -> None:
        if self.bad_steps and not last and not self.stopped_by:
            return  # a rollback must not come back to the edge of what it flees
        self.watchdog.beat(step, "writing a checkpoint")
        # A finite loss may have had a gradient that is not: such weights must not replace a good checkpoint.
        if not math.isfinite(self.whole.squared_norm().item()):
            good = self.checkpoints.last
            raise NonFiniteLossError(
                f"the norm of the weights is not finite at step {step}; the last good checkpoint is {good or 'not there yet'}"
            )
        self.progress.step = step
        saved = self.checkpoints.save(self.engine, self.progress, self.whole.average_state())
        self.saved_at = time.monotonic()
        exported = self._export()
        if (saved is None or not exported) and (last or self.stopped_by):
            what = "weights" if saved else "checkpoint"
            raise UnwrittenError(
                f"the {what} of step {step} could not be written (the log says why): make room and give the same command "
                f"again; it continues from {self.checkpoints.last or 'the start'}"
            )

    def _leave(self, step: int) -> NoReturn:
        """End the run after a signal; a checkpoint has been written."""
        requeued = self.stopped_by == faults.REQUEUE and self.world.agree(self.world.is_main and slurm.requeue())
        if requeued:
            log.info("step %d: the job is queued again, and continues from %s", step, self.checkpoints.last)
            until = time.monotonic() + 60  # Slurm ends the job now, with SIGTERM first
            while faults.STOP not in faults.received() and time.monotonic() < until:
                time.sleep(0.1)
        raise faults.StoppedRunError(
            f"stopped by a signal after step {step}; the same command continues from {self.checkpoints.last}"
        )

    def _judged(self) -> float:
        """The value that decides which checkpoint is the best; higher is better."""
        name = self.train.keep_best.removeprefix("-")
        if name not in self.results:
            raise ConfigError(
                f"train.keep_best={self.train.keep_best}: no such value is evaluated; there are "
                f"{', '.join(self.results) or 'none'}"
            )
        return -self.results[name] if self.train.keep_best.startswith("-") else self.results[name]

    def _ends_epochs(self, step: int, epochs: int) -> bool:
        return bool(epochs) and step % (epochs * self.plan.steps_per_epoch) == 0

    def _forward_only(self, model: nn.Module, work: Callable[[nn.Module], Any]) -> Any:
        """Run ``work`` on the model in evaluation mode, in the run's precision, without disturbing the training."""
        training = model.training
        model.eval()
        enabled = self.autocast is not None
        try:
            with torch.no_grad(), torch.autocast(self.world.device.type, self.autocast, enabled=enabled):
                return work(model)
        finally:
            model.train(training)

    def _evaluate(self, step: int) -> None:
        if self.hooks.evaluate is None:
            return
        try:
            with self.watchdog.during(step, "evaluating"):
                with self.whole.kept() as model:
                    self.results = self._forward_only(model, self.hooks.evaluate)
                if self.train.ema_decay:
                    with self.whole.weights() as model:
                        raw = self._forward_only(model, self.hooks.evaluate)
                    self.results |= {f"{key}_without_ema": value for key, value in raw.items()}
        except faults.StoppedEvaluationError as told:
            self.stopped_by = told.signal
            if self.progress.step != step:
                self._save(step, last=False)
            self._leave(step)
        log.info("step %d: %s", step, ", ".join(f"{key} {value:.4g}" for key, value in self.results.items()))
        self.run_log.write(step, self.results, event="evaluate")
        if self.train.keep_best:
            value = self._judged()
            if self.world.is_main:
                self.checkpoints.mark_best(step, self.train.keep_best, value)

    def _pictures(self, step: int) -> None:
        if self.hooks.pictures is None or not self.train.picture_epochs:
            return
        with self.watchdog.during(step, "drawing pictures"), self.whole.kept() as model:
            if self.world.is_main:
                pictures = self._forward_only(model, self.hooks.pictures)
                try:
                    for name, image in pictures.items():
                        save_picture(image, self.folder / "pictures" / f"{name}_step{step:08d}.png")
                    write_report(self.folder)
                except OSError as error:
                    log.error("the pictures of step %d cannot be written: %s", step, error)
            self.world.barrier()

    def _count_broken(self) -> int:
        """Broken files that any process has met so far; rank 0 names those of the others."""
        everywhere: dict[str, str] = {}
        for found in self.world.gather(self.loader.broken):
            everywhere |= found
        self.loader.name_broken(everywhere)  # what the other processes met; their logs are silent about it
        return len(everywhere)

    def _export(self) -> bool:
        """Write what the next stage loads -> whether that went well."""
        done = True
        if self.hooks.export:
            with self.whole.kept() as model:
                if self.world.is_main:
                    try:
                        self.hooks.export(model, self.folder)
                    except (OSError, SafetensorError) as error:
                        log.error("the weights cannot be written to %s: %s", self.folder, error)
                        done = False
        return self.world.agree(done)


def dry_run(method: nn.Module, loader: Loader, config: BaseConfig, world: World) -> dict[str, float]:
    """Build everything and take one step on real data, writing nothing -> parameters, memory, speed."""
    merged = ds.merge(config, world.size, world.device.type)
    Plan.make(config.optim, config.train, len(loader))
    optimizer = build_optimizer(param_groups(method, config.optim), config.optim)
    sizes = [(p.numel(), p.requires_grad) for p in method.parameters()]  # before ZeRO-3 takes them apart
    batch_norm.share(method, world, config.train.sync_batchnorm)
    engine = ds.initialize(method, optimizer, merged, world)
    batches = loader.batches(0)
    seconds, outputs = 0.0, {}
    for part in range(config.train.accumulation):
        batch = to_device(next(batches), world.device)
        seed_step(config.seed, part, world.rank)
        set_step(optimizer, 0.0, 0.0)
        started = time.perf_counter()
        outputs = engine(batch)
        engine.backward(outputs["loss"])
        engine.step()
        seconds += time.perf_counter() - started
    found = {key: float(value.detach()) for key, value in outputs.items()}
    return {
        "parameters": sum(size for size, _ in sizes),
        "trained_parameters": sum(size for size, trained in sizes if trained),
        "peak_memory_gb": round(peak_memory(world.device) / 2**30, 3),
        "images_per_second": round(config.train.batch_size / seconds, 2),
        "seconds_per_step": round(seconds, 3),
        **found,
    }


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _prepare_folder(folder: Path, config: BaseConfig, merged: dict[str, Any], world: World) -> None:
    """The run folder, with what the run was asked to do."""
    problem = ""
    if world.is_main:
        versions = {"git_commit": _git_commit(), "world_size": world.size, "torch": torch.__version__}
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_text(folder / "config.yaml", to_yaml(config))
            write_json(folder / "ds_config.json", merged)
            write_json(folder / "run.json", versions)
        except OSError as error:
            problem = str(error)
    if problem := next((said for said in world.gather(problem) if said), ""):
        raise ConfigError(f"output_dir={folder} cannot be written: {problem}")


def _git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
