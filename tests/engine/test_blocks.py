"""Blocks that are computed again, and shared batch norms, as DeepSpeed runs them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import ds
from engine.blocks import block_options
from engine.config import ConfigError, load
from engine.schema import BaseConfig
from tests import launch
from tests.engine.blocks_run import WAYS


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Of one process and of two: what every way of running gave."""
    folder = tmp_path_factory.mktemp("blocks")
    everything = {}
    for processes in (1, 2):
        launch.run(["-m", "tests.engine.blocks_run", str(folder)], processes, folder / f"log{processes}")
        everything[processes] = torch.load(folder / f"found_of_{processes}.pt", weights_only=True)
    return everything


@pytest.mark.parametrize(("processes", "network", "stage"), [(n, *way) for n, ways in WAYS.items() for way in ways])
def test_computed_again_is_bit_for_bit(
    processes: int, network: str, stage: str, found: dict[int, dict[str, Any]]
) -> None:
    """Losses, weights and running statistics: with stochastic depth, shared statistics, and weights in pieces."""
    plain, again = (found[processes][f"{network} {stage} {recompute}"] for recompute in (False, True))
    assert again["losses"] == plain["losses"] and len(set(plain["losses"])) == 3
    for name, value in plain["state"].items():
        assert torch.equal(again["state"][name], value), name


@pytest.mark.parametrize("processes", [1, 2])
def test_modules_that_were_stopped_are_forgotten(processes: int, found: dict[int, dict[str, Any]]) -> None:
    """ZeRO-3's list of modules that run does not grow from step to step."""
    first, *rest = found[processes]["resnet 3 True"]["running"]
    assert rest == [first, first]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("stage", ["0", "2", "3"])
def test_two_processes_with_batch_norms_are_one(stage: str, recompute: bool, found: dict[int, dict[str, Any]]) -> None:
    """The batch of one process on two, at every stage: the losses are its, and so are the running statistics."""
    one, two = found[1]["resnet 0 False"], found[2][f"resnet {stage} {recompute}"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for name, value in one["state"].items():
        if "running" in name:
            torch.testing.assert_close(two["state"][name], value, rtol=1e-4, atol=1e-5, msg=name)
        if "num_batches" in name:
            assert int(two["state"][name]) == int(value) == 3


def config(*words: str) -> BaseConfig:
    return load(BaseConfig, {}, ["train.batch_size=24", "optim.lr=1", *words], "toy")


def test_options_are_those_of_the_run() -> None:
    assert block_options(config()) == {"recompute": False, "compiled": False}
    words = ("train.checkpoint_blocks=true", "train.compile=true")
    assert block_options(config(*words)) == {"recompute": True, "compiled": True}
    assert block_options(config(words[0], "deepspeed=zero3_bf16")) == {"recompute": True, "compiled": False}


def test_compilation_at_zero_3_is_refused_by_name(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    for name in ("zero3_fp32", str(own)):
        assert ds.stage_of(ds.read_ds_config(name)) == 3
        with pytest.raises(ConfigError, match=r"train.compile=true does not go with deepspeed=.*use ZeRO 0 to 2"):
            block_options(config("train.compile=true", f"deepspeed={name}"))
