"""A Slurm cluster on this machine for the tests of the batch files, where Slurm is installed."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.digits import write_digits
from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes; their daemons and jobs end with the tests."""
    if why := missing():
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # pytest's own may be too long for a socket
    made = Cluster(folder)
    made.start()
    try:
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of 40 digits: an epoch is two or three steps."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    chosen = sorted((folder / "train").rglob("*.png"))[::35][:40]
    (folder / "images.txt").write_text("".join(f"{path}\n" for path in chosen))
    return folder / "images.txt"
