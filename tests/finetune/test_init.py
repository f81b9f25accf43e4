"""``init=``: the word, what it stands for, and what a run keeps of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import cli
from engine.checkpoint import identity
from engine.config import ConfigError, check_run, read_recipe, to_yaml
from engine.world import World
from finetune import classify, weights
from finetune.__main__ import PROGRAM
from finetune.init import pretrained_of, told
from pretrain.__main__ import PROGRAM as PRETRAIN

VIT = "encoder.kwargs={patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2, global_pool: avg, fc_norm: false}"


def config_of(*words: str, recipe: str = "digits_vit") -> Any:
    return cli.read_config(PROGRAM, recipe, list(words))


def save_encoder(folder: Path, *words: str) -> Path:
    """A run folder with a network of random weights, as a fine-tuning leaves it."""
    config = config_of("data.image_size=24", VIT, "seed=77", *words)
    model = weights.build(config.encoder, config.data, config.seed, num_classes=10)
    folder.mkdir()
    weights.save_model(model, config.encoder, config.data, [str(i) for i in range(10)], folder)
    return folder


@pytest.mark.parametrize("recipe", ["digits_vit", "digits_knn", "digits_probe"])
def test_the_word_stands_for_the_setting_in_every_task(recipe: str, tmp_path: Path) -> None:
    assert config_of("init=scratch", recipe=recipe).encoder.pretrained == ""
    assert config_of("init=pretrained", recipe=recipe).encoder.pretrained == "true"
    assert config_of(f"init={tmp_path}", recipe=recipe).encoder.pretrained == str(tmp_path)


def test_scratch_is_also_meant_where_the_recipe_has_weights(tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(f"task: classify\nencoder: {{pretrained: {tmp_path}}}\n")
    assert config_of(recipe=str(recipe)).encoder.pretrained == str(tmp_path)
    assert config_of("init=scratch", recipe=str(recipe)).encoder.pretrained == ""
    # What a run writes down is resolved, and a recipe itself.
    (tmp_path / "config.yaml").write_text(to_yaml(config_of("init=pretrained", recipe=str(recipe))))
    assert "init" not in read_recipe(tmp_path / "config.yaml")
    assert config_of(recipe=str(tmp_path / "config.yaml")).encoder.pretrained == "true"


def test_a_recipe_may_say_it_too(tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text("task: classify\ninit: pretrained\n")
    assert config_of(recipe=str(recipe)).encoder.pretrained == "true"
    assert config_of("init=scratch", recipe=str(recipe)).encoder.pretrained == ""
    assert config_of("encoder.pretrained=", recipe=str(recipe)).encoder.pretrained == ""


def test_files_with_the_name_of_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("true", "scratch"):
        (tmp_path / name).touch()
    assert pretrained_of("true") == "./true" and pretrained_of("./scratch") == "./scratch"
    assert pretrained_of("scratch") == "" and pretrained_of("pretrained") == "true"
    assert [told(value) for value in ("", "true", "./true")] == ["scratch", "pretrained", "./true"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["init=scratch", "encoder.pretrained=true"], "init stands for encoder.pretrained: give one of the two"),
        (["init=nowhere"], "init: 'nowhere' does not exist; give scratch, pretrained or a path"),
        (["init=true"], "init: 'true' does not exist"),
        (["init="], "init: '' does not exist"),
        (["init=scratch", "evaluate=true", "data.path=."], "evaluate=true needs encoder.pretrained"),
    ],
)
def test_wrong_words_are_one_line(words: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(PROGRAM, ["digits_vit", *words]) == 2
    said = capsys.readouterr().err
    assert error in said and len(said.strip().splitlines()) == 1


def test_pretraining_has_no_such_word() -> None:
    with pytest.raises(ConfigError, match="unknown key 'init'"):
        cli.read_config(PRETRAIN, "digits_cim", ["init=scratch"])


def test_from_scratch_the_classifier_keeps_its_size_and_from_weights_it_does_not(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "run")
    heads = {}
    for init in ("scratch", str(folder)):
        config = config_of(VIT, f"init={init}", "classify.head_init_scale=0.001")
        model = weights.build(config.encoder, config.data, 0, 7, head_init_scale=config.classify.head_init_scale)
        heads[init] = model.get_parameter("head.weight").detach()
    assert torch.allclose(heads["scratch"], 1000 * heads[str(folder)]) and heads["scratch"].std() > 0.01


def test_a_run_tells_where_it_began_and_goes_on_from_there_only(digits: Path, tmp_path: Path, world: World) -> None:
    folder = save_encoder(tmp_path / "weights")

    def run(init: str) -> None:
        short = ["train.epochs=null", "train.steps=2", "train.warmup_epochs=0", "train.picture_epochs=0"]
        config = config_of(
            f"data.path={digits}", f"output_dir={tmp_path / 'run'}", VIT, "data.labels=0.1", *short, f"init={init}"
        )
        check_run(config)
        PROGRAM.check(config)
        classify.run(config, world)

    run(str(folder))
    first = json.loads((tmp_path / "run/results.json").read_text())
    assert first[0]["init"] == str(folder)
    # The same words continue it, here at its end; the weights may have moved meanwhile.
    run(str(folder))
    assert json.loads((tmp_path / "run/results.json").read_text()) == first
    run(str(folder.rename(tmp_path / "moved")))
    for init, now in (("scratch", ""), ("pretrained", "true")):
        config = config_of(f"init={init}")
        assert identity(config)["encoder.pretrained"] == now
    with pytest.raises(ConfigError, match=r"encoder\.pretrained=a file \(now \)"):
        run("scratch")
