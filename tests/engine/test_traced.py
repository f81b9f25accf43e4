"""Steps on shapes alone: bytes and operations of small networks, counted by hand."""

import resource
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.traced import Step, ValueNeededError, trace, without_weights


class Method(nn.Module):
    """One function of images as a method."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": self.layers(batch["image"]).sum()}


def traced(method: type[nn.Module], image: Tensor, dtype: torch.dtype | None = None, **options: Any) -> Step:
    with without_weights() as mode:
        built = method()
    return trace(built, {"image": image}, mode, dtype, **options)


class Two(Method):
    def __init__(self) -> None:
        super().__init__(nn.Linear(50, 40, bias=False), nn.Linear(40, 30, bias=False))


def test_activations_and_gradients_of_two_layers() -> None:
    step = traced(Two, torch.zeros(7, 50))
    image, middle, last = 4 * 7 * 50, 4 * 7 * 40, 4 * 7 * 30
    second, first = 4 * 30 * 40, 4 * 40 * 50
    # Going back: the result's gradient is one number seen as many; the gradient of what lies between is there, the
    # image and what lies between are kept; then come the gradients of the weights.
    assert step.moments[-1][1] == first + second
    assert step.activations >= image + middle + last
    assert step.peak(lambda made: made) < image + middle + last + first + second + middle + 100
    forward, back = 2 * 7 * (50 * 40 + 40 * 30), 2 * 7 * (40 * 30 + 50 * 40 + 40 * 30)
    assert step.flops == forward + back  # no gradient of the image


def test_twice_the_images_twice_the_activations_and_operations() -> None:
    once, twice = (traced(Two, torch.zeros(n, 50)) for n in (50, 100))
    assert twice.flops == 2 * once.flops
    assert twice.activations / once.activations == pytest.approx(2, rel=0.4)  # gradients on their way stay the same


class Depthwise(Method):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(8, 16, 1, bias=False), nn.Conv2d(16, 16, (3, 5), padding=(1, 2), groups=16, bias=False)
        )


def test_operations_of_grouped_convolutions_on_maps_that_are_not_square() -> None:
    step = traced(Depthwise, torch.zeros(2, 8, 6, 9))
    sites = 2 * 6 * 9
    point, depth = 2 * sites * 8 * 16, 2 * sites * 16 * 15
    assert step.flops == point + depth + (point + 2 * depth)


class Deep(Method):
    def __init__(self) -> None:
        super().__init__(*(nn.Linear(40, 40) for _ in range(12)))


def test_autocast_halves_what_is_kept_between_layers() -> None:
    plain, half = (traced(Deep, torch.zeros(1000, 40), dtype) for dtype in (None, torch.bfloat16))
    assert half.flops == plain.flops
    maps = 1000 * 40
    # The image, its half copy, twelve results, the last of them in float32 for the sum; half copies of the weights.
    assert half.activations == pytest.approx((4 + 2 + 12 * 2 + 4) * maps + 12 * 2 * 40 * 41, rel=0.01)
    assert plain.activations == pytest.approx(4 * 13 * maps, rel=0.01)


class Norms(Method):
    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))


def test_a_gpu_normalises_in_float32_under_autocast() -> None:
    cpu, gpu = (traced(Norms, torch.zeros(200, 64), torch.bfloat16, gpu=gpu) for gpu in (False, True))
    assert gpu.activations > cpu.activations


def test_accumulated_gradients_are_there_from_the_start() -> None:
    first, later = (traced(Two, torch.zeros(7, 50), accumulated=flag) for flag in (False, True))
    assert first.moments[0][1] == 0
    assert {made for _, made in later.moments} == {4 * (50 * 40 + 40 * 30)}


class Huge(Method):
    def __init__(self) -> None:
        super().__init__(*(nn.Linear(10_000, 10_000) for _ in range(5)))


def test_weights_take_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = traced(Huge, torch.zeros(100, 10_000))
    assert step.moments[-1][1] == 5 * 4 * (10_000**2 + 10_000)  # two gigabytes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


class Selects(nn.Module):
    """Encodes as many rows as a mask that is drawn says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 10))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image = batch["image"]
        hidden = torch.rand(image.shape[:2]).argsort(1) < 3
        kept = image[~hidden] @ self.weight
        whole = torch.zeros(*image.shape[:2], 10)
        whole[~hidden] = kept
        rows = torch.empty(len(kept), 10)
        torch.mul(kept.detach(), 2, out=rows)
        return {"loss": whole.square().sum() + rows.sum()}


def test_masks_that_are_drawn_decide_about_shapes() -> None:
    step = traced(Selects, torch.zeros(4, 5, 6))
    rows = 4 * (5 - 3)
    assert step.flops == 2 * 2 * rows * 6 * 10  # forward, and the weight's gradient


class Asks(Selects):
    question = "item"

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found = batch["image"] @ self.weight
        if self.question == "item":
            found = found * float(found.detach().max())
        elif self.question == "list":
            found = found * len(found.tolist())
        else:
            found = found[found > 0]
        return {"loss": found.sum()}


@pytest.mark.parametrize("question", ["item", "list", "mask"])
def test_a_step_that_needs_values_is_refused(question: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Asks, "question", question)
    with pytest.raises(ValueNeededError, match="computes"):
        traced(Asks, torch.ones(2, 3, 6))


@pytest.mark.parametrize("gpu", [True, False])
def test_a_tensor_says_whether_it_stands_for_one_of_a_gpu(gpu: bool) -> None:
    """By which a network chooses its way; where new tensors are to be made stays as it is."""
    said = []

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            x = batch["image"]
            said.append(x.is_cpu)
            return {"loss": (self.layer(x) + torch.zeros(5, device=x.device)).sum()}

    traced(Asks, torch.zeros(3, 5), gpu=gpu)
    assert said == [not gpu] and torch.zeros(1).is_cpu


def test_nothing_is_left_behind() -> None:
    register = nn.Module.register_parameter
    with pytest.raises(ZeroDivisionError), without_weights():
        nn.Linear(2, 2)
        raise ZeroDivisionError
    assert nn.Module.register_parameter is register
    assert float(F.linear(torch.ones(1, 2), nn.Linear(2, 1).weight.detach().fill_(1.0))) == 2.0
