"""Files of tensors, read without running anything in them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from formats.pickles import load_pickle, unreadable

_WRAPPERS = ("model", "module", "state_dict")
_AVERAGES = ("model_ema", "state_dict_ema", "ema")
"""Where training codes put the weights, and their moving average"""


@dataclass
class Saved:
    """Tensors by name, and what else lay in their file, which is not read."""

    state: dict[str, Tensor]
    beside: list[str] = field(default_factory=list)


def read_saved(path: str | Path, *, ema: bool = False) -> Saved:
    """Tensors of a ``.safetensors`` or ``.pth`` file; a nested ``model``, ``module`` or ``state_dict`` is opened.

    ``ema`` opens ``model_ema``, ``state_dict_ema`` or ``ema`` instead. What torch's wrappers add to the names is taken
    off: ``module.`` (parallel training) before all of them, ``_orig_mod.`` (``torch.compile``) anywhere.

    Raises:
        ValueError: in one line, what the file is instead.
    """
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "does not exist"
        raise ValueError(f"{path} cannot be read as weights, a .safetensors or .pth of tensors (it {what})")
    found: Any = _read_safetensors(path) if _is_safetensors(path) else load_pickle(path)
    beside: list[str] = []
    wanted = _AVERAGES if ema else _WRAPPERS
    inner = next((key for key in wanted if isinstance(found.get(key), Mapping)), None)
    if inner is not None:
        beside, found = [str(key) for key in found if key != inner], found[inner]
    elif ema:
        raise ValueError(f"{path} keeps no moving average: none of {', '.join(_AVERAGES)} is in it")
    state = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    beside += [str(key) for key in found if str(key) not in state]
    return Saved(_unwrapped(path, state), beside)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors alone: see :func:`read_saved`."""
    return read_saved(path).state


def _unwrapped(path: str | Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` by the names of the network alone: see :func:`read_saved`."""
    names = {key: re.sub(r"(?<![^.])_orig_mod\.", "", key) for key in state}
    wrapped = [key for key, name in names.items() if name.startswith("module.")]
    if wrapped and len(wrapped) < len(names):
        bare = next(key for key in names if key not in wrapped)
        raise ValueError(
            f"{path}: {len(wrapped)} of {len(names)} keys begin with module. (as {wrapped[0]}), others do not (as {bare}): "
            "they are of two networks, or of a wrapper's own; save the state_dict() of the network inside alone"
        )
    found: dict[str, Tensor] = {}
    for key, name in names.items():
        name = name.removeprefix("module.")
        if name in found:
            raise ValueError(
                f"{path} holds {name} twice, with and without the _orig_mod. of torch.compile: "
                "save the state_dict() of one network alone"
            )
        found[name] = state[key]
    return found


def _is_safetensors(path: str | Path) -> bool:
    with Path(path).open("rb") as file:
        head = file.read(9)
    return Path(path).suffix == ".safetensors" or (len(head) == 9 and head[8:] == b"{" and head[:2] != b"PK")


def _read_safetensors(path: str | Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:
        raise unreadable(path, error) from error
