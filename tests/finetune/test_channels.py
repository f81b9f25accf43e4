"""Class selectivity and cosine distance against slow loops in float64, and what they are by definition."""

import math

import pytest
import torch
from torch import Tensor

from engine.world import World
from finetune.channels import ChannelSums, class_selectivity, cosine_distance
from tests.finetune.ranks import on_ranks

CLASSES = 4
ALONE = World(0, 1, torch.device("cpu"))


def draw(images: int, channels: int, positions: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(images)
    labels = torch.randint(CLASSES - 1, (images,), generator=generator)  # one class has no image
    return torch.randn(images, channels, positions, generator=generator) + labels[:, None, None] * 0.3, labels


def slow_selectivity(features: Tensor, labels: Tensor) -> list[float]:
    found = []
    for unit in range(features.shape[1]):
        means = []
        for label in sorted(set(labels.tolist())):
            own = [i for i in range(len(labels)) if int(labels[i]) == label]
            activities = [max(0.0, float(v)) for i in own for v in features[i, unit].double()]
            means.append(sum(activities) / len(activities))
        best = max(range(len(means)), key=lambda i: means[i])
        rest = sum(m for i, m in enumerate(means) if i != best) / (len(means) - 1)
        found.append((means[best] - rest) / (means[best] + rest) if means[best] + rest else 0.0)
    return found


def slow_distance(features: Tensor) -> list[float]:
    found = []
    for image in features.double():
        channels, total = [row.tolist() for row in image], 0.0
        for i, one in enumerate(channels):
            for j, other in enumerate(channels):
                if i == j:
                    continue
                lengths = math.sqrt(sum(a * a for a in one)) * math.sqrt(sum(b * b for b in other))
                cosine = sum(a * b for a, b in zip(one, other, strict=True)) / lengths if lengths else 0.0
                total += (1 - cosine) / 2
        found.append(total / (len(channels) * (len(channels) - 1)))
    return found


@pytest.mark.parametrize(("channels", "positions"), [(2, 1), (5, 6), (7, 15)])
def test_both_equal_slow_loops(channels: int, positions: int) -> None:
    features, labels = draw(23, channels, positions)
    features[:, 1] = 0  # a dead unit
    sums = ChannelSums(CLASSES)
    for part in (slice(0, 10), slice(10, 11), slice(11, 23)):
        sums.add(features[part], labels[part])
    selectivity, dead = sums.selectivity()
    assert selectivity.tolist() == pytest.approx(slow_selectivity(features, labels), abs=1e-9)
    assert dead.tolist() == [i == 1 for i in range(channels)]
    assert cosine_distance(features).tolist() == pytest.approx(slow_distance(features), abs=1e-9)
    assert sums.mean_distance() == pytest.approx(sum(slow_distance(features)) / 23, abs=1e-9)


@pytest.mark.parametrize("processes", [2, 3, 30])
def test_sums_over_processes_are_those_of_one(processes: int) -> None:
    features, labels = draw(11, 5, 4)
    alone = ChannelSums(CLASSES)
    alone.add(features, labels)

    def work(world: World) -> tuple[Tensor, float]:
        sums, mine = ChannelSums(CLASSES), slice(world.rank, None, world.size)
        if len(labels[mine]):
            sums.add(features[mine], labels[mine])
        sums.over(world, 5)
        return sums.selectivity()[0], sums.mean_distance()

    for selectivity, distance in on_ranks(processes, work):
        assert torch.allclose(selectivity, alone.selectivity()[0], atol=1e-12, rtol=0)
        assert distance == pytest.approx(alone.mean_distance(), abs=1e-12)


def test_selectivity_by_definition() -> None:
    # selective for one class, constant, dead, active for two of three classes
    means = torch.tensor([[0.3, 0.7, 0.0, 2.0], [0.0, 0.7, 0.0, 2.0], [0.0, 0.7, 0.0, 0.0]], dtype=torch.float64)
    assert class_selectivity(means).tolist() == pytest.approx([1.0, 0.0, 0.0, (2 - 1) / (2 + 1)], abs=1e-15)
    assert class_selectivity(means)[0] == 1
    tiny = class_selectivity(means * 1e-300)
    assert tiny.tolist() == pytest.approx([1.0, 0.0, 0.0, 1 / 3])
    with pytest.raises(ValueError, match="compares classes"):
        class_selectivity(means[:1])


def test_what_is_negative_counts_as_inactive() -> None:
    sums = ChannelSums(2)
    sums.add(torch.tensor([[[-5.0, 1.0]], [[-5.0, -3.0]]]).repeat(1, 2, 1), torch.tensor([0, 1]))
    assert sums.selectivity()[0].tolist() == [1.0, 1.0]


def test_cosine_distance_by_definition() -> None:
    row, other = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([-2.0, 1.0, 5.0])
    pairs = torch.stack([torch.stack([row, 3 * row]), torch.stack([row, -row]), torch.stack([row, other])])
    assert cosine_distance(pairs).tolist() == pytest.approx([0.0, 1.0, 0.5], abs=1e-12)
    dead = torch.stack([row, torch.zeros(3)])[None]
    assert cosine_distance(dead).item() == pytest.approx(0.5) and cosine_distance(0 * dead).item() == 0.5
    assert cosine_distance(1e-25 * pairs).tolist() == pytest.approx([0.0, 1.0, 0.5], abs=1e-12)
    with pytest.raises(ValueError, match="compares channels"):
        cosine_distance(pairs[:, :1])
