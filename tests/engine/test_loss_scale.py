"""The loss scale of float16 falls, grows, is saved and is carried to another stage, at every ZeRO stage alike."""

import json
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.loss_scale import ZeroScaler
from tests import launch
from tests.engine.loss_scale_run import CHANGES, GROWTH, SCALE, STAGES

pytestmark = pytest.mark.timeout(400)

Found = dict[str, Any]
everywhere = pytest.mark.parametrize(("processes", "stage"), [(n, stage) for n in (1, 2) for stage in STAGES])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Found]:
    """What the runs did, by number of processes and name."""
    root = tmp_path_factory.mktemp("scale")
    for count in (1, 2):
        words = ["-m", "tests.engine.loss_scale_run", str(root)]
        launch.run(words, processes=count, log=root / f"log{count}.", timeout=300)
    return {count: json.loads((root / f"{count}.json").read_text()) for count in (1, 2)}


def logged(run: Found, key: str) -> list[Any]:
    return [line.get(key) for line in run["log"] if line["event"] == "train"]


def scales(run: Found) -> list[float]:
    """The loss scale before every step."""
    return [moment["used"] for moment in run["ranks"][0]]


def taken(run: Found, rank: int) -> list[bool]:
    """Whether each step but the last changed the weights of a process; the first, at a rate of zero, never does."""
    weights = [moment["weights"] for moment in run["ranks"][rank]]
    return [a != b for a, b in pairwise(weights)]


@everywhere
def test_a_scale_that_is_too_large_falls_and_the_steps_until_then_change_nothing(
    processes: int, stage: str, found: dict[int, Found]
) -> None:
    run = found[processes][stage]["whole"]
    used = scales(run)
    assert used[0] == SCALE and min(used) < SCALE / 32 and not run["ended"]
    fell = [b == a / 2 for a, b in pairwise(used)]
    assert len(used) == 24 and 5 <= sum(fell) <= 12
    assert {b / a for a, b in pairwise(used)} == {0.5, 1.0, 2.0}
    for rank in range(processes):
        assert taken(run, rank) == [not one for one in fell]
        assert [moment["used"] for moment in run["ranks"][rank]] == used
        assert [moment["state"]["scale"] for moment in run["ranks"][rank]] == used
    # Doubled after so many good steps in a row, and only then.
    for i in range(1, len(used)):
        if used[i] == 2 * used[i - 1]:
            assert not any(fell[i - GROWTH : i])
    # None of it is a fault of the run.
    assert run["skipped"] == 0 and {line["event"] for line in run["log"]} == {"train"}
    assert logged(run, "loss_scale")[:-1] == used[1:]


@everywhere
def test_the_norm_is_that_of_gradients_without_the_scale(processes: int, stage: str, found: dict[int, Found]) -> None:
    """At ZeRO-0 DeepSpeed tells none; where the step was left out there is none."""
    norms, used = logged(found[processes][stage]["plain"], "grad_norm"), scales(found[processes][stage]["plain"])
    expected = logged(found[processes]["float32"], "grad_norm")
    if stage == "zero0_fp16":
        assert norms == [None] * 3
    else:
        assert used == [65536.0] * 3 and norms == pytest.approx(expected, rel=2e-2)
        whole = found[processes][stage]["whole"]
        assert [norm is not None for norm in logged(whole, "grad_norm")][:-1] == taken(whole, 0)


@everywhere
def test_losses_are_those_of_float32(processes: int, stage: str, found: dict[int, Found]) -> None:
    losses = logged(found[processes][stage]["plain"], "loss")
    assert losses == pytest.approx(logged(found[processes]["float32"], "loss"), rel=2e-2)


@everywhere
def test_an_overflow_on_one_process_leaves_out_the_step_on_all(
    processes: int, stage: str, found: dict[int, Found]
) -> None:
    """A gradient of the seventh step is not finite on the last rank; the run goes on and counts nothing."""
    run = found[processes][stage]["overflow"]
    for rank in range(processes):
        assert [moment["used"] for moment in run["ranks"][rank]] == [65536.0] * 7 + [32768.0] * 17
        assert taken(run, rank) == [False] + [True] * 5 + [False] + [True] * 16
    assert run["skipped"] == 0 and not run["ended"] and all(math.isfinite(one) for one in logged(run, "loss"))


@everywhere
def test_gradients_that_no_scale_helps_are_counted(processes: int, stage: str, found: dict[int, Found]) -> None:
    """From a scale of 1 on: of 4, 2, 1 and 0.5 the last two count, and train.max_skipped is 1."""
    run = found[processes][stage]["hopeless"]
    assert scales(run) == [4.0, 2.0, 1.0, 0.5] and run["skipped"] == 2
    assert "the gradient is not finite at step 4, the last of 2 such steps" in run["ended"]


@everywhere
def test_a_loss_that_is_not_finite_is_counted(processes: int, stage: str, found: dict[int, Found]) -> None:
    run = found[processes][stage]["stopped"]
    assert run["skipped"] == 1 and "the loss is not finite on rank 0" in run["ended"] and "at step 14" in run["ended"]


@everywhere
def test_a_continued_run_has_the_scale_and_the_losses_of_one_without_a_break(
    processes: int, stage: str, found: dict[int, Found]
) -> None:
    """Continued from step 10 of 24, in the middle of the good steps that are counted."""
    whole, resumed = found[processes][stage]["whole"], found[processes][stage]["resumed"]
    assert scales(resumed) == scales(whole)[10:]
    for rank in range(processes):
        assert resumed["ranks"][rank] == whole["ranks"][rank][10:]
    for key in ("loss", "loss_scale", "grad_norm"):
        assert logged(resumed, key) == logged(whole, key)
    assert whole["ranks"][0][10]["state"]["_growth_tracker"] > 0


@pytest.mark.parametrize(("processes", "change"), [(n, change) for n in (1, 2) for change in CHANGES])
def test_another_stage_keeps_the_scale(processes: int, change: tuple[str, str], found: dict[int, Found]) -> None:
    source, target = change
    before, after = found[processes][source]["whole"], found[processes][f"{source}>{target}"]
    for rank in range(processes):
        first = after["ranks"][rank][0]
        assert first["state"] == before["ranks"][rank][10]["state"] and first["used"] == first["state"]["scale"]
    assert logged(after, "loss") == pytest.approx(logged(before, "loss"), rel=5e-2) and not after["ended"]


def test_the_rule_is_that_of_torch() -> None:
    """Step by step beside torch's own GradScaler, which is told of the same overflows by real gradients."""
    told: list[float] = []
    zero = SimpleNamespace(torch_autocast_gradscaler=1, compute_grad_norm=False, override_loss_scale=told.append)
    ours, theirs = ZeroScaler(zero), torch.amp.GradScaler("cpu")
    weight = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for scaler in (ours, theirs):
        scaler.load_state_dict(scaler.state_dict() | {"growth_interval": 3})
    for bad in (False, False, True, False, False, False, False, True, True, False):
        weight.grad = None
        theirs.scale(weight * (math.inf if bad else 1.0)).backward()
        theirs.step(optimizer)
        theirs.update()
        ours.follow(bad)
        assert ours.state_dict() == theirs.state_dict() and told[-1] == theirs.get_scale()
    assert {32768.0, 65536.0, 16384.0} <= set(told)
    assert zero.check_grad_overflow  # where it takes no norm, in which an overflow would show
