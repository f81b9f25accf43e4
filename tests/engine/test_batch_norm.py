"""Synchronised batch norm: two processes with unequal shares compute what one with all images does."""

import copy
import logging
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.layers.evo_norm import EvoNorm2dB0
from torch import Tensor, nn

from engine.batch_norm import BatchNorm, Synchronised, share, synchronise
from engine.config import ConfigError
from engine.world import World
from finetune.probe import FeatureNorm
from models.sparse import sparse_images
from models.sparse.tensor import map_values, plain
from tests import launch
from tests.engine import batch_norm_run as case

NAMES = ("out", "grad")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes computed."""
    folder = tmp_path_factory.mktemp("batch_norm")
    launch.run(["-m", "tests.engine.batch_norm_run", str(folder)], 2, folder / "log")
    return [torch.load(folder / f"found{rank}.pt", weights_only=True) for rank in range(2)]


def close(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def compare(found: list[dict[str, Any]], expected: dict[str, Any], tolerance: float = 1e-9) -> None:
    """Outputs and input gradients image by image, weights' gradients as their sum, statistics the same on every process."""
    for name in NAMES:
        close(torch.cat([part[name] for part in found]), expected[name], name, tolerance)
    for name, gradient in expected["weights"].items():
        close(sum(part["weights"][name] for part in found), gradient, name, tolerance)
    for part in found:
        assert part["buffers"].keys() == expected["buffers"].keys()
        for name, value in expected["buffers"].items():
            close(part["buffers"][name], value, name, tolerance)


@pytest.mark.parametrize("kind", case.KINDS)
def test_two_processes_are_one(kind: str, found: list[dict[str, Any]]) -> None:
    """Outputs, gradients and running statistics, to 1e-9, with unequal numbers of images."""
    norm, x = case.norm_of(kind)
    compare([part[kind] for part in found], case.twice(norm, x, case.weights_of(x)))


def test_local_statistics_would_be_seen(found: list[dict[str, Any]]) -> None:
    """The comparison fails for a process that normalises by its own images."""
    norm, x = case.norm_of("2d")
    alone = [copy.deepcopy(norm)(x[:5]), copy.deepcopy(norm)(x[5:])]
    together = norm(x)
    assert float((torch.cat(alone) - together).detach().abs().max()) > 0.1


def test_statistics_are_float32_under_bfloat16(found: list[dict[str, Any]]) -> None:
    """Of bfloat16 maps: those that float32 maps of the same values have, and outputs rounded once."""
    norm, x = case.norm_of("2d", torch.float32)
    wide = x.bfloat16().float()
    expected = case.twice(copy.deepcopy(norm), wide, case.weights_of(x.bfloat16()).float())
    parts = [part["bfloat16"] for part in found]
    assert all(part["out"].dtype == torch.bfloat16 for part in parts)
    for part in parts:
        for name in ("running_mean", "running_var"):
            assert part["buffers"][f"0.{name}"].dtype == torch.float32
            close(
                part["buffers"][f"0.{name}"], expected["buffers"][name], name, 1e-3
            )  # the second input is rounded, too
    out = torch.cat([part["out"] for part in parts])
    assert float((out == expected["out"].bfloat16()).float().mean()) > 0.99
    close(sum(part["weights"]["0.weight"] for part in parts), expected["weights"]["weight"], "weight", 1e-4)


def rows(backend: str, rank: int, network: case.Network) -> Tensor:
    """Visible sites of the first convolution's output, (sites, C)."""
    images, mask, _ = case.sparse_case(rank)
    x: Any = network.conv1(sparse_images(images, mask, backend))
    return x.sites.geometry.rows(plain(x), x.sites).flatten(0, 1)


@pytest.mark.parametrize("backend", ["tiles", "masked"])
def test_visible_sites_of_all_processes_count(backend: str, found: list[dict[str, Any]]) -> None:
    """Unequal numbers of visible sites: statistics are those of all of them in one heap."""
    network = case.Network().double().train()
    norm = nn.BatchNorm1d(6).double().train()
    norm(torch.cat([rows(backend, rank, network) for rank in range(2)]))
    for part in found:
        for name in ("running_mean", "running_var"):
            close(part[f"sparse_{backend}"]["buffers"][f"norm1.{name}"], getattr(norm, name), name)


def test_backends_agree_on_two_processes(found: list[dict[str, Any]]) -> None:
    """Tiles make a norm's output again in the backward pass, the masked backend keeps it; gradients tell."""
    for part in found:
        ours, theirs = part["sparse_tiles"], part["sparse_masked"]
        for name in NAMES:
            close(ours[name], theirs[name], name)
        for kind in ("weights", "buffers"):
            for name, value in theirs[kind].items():
                close(ours[kind][name], value, name)


def test_sparse_gradients_are_those_of_the_sum_of_losses(found: list[dict[str, Any]]) -> None:
    """Of the whole network, by differences: the loss of both processes as one function of an image's pixels and of a weight."""

    def loss(change: float, where: str) -> float:
        """Both processes' loss, their norms' statistics joined by hand."""
        network = case.Network().double().train()
        x, weights = [], []
        for rank in range(2):
            images, mask, weight = case.sparse_case(rank)
            if where == "pixel" and rank == 1:
                images[0, 0] += change
            x.append(sparse_images(images, mask, "masked"))
            weights.append(weight)
        if where == "weight":
            network.conv1.weight.data[0, 0, 1, 1] += change
        total = 0.0
        with torch.no_grad():
            maps = joined(network.norm1, [network.conv1(one) for one in x])
            maps = joined(network.norm2, [network.conv2(torch.relu(one)) for one in maps])
            maps = [torch.relu(one) for one in maps]
            gates = [network.gate[0](one.mean((2, 3), keepdim=True)) for one in maps]
            images_of = [plain(gate) for gate in gates]
            gate = network.gate[1](torch.cat(images_of)).sigmoid().split(case.SHARES)
            for one, g, weight in zip(maps, gate, weights, strict=True):
                hidden = one.sites.geometry.dense(plain(one) * g, one.sites)
                total += float((hidden * weight).sum())
        return total

    step = 1e-5
    by_weight = (loss(step, "weight") - loss(-step, "weight")) / (2 * step)
    by_pixel = (loss(step, "pixel") - loss(-step, "pixel")) / (2 * step)
    ours = sum(float(part["sparse_tiles"]["weights"]["conv1.weight"][0, 0, 1, 1]) for part in found)
    assert ours == pytest.approx(by_weight, rel=1e-6)
    assert float(found[1]["sparse_tiles"]["grad"][0, 0].sum()) == pytest.approx(by_pixel, rel=1e-6)


def joined(norm: nn.BatchNorm2d, maps: list[Any]) -> list[Any]:
    """A batch norm over the visible sites of several sparse maps at once."""
    heaps = [one.sites.geometry.rows(plain(one), one.sites) for one in maps]
    out = F.batch_norm(torch.cat([h.flatten(0, 1) for h in heaps]), None, None, norm.weight, norm.bias, True)
    parts = out.split([h.shape[0] * h.shape[1] for h in heaps])
    return [
        map_values(one.sites.geometry.from_rows(part.view_as(heap), one.sites), one.sites, clean=True)
        for one, part, heap in zip(maps, parts, heaps, strict=True)
    ]


def test_one_image_per_process_is_enough(found: list[dict[str, Any]]) -> None:
    norm, _ = case.norm_of("1d")
    norm(torch.tensor([[0.0] * 4, [1.0] * 4], dtype=torch.float64))
    for part in found:
        for name, value in norm.named_buffers():
            close(part["single"][name], value, name)


# --- without a second process ---------------------------------------------------------------------------------------


class Pair(World):
    """Two processes with the same images, seen from one of them; counts what is asked of the other."""

    def __init__(self) -> None:
        super().__init__(0, 2, torch.device("cpu"))
        object.__setattr__(self, "sums", 0)

    def sum(self, values: Any) -> Tensor:
        object.__setattr__(self, "sums", self.sums + 1)  # type: ignore[attr-defined]
        return 2 * torch.as_tensor(values, dtype=torch.float64)


def networks() -> list[nn.Module]:
    return [
        timm.create_model("resnet10t", num_classes=2),
        timm.create_model("test_efficientnet", num_classes=2),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)),
    ]


@pytest.mark.parametrize("number", range(3))
def test_names_keys_and_classes_stay(number: int) -> None:
    network = networks()[number]
    keys, printed = list(network.state_dict()), str(network)
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kinds = [type(m) for m in norms]
    world = Pair()
    assert synchronise(network, world) == len(norms)
    assert synchronise(network, world) == 0, "they are synchronised already"
    assert list(network.state_dict()) == keys and str(network) == printed
    for norm, kind in zip(norms, kinds, strict=True):
        assert isinstance(norm, kind) and type(norm).__name__ == kind.__name__ and isinstance(norm, Synchronised)
    twin = copy.deepcopy(network)
    assert list(twin.state_dict()) == keys
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    asked = world.sums  # type: ignore[attr-defined]
    network.eval()(x)
    assert world.sums == asked, "evaluation asks nobody"  # type: ignore[attr-defined]
    network.train()(x)
    assert world.sums == asked + len(norms)  # type: ignore[attr-defined]


def test_evaluation_is_as_before() -> None:
    network = networks()[0].eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = network(x)
    synchronise(network, Pair())
    assert torch.equal(network(x), expected)


def test_one_process_changes_nothing() -> None:
    network = networks()[0]
    classes = [type(m) for m in network.modules()]
    lone = World(0, 1, torch.device("cpu"))
    assert synchronise(network, lone) == 0
    share(network, lone, wanted=True)
    share(network, lone, wanted=False)
    assert [type(m) for m in network.modules()] == classes


def test_twice_the_same_images_are_once_the_same() -> None:
    """Statistics of two equal halves are those of one; only the unbiased variance knows of twice as many values."""
    torch.manual_seed(0)
    x = torch.randn(4, 5, 3, 3) * 2 + 1
    ours = BatchNorm(Pair().sum)(x, None, None, torch.ones(5), torch.zeros(5), True)
    close(ours, F.batch_norm(x, None, None, torch.ones(5), torch.zeros(5), True), "out", 1e-5)


def test_a_single_value_is_refused() -> None:
    norm = BatchNorm(lambda values: values)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.ones(1, 3), torch.zeros(3), torch.ones(3), training=True)


def test_a_process_without_values_takes_part() -> None:
    norm = BatchNorm(lambda values: values + torch.tensor([4.0, 8.0, 20.0], dtype=torch.float64))
    running = torch.zeros(1), torch.zeros(1)
    out = norm(torch.ones(0, 1), *running, None, None, True, 1.0)
    assert out.shape == (0, 1) and float(running[0]) == 2.0 and float(running[1]) == pytest.approx(4 / 3)


def test_what_cannot_be_added_up_is_refused_by_name() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    for wrong in (Own(4), EvoNorm2dB0(4)):
        network = nn.Sequential(nn.Conv2d(3, 4, 1), wrong)
        with pytest.raises(ConfigError, match=rf"1 \({type(wrong).__name__}\).*train.sync_batchnorm=false"):
            synchronise(network, Pair())


def test_norms_that_add_up_by_themselves_are_left_alone() -> None:
    world = Pair()
    network = nn.Sequential(FeatureNorm(4, world), nn.SyncBatchNorm(4), BatchNormAct2d(4))
    assert synchronise(network, world) == 1
    assert [isinstance(m, Synchronised) for m in network] == [False, False, True]


def test_separate_statistics_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        share(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), Pair(), wanted=False)
        assert not caplog.records
        share(nn.Sequential(nn.BatchNorm1d(2)), Pair(), wanted=False)
    assert [record for record in caplog.records if "rank 0 are kept" in record.message]
