"""DeepSpeed's training checkpoints as weights: of a run, the newest; in float32 whatever they were trained in."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.hashes import HASHES, read_hashes, refuse_damaged
from formats.pickles import load_pickle
from formats.zero import MODEL, ZeroCheckpoint
from models.interop.card import AVERAGE

_STEP = re.compile(r"step\d+")


def is_zero(folder: Path) -> bool:
    """Whether a folder holds one checkpoint of DeepSpeed's (``stepNNNNNNNN`` of our runs), be it what is left of it."""
    ours = _STEP.fullmatch(folder.name) and (folder / HASHES).is_file()
    return folder.is_dir() and bool(ours or any(folder.glob(MODEL)))


def newest_zero(folder: Path) -> Path | None:
    """The checkpoint that a person means by a folder: itself, the newest in it, or the newest of the run it belongs to."""
    if is_zero(folder):
        return folder
    for root in (folder, folder / "checkpoints"):
        steps = [path for path in root.glob("step*") if _STEP.fullmatch(path.name) and is_zero(path)]
        if steps:
            return max(steps, key=lambda path: int(path.name.removeprefix("step")))
        named = root / "latest"
        if named.is_file() and is_zero(found := root / named.read_text().strip()):
            return found
    return None


def keeps_average(folder: Path) -> bool:
    """Whether a checkpoint has, or had when it was written, a moving average of the weights beside them."""
    try:
        return (folder / AVERAGE).is_file() or AVERAGE in read_hashes(folder)
    except (OSError, ValueError):  # told when the weights are read
        return False


def read_average(folder: Path) -> tuple[dict[str, Tensor], str]:
    """The moving average that a run keeps beside its weights, ``ema.pt``, as :func:`read_zero` gives these.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    refuse_damaged(folder, AVERAGE)
    if not (folder / AVERAGE).is_file():
        raise ValueError(f"{folder} has no {AVERAGE}: that run keeps no moving average (train.ema_decay)")
    return _floats(load_pickle(folder / AVERAGE)), "the moving average of a DeepSpeed checkpoint"


def read_zero(folder: Path) -> tuple[dict[str, Tensor], str]:
    """Whole state dict of a checkpoint, float32, on the CPU -> (it, and in words what was read).

    Frozen parameters, buffers and parameters with several names are there.

    Raises:
        ValueError: files that are missing, damaged, or of a network cut for tensor or pipeline parallelism.
    """
    saved = ZeroCheckpoint(folder)
    wholes = {spread: spread.whole() for spread in saved.weights.values()}
    state = {name: wholes[spread] for name, spread in saved.weights.items()}
    if saved.stage < 3 and saved.rounded_to and saved.exact:
        for name, stored in saved.stored.items():
            # The weights in use are the optimiser's, rounded: were the order or the paddings others, they would not agree.
            if not torch.equal(state[name].to(stored.dtype), stored):
                raise ValueError(f"{folder}: the float32 values of {name} are not where they should be")
    rounded = "" if saved.exact else f", rounded to {saved.rounded_to} as it was trained"
    other = f", not their moving average in {AVERAGE}" if keeps_average(folder) else ""
    return state, f"{'the weights of ' if other else ''}a DeepSpeed checkpoint of ZeRO-{saved.stage}{rounded}{other}"


def _floats(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors, those of half precision as float32."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    half = (torch.float16, torch.bfloat16)
    return {name: value.float() if value.dtype in half else value for name, value in tensors.items()}
