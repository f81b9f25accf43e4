"""k-NN against slow loops, scikit-learn and other numbers of processes."""

import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from engine.cli import read_config
from engine.config import ConfigError, check_run, load
from engine.world import World
from finetune import knn
from finetune.__main__ import PROGRAM
from finetune.features import Extracted
from finetune.knn import KNNConfig, count_votes, neighbours, shared_neighbours, vote
from tests.finetune.ranks import on_ranks

CLASSES, TEMPERATURE = 4, 0.07


def draw(images: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    centres = torch.randn(CLASSES, 6, generator=torch.Generator().manual_seed(99))
    return F.normalize(centres[labels] + 1.5 * torch.randn(images, 6, generator=generator), dim=1), labels


@pytest.mark.parametrize("k", [1, 5, 20])
def test_votes_equal_a_slow_loop_and_scikit_learn(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "CHUNK", 300)  # several chunks, the last one smaller
    (keys, key_labels), (queries, _) = draw(83, 0), draw(29, 1)
    cosines, where = neighbours(queries, keys, k)
    weighted = vote(cosines, key_labels[where], CLASSES, TEMPERATURE).argmax(dim=1)
    counted = count_votes(cosines, key_labels[where], CLASSES).argmax(dim=1)
    for i, query in enumerate(queries.double()):
        similar = sorted(
            ((float(query @ key), int(label)) for key, label in zip(keys.double(), key_labels, strict=True)),
            reverse=True,
        )
        shares, counts, sums = [0.0] * CLASSES, [0] * CLASSES, [0.0] * CLASSES
        for cosine, label in similar[:k]:
            shares[label] += math.exp(cosine / TEMPERATURE)
            counts[label] += 1
            sums[label] += cosine + 1
        assert int(weighted[i]) == max(range(CLASSES), key=lambda c: shares[c])
        assert int(counted[i]) == max(range(CLASSES), key=lambda c: (counts[c], sums[c]))

    def weights(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / TEMPERATURE)

    reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights).fit(
        keys.numpy(), key_labels.numpy()
    )
    assert np.array_equal(weighted.numpy(), reference.predict(queries.numpy()))


def share(keys: Tensor, labels: Tensor, mine: slice) -> Extracted:
    return Extracted(keys[mine], labels[mine], torch.arange(len(keys))[mine])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_equally_near_images_are_taken_in_their_order(processes: int) -> None:
    once, _ = draw(6, 7)
    keys = once.repeat(4, 1)  # every image four times, each time of another class
    key_labels, queries = torch.arange(24), draw(5, 8)[0]
    order = [i for rank in range(processes) for i in range(rank, len(queries), processes)]
    products = (queries.double() @ once.double().T).argsort(dim=1, descending=True)
    slow = torch.tensor([[int(i) + 6 * copy for i in row for copy in range(4)] for row in products])

    def work(world: World) -> Tensor:
        mine = slice(world.rank, None, world.size)
        return shared_neighbours(share(keys, key_labels, mine), queries[mine], 7, world)[1]

    for labels in on_ranks(processes, work):
        assert torch.equal(labels, slow[:, :7][order])


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_shared_search_is_exact(processes: int) -> None:
    (keys, key_labels), (queries, _) = draw(13, 2), draw(7, 3)  # 5 processes: fewer keys each than neighbours asked for
    alone = neighbours(queries, keys, 4)
    order = [i for rank in range(processes) for i in range(rank, len(queries), processes)]

    def work(world: World) -> tuple[Tensor, Tensor]:
        mine = slice(world.rank, None, world.size)
        return shared_neighbours(share(keys, key_labels, mine), queries[mine], 4, world)

    for cosines, labels in on_ranks(processes, work):
        assert torch.allclose(cosines, alone[0][order], atol=1e-6)
        assert torch.equal(labels, key_labels[alone[1]][order])


def test_a_process_without_images_takes_part() -> None:
    (keys, key_labels), (queries, _) = draw(6, 4), draw(3, 5)

    def work(world: World) -> Tensor:
        end = 6 if world.is_main else 0
        return shared_neighbours(share(keys, key_labels, slice(end)), queries[: end // 2], 2, world)[1]

    for labels in on_ranks(2, work):
        assert torch.equal(labels, key_labels[neighbours(queries, keys, 2)[1]])


def test_a_small_temperature_does_not_overflow() -> None:
    votes = vote(torch.tensor([[0.9, 0.8, 0.8]]), torch.tensor([[0, 1, 1]]), 2, temperature=1e-4)
    assert torch.isfinite(votes).all() and int(votes.argmax()) == 0


def tiny(digits: Path, folder: Path, *overrides: str) -> KNNConfig:
    settings = [
        f"data.path={digits}",
        f"output_dir={folder}",
        "data.workers=0",
        "encoder.kwargs.depth=1",
        "data.labels=0.2",
    ]
    config = read_config(PROGRAM, "digits_knn", [*settings, *overrides])
    check_run(config)
    PROGRAM.check(config)
    assert isinstance(config, KNNConfig)
    return config


@pytest.mark.parametrize("processes", [1, 3])
def test_random_network_end_to_end(
    digits: Path, tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(digits, tmp_path, "knn.k=[1,20]")
    building, lock = knn.weights.build, threading.Lock()

    def one_at_a_time(*args: Any, **kwargs: Any) -> nn.Module:  # threads share torch's random state, processes do not
        with lock:
            return building(*args, **kwargs)

    monkeypatch.setattr(knn.weights, "build", one_at_a_time)
    on_ranks(processes, lambda world: knn.run(config, world))
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["k"] for row in rows] == [1, 20]
    for row in rows:
        assert row["task"] == "knn" and row["init"] == "random" and row["labels"] == 0.2
        assert row["train_images"] == 287 and row["eval_images"] == 359
        assert 20 < row["top1"] < 100  # pixels alone tell digits apart
    assert rows[0]["top1"] == rows[0]["top1_majority"]
    (tmp_path / "results.json").rename(tmp_path / "first.json")
    knn.run(config, World(0, 1, torch.device("cpu")))
    again = json.loads((tmp_path / "results.json").read_text())
    assert [row["top1"] for row in again] == [row["top1"] for row in rows]


def test_what_it_refuses(digits: Path, tmp_path: Path) -> None:
    world = World(0, 1, torch.device("cpu"))
    with pytest.raises(ConfigError, match="lower it"):
        knn.run(tiny(digits, tmp_path, "knn.k=[2000]"), world)
    with pytest.raises(ConfigError, match="ResNet has no class token"):
        knn.run(tiny(digits, tmp_path, "encoder.name=resnet18", "encoder.kwargs={}", "knn.features=token"), world)
    with pytest.raises(ConfigError, match=r"knn\.k is empty"):
        tiny(digits, tmp_path, "knn.k=[]")
    with pytest.raises(ConfigError, match="drop_path_rate has no effect"):
        tiny(digits, tmp_path, "encoder.drop_path_rate=0.1")
    with pytest.raises(ConfigError, match=r"unknown key 'optim\.lr'|unknown key 'optim'"):
        load(KNNConfig, {}, ["optim.lr=1"], "test")
