"""Every way to run one network through DeepSpeed against plain PyTorch; the numbers are in docs/parity.md.

``WRITE_DOCS=1 python -m pytest -n 0 tests/engine/test_parity_matrix.py tests/engine/test_parity_methods.py`` writes them anew.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import ConfigError
from engine.ds import DS_CONFIGS, merge, stage_of
from engine.optim import param_groups
from engine.schedule import Plan
from tests.engine import parity
from tests.engine.parity import NETWORK, Case, matrix, optimisers
from tests.engine.parity_check import Runs, is_table_of, write_table

pytestmark = pytest.mark.timeout(1500)

PRECISIONS = ("fp32", "bf16")
FP16 = [*matrix((0, 1, 2), ("fp16",), (1, 2)), *matrix((3,), ("fp16",), (1, 2), cut=True)]


def is_quick(case: Case) -> bool:
    """Whether a case of fp16 is run at every change."""
    return case.parts == case.processes == 2 and not case.offload


QUICK = [
    *matrix((0, 1, 2), PRECISIONS, (1, 2)),
    *[case for case in matrix((3,), PRECISIONS, (1, 2), cut=True) if not case.offload],
    *[case for case in matrix((3,), PRECISIONS, (1, 2)) if case.offload],
    *[case for case in FP16 if is_quick(case)],
    *optimisers(),
]
NIGHTLY = [
    *[case for case in matrix((3,), PRECISIONS, (1, 2), cut=True) if case.offload],
    *[case for case in matrix((3,), PRECISIONS, (1, 2)) if not case.offload],
    *[case for case in FP16 if not is_quick(case)],
    *matrix((3,), ("fp16",), (1, 2)),
]
GPU = [case for stage in range(4) for case in matrix((stage,), ("fp16", "bf16"), (1,), cut=stage == 3)]

by_name = pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("matrix"), QUICK)
    yield runs
    write_table("matrix", runs, QUICK, [*QUICK, *NIGHTLY])


@pytest.fixture(scope="module")
def nightly_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("nightly"), NIGHTLY)
    yield runs
    write_table("matrix", runs, NIGHTLY, [*QUICK, *NIGHTLY])


@by_name
def test_losses_weights_and_average_are_those_of_plain_pytorch(case: Case, runs: Runs) -> None:
    difference = runs.difference(case)
    assert difference.within(case), difference
    assert difference.moved > 10 * case.tolerance  # or a network that stands still would do


@pytest.mark.parametrize("case", [case for case in QUICK if case.precision == "fp16"], ids=lambda case: case.name)
def test_losses_of_float16_are_those_of_float32(case: Case, runs: Runs) -> None:
    """Within 2 %, with a step left out, clipping and parts."""
    expected = runs.reference(dataclasses.replace(case, precision="fp32"))[0].losses
    assert runs.found(case)["losses"] == pytest.approx(expected, rel=2e-2)


@pytest.mark.nightly
@pytest.mark.parametrize("case", NIGHTLY, ids=lambda case: case.name)
def test_zero3_as_it_is_shipped_cut_with_offload_and_fp16_with_offload(case: Case, nightly_runs: Runs) -> None:
    difference = nightly_runs.difference(case)
    assert difference.within(case), difference


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU, ids=lambda case: case.name)
def test_half_precision_on_a_gpu(case: Case, tmp_path: Path) -> None:
    difference = Runs(tmp_path, [case], device="cuda").difference(case)
    assert difference.within(case), difference


def expected_groups(case: Case, folder: Path) -> tuple[list[tuple[float, float]], list[int], Plan]:
    """Factors of the groups of :class:`tests.engine.parity.Network` in order, numbers in each, and the plan."""
    method, config = NETWORK.make(case, folder)
    factors = parity.scales(method, config)
    groups = sorted(set(factors.values()))
    numbers = [sum(method.get_parameter(n).numel() for n, found in factors.items() if found == g) for g in groups]
    return groups, numbers, Plan.make(config.optim, config.train, len(NETWORK.loader(config, 0, case.processes)))


@by_name
def test_every_group_has_the_planned_rate_and_decay_at_every_step(case: Case, runs: Runs, tmp_path: Path) -> None:
    """The layer that is wholly frozen leaves no gap: each group has its own layer's factors."""
    groups, numbers, plan = expected_groups(case, tmp_path)
    assert [rate for rate, decay in groups if decay == 0] == [0.5**4, 0.5**3, 0.5**1, 1.0]  # nothing of layer 2
    calls = runs.found(case)["calls"]
    # DeepSpeed makes room for an optimiser's moments by a step without a rate, of a gradient of zero.
    assert all((rate, decay) == (0.0, 0.0) for step, rate, decay, _ in calls if step < 0)
    shares = [math.ceil(count / (case.processes if case.stage else 1)) for count in numbers]
    left_out = [step for step in range(plan.steps) if step not in {call[0] for call in calls}]
    assert left_out in ([], [0]) if case.precision == "fp16" else not left_out  # the first loss scale may be too large
    for step in set(range(plan.steps)) - set(left_out):
        lr, weight_decay = float(plan.lr[step]), float(plan.weight_decay[step])
        found = [call[1:] for call in calls if call[0] == step]
        planned = [(lr * rate, weight_decay * decay) for rate, decay in groups]
        assert [(rate, decay) for rate, decay, _ in found] == planned, step
        # Of each tensor, or of each group, a process has a share, padded to whole numbers.
        assert all(count >= share for (_, _, count), share in zip(found, shares, strict=True)), step


def test_rates_and_decays_of_the_network_are_those_of_the_engine(tmp_path: Path) -> None:
    """The factors written down by hand, which plain PyTorch follows, are what the engine groups by."""
    method, config = NETWORK.make(Case("network", 0), tmp_path)
    found = param_groups(method, config.optim)
    assert parity.scales(method, config) == {n: (g["lr_scale"], g["wd_scale"]) for g in found for n in g["names"]}
    scales = [(group["lr_scale"], group["wd_scale"]) for group in found]
    assert scales == sorted(set(parity.scales(method, config).values()))


@by_name
def test_frozen_parts_stay_and_shared_ones_stay_shared(case: Case, runs: Runs, tmp_path: Path) -> None:
    method, _ = NETWORK.make(case, tmp_path)
    found = runs.found(case)
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(found["weights"][name], parameter.detach()), name
            torch.testing.assert_close(found["average"][name], parameter.detach(), rtol=0, atol=1e-6)
        else:
            assert not torch.equal(found["weights"][name], parameter.detach()), name
    for state in (found["weights"], found["average"]):
        for name, other in (
            ("head.weight", "encoder.blocks.0.up.weight"),
            ("again.down.weight", "encoder.blocks.0.down.weight"),
        ):
            assert torch.equal(state[name], state[other])


@by_name
def test_zero3_holds_no_parameter_between_steps_where_it_cuts_them(case: Case, runs: Runs, tmp_path: Path) -> None:
    """Else the cases would not show what happens to large networks."""
    method, _ = NETWORK.make(case, tmp_path)
    assert runs.found(case)["held"] == (0 if case.cut else sum(p.numel() for p in method.parameters()))


@pytest.mark.parametrize("optimizer", ["lamb", "lars"])
@pytest.mark.parametrize("name", sorted(path.stem for path in DS_CONFIGS.glob("zero[123]_*.json")))
def test_trust_ratios_are_refused_wherever_zero_cuts_tensors(name: str, optimizer: str, tmp_path: Path) -> None:
    _, config = NETWORK.make(Case("network", 0, words=(f"deepspeed={name}", f"optim.name={optimizer}")), tmp_path)
    with pytest.raises(ConfigError, match=f"optim.name={optimizer} needs whole tensors.*zero0_fp32 or zero0_bf16"):
        merge(config, 1, "cuda")


def test_the_configurations_of_the_cases_are_what_they_are_called(tmp_path: Path) -> None:
    """Offload and stage, of the files that ship and of those that cut."""
    for case in [*QUICK, *NIGHTLY]:
        _, config = NETWORK.make(case, tmp_path)
        merged: dict[str, Any] = merge(config, case.processes, "cuda")
        assert stage_of(merged) == case.stage
        assert ("offload_optimizer" in merged["zero_optimization"]) == case.offload
        assert merged["gradient_accumulation_steps"] == case.parts


def test_the_table_has_the_cases() -> None:
    assert is_table_of("matrix", [*QUICK, *NIGHTLY])
