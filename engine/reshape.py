"""A checkpoint made by N processes at one ZeRO stage, continued by M processes at another.

DeepSpeed continues what as many processes wrote at the same stage. For everything else its files are read as whole tensors
by name, and each process copies the parts it keeps into what its torch optimiser updates: the parameters themselves
(ZeRO-0), one flat piece of each parameter group (ZeRO-1 and 2), or one flat tensor of its share of every parameter (ZeRO-3).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.loss_scale import grad_scaler
from formats.pickles import load_pickle
from formats.zero import Spread, ZeroCheckpoint

log = logging.getLogger(__name__)

GROUP_NAMES = "group_names"
_LISTED = 8


@dataclass
class State:
    """What a checkpoint holds, by the names of the network's tensors; values stay on the disk until they are copied.

    Attributes:
        weights: float32, trained and frozen; and buffers, those of rank 0.
        optimizer: what the torch optimiser keeps of each trained parameter, by key: a :class:`Spread` or a plain value.
        options: of each parameter group, its settings and counters; ``params`` are numbers of what the optimiser updated.
        groups: names of the trained parameters of each parameter group; empty where they are not known.
        step: optimiser steps that were taken; ``skipped`` of them did nothing, ``samples`` were seen.
        stage, processes: by which it was written.
    """

    folder: Path
    weights: Mapping[str, Spread]
    optimizer: Mapping[str, Mapping[str, Any]]
    options: Sequence[Mapping[str, Any]]
    groups: Sequence[Sequence[str]]
    step: int
    skipped: int
    samples: int
    stage: int
    processes: int


@dataclass
class _Part:
    """A tensor that the torch optimiser updates, and what it is made of.

    Attributes:
        group: the parameter group it belongs to.
        names: all parameters it is a part of on some process.
        slots: (name, start, stop, at): values ``start`` to ``stop`` of the parameter stand at ``at`` in the flat tensor;
            the rest is padding. None: it is the parameter itself.
    """

    tensor: Tensor
    group: int
    names: list[str]
    slots: list[tuple[str, int, int, int]] | None = field(default=None)

    def fill(self, out: Tensor, spreads: Mapping[str, Any]) -> Tensor:
        """``out``, of the shape of ``tensor``, with the values of ``spreads`` where they belong."""
        if self.slots is None:
            return out.copy_(spreads[self.names[0]].whole())
        for name, start, stop, at in self.slots:
            if name in spreads:
                out[at : at + stop - start].copy_(spreads[name].part(start, stop))
        return out


def read(folder: Path, groups: Sequence[Sequence[str]] = (), *, checked: bool = False) -> State:
    """A checkpoint of any stage and number of processes, without DeepSpeed and without running anything in it.

    ``groups``: names of the trained parameters by group, for a checkpoint of ZeRO-0 that was saved without
    :func:`group_names`; where they are not as many as it trained, its optimiser is not read. ``checked``: see
    :class:`ZeroCheckpoint`.

    Raises:
        ValueError: files that are missing or damaged.
    """
    saved = ZeroCheckpoint(folder, checked=checked)
    first = saved.models[0]
    if saved.stage:
        # One flat tensor of ZeRO-3 may be but a part of a group: the optimiser's groups say which belong together.
        shapes = iter(saved.groups)
        groups = [[name for _ in group["params"] for name in next(shapes)] for group in saved.options]
    else:
        groups = first.get(GROUP_NAMES) or groups
        if [len(group) for group in groups] != [len(group["params"]) for group in saved.options]:
            groups = []
    return State(
        folder=folder,
        weights=saved.weights,
        optimizer=saved.optimizer_state([name for group in groups for name in group]),
        options=saved.options,
        groups=groups,
        step=int(first["global_steps"]),
        skipped=int(first.get("skipped_steps") or 0),
        samples=int(first.get("global_samples") or 0),
        stage=saved.stage,
        processes=saved.processes,
    )


@torch.no_grad()
def load(engine: Any, folder: Path) -> None:
    """Continue from a checkpoint of another stage or number of processes, whose files were checked; called on every process.

    Weights, what the optimiser keeps, its counters and the engine's, the loss scale of fp16, and the buffers are those of
    the checkpoint. Buffers that differ from process to process, as statistics of batch norms that are not synchronised, go
    to the process of the same rank; a process that the checkpoint does not know takes those of rank modulo their number.

    Raises:
        ValueError: on every process, before anything has changed: files are missing or damaged, or of another network.
    """
    parts, told = _parts(engine), ""
    try:
        state = read(folder, group_names(engine), checked=True)
        _check(engine, parts, state)
        buffers, scaler = _buffers(engine, state), _scaler(folder)
    except ValueError as error:
        told = str(error)
    except Exception as error:  # nobody may be left waiting for a process that met something unforeseen
        told = f"{folder} cannot be read ({type(error).__name__}: {error})"
    if told := next((words for words in _everywhere(told) if words), ""):
        raise ValueError(told)
    stage = engine.zero_optimization_stage()
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()  # no parameter is whole while its shards are written
    _write_weights(engine, parts, state)
    _write_optimizer(engine, parts, state)
    for name, value in engine.module.named_buffers():
        value.copy_(buffers[name])
    if stage == 3:
        engine.optimizer.checkpoint_event_epilogue()  # parameters that are kept whole are gathered anew
    engine.global_steps, engine.skipped_steps, engine.global_samples = state.step, state.skipped, state.samples
    if scaler and (live := grad_scaler(engine)) is not None:
        live.load_state_dict(scaler)
    log.info("%s: %d processes at ZeRO-%d wrote it", folder, state.processes, state.stage)


def group_names(engine: Any) -> list[list[str]]:
    """Names of the trained parameters by group, which DeepSpeed does not write down at ZeRO-0.

    Saved as ``client_state={GROUP_NAMES: ...}`` they show when a run is continued with other groups.
    """
    parts = _parts(engine)
    return [[name for part in parts if part.group == i for name in part.names] for i in _indices(engine)]


def _indices(engine: Any) -> range:
    return range(len(engine.optimizer.param_groups))


def _everywhere(words: str) -> list[str]:
    """``words`` of every process."""
    found: list[Any] = [words] * dist.get_world_size()
    if len(found) > 1:
        dist.all_gather_object(found, words)
    return found


def _parts(engine: Any) -> list[_Part]:
    """What the torch optimiser of this process updates, group after group."""
    stage, names, zero = engine.zero_optimization_stage(), engine.param_names, engine.optimizer
    if stage == 0:
        return [_Part(p, i, [names[p]]) for i in _indices(engine) for p in zero.param_groups[i]["params"]]
    found = []
    if stage < 3:
        for i, flat in enumerate(zero.single_partition_of_fp32_groups):
            slots = []
            for p in zero.bit16_groups[i]:
                if (own := p._hp_mapping) is not None:  # some of it is in this process's piece
                    start, count = own.lp_fragment_address.start, own.lp_fragment_address.numel
                    slots.append((names[p], start, start + count, own.hp_fragment_address.start))
            found.append(_Part(flat, i, [names[p] for p in zero.bit16_groups[i]], slots))
        return found
    if zero.swap_optimizer or zero.params_in_nvme_and_cpu:
        raise ValueError(
            "a checkpoint cannot be continued at another ZeRO stage or number of processes with NVMe offload"
        )
    for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
        slots, at = [], 0
        for p, shard in zip(zero.fp16_groups[i], zero.fp16_partitioned_groups[i], strict=True):
            start, stop = _share(p)
            if start < stop:
                slots.append((names[p], start, stop, at))
            at += shard.ds_numel
        found.append(_Part(flat, zero.sub_group_to_group_id[i], [names[p] for p in zero.fp16_groups[i]], slots))
    return found


def _share(parameter: Any) -> tuple[int, int]:
    """Which values of a parameter this process keeps at ZeRO-3; none where padding is all it keeps."""
    start = dist.get_rank() * parameter.ds_tensor.ds_numel
    return start, min(start + parameter.ds_tensor.ds_numel, parameter.ds_numel)


def _check(engine: Any, parts: Sequence[_Part], state: State) -> None:
    """Refuse the checkpoint of another network, or of another part of it that was trained."""
    here = {name: getattr(p, "ds_shape", p.shape) for p, name in engine.param_names.items()}
    wanted, there = set(engine.module.state_dict()), set(state.weights)
    wrong = {
        "missing in it": sorted(wanted - there),
        "unknown here": sorted(there - wanted),
        "of another shape": [
            f"{name} {tuple(state.weights[name].shape)} (here {tuple(shape)})"
            for name, shape in here.items()
            if name in there and state.weights[name].shape != shape
        ],
    }
    if not any(wrong.values()):
        trained = {name: part.group for part in parts for name in part.names}
        then = {name: i for i, group in enumerate(state.groups) for name in group}
        if not then:
            counts = [len(group["params"]) for group in state.options]
            raise ValueError(
                f"{state.folder} was trained in {len(counts)} groups of {counts} parameters, here they differ"
            )
        wrong["trained in another parameter group"] = sorted(
            name for name in trained.keys() | then.keys() if trained.get(name) != then.get(name)
        )
        wrong["with an optimiser's state of another shape"] = [
            name
            for name, kept in state.optimizer.items()
            if any(isinstance(value, Spread) and value.shape != here[name] for value in kept.values())
        ]
    if told := [f"{len(names)} {what}: {_listed(names)}" for what, names in wrong.items() if names]:
        raise ValueError(f"{state.folder} is not of this network; {'; '.join(told)}")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown}, ... and {len(names) - _LISTED} more"


def _buffers(engine: Any, state: State) -> dict[str, Tensor]:
    """Buffers of this process, also those that a state dict leaves out."""
    wanted = [name for name, _ in engine.module.named_buffers()]
    if not any(state.folder.glob("rank*.pt")):
        found = {name: state.weights[name].whole() for name in wanted if name in state.weights}
    else:
        file = state.folder / f"rank{dist.get_rank() % max(state.processes, 1)}.pt"
        if not file.is_file():
            raise ValueError(f"{state.folder} has no {file.name}: the files of some processes are missing")
        found = load_pickle(file)["buffers"]
    if lacking := [name for name in wanted if name not in found]:
        raise ValueError(f"{state.folder} holds no buffers called {_listed(lacking)}")
    return found


def _scaler(folder: Path) -> dict[str, Any]:
    file = folder / "rank0.pt"
    return (load_pickle(file).get("scaler") or {}) if file.is_file() else {}


def _write_weights(engine: Any, parts: Sequence[_Part], state: State) -> None:
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    for part in parts:
        if stage:
            part.fill(part.tensor.data, state.weights)
    for parameter, name in engine.param_names.items():
        if stage < 3:
            parameter.data.copy_(state.weights[name].whole())
        elif not parameter.requires_grad:
            start, stop = _share(parameter)
            if start < stop:
                parameter.ds_tensor[: stop - start].copy_(state.weights[name].part(start, stop))
    if stage == 3:
        # The shards in use are the optimiser's tensors themselves, or copies of them where it is offloaded.
        for flat, used in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
            used.copy_(flat)


def _write_optimizer(engine: Any, parts: Sequence[_Part], state: State) -> None:
    """Hand the torch optimiser its state, as DeepSpeed does when it continues what it wrote itself."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    kept = {i: found for i, part in enumerate(parts) if (found := dict(_kept(part, state.optimizer)))}
    numbers = [[i for i, part in enumerate(parts) if part.group == group] for group in _indices(engine)]
    groups = [{**options, "params": own} for options, own in zip(state.options, numbers, strict=True)]
    if stage == 3:
        zero._set_fp32_optimizer_param_groups()
    (zero.optimizer if stage else zero).load_state_dict({"state": kept, "param_groups": groups})
    if stage == 3:
        zero._clear_fp32_optimizer_param_groups()
    elif stage:
        zero._hp_optimizer_states_linked = False  # DeepSpeed looks at what it was until now


def _kept(part: _Part, saved: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """What the optimiser keeps for one of its tensors."""
    for key in dict.fromkeys(key for name in part.names for key in saved.get(name, {})):
        values = {name: saved[name][key] for name in part.names if saved.get(name, {}).get(key) is not None}
        first = next(iter(values.values()), None)
        if isinstance(first, Spread):
            yield key, part.fill(torch.zeros_like(part.tensor, dtype=torch.float32), values)
        elif isinstance(first, Tensor):
            counts = torch.stack([value.cpu() for value in values.values()])
            if counts.amin() < counts.amax():
                few = ", ".join(name for name, value in values.items() if value < counts.amax())
                log.warning(
                    "optimiser's %s of %s was %g, at this stage it is its group's, %g",
                    key,
                    few,
                    counts.amin(),
                    counts.amax(),
                )
            yield key, counts.amax()
        else:
            yield key, first
