"""What a run says: to the screen, to log.jsonl and to TensorBoard."""

import json
import logging
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from engine.world import World
from formats.files import write_text

log = logging.getLogger(__name__)


class _TqdmHandler(logging.Handler):
    """Log lines above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def setup(rank: int) -> None:
    """Logging of an entry point: rank 0 tells everything, the others only what went wrong."""
    handler = _TqdmHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(message)s" if rank == 0 else f"rank {rank}: %(message)s", "%H:%M:%S")
    )
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)


def progress(items: Iterable[Any] | None, world: World, description: str, **options: Any) -> Any:
    """A progress bar on rank 0 (plain lines, seldom, where the output is no terminal)."""
    if not sys.stderr.isatty():
        options |= dict(file=_Lines(sys.stderr), mininterval=10)
    return tqdm(items, desc=description, disable=not world.is_main, dynamic_ncols=True, **options)


class _Lines:
    """What a bar draws over itself on a terminal, as lines of a log file."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if shown := text.strip("\r\n "):
            self._stream.write(shown + "\n")

    def flush(self) -> None:
        self._stream.flush()


class RunLog:
    """log.jsonl and TensorBoard events of a run folder; only rank 0 writes."""

    def __init__(self, folder: Path, world: World, first_step: int) -> None:
        self._file: Any = None
        self._events: SummaryWriter | None = None
        self._last: dict[str, dict[str, Any]] = {}
        if not world.is_main:
            return
        path = folder / "log.jsonl"
        if path.is_file():
            # A run that was killed has logged steps after its last checkpoint; they are taken again. That it went back
            # before is true all the same.
            always = ("rollback",) if first_step else ()
            kept = [line for line in read_log(path) if line["step"] <= first_step or line["event"] in always]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
            self._last = {line["event"]: line for line in kept}
        self._file = path.open("a")
        self._events = SummaryWriter(str(folder / "events"), purge_step=first_step + 1)

    def last(self, event: str) -> dict[str, Any]:
        """The newest line of that kind from before this leg of the run, empty where there is none or on another rank."""
        return self._last.get(event, {})

    def write(self, step: int, values: dict[str, Any], event: str = "train") -> None:
        """One line: what happened at the end of ``step`` (the first step is 1)."""
        if self._file is None or self._events is None:
            return
        line = {"event": event, "step": step, "time": round(time.time(), 3), **values}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:  # a full disk: what is buffered is written with the next line
            log.error("log.jsonl cannot be written: %s", error)
        for key, value in values.items():
            if isinstance(value, int | float):
                self._events.add_scalar(f"{event}/{key}", value, step)
        self._events.flush()

    def close(self) -> None:
        """Finish both files."""
        if self._file is not None and self._events is not None:
            try:
                self._file.close()
            except OSError as error:
                log.error("the last lines of log.jsonl cannot be written: %s", error)
            self._events.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a log.jsonl; a line torn by a kill is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines
