"""Only one run writes into a run folder."""

import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

from engine.config import ConfigError
from engine.world import World

log = logging.getLogger(__name__)

PATIENCE = 30.0
"""Seconds that a run waits for the one before it in its folder to end, as a cluster gives to jobs that it stops."""


class FolderLock:
    """Nobody else writes into a run folder while this process lives.

    The kernel lets go of it when the process ends, however it ends.
    """

    def __init__(self, folder: Path, patience: float) -> None:
        """Take the lock of ``folder``, waiting ``patience`` seconds for a process that is about to end.

        Raises:
            ConfigError: another process keeps it.
        """
        self._file: Any = (folder / ".lock").open("a+")
        until, told = time.monotonic() + patience, False
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    self._file.seek(0)
                    raise ConfigError(
                        f"output_dir={folder} is in use by another run ({self._file.read().strip() or 'unknown'}): end it "
                        "first, or give another output_dir"
                    ) from None
                if not told:
                    log.warning(
                        "%s is still in use by another process: waiting up to %.0f s for its end", folder, patience
                    )
                    told = True
                time.sleep(0.2)
            except OSError as error:
                log.warning("%s cannot be locked (%s): see to it that only one run writes into it", folder, error)
                return
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    @classmethod
    def none(cls) -> "FolderLock":
        """No lock: that of a process which leaves it to rank 0."""
        made = cls.__new__(cls)
        made._file = None
        return made

    def release(self) -> None:
        """Let others have the folder."""
        if self._file is not None:
            self._file.close()


def lock(folder: Path, world: World) -> FolderLock:
    """The lock of a run folder, taken by rank 0; refused on every process where it is not to be had."""
    folder.mkdir(parents=True, exist_ok=True)
    found, problem = None, ""
    if world.is_main:
        try:
            found = FolderLock(folder, PATIENCE)
        except ConfigError as error:
            problem = str(error)
        except OSError as error:
            problem = f"output_dir={folder} cannot be written: {error.strerror or error}"
    if problem := next((said for said in world.gather(problem) if said), ""):
        raise ConfigError(problem)
    return found or FolderLock.none()
