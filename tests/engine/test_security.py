"""A checkpoint runs no code, and what a run writes holds nothing of the environment."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from formats.files import write_json
from formats.hashes import file_digest
from tests.engine.test_faults import Place
from tests.launch import ROOT

SECRET = "hunter2-c0rrect-h0rse"


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


FILES = [
    ("zero0_fp32", "mp_rank_00_model_states.pt"),
    ("zero1_fp32", "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    ("zero3_fp32", "zero_pp_rank_0_mp_rank_00_model_states.pt"),
    ("zero0_fp32", "rank0.pt"),
    ("zero0_fp32", "ema.pt"),
]


@pytest.mark.parametrize(("deepspeed", "name"), FILES)
def test_a_checkpoint_with_code_in_it_runs_none(deepspeed: str, name: str, tmp_path: Path) -> None:
    """Its hash fits: whoever can put a file there can write its hash as well."""
    place = Place(tmp_path)
    assert place(f"deepspeed={deepspeed}", "fault.kind=SIGTERM", "fault.rank=0", processes=1) == [75]
    folder = place.output / "checkpoints/step00000013"
    torch.save({"module": Payload(tmp_path / "ran"), "buffers": Payload(tmp_path / "ran")}, folder / name)
    write_json(folder / "hashes.json", {name: file_digest(folder / name)})
    assert place(f"deepspeed={deepspeed}", processes=1) != [0]
    assert not (tmp_path / "ran").exists()
    assert "mkdir" in place.said(0)  # which is what it refused


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone"]])
def test_a_run_writes_nothing_of_the_environment(launcher: list[str], tmp_path: Path) -> None:
    place = Place(tmp_path)
    env = {**os.environ, "AWS_SECRET_ACCESS_KEY": SECRET, "WANDB_API_KEY": SECRET, "MY_PASSWORD": SECRET}
    command = [
        sys.executable,
        *launcher,
        "-m",
        "tests.engine.faulty",
        *place.words("train.steps=6", "train.epochs=null"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=True)
    files = [path for path in place.output.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in done.stdout + done.stderr
