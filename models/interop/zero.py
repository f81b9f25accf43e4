"""DeepSpeed's training checkpoints, of any ZeRO stage, as whole float32 weights; read without DeepSpeed or a GPU.

Up to ZeRO-2 ``mp_rank_00_model_states.pt`` holds all weights in the precision of training; where that is float32 they
are taken as they are. Of half-precision training the float32 weights of the optimizer are in pieces, one per process
(``*_optim_states.pt``): all tensors of a parameter group one after another, cut into equal parts. Of ZeRO-3 every
tensor is cut by itself, padded to a multiple of the processes, and frozen ones lie in the processes' model files.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.files import load_pickle
from models.interop.strict import listed

_MODEL = "*_model_states.pt"
_OPTIM = "*_optim_states.pt"
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


def is_zero(folder: Path) -> bool:
    """Whether a folder holds one checkpoint of DeepSpeed's (``stepNNNNNNNN`` of our runs)."""
    return folder.is_dir() and any(folder.glob(_MODEL))


def newest_zero(folder: Path) -> Path | None:
    """The checkpoint that a person means by a folder: itself, the newest in it, or the newest of the run it belongs to."""
    if is_zero(folder):
        return folder
    for root in (folder, folder / "checkpoints"):
        steps = [path for path in root.glob("step*") if re.fullmatch(r"step\d+", path.name) and is_zero(path)]
        if steps:
            return max(steps, key=lambda path: int(path.name.removeprefix("step")))
        named = root / "latest"
        if named.is_file() and is_zero(found := root / named.read_text().strip()):
            return found
    return None


def read_zero(folder: Path, *, ema: bool = False) -> tuple[dict[str, Tensor], str]:
    """Whole state dict of a checkpoint, float32, on the CPU -> (it, and in words what was read).

    Frozen parameters, buffers and parameters with several names are there. ``ema``: the moving average of one of our
    runs, ``ema.pt``, instead of the weights.

    Raises:
        ValueError: files that are missing, damaged, or of a network cut for tensor or pipeline parallelism.
    """
    if ema:
        if not (folder / "ema.pt").is_file():
            raise ValueError(f"{folder} has no ema.pt: that run keeps no moving average (train.ema_decay)")
        return _floats(load_pickle(folder / "ema.pt")), "the moving average of a DeepSpeed checkpoint"
    with _deepspeeds_classes():
        files = _by_rank(folder, _MODEL)
        models = [load_pickle(file, lazily=True) for file in files]
        if any("module" not in model or "param_shapes" not in model for model in models):
            raise ValueError(f"{folder}: {files[0].name} is no checkpoint of DeepSpeed's engine")
        stage = _stage(folder, files, models[0])
        exact = stage == 3 or _is_exact(folder, models[0], stage)
        state = _sharded(folder, models) if stage == 3 else _whole(folder, models[0], exact=exact)
    rounded = "" if exact else f", rounded to {_half(models[0])} as it was trained"
    return state, f"a DeepSpeed checkpoint of ZeRO-{stage}{rounded}"


@contextmanager
def _deepspeeds_classes() -> Iterator[None]:
    """Harmless classes under the names that DeepSpeed's files ask for."""
    with torch.serialization.safe_globals(_STAND_INS):
        yield


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    """One file per process, in their order."""
    files = list(folder.glob(pattern))
    cut = [file.name for file in files if not re.search(r"mp_rank_00_", file.name)]
    if cut:
        raise ValueError(f"{folder} is of a network cut for tensor or pipeline parallelism ({listed(sorted(cut))})")

    def rank(file: Path) -> int:
        found = re.search(r"zero_pp_rank_(\d+)_", file.name)
        return int(found[1]) if found else 0

    return sorted(files, key=rank)


def _stage(folder: Path, files: Sequence[Path], model: Mapping[str, Any]) -> int:
    if files[0].name.startswith("zero_pp_rank_"):
        return 3
    config = model.get("ds_config")
    asked = config.get("zero_optimization") if isinstance(config, dict) else None
    return int(asked.get("stage", 0)) if isinstance(asked, dict) else int(any(folder.glob(_OPTIM)))


def _floats(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Floating-point tensors as float32 (float64 stays)."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {name: value.float() if value.dtype in _HALF else value for name, value in tensors.items()}


def _groups(folder: Path, key: str) -> list[list[Tensor]]:
    """``found[rank][group]``: the pieces of the float32 weights."""
    found = []
    files = _by_rank(folder, _OPTIM)
    for file in files:
        saved: dict[str, Any] = load_pickle(file, lazily=True).get("optimizer_state_dict") or {}
        pieces = saved.get(key)
        if not isinstance(pieces, list):
            raise ValueError(f"{file} has no {key}: the float32 weights are not in it")
        count = saved["partition_count"]
        count = max(count) if isinstance(count, list) else count
        if count != len(files):
            raise ValueError(
                f"{folder} has {len(files)} of {count} *_optim_states.pt: the files of some processes are missing"
            )
        found.append(pieces)
    if not found:
        raise ValueError(f"{folder} has no {_OPTIM}, which hold the float32 weights: copy the folder whole")
    return found


def _half(model: Mapping[str, Any]) -> str:
    """The half precision of a process's model, in words; empty where all of it is in float32."""
    found = {value.dtype for value in model["module"].values() if isinstance(value, Tensor)}
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in _HALF if dtype in found)


def _is_exact(folder: Path, model: Mapping[str, Any], stage: int) -> bool:
    """Whether the weights that were trained are to be had in float32, of ZeRO-0 to 2.

    Where the shapes by group are missing, as of ZeRO-0, nothing tells which parameter each float32 tensor of the optimizer
    belongs to. Later stages always keep those tensors: files without them are incomplete, and refused when read.
    """
    return not _half(model) or bool(model["param_shapes"] and (stage or any(folder.glob(_OPTIM))))


def _whole(folder: Path, model: Mapping[str, Any], *, exact: bool) -> dict[str, Tensor]:
    """Weights of ZeRO-0 to 2; those in use, or the ``exact`` ones that they are rounded from."""
    stored: Mapping[str, Tensor] = model["module"]
    state = _floats(stored)
    groups = model["param_shapes"] or []
    if not exact or all(stored[name].dtype == torch.float32 for group in groups for name in group):
        return state  # the optimizer's own are the same, or cannot be told apart
    pieces = _groups(folder, "single_partition_of_fp32_groups")
    for index, group in enumerate(groups):
        flat, offset = torch.cat([rank[index] for rank in pieces]), 0
        paddings = _paddings(folder, index, len(group))
        for (name, shape), padding in zip(group.items(), paddings, strict=True):
            piece = flat[offset : offset + shape.numel()]
            # The weights in use are these, rounded: were the order or the paddings others, they would not agree.
            if piece.numel() != shape.numel() or not torch.equal(
                piece.view(shape).to(stored[name].dtype), stored[name]
            ):
                raise ValueError(f"{folder}: the float32 values of {name} are not where they should be")
            state[name] = piece.view(shape).clone()
            offset += shape.numel() + padding
    for alias, name in (model.get("shared_params") or {}).items():
        if name in state:
            state[alias] = state[name]
    return state


def _paddings(folder: Path, group: int, count: int) -> list[int]:
    """Values left free behind each tensor of a group, as newer versions write them down."""
    saved = load_pickle(_by_rank(folder, _OPTIM)[0], lazily=True)["optimizer_state_dict"]
    paddings = saved.get("param_alignment_paddings")
    return list(paddings[group]) if paddings else [0] * count


def _sharded(folder: Path, models: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Weights of ZeRO-3."""
    buffers = set(models[0]["buffer_names"])
    state = _floats({name: value for name, value in models[0]["module"].items() if name in buffers})
    ranks = [torch.cat([piece.flatten() for piece in rank]) for rank in _groups(folder, "fp32_flat_groups")]
    offset = 0
    for name, shape in ((name, shape) for group in models[0]["param_shapes"] for name, shape in group.items()):
        share = math.ceil(shape.numel() / len(ranks))
        parts = [rank[offset : offset + share] for rank in ranks]
        if any(part.numel() != share for part in parts):
            raise ValueError(f"{folder}: the pieces end before {name}")
        state[name] = torch.cat(parts)[: shape.numel()].view(shape).clone()
        offset += share
    if any(rank.numel() != offset for rank in ranks):
        raise ValueError(f"{folder}: the pieces hold {ranks[0].numel()} values each, the parameters need {offset}")
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        if len(models) != len(ranks):
            raise ValueError(
                f"{folder} has {len(models)} of {len(ranks)} {_MODEL}: frozen parameters such as {name} lie in all"
            )
        whole = torch.cat([model["frozen_param_fragments"][name].flatten() for model in models])
        state[name] = _floats({name: whole[: shape.numel()].view(shape).clone()})[name]
    for alias, name in (models[0].get("shared_params") or {}).items():
        state[alias] = state[name]
    return {name: state[name] for name in models[0]["module"] if name in state}
