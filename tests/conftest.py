"""What every test starts from: one CPU thread per process, and no GPU test without a GPU."""

import logging
import os

# Before torch is imported: tests start several processes on few cores, and sums must not depend on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest
import torch

from engine.world import World, join

torch.set_num_threads(1)


LONG = ("tests/test_readme.py", "tests/engine/test_faults.py", "tests/slurm/test_slurm.py")
"""What takes longest, one after the other: begun first, other files run beside it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and there is none"))


_LINEAR = torch.nn.functional.linear


@pytest.fixture(autouse=True)
def _linear_as_it_was() -> Iterator[None]:
    """torch's own: DeepSpeed's ZeRO-3 leaves one in its place that keeps other tensors for the backward pass."""
    yield
    torch.nn.functional.linear = _LINEAR


@pytest.fixture(autouse=True)
def _log_as_found() -> Iterator[None]:
    """The log as this test found it: an entry point sets one up that would tell all that later tests do."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = [kept for kept in handlers if type(kept).__module__.startswith("_pytest")]
    logging.root.setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """This process as a run of one; every later ``join`` in it is part of this one."""
    before = dict(os.environ)
    with join() as joined:
        # Programs that tests start are runs of their own.
        for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # DeepSpeed still asks for LOCAL_RANK
            if key not in before:
                os.environ.pop(key, None)
        yield joined
