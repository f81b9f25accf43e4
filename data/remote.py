"""Shards out of pipes and from addresses: bytes that come in order, and come again from where they broke off.

A ``pipe:`` command is run by the shell. It is the user's own setting; nothing that is read from a file ever gets there.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from typing import IO

from data.patience import Patience

TIMEOUT = 60.0
"""Seconds after which a silent server counts as gone."""

_PIECE = 1 << 20
_NO_COMMAND = {126, 127}
_PASSING = {408, 425, 429}
"""HTTP errors below 500 that pass: time-outs and too many requests."""

_starting = threading.Lock()
"""Held while a command is started. A worker that is forked by another thread at that moment would inherit ends of its pipes, keep them
open, and let us wait for their end until the worker is gone."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_starting.release
    )  # fmt: skip


class ShardStream:
    """One shard, read forwards.

    A pipe that ends with an error, or a connection that breaks, is opened again where it was (a pipe is read again up to there),
    until ``retry_seconds`` have passed without a byte. One thread reads; another may ``close``.
    """

    def __init__(self, address: str, retry_seconds: float) -> None:
        self.address = address
        self._next, self._at = 0, 0
        """Offsets of the byte that is wanted next, and of the one that the open file gives next."""
        self._file: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = threading.Event()
        self._patience = Patience(address, retry_seconds, self._closed.wait)

    def seek(self, position: int, /) -> None:
        """Go forward to an offset."""
        if position < self._next:
            raise ValueError(f"a stream cannot go back from byte {self._next} to {position}")
        self._next = position

    def read(self, count: int, /, exactly: bool = False) -> bytes:
        """The next ``count`` bytes; fewer only at the end of the shard, and not ``exactly``: then an early end is an error that
        may pass.

        Raises:
            data.patience.StorageGoneError: nothing came for too long.
            FileNotFoundError: the server has no such shard, or refuses it; there is no such command.
            EOFError: the stream was closed.
        """
        found = bytearray()
        while len(found) < count:
            if self._closed.is_set():
                raise EOFError(f"{self.address} was closed")
            piece, problem = self._piece(min(count - len(found), _PIECE))
            if piece:
                self._patience.done()
                found += piece
                self._next += len(piece)
            elif problem or exactly:
                self._drop()
                if not self._closed.is_set():
                    self._patience.wait(problem or f"it ended at byte {self._at}")
            else:
                break
        return bytes(found)

    def _piece(self, count: int) -> tuple[bytes, str]:
        """Bytes from the wanted one on, or none and what went wrong ("": the shard has ended)."""
        try:
            if self._file is None:
                self._open()
            while self._at < self._next:
                if not (piece := self._read(min(self._next - self._at, _PIECE))):
                    return b"", self._problem()
            piece = self._read(count)
            return piece, "" if piece else self._problem()
        except urllib.error.HTTPError as error:
            if 400 <= error.code < 500 and error.code not in _PASSING:
                raise FileNotFoundError(f"{self.address}: the server answers {error.code} {error.reason}") from None
            return b"", f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, FileNotFoundError):
                raise
            return b"", f"{type(error).__name__}: {error}"

    def _read(self, count: int) -> bytes:
        assert self._file is not None
        piece = self._file.read(count)
        self._at += len(piece)
        return piece

    def _problem(self) -> str:
        """Why there are no more bytes, "" where it is the proper end."""
        if self._process is not None and (code := self._process.wait()):
            if code in _NO_COMMAND:
                raise FileNotFoundError(f"{self.address}: the shell finds no such command, or may not run it")
            return f"the command ended with {code} at byte {self._at}"
        if getattr(self._file, "length", None):  # of a response: what it still owes
            return f"the connection ended at byte {self._at}"
        return ""

    def _open(self) -> None:
        if self.address.startswith("pipe:"):
            with _starting:
                # Its own session: a Ctrl-C is not for it, and it can be ended with all that it started.
                self._process = subprocess.Popen(
                    ["/bin/sh", "-c", self.address[len("pipe:") :]],
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True,
                )  # fmt: skip
            self._file, self._at = self._process.stdout, 0
        else:
            response = _request(self.address, self._next)
            given = response.headers.get("Content-Range", "").partition("-")[0]
            self._file, self._at = response, self._next if given == f"bytes {self._next}" else 0

    def _drop(self) -> None:
        """Close what is open, and end the command."""
        file, process = self._file, self._process
        self._file = self._process = None
        if process is not None:
            _end(process)
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    def close(self) -> None:
        """End; a ``read`` in another thread ends too, at the latest with the next bytes."""
        self._closed.set()
        if (process := self._process) is not None:
            _end(process)

    def __enter__(self) -> ShardStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._drop()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and what it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)


class TooLongError(ValueError):
    """A file at an address is longer than is taken from one."""


def fetch(address: str, most: int) -> bytes | None:
    """The whole of a file at an http(s) address, None where the server does not have it (or does not give it).

    Raises:
        TooLongError: it has more than ``most`` bytes; hardly more than these are read.
        OSError: the server cannot be reached, or breaks off.
    """
    try:
        with _request(address, 0) as response:
            found = bytearray()
            while True:
                # What is still to come, where the server says it.
                if len(found) + (response.length or 0) > most:
                    raise TooLongError(f"{address} is longer than {most} bytes")
                if not (piece := response.read(_PIECE)):
                    break
                found += piece
            if response.length:
                raise ConnectionError(f"{address}: the connection ended at byte {len(found)}")
            return bytes(found)
    except http.client.HTTPException as error:
        raise ConnectionError(f"{address}: {type(error).__name__}: {error}") from error
    except urllib.error.HTTPError as error:
        if error.code < 500:
            return None
        raise


def _request(address: str, position: int) -> http.client.HTTPResponse:
    if not address.startswith(("http://", "https://")):  # urllib would also open files
        raise ValueError(f"{address!r} is no http(s) address")
    headers = {"User-Agent": "palimpsest"} | ({"Range": f"bytes={position}-"} if position else {})
    return urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=TIMEOUT)
