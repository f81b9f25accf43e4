"""A small run that something happens to: ``python -m tests.engine.faulty RECIPE key=value ...``, or started by :func:`start`.

The fault strikes the process ``fault.rank`` in step ``fault.step`` (the first is 1), ``fault.times`` times. All that a
run imports is imported here at once: processes are forked from one that has it.
"""

import dataclasses
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch._dynamo
from torch import Tensor

import engine.checkpoint
import engine.safe_files
from engine import cli
from engine.faults import until_stopped
from engine.loop import Hooks, fit
from engine.schema import BaseConfig, option
from engine.world import World
from formats.files import write_json, write_text
from tests.engine.toy import ToyLoader, ToyMethod

RECIPE = """
method: toy
data: {path: .}
optim: {lr: 0.01, clip_grad: 1, layer_decay: 0.5}
train: {epochs: 4, batch_size: 4, log_steps: 1, warmup_steps: 3, picture_epochs: 0, ema_decay: 0.9, save_steps: 5, save_epochs: 0}
"""
STEPS = 24


@dataclasses.dataclass
class FaultConfig:
    kind: str = option("none", "what happens")
    rank: int = option(1, "to whom")
    step: int = option(13, "when")
    times: int = option(1, "how often")


@dataclasses.dataclass
class FaultyConfig(BaseConfig):
    method: str = option("toy", "its name")
    fault: FaultConfig = dataclasses.field(default_factory=FaultConfig)


# What happens to a run does not make it another.
engine.checkpoint.FREE_SETTINGS |= {f"fault.{field.name}" for field in dataclasses.fields(FaultConfig)}


class FaultyMethod(ToyMethod):
    """Learns nothing of what is about to happen."""

    def __init__(self, fault: FaultConfig, rank: int) -> None:
        torch.manual_seed(0)
        super().__init__(batch_norm=False)
        self.fault, self.mine, self.left = fault, rank == fault.rank, fault.times

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        output = super().forward(batch, generator)
        if (
            self.mine
            and self.fault.kind == "rollback SIGKILL"
            and not self.left
            and self.step + 1 == self.fault.step - 1
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        if not (self.mine and self.left and self.step + 1 >= self.fault.step):
            return output
        kind = self.fault.kind
        if kind.startswith("evaluation"):
            return output
        self.left -= 1
        if kind in ("SIGKILL", "SIGTERM", "SIGUSR1", "SIGSTOP"):
            os.kill(os.getpid(), getattr(signal, kind))
        elif kind == "hang":
            time.sleep(1000)
        elif kind.startswith("wait "):
            while not Path(kind.removeprefix("wait ")).exists():
                time.sleep(0.05)
        elif kind in ("nan_loss", "rollback SIGKILL"):
            return {"loss": output["loss"] * float("nan")}
        elif kind == "inf_gradient":
            output["loss"].register_hook(lambda gradient: gradient * float("inf"))
        return output


class RankLoader(ToyLoader):
    """This process's share of every batch; ``seen`` is told what it was given, a line "epoch index" for each."""

    def __init__(self, world: World, batch_size: int, seen: Path) -> None:
        super().__init__(batch_size=batch_size)
        self.world, self.seen = world, seen

    def batches(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        for batch in super().batches(epoch, start):
            with self.seen.open("a") as file:
                file.writelines(f"{epoch} {i}\n" for i in batch["index"][self.world.rank :: self.world.size].tolist())
            yield {key: value[self.world.rank :: self.world.size] for key, value in batch.items()}


def die_writing(part: str) -> None:
    """Kill this process at its second write, rename or removal of ``part``, half way through where it can be."""
    calls = 0

    def now(name: str) -> bool:
        nonlocal calls
        calls += name.startswith(part)
        return name.startswith(part) and calls == 2

    def torn(original: Callable[..., Any]) -> Callable[..., Any]:
        def work(path: Path, *args: Any) -> Any:
            if now(path.name):
                path.write_bytes(b"PK\3\4 half of it")
                os.kill(os.getpid(), signal.SIGKILL)
            return original(path, *args)

        return work

    rename, rmtree = Path.rename, shutil.rmtree

    def text(path: Path, content: str) -> None:
        if now(path.name):  # written aside and put in its place: torn it is never seen
            os.kill(os.getpid(), signal.SIGKILL)
        write_text(path, content)

    def renamed(path: Path, target: Path) -> Path:
        if now(f"rename {target.name}"):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    def removed(path: Path, **options: Any) -> None:
        if path.exists() and now(f"remove {path.name}"):
            next(path.iterdir()).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        rmtree(path, **options)

    hashed = torn(engine.safe_files.write_hashed)
    for owner, name, value in (
        (engine.safe_files, "write_hashed", hashed),
        (engine.checkpoint, "write_hashed", hashed),
        (engine.checkpoint, "write_json", torn(write_json)),
        (engine.checkpoint, "write_text", text),
        (Path, "rename", renamed),
        (shutil, "rmtree", removed),
    ):
        setattr(owner, name, value)


def run(config: Any, world: World) -> None:
    fault = config.fault
    if fault.kind.startswith("write ") and world.rank == fault.rank:
        die_writing(fault.kind.removeprefix("write "))
    seen = Path(config.output_dir) / f"seen{world.rank}.txt"
    loader = RankLoader(world, config.train.batch_size // config.train.accumulation, seen)

    method = FaultyMethod(fault, world.rank)

    def evaluate(model: Any) -> dict[str, float]:
        """The sum of the biases, in three batches of which the second is where a fault may strike; of others many follow."""
        total = 0.0
        due = method.left and method.step + 1 >= fault.step and fault.kind.startswith("evaluation")
        for batch in until_stopped(range(1000 if due and "SIGKILL" not in fault.kind else 3), world):
            if due and method.mine and batch == 1:
                os.kill(os.getpid(), getattr(signal, fault.kind.removeprefix("evaluation ")))
            if due:
                time.sleep(0.1)
            total += float(model.encoder.fc.bias.sum())
        return {"bias": total}

    fit(method, loader, config, world, Hooks(evaluate=evaluate), "toy")


PROGRAM = cli.Program(
    name="tests.engine.faulty",
    recipes=Path("nowhere"),
    kind="method",
    schemas={"toy": FaultyConfig},
    check=lambda config: None,
    run=run,
    dry_run=lambda config, world: {},
)


def _process(words: list[str], log: str, rank: int, size: int, port: int) -> None:
    own = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, MASTER_PORT=port, MASTER_ADDR="127.0.0.1")
    os.environ.update({key: str(value) for key, value in own.items()} | {"DS_ACCELERATOR": "cpu"})
    output = os.open(f"{log}{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    sys.exit(cli.main(PROGRAM, words))


def start(words: list[str], log: Path, processes: int = 2) -> list[BaseProcess]:
    """A run of so many processes, forked from one that has torch already; output of rank N goes to ``log`` + N."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.engine.faulty"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        context.Process(target=_process, args=(words, str(log), rank, processes, port)) for rank in range(processes)
    ]
    for process in started:
        process.start()
    return list(started)


if __name__ == "__main__":
    sys.exit(cli.main(PROGRAM, sys.argv[1:]))
