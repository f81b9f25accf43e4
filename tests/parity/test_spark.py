"""SparK against numbers of its released code, and how much float32 may differ."""

from pathlib import Path

import numpy as np
import pytest

from tests.parity.__main__ import main
from tests.pretrain.test_spark import golden_case
from tests.shared import SHARED, needs_shared


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spark_resnet50", "spark_convnext_small"])
@needs_shared("goldens")
def test_released_code(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every quantity on both backends: float64 to 1e-9, float32 within the released code's own noise."""
    assert main([str(SHARED / "goldens" / f"{name}.npz")]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "FAIL" not in out and out.count(" (tiles) ") == out.count(" (masked) ") >= 31


def test_float32_may_differ_as_much_as_the_file_does_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Batch norm over few sites amplifies rounding: a float32 number is as good as its distance from the float64 one."""
    with np.load(golden_case(tmp_path / "exact.npz", "resnet")) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["loss"] = arrays["loss"] * np.float32(1 + 1e-3)
    np.savez(tmp_path / "noisy.npz", **arrays)
    assert main([str(tmp_path / "noisy.npz")]) == 0, capsys.readouterr().out
    capsys.readouterr()
    del arrays["loss_f64"]  # nothing tells any more that the float32 number is bad
    np.savez(tmp_path / "wrong.npz", **arrays)
    assert main([str(tmp_path / "wrong.npz")]) == 1
    failed = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert failed == [["loss", "(tiles)"], ["loss", "(masked)"]]
