"""``train.checkpoint_blocks``, ``train.compile`` and ``train.sync_batchnorm`` in fine-tuning."""

from pathlib import Path

import pytest

from engine import cli
from engine.config import ConfigError
from engine.log import read_log
from engine.world import World
from finetune.__main__ import PROGRAM
from models.blocks import Arranged
from tests.finetune.test_classify import TINY, configure

RESNET = ("encoder.name=resnet18", "encoder.kwargs={layers: [1, 1, 1, 1], channels: [8, 8, 16, 16]}")


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("encoder", ["vit", "resnet"])
def test_a_run_with_checkpointed_blocks_is_the_run_without(encoder: str, digits: Path, tmp_path: Path) -> None:
    """The same losses and the same model, with stochastic depth and dropout."""
    tiny = [word for word in TINY if not word.startswith("train.epochs")]
    words = [f"data.path={digits}", *tiny, "encoder.drop_path_rate=0.2", "train.steps=3", "train.log_steps=1"]
    words += ["train.eval_epochs=0", "train.warmup_epochs=0", "optim.layer_decay=1"]
    words += [*RESNET] if encoder == "resnet" else []
    for folder, more in (("plain", []), ("again", ["train.checkpoint_blocks=true"])):
        assert cli.main(PROGRAM, ["digits_vit", *words, f"output_dir={tmp_path}/{folder}", *more]) == 0
    lines = [
        [line["loss"] for line in read_log(tmp_path / folder / "log.jsonl") if line["event"] == "train"]
        for folder in ("plain", "again")
    ]
    assert len(lines[0]) == 3 and lines[0] == lines[1]
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("plain", "again")]
    assert files[0] == files[1]


def test_a_classifiers_blocks_are_arranged(digits: Path, tmp_path: Path, world: World) -> None:
    from finetune.classify import build

    method, _, _ = build(configure(digits, tmp_path, "train.checkpoint_blocks=true"), world)
    assert sum(isinstance(module, Arranged) for module in method.modules()) == len(method.encoder.blocks)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["checkpoint_blocks", "compile"])
def test_a_probe_has_no_use_for_them(key: str, digits: Path) -> None:
    words = [f"data.path={digits}", f"train.{key}=true"]
    config = cli.read_config(PROGRAM, "digits_probe", words)
    with pytest.raises(ConfigError, match=rf"train\.{key} has no place in a probe"):
        PROGRAM.check(config)
