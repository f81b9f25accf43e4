"""Weighted nearest-neighbour classification on frozen features: a look at an encoder that trains nothing.

As Wu et al. (arXiv:1805.01978, section 3.4) and DINO (arXiv:2104.14294, section 4.1) do it: features are the mean of
the encoder's last map (or its class token, as in DINO), compared by their cosine; the k nearest training images vote
for their class with weight ``exp(cosine / temperature)``.

Shapes: ``N`` queries, ``M`` keys (training images) of one process, ``D`` features, ``k`` neighbours, ``K`` classes.
"""

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.sources import ImageIndex
from engine import faults
from engine.config import ConfigError, user_errors
from engine.loop import peak_memory
from engine.report import keep_settings, record
from engine.schema import option
from engine.world import World, to_device
from finetune import sets, weights
from finetune.config import MeasureConfig
from finetune.features import KINDS, Extracted, Frozen, extract

log = logging.getLogger(__name__)

CHUNK = 2**25
"""Similarities held at once (128 MiB)."""


@dataclasses.dataclass
class KNNSection:
    """How the neighbours vote."""

    features: str = option(
        "mean", "mean of the last map, class token, or what the model's own head gets", choices=KINDS
    )
    k: list[int] = option([20], "numbers of neighbours, each its own result", ge=1)
    temperature: float = option(0.07, "of the votes exp(cosine / temperature)", gt=0)


@dataclasses.dataclass
class KNNConfig(MeasureConfig):
    """k-NN of an encoder; without ``encoder.pretrained`` of the untrained network."""

    task: str = option("knn", "the task, one of finetune/tasks.py (set by the recipe)")
    knn: KNNSection = dataclasses.field(default_factory=KNNSection)


def check(config: KNNConfig) -> None:
    """Refuse what does not fit, before anything is built."""
    if not config.knn.k:
        raise ConfigError("knn.k is empty: give one or more numbers of neighbours, such as [10,20]")
    if config.encoder.drop_path_rate:
        raise ConfigError("encoder.drop_path_rate has no effect on frozen features: remove it")
    sets.split_paths(config.data)
    weights.resolve(config.encoder, config.data)


def run(config: KNNConfig, world: World) -> None:
    """Measure and append one result per ``knn.k`` to results.json."""
    faults.unlisten()
    started = time.perf_counter()
    frozen, found = build(config, world)
    keys = unit_features(frozen, found.train, config, world)
    queries = unit_features(frozen, found.val, config, world)
    nearest = shared_neighbours(keys, queries.features, max(config.knn.k), world)
    labels = torch.cat(world.gather(queries.labels))
    if world.is_main:
        keep_settings(Path(config.output_dir), config)
    for k in config.knn.k:
        votes = vote(nearest[0][:, :k], nearest[1][:, :k], found.num_classes, config.knn.temperature)
        majority = count_votes(nearest[0][:, :k], nearest[1][:, :k], found.num_classes)
        row = {
            "task": config.task,
            "recipe": config.recipe,
            "encoder": config.encoder.name,
            "image_size": list(sets.eval_size(config.data)),
            "features": config.knn.features,
            "k": k,
            "top1": 100 * float((votes.argmax(dim=1) == labels).double().mean()),
            "top1_majority": 100 * float((majority.argmax(dim=1) == labels).double().mean()),
            "init": config.encoder.pretrained or "random",
            "labels": config.data.labels,
            "train_images": len(found.train),
            "eval_images": len(labels),
        }
        log.info(
            "k-NN, k=%d: top-1 %.2f %%, by majority %.2f %% on %d images",
            k,
            row["top1"],
            row["top1_majority"],
            len(labels),
        )
        if world.is_main:
            record(Path(config.output_dir), row, time.perf_counter() - started)


def dry_run(config: KNNConfig, world: World) -> dict[str, Any]:
    """``--dry_run``: features of one batch."""
    frozen, found = build(config, world)
    batch = to_device(next(sets.eval_loader(found.val, config, world).batches(0)), world.device)
    started = time.perf_counter()
    features = frozen(batch["image"])
    return {
        "train_images": len(found.train),
        "eval_images": len(found.val),
        "features": features.shape[1],
        "parameters": sum(p.numel() for p in frozen.encoder.parameters()),
        "peak_memory_gb": round(peak_memory(world.device) / 2**30, 3),
        "images_per_second": round(len(features) * world.size / (time.perf_counter() - started), 2),
    }


def build(config: KNNConfig, world: World) -> tuple[Frozen, sets.Sets]:
    """Frozen encoder and labelled images."""
    with user_errors():
        found = sets.find_sets(config.data, config.seed)
        if max(config.knn.k) > len(found.train):
            raise ConfigError(f"knn.k={max(config.knn.k)} neighbours of {len(found.train)} training images: lower it")
        encoder = weights.build(config.encoder, sets.at_eval_size(config.data), config.seed, num_classes=0)
        return Frozen(encoder, config.data, config.knn.features, world.device), found


def unit_features(frozen: Frozen, index: ImageIndex, config: KNNConfig, world: World) -> Extracted:
    """This process's share of a set, its features of length 1."""
    found = extract(frozen, sets.eval_loader(index, config, world), world)
    F.normalize(found.features, dim=1, out=found.features)
    return found


def shared_neighbours(keys: Extracted, queries: Tensor, k: int, world: World) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest keys of all processes to the queries of all processes, in rank order of the queries.

    Each process searches its own keys for everybody's queries, so that no keys travel: what is gathered is ``k``
    candidates per query and process. Of equally near keys the first in the set comes first, whichever process has it.
    ``queries`` (N_rank, D) -> cosines (N, k) float32, falling, and labels (N, k) int64, both on the CPU.
    """
    everyone = torch.cat([part.to(keys.features.device) for part in world.gather(queries.cpu())])
    cosine, where = neighbours(everyone, keys.features, k)
    where = where.cpu()
    parts = world.gather((cosine.cpu(), keys.labels[where], keys.indices[where]))
    cosines, labels, places = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    best = in_order(cosines, places)[:, :k]
    return cosines.gather(1, best), labels.gather(1, best)


def neighbours(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The min(k, M) keys (M, D) with the largest inner product to each query (N, D) -> (values, positions), falling.

    Equal products come in the order of the keys.
    """
    k = min(k, len(keys))
    if not k:
        return queries.new_zeros(len(queries), 0), torch.zeros(
            len(queries), 0, dtype=torch.int64, device=queries.device
        )
    step = max(1, CHUNK // len(keys))
    with torch.autocast(queries.device.type, enabled=False):
        found = [_nearest(part.float() @ keys.float().T, k) for part in queries.split(step)]
    return torch.cat([values for values, _ in found]), torch.cat([positions for _, positions in found])


def _nearest(cosine: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row of (N, M), equal ones in the order of their columns."""
    values, positions = cosine.topk(k, dim=1)
    # topk takes any of those that are as large as the last one it takes: there the whole row is sorted.
    tied = (cosine >= values[:, -1:]).sum(dim=1) > k
    if tied.any():
        rows = cosine[tied].sort(dim=1, descending=True, stable=True)
        values[tied], positions[tied] = rows.values[:, :k], rows.indices[:, :k]
    order = in_order(values, positions)
    return values.gather(1, order), positions.gather(1, order)


def in_order(values: Tensor, places: Tensor) -> Tensor:
    """Columns of (N, k) by falling ``values``, equal ones by rising ``places``."""
    by_place = places.argsort(dim=1)
    falling = values.gather(1, by_place).argsort(dim=1, descending=True, stable=True)
    return by_place.gather(1, falling)


def vote(cosines: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Sum of ``exp(cosine / temperature)`` over the neighbours of each class; (N, k), (N, k) -> (N, K) float32."""
    # Relative to the nearest neighbour: the same winner, and no overflow at a small temperature.
    shares = ((cosines - cosines[:, :1]) / temperature).exp()
    return _sum_by_class(shares, labels, num_classes)


def count_votes(cosines: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """One vote per neighbour, equal counts decided by the larger sum of cosines; (N, k), (N, k) -> (N, K) float32."""
    k = labels.shape[1]
    # At most k / (k + 1) altogether: never worth a vote.
    tie_break = (cosines.clamp(-1, 1) + 1) / (2 * (k + 1))
    return _sum_by_class(1 + tie_break, labels, num_classes)


def _sum_by_class(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return values.new_zeros(len(values), num_classes).scatter_add_(1, labels, values)
