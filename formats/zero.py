"""DeepSpeed's training checkpoints, of any ZeRO stage, as whole tensors; read without DeepSpeed or a GPU.

Up to ZeRO-2 ``mp_rank_00_model_states.pt`` holds all weights in the precision of training, and of ZeRO-0 the optimiser
too, by the number of each parameter. Of ZeRO-1 and 2 the optimiser and its float32 weights are in pieces, one per process
(``*_optim_states.pt``): all tensors of a parameter group one after another, cut into equal parts. Of ZeRO-3 every
tensor is cut by itself, padded to a multiple of the processes, and frozen ones lie in the processes' model files.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.hashes import refuse_damaged
from formats.pickles import load_pickle

MODEL = "*_model_states.pt"
OPTIM = "*_optim_states.pt"
_HALF = (torch.float16, torch.bfloat16)


class _Unread:
    """In place of an object of DeepSpeed's that nothing here looks at."""

    def __init__(self, *args: Any) -> None:
        pass


class _Stage(int):
    """In place of DeepSpeed's ``ZeroStageEnum``."""


_STAND_INS: list[Any] = [
    (_Stage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Unread, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Unread, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Unread, "deepspeed.utils.tensor_fragment.fragment_address"),
]


@dataclass(frozen=True, eq=False)
class Spread:
    """A tensor in flat pieces that follow one another, each left on the disk until it is asked for."""

    shape: torch.Size
    pieces: tuple[Tensor, ...]

    def part(self, start: int, stop: int) -> Tensor:
        """A copy of the values from ``start`` to ``stop`` of the flat tensor; half precision as float32."""
        found = torch.cat(_between(self.pieces, start, stop))
        return found.float() if found.dtype in _HALF else found

    def whole(self) -> Tensor:
        """A copy of all of it, of its own shape."""
        return self.part(0, self.shape.numel()).view(self.shape)


class ZeroCheckpoint:
    """One folder of DeepSpeed's files.

    Attributes:
        stage: ZeRO's, 0 to 3.
        processes: how many wrote it; 0 where an old version did not say.
        stored: the state dict that rank 0 wrote, as it is; of ZeRO-3 only its names and buffers mean anything.
        rounded_to: the half precision of ``stored`` in words, empty where all of it is float32.
        groups: name to shape of the trained parameters, one dictionary for each flat tensor of the optimiser; none of ZeRO-0.
    """

    def __init__(self, folder: Path, *, checked: bool = False) -> None:
        """``checked``: its files were compared with its ``hashes.json`` already; else each is before it is read.

        Raises:
            ValueError: files that are missing, damaged, or of a network cut for tensor or pipeline parallelism.
        """
        self.folder, self.checked = folder, checked
        files = self._files(MODEL)
        if not files:
            raise ValueError(f"{folder} is no checkpoint of DeepSpeed's: no {MODEL} is in it")
        with _deepspeeds_classes():
            self.models = [load_pickle(file, lazily=True) for file in files]
        if any("module" not in model or "param_shapes" not in model for model in self.models):
            raise ValueError(f"{folder}: {files[0].name} is no checkpoint of DeepSpeed's engine")
        first = self.models[0]
        self.stage = _stage(folder, files, first)
        self.processes = int(first.get("dp_world_size") or 0)
        self.stored: dict[str, Tensor] = {k: v for k, v in first["module"].items() if isinstance(v, Tensor)}
        used = {value.dtype for value in self.stored.values()}
        self.rounded_to = " and ".join(str(dtype).removeprefix("torch.") for dtype in _HALF if dtype in used)
        self.groups: list[Mapping[str, torch.Size]] = list(first["param_shapes"] or [])

    @property
    def exact(self) -> bool:
        """Whether the weights that were trained are to be had in float32.

        Where the shapes by group are missing, as of ZeRO-0, nothing tells which parameter each float32 tensor of the
        optimiser belongs to. Later stages always keep those tensors: files without them are incomplete, and refused when read.
        """
        if self.stage == 3 or not self.rounded_to:
            return True
        return bool(self.groups and (self.stage or any(self.folder.glob(OPTIM))))

    @cached_property
    def weights(self) -> dict[str, Spread]:
        """Trained and frozen parameters and buffers by name, a shared parameter under each of its names; see ``exact``.

        Raises:
            ValueError: the files of some processes are missing, or do not fit.
        """
        found = {name: _plain(value) for name, value in self.stored.items()}
        if self.stage == 3:
            found = {name: found[name] for name in self.models[0]["buffer_names"] if name in found}
            found |= self._cut_by("fp32_flat_groups") | self._frozen()
        elif self.exact and any(self.stored[name].dtype in _HALF for group in self.groups for name in group):
            found |= self._cut_by("single_partition_of_fp32_groups")
        for alias, name in (self.models[0].get("shared_params") or {}).items():
            if name in found:
                found[alias] = found[name]
        return {name: found[name] for name in self.stored if name in found}

    def optimizer_state(self, names: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
        """What the optimiser keeps of each trained parameter, by name and key: a :class:`Spread`, or a plain value.

        ``names``: of the trained parameters in the order of their groups, which ZeRO-0 does not write down.

        Raises:
            ValueError: the files of some processes are missing, or do not fit.
        """
        if self.stage == 0:
            states = self._torch_state["state"]
            return {
                name: {
                    key: _plain(value) if _is_spread(key, value) else value for key, value in states.get(i, {}).items()
                }
                for i, name in enumerate(names)
            }
        found: dict[str, dict[str, Any]] = {name: {} for group in self.groups for name in group}
        everywhere = [saved[self._torch_key]["state"] for saved in self._optimizers]
        for index, group in enumerate(self.groups):
            ranks = [state.get(index, {}) for state in everywhere]
            for key, value in ranks[0].items():
                if _is_spread(key, value):
                    for name, spread in self._cut(index, [rank[key] for rank in ranks]):
                        found[name][key] = spread
                else:
                    for name in group:
                        found[name][key] = value
        return found

    @property
    def options(self) -> list[dict[str, Any]]:
        """The optimiser's parameter groups: settings and counters; ``params`` are the numbers of what it updates."""
        return self._torch_state["param_groups"]

    @property
    def _torch_key(self) -> str:
        return "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"

    @property
    def _torch_state(self) -> dict[str, Any]:
        """State dict of the torch optimiser of rank 0."""
        found = self._optimizers[0][self._torch_key] if self.stage else self.models[0].get("optimizer")
        if not isinstance(found, dict) or found.keys() != {"state", "param_groups"}:
            raise ValueError(f"{self.folder} does not hold the state of a torch optimiser")
        return found

    def _files(self, pattern: str) -> list[Path]:
        """One file per process, in their order."""
        if not self.checked:
            refuse_damaged(self.folder, pattern)
        return _by_rank(self.folder, pattern)

    @cached_property
    def _optimizers(self) -> list[dict[str, Any]]:
        """Each process's part of the optimiser."""
        files, found = self._files(OPTIM), []
        for file in files:
            with _deepspeeds_classes():
                saved = load_pickle(file, lazily=True).get("optimizer_state_dict")
            if not isinstance(saved, dict) or "partition_count" not in saved:
                raise ValueError(f"{file} is no part of an optimiser that ZeRO has cut")
            count = saved["partition_count"]
            count = max(count) if isinstance(count, list) else count
            if count != len(files):
                raise ValueError(
                    f"{self.folder} has {len(files)} of {count} {OPTIM}: the files of some processes are missing"
                )
            found.append(saved)
        if not found:
            raise ValueError(f"{self.folder} has no {OPTIM}, which hold the float32 weights: copy the folder whole")
        return found

    def _cut_by(self, key: str) -> dict[str, Spread]:
        """The float32 weights of the optimiser."""
        if lacking := [rank for rank, saved in enumerate(self._optimizers) if not isinstance(saved.get(key), list)]:
            raise ValueError(f"{self.folder}: rank {lacking[0]} has no {key}: the float32 weights are not in its file")
        found: dict[str, Spread] = {}
        for index in range(len(self.groups)):
            found |= dict(self._cut(index, [saved[key][index] for saved in self._optimizers]))
        return found

    def _cut(self, group: int, ranks: Sequence[Tensor]) -> Iterator[tuple[str, Spread]]:
        """Each parameter of a group, of which ``ranks`` are the flat tensors of all processes."""
        shapes, at = self.groups[group], 0
        # Values left free behind each tensor of a group, as newer versions write them down.
        paddings = self._optimizers[0].get("param_alignment_paddings")
        for (name, shape), padding in zip(
            shapes.items(), paddings[group] if paddings else [0] * len(shapes), strict=True
        ):
            shape = torch.Size(shape)
            if self.stage == 3:
                share = math.ceil(shape.numel() / len(ranks))
                pieces = _between([rank[at : at + share] for rank in ranks], 0, shape.numel())
                at += share
            else:
                pieces = _between(ranks, at, at + shape.numel())
                at += shape.numel() + padding
            if sum(piece.numel() for piece in pieces) != shape.numel():
                raise ValueError(f"{self.folder}: the pieces end before {name}")
            yield name, Spread(shape, tuple(pieces))
        if self.stage == 3 and any(rank.numel() != at for rank in ranks):
            raise ValueError(f"{self.folder}: the pieces hold {ranks[0].numel()} values each, the parameters need {at}")

    def _frozen(self) -> dict[str, Spread]:
        """Parameters that ZeRO-3 has cut and nothing trains."""
        found = {}
        for name, shape in (self.models[0].get("frozen_param_shapes") or {}).items():
            if len(self.models) != len(self._optimizers):
                raise ValueError(
                    f"{self.folder} has {len(self.models)} of {len(self._optimizers)} {MODEL}: frozen parameters such as "
                    f"{name} lie in all"
                )
            ranks = [model["frozen_param_fragments"][name].flatten() for model in self.models]
            found[name] = Spread(torch.Size(shape), tuple(_between(ranks, 0, torch.Size(shape).numel())))
        return found


@contextmanager
def _deepspeeds_classes() -> Iterator[None]:
    """Harmless classes under the names that DeepSpeed's files ask for."""
    with torch.serialization.safe_globals(_STAND_INS):
        yield


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    """One file per process, in their order."""
    files = list(folder.glob(pattern))
    if cut := sorted(file.name for file in files if not re.search(r"mp_rank_00_", file.name)):
        raise ValueError(f"{folder} is of a network cut for tensor or pipeline parallelism ({cut[0]})")

    def rank(file: Path) -> int:
        found = re.search(r"zero_pp_rank_(\d+)_", file.name)
        return int(found[1]) if found else 0

    return sorted(files, key=rank)


def _stage(folder: Path, files: Sequence[Path], model: Mapping[str, Any]) -> int:
    if files[0].name.startswith("zero_pp_rank_"):
        return 3
    config = model.get("ds_config")
    asked = config.get("zero_optimization") if isinstance(config, dict) else None
    return int(asked.get("stage", 0)) if isinstance(asked, dict) else int(any(folder.glob(OPTIM)))


def _between(pieces: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Views of the values from ``start`` to ``stop`` of flat tensors that follow one another; at least one, maybe empty."""
    found, at = [], 0
    for piece in pieces:
        low, high = max(start - at, 0), min(stop - at, piece.numel())
        if low < high:
            found.append(piece.flatten()[low:high])
        at += piece.numel()
    return found or [pieces[0].flatten()[:0]]


def _plain(value: Tensor) -> Spread:
    return Spread(value.shape, (value.flatten(),))


def _is_spread(key: str, value: Any) -> bool:
    """Whether an optimiser's value has an entry for each of the weights: the number of steps has none."""
    return isinstance(value, Tensor) and key != "step"
