"""The one DeepSpeed configuration of a run: what the recipe owns, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import ConfigError, load
from engine.ds import DS_CONFIGS, autocast_dtype, merge, micro_batch_size, read_ds_config, stage_of
from engine.schema import BaseConfig

NAMES = sorted(path.stem for path in DS_CONFIGS.glob("*.json"))


def config(*words: str) -> BaseConfig:
    return load(BaseConfig, {}, ["train.batch_size=24", "optim.lr=1", *words], "toy")


def with_json(folder: Path, content: dict[str, Any], *words: str) -> BaseConfig:
    path = folder / "ds.json"
    path.write_text(json.dumps(content))
    return config(f"deepspeed={path}", *words)


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_reads_and_is_what_its_name_says(name: str) -> None:
    content = read_ds_config(name)
    stage, precision, *offload = name.removeprefix("zero").split("_")
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert stage_of(content) == int(stage) and autocast_dtype(content) == dtype
    assert ("offload_optimizer" in content["zero_optimization"]) == (offload == ["offload"])
    # How it runs, and nothing of what is trained.
    assert content.keys() <= {"zero_optimization", "torch_autocast"}


def test_all_stages_and_precisions_are_there() -> None:
    kinds = [f"zero{stage}_{dtype}" for stage in range(4) for dtype in ("fp32", "bf16", "fp16")]
    assert set(kinds) <= set(NAMES)


@pytest.mark.parametrize("name", ["zero0_fp32", "zero0_bf16", "zero1_fp32", "zero1_bf16"])
def test_the_recipe_decides_batch_and_clipping(name: str) -> None:
    merged = merge(config(f"deepspeed={name}", "train.accumulation=3", "optim.clip_grad=0.5"), 2, "cpu")
    assert merged["train_batch_size"] == 24
    assert merged["train_micro_batch_size_per_gpu"] == 4
    assert merged["gradient_accumulation_steps"] == 3
    assert merged["gradient_clipping"] == 0.5
    assert "optimizer" not in merged and "scheduler" not in merged
    json.dumps(merged)  # written into the run folder


@pytest.mark.parametrize("name", ["zero0_fp32", "zero1_bf16"])
def test_no_clipping_is_said_aloud(name: str) -> None:
    assert merge(config(f"deepspeed={name}"), 1, "cpu")["gradient_clipping"] == 0.0


@pytest.mark.parametrize(("world", "parts", "micro"), [(1, 1, 24), (2, 1, 12), (3, 2, 4), (24, 1, 1), (1, 24, 1)])
def test_batch_arithmetic(world: int, parts: int, micro: int) -> None:
    chosen = config(f"train.accumulation={parts}")
    assert micro_batch_size(chosen, world) == micro
    assert micro * world * parts == chosen.train.batch_size


@pytest.mark.parametrize(("world", "parts"), [(5, 1), (2, 5), (48, 1)])
def test_a_batch_that_does_not_split_is_refused(world: int, parts: int) -> None:
    with pytest.raises(ConfigError, match=rf"24 does not split into {world} processes.*multiple of {world * parts}"):
        merge(config(f"train.accumulation={parts}"), world, "cpu")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"optimizer": {"type": "Adam"}}, "sets 'optimizer'.*optim.name"),
        ({"scheduler": {"type": "WarmupLR"}}, "sets 'scheduler'.*optim.lr"),
        ({"train_batch_size": 32}, "train_batch_size=32, the recipe says 24"),
        ({"train_micro_batch_size_per_gpu": 32}, "train_micro_batch_size_per_gpu=32, the recipe says 12"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2, the recipe says 1"),
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0, the recipe says 0"),
        ({"bf16": {"enabled": True}}, "bf16 or fp16 section.*torch_autocast"),
        ({"fp16": {"enabled": True}}, "bf16 or fp16 section.*torch_autocast"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "a CPU has no fp16"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.dtype must be bfloat16 or float16, got None"),
        ({"torch_autocast": {"enabled": True, "dtype": "int8"}}, "must be bfloat16 or float16, got 'int8'"),
    ],
)
def test_a_json_that_disagrees_is_refused_in_one_line(content: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        merge(with_json(tmp_path, content), 2, "cpu")
    assert len(str(caught.value).splitlines()) == 1 and "ds.json" in str(caught.value)


def test_a_json_that_agrees_or_leaves_it_open_is_taken(tmp_path: Path) -> None:
    content = {
        "train_batch_size": 24,
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": False},
    }
    merged = merge(with_json(tmp_path, content | {"prescale_gradients": True}), 2, "cpu")
    assert merged["gradient_clipping"] == 0 and merged["prescale_gradients"] is True


@pytest.mark.parametrize("name", [name for name in NAMES if "fp16" in name])
def test_fp16_is_for_a_gpu(name: str) -> None:
    with pytest.raises(ConfigError, match=r"a CPU has no fp16; use a .*_fp32 or .*_bf16"):
        merge(config(f"deepspeed={name}"), 1, "cpu")
    assert autocast_dtype(merge(config(f"deepspeed={name}"), 1, "cuda")) == torch.float16


@pytest.mark.parametrize("optimizer", ["lamb", "lars"])
def test_trust_ratios_need_whole_tensors(optimizer: str) -> None:
    merge(config("deepspeed=zero0_fp32", f"optim.name={optimizer}"), 1, "cpu")
    with pytest.raises(ConfigError, match=f"optim.name={optimizer} needs whole tensors.*zero0"):
        merge(config("deepspeed=zero1_fp32", f"optim.name={optimizer}"), 1, "cpu")


def test_a_file_that_is_none_is_refused_with_the_known_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"deepspeed=zero9: no such file.*zero0_bf16, zero0_fp16"):
        read_ds_config("zero9")
    for text, named in (("{", "no valid JSON"), ("[1]", "must hold an object"), ("\x00", "no valid JSON")):
        path = tmp_path / "bad.json"
        path.write_text(text)
        with pytest.raises(ConfigError, match=named):
            read_ds_config(str(path))
