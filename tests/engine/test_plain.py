"""The plain PyTorch that everything is compared with: what it must tell apart, and what must not matter to it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine import plain
from tests.engine.lockstep import Lockstep, statistics_of_all
from tests.engine.parity import NETWORK, Case, scales
from tests.engine.plain import Trace


def train(folder: Path, *words: str, spoil: Any = None, **case: Any) -> Trace:
    """The network of the parity matrix for six steps; ``spoil`` changes the factors of its parameters."""
    chosen = Case("network", 0, words=("train.steps=6", *words), **case)
    method, config = NETWORK.make(chosen, folder)
    factors = scales(method, config)
    if spoil:
        factors = {name: spoil(name, *both) for name, both in factors.items()}
    loaders = [NETWORK.loader(config, rank, chosen.processes) for rank in range(chosen.processes)]
    return plain.train(method, loaders, config, factors, dtype=chosen.dtype)


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize(
    ("words", "spoil"),
    [
        pytest.param(("optim.clip_grad=0",), None, id="clipping"),
        pytest.param(("optim.weight_decay_end=0.1",), None, id="schedule-of-weight-decay"),
        pytest.param(("seed=1",), None, id="noise-of-the-step"),
        pytest.param((), lambda name, rate, decay: (rate, 1.0), id="decay-of-vectors"),
        pytest.param((), lambda name, rate, decay: (1.0, decay), id="layer-decay"),
        pytest.param(
            (),
            lambda name, rate, decay: (rate / 2 if name.startswith("encoder.blocks.2") else rate, decay),
            id="one-layer-off-by-one",
        ),
    ],
)
def test_what_would_be_wrong_is_seen(words: tuple[str, ...], spoil: Any, tmp_path: Path) -> None:
    right, wrong = train(tmp_path), train(tmp_path, *words, spoil=spoil)
    loss = max(abs(a - b) for a, b in zip(right.losses, wrong.losses, strict=True))
    assert max(loss, apart(right.weights, wrong.weights)) > 1e-4  # ten times the tolerance


def test_a_wrong_average_is_seen(tmp_path: Path) -> None:
    right, wrong = train(tmp_path), train(tmp_path, "train.ema_decay=0.7")
    assert right.losses == wrong.losses and apart(right.average, wrong.average) > 1e-4


def test_processes_and_parts_draw_for_themselves(tmp_path: Path) -> None:
    """The global batch is the same, the noise is not; without noise the split does not matter."""
    for split in ({"processes": 2}, {"parts": 2}):
        assert train(tmp_path, **split).losses[0] != pytest.approx(train(tmp_path).losses[0], abs=1e-4)


class Quiet(nn.Module):
    """A batch norm, and nothing random."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 11)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = torch.relu_(self.norm(self.conv(batch["image"]))).mean((2, 3))
        return {"loss": nn.functional.cross_entropy(self.fc(x), batch["label"])}


def quiet(folder: Path, processes: int, synchronise: bool) -> Trace:
    case = Case("network", 0, processes=processes, words=("train.steps=6", "optim.layer_decay=1"))
    _, config = NETWORK.make(case, folder)
    torch.manual_seed(0)
    method = Quiet()
    loaders = [NETWORK.loader(config, rank, processes) for rank in range(processes)]
    factors = {name: (1.0, 1.0) for name, _ in method.named_parameters()}
    return plain.train(method, loaders, config, factors, synchronise=synchronise)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_statistics_of_all_are_those_of_the_whole_batch(processes: int, tmp_path: Path) -> None:
    whole, shared = quiet(tmp_path, 1, synchronise=False), quiet(tmp_path, processes, synchronise=True)
    assert shared.losses == pytest.approx(whole.losses, abs=1e-5)
    for name, value in whole.weights.items():
        torch.testing.assert_close(shared.weights[name], value, rtol=0, atol=2e-5)
    if processes > 1:
        assert quiet(tmp_path, processes, synchronise=False).losses != pytest.approx(whole.losses, abs=1e-3)


def test_simulated_processes_run_in_turns_each_with_its_own_random_numbers() -> None:
    together, order = Lockstep(3), []

    def work(rank: int) -> list[float]:
        torch.manual_seed(rank)
        drawn = []
        for _ in range(2):
            order.append(rank)
            drawn.append(float(torch.rand(())))
            assert together.meet(rank, lambda all: [sum(all)] * 3) == 3
        return drawn

    found = together.run(work)
    assert order == [0, 1, 2, 0, 1, 2]
    for rank, drawn in enumerate(found):
        torch.manual_seed(rank)
        assert drawn == [float(torch.rand(())) for _ in range(2)]


def test_an_error_in_a_simulated_process_is_raised_and_does_not_hang() -> None:
    together = Lockstep(2)

    def work(rank: int) -> None:
        if rank == 1:
            raise ValueError("of rank 1")
        together.meet(rank, lambda all: all)

    with pytest.raises(ValueError, match="of rank 1"):
        together.run(work)


def test_batch_norms_are_put_back() -> None:
    original, norm = torch.batch_norm, nn.BatchNorm2d(2)
    together = Lockstep(2)
    with statistics_of_all(norm, together):
        together.run(lambda rank: norm(torch.randn(3, 2, 4, 4)))
    assert torch.batch_norm is original and norm.num_batches_tracked == 1
