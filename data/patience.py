"""Waiting for storage that is gone for a while."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

FIRST_DELAY, LONGEST_DELAY = 0.25, 5.0
"""Seconds before the second try, doubled at each, up to the second number."""

OF_THE_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""What this machine has run out of: no file's fault, and waiting does not help."""


class StorageGoneError(RuntimeError):
    """Storage that did not come back within ``data.retry_seconds``: the run stops, and can be continued."""


class Patience:
    """Tries of one thing, further and further apart, until ``seconds`` have passed since the first failure.

    The log says once that there is a wait, and that it is over.
    """

    def __init__(self, what: str, seconds: float, sleep: Callable[[float], object] = time.sleep) -> None:
        self.what, self.seconds, self.sleep = what, seconds, sleep
        self._since: float | None = None
        self._delay = FIRST_DELAY

    def wait(self, reason: object) -> None:
        """Sleep before the next try.

        Raises:
            StorageGoneError: the time is over.
        """
        now = time.monotonic()
        if self._since is None:
            self._since = now
            logger.warning(
                "%s: %s cannot be reached (%s): trying again for %g s", _who(), self.what, reason, self.seconds
            )
        left = self._since + self.seconds - now
        if left <= 0:
            raise StorageGoneError(
                f"{self.what} could not be reached for {self.seconds:g} s ({reason}): start the same command again when it is "
                "back, or raise data.retry_seconds"
            )
        self.sleep(min(self._delay, left))
        self._delay = min(2 * self._delay, LONGEST_DELAY)

    def done(self) -> None:
        """It worked."""
        if self._since is not None:
            logger.warning("%s: %s is back after %.1f s", _who(), self.what, time.monotonic() - self._since)
        self._since, self._delay = None, FIRST_DELAY


def folder_is_gone(folder: str) -> str:
    """Why nothing can be read below a folder: it is absent, gives an error, or is empty as a mount point without its disk.

    "" where it is there.
    """
    try:
        with os.scandir(folder) as entries:
            return "" if next(entries, None) is not None else "the folder is empty"
    except OSError as error:
        if error.errno in OF_THE_MACHINE:
            raise
        return error.strerror or type(error).__name__


def _who() -> str:
    process = multiprocessing.current_process()
    return "loader" if process.name == "MainProcess" else process.name
