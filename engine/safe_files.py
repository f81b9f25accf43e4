"""Checkpoint files: hashed while they are written, checked before they are read, and read without running anything."""

import argparse
import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from engine.config import ConfigError
from engine.world import World
from formats.hashes import HASHES, file_digest, read_hashes, wrong_file


class _HashingFile:
    """What ``torch.save`` writes to: a file, and the sha256 of what went into it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._sha256 = hashlib.sha256()
        self.problem: OSError | None = None

    def write(self, data: Any) -> int:
        self._sha256.update(data)
        try:
            return self._file.write(data)
        except OSError as error:  # torch tells it as something else
            self.problem = self.problem or error
            raise

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> str:
        """Bring everything to the disk -> the digest, in hexadecimal."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._sha256.hexdigest()

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            self.problem = self.problem or error


def write_hashed(path: Path, content: Any) -> str:
    """``torch.save(content, path)`` -> sha256 of the file.

    Raises:
        OSError: it cannot be written.
    """
    file = _HashingFile(path)
    try:
        torch.save(content, file)  # type: ignore[arg-type]
        return file.finish()
    except RuntimeError as error:
        raise (file.problem or error) from None
    finally:
        file.close()


def is_whole(folder: Path, name: str) -> bool:
    """Whether one file of a checkpoint is as it was written."""
    try:
        return file_digest(folder / name) == read_hashes(folder)[name]
    except (OSError, ValueError, KeyError):
        return False


def damage(folder: Path, world: World) -> str:
    """What is wrong with a checkpoint, empty if nothing: every file has the sha256 of ``hashes.json``.

    Every process reads its share of the files, and all of them get the same answer.

    Raises:
        ConfigError: a file is there and cannot be read now, which is no reason to do without it.
    """
    wrong = unread = ""
    try:
        hashes = read_hashes(folder)
        wrong = wrong_file(folder, {name: hashes[name] for name in sorted(hashes)[world.rank :: world.size]})
    except FileNotFoundError:
        wrong = f"{HASHES} is missing"
    except ValueError as error:
        wrong = str(error)
    except OSError as error:
        unread = str(error)
    if unread := next((said for said in world.gather(unread) if said), ""):
        raise ConfigError(f"{folder} cannot be read now ({unread}): see to its disk, and give the same command again")
    return next((said for said in world.gather(wrong) if said), "")


def safe_checkpoint_engine(engine: Any) -> Any:
    """DeepSpeed's checkpoint files, hashed and read without executing what a pickle asks for.

    DeepSpeed loads with ``weights_only=False``; here only its own three classes and argparse's Namespace are known.
    A file that cannot be written is noted in ``problem`` and told later: raised at once, it would leave the other
    processes waiting for this one.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, argparse.Namespace]

    class SafeCheckpointEngine(TorchCheckpointEngine):
        written: dict[str, str]
        problem: str

        def begin(self) -> dict[str, str]:
            """Forget what was written so far -> sha256 by name of what will be."""
            self.written, self.problem = {}, ""
            return self.written

        def save(self, state_dict: Any, path: str) -> None:
            try:
                self.written[Path(path).name] = write_hashed(Path(path), state_dict)
            except OSError as error:
                self.problem = self.problem or str(error)

        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals(known):
                return torch.load(path, map_location=map_location, weights_only=True)

    return SafeCheckpointEngine(engine._config)
