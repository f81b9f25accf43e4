"""Every method and network kind under every ZeRO stage against plain PyTorch; the numbers are in docs/parity.md."""

from collections.abc import Iterator

import pytest

from tests.engine.parity import Case
from tests.engine.parity_check import Runs, is_table_of, write_table
from tests.engine.parity_methods import SUBJECTS, cases

pytestmark = pytest.mark.timeout(1500)

QUICK = [
    *cases("fp32", 2, (3,)),
    *[case for case in cases("fp32", 2, (0,)) if SUBJECTS[case.subject].batch_norm],
]
NIGHTLY = [
    *cases("fp32", 1),
    *[case for case in cases("fp32", 2) if case not in QUICK],
    *[
        case
        for case in cases("fp32", 2, (0, 3), words=("train.sync_batchnorm=false",))
        if SUBJECTS[case.subject].batch_norm
    ],
    *cases("fp32", 1, (0, 2), words=("train.checkpoint_blocks=true",)),
    *cases("fp32", 2, (3,), words=("train.checkpoint_blocks=true",)),
    *cases("bf16", 1),
    *cases("bf16", 1, (3,), words=("train.checkpoint_blocks=true",)),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("methods"), QUICK)
    yield runs
    write_table("methods", runs, QUICK, [*QUICK, *NIGHTLY])


@pytest.fixture(scope="module")
def nightly_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("nightly"), NIGHTLY)
    yield runs
    write_table("methods", runs, NIGHTLY, [*QUICK, *NIGHTLY])


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_losses_weights_and_average_are_those_of_plain_pytorch(case: Case, runs: Runs) -> None:
    compare(case, runs)


@pytest.mark.nightly
@pytest.mark.parametrize("case", NIGHTLY, ids=lambda case: case.name)
def test_so_are_those_of_every_other_way_to_run(case: Case, nightly_runs: Runs) -> None:
    compare(case, nightly_runs)


def compare(case: Case, runs: Runs) -> None:
    """Within rounding, and trained at all; and ZeRO-3 had every parameter cut."""
    difference = runs.difference(case)
    assert difference.within(case), difference
    assert difference.moved > 3 * case.tolerance
    assert bool(runs.found(case)["held"]) != case.cut


def test_the_table_has_the_cases() -> None:
    assert is_table_of("methods", [*QUICK, *NIGHTLY])
