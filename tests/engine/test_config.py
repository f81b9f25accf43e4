"""Recipes: every wrong setting is refused in one line that names it, every right one means what it says."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from engine.config import (
    ConfigError,
    check_run,
    exactly_one,
    find_recipe,
    getattr_path,
    list_recipes,
    load,
    read_recipe,
    settings,
    to_yaml,
    user_errors,
)
from engine.schema import BaseConfig, RunConfig, option, with_sections


@dataclasses.dataclass
class Extra:
    """One setting of each kind that the shared schema lacks."""

    flag: bool = option(False, "a switch")
    share: list[float] = option([0.5, 0.5], "two numbers, or one for both", ge=0, kind="pair")
    either: list[int] | None = option(None, "a pair that may be absent", ge=1, kind="pair")


SCHEMA = with_sections(RunConfig, {"extra": Extra})


def given(*words: str, recipe: dict[str, Any] | None = None) -> Any:
    return load(SCHEMA, recipe or {}, words, "toy.yaml")


def refusal(*words: str, recipe: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        given(*words, recipe=recipe)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("x=5", ["'x'", "the command line", "allowed: recipe, output_dir"]),
        ("x.y=5", ["'x.y'", "allowed: recipe, output_dir"]),
        ("data.x=5", ["'data.x'", "allowed in data: path, image_size"]),
        ("data.=5", ["'data.'", "allowed in data"]),
        ("optim.lr.x=3", ["optim.lr", "no settings of its own"]),
        ("optim.betas.0=3", ["optim.betas", "no settings of its own"]),
        ("encoder.kwargs.a.b=3", ["encoder.kwargs.a.b", "too deep"]),
        ("data=5", ["data is a section", "data.<name>"]),
        ("seed", ["'seed'", "key=value"]),
        ("=5", ["'=5'", "key=value"]),
        # wrong type
        ("seed=1.5", ["seed", "int", "1.5"]),
        ("seed=true", ["seed", "int", "True"]),
        ("seed=abc", ["seed", "int", "'abc'"]),
        ("seed=null", ["seed", "int", "None"]),
        ("seed=[", ["seed=[", "YAML"]),
        ("train.batch_size=1e2", ["train.batch_size", "int", "100.0"]),
        ("optim.lr=abc", ["optim.lr", "float", "'abc'"]),
        ("optim.lr='1'", ["optim.lr", "float", "'1'"]),
        ("optim.lr=true", ["optim.lr", "float", "True"]),
        ("optim.lr={a: 1}", ["optim.lr", "float"]),
        ("extra.flag=1", ["extra.flag", "bool", "1"]),
        ("extra.flag=maybe", ["extra.flag", "bool", "'maybe'"]),
        ("data.image_size=32.5", ["data.image_size", "int", "32.5"]),
        ("data.image_size=[32,a]", ["data.image_size", "int", "'a'"]),
        ("data.mean=0.5", ["data.mean", "list", "0.5"]),
        ("optim.betas=[0.9,null]", ["optim.betas", "None"]),
        ("optim.betas=null", ["optim.betas", "None"]),
        ("encoder.kwargs=5", ["encoder.kwargs", "dict", "5"]),
        ("encoder.kwargs=null", ["encoder.kwargs", "dict", "None"]),
        # out of range
        ("seed=-1", ["seed", ">= 0", "-1"]),
        ("optim.layer_decay=0", ["optim.layer_decay", "> 0 and <= 1", "0"]),
        ("optim.layer_decay=1.5", ["optim.layer_decay", "> 0 and <= 1", "1.5"]),
        ("optim.lr=nan", ["optim.lr", "float", "'nan'"]),
        ("optim.lr=.nan", ["optim.lr", "finite", "nan"]),
        ("optim.lr=.inf", ["optim.lr", "finite", "inf"]),
        ("optim.betas=[0.9,1]", ["optim.betas", ">= 0 and < 1", "[0.9, 1.0]"]),
        ("optim.betas=[0.9]", ["optim.betas", "two numbers", "[0.9]"]),
        ("data.image_size=[1,2,3]", ["data.image_size", "one number or two", "[1, 2, 3]"]),
        ("data.image_size=0", ["data.image_size", ">= 1", "[0, 0]"]),
        ("data.std=[1,0,1]", ["data.std", "> 0", "[1.0, 0.0, 1.0]"]),
        ("extra.either=[3]", ["extra.either", "one number or two", "[3]"]),
        ("optim.name=adamx", ["optim.name", "adamw, sgd", "'adamx'"]),
        # missing path
        ("data.path=/no/such/folder", ["data.path", "'/no/such/folder'", "exist"]),
        ("data.path=/,/no/such/list.txt", ["data.path", "'/no/such/list.txt'", "exist"]),
        ("encoder.pretrained=/no/weights.pth", ["encoder.pretrained", "'/no/weights.pth'", "exist"]),
        # OmegaConf's word for "missing" cannot be a text of ours
        ("output_dir=???", ["output_dir"]),
        ("encoder.kwargs.a=???", ["encoder.kwargs.a"]),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(word: str, named: list[str]) -> None:
    message = refusal(word)
    assert all(part in message for part in named), message


def test_a_wrong_recipe_is_refused_with_its_name() -> None:
    assert "toy.yaml: unknown key 'data.x'" in refusal(recipe={"data": {"x": 1}})
    assert "toy.yaml: data is a section" in refusal(recipe={"data": None})
    assert "toy.yaml: output_dir must be str, got 83: put it in quotes" in refusal(recipe={"output_dir": 83})
    assert "toy.yaml: data.path must be str" in refusal(recipe={"data": {"path": ["a", "b"]}})


@pytest.mark.parametrize(
    "text",
    ["0123", "on", "${x}", "${x", "\\${x}", "\\\\${x}", "1e5", "null", "", "a=b", "a: b # c", "'q'", " x ", "[1]"],
)
def test_text_is_literal(text: str) -> None:
    assert given(f"output_dir={text}").output_dir == text


@pytest.mark.parametrize(
    "text",
    [
        "0123",
        "on",
        "${x}",
        "\\${x}",
        "\\\\${x}",
        "1e5",
        "null",
        "",
        "a=b",
        "a: b # c",
        "'q'",
        " x ",
        "[1]",
        "ä",
        "1_0",
        "~",
        "0o7",
        "1:30",
    ],
)
def test_text_survives_the_run_folder(text: str, tmp_path: Path) -> None:
    quoted = "'" + text.replace("'", "''") + "'"
    config = given(f"output_dir={text}", f"encoder.kwargs={{inner: [{{text: {quoted}}}]}}")
    assert config.encoder.kwargs == {"inner": [{"text": text}]}
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load(SCHEMA, read_recipe(tmp_path / "config.yaml"), [], "config.yaml") == config


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["data.image_size=32"], "data.image_size", [32, 32]),
        (["data.image_size=[32,48]"], "data.image_size", [32, 48]),
        (["extra.share=1"], "extra.share", [1.0, 1.0]),
        (["extra.either=3"], "extra.either", [3, 3]),
        (["extra.either=3", "extra.either=null"], "extra.either", None),
        (["optim.lr=1"], "optim.lr", 1.0),
        (["optim.lr=1e-3"], "optim.lr", 1e-3),
        (["optim.lr=1", "optim.lr="], "optim.lr", None),
        (["optim.lr=1", "optim.lr=null"], "optim.lr", None),
        (["optim.betas=[0,0.5]"], "optim.betas", [0.0, 0.5]),
        (["data.mean=[1, 2]"], "data.mean", [1.0, 2.0]),
        (["extra.flag=true"], "extra.flag", True),
        (["encoder.kwargs={a: [1, x], b: {c: 1e-3}}"], "encoder.kwargs", {"a": [1, "x"], "b": {"c": 1e-3}}),
        (["encoder.kwargs.depth=4", "encoder.kwargs.rope=true"], "encoder.kwargs", {"depth": 4, "rope": True}),
        (["encoder.kwargs={a: 1}", "encoder.kwargs={b: 2}"], "encoder.kwargs", {"b": 2}),
        (["encoder.kwargs={a: 1}", "encoder.kwargs.b=2"], "encoder.kwargs", {"a": 1, "b": 2}),
        (["seed=1", "seed=2"], "seed", 2),
    ],
)
def test_values(words: list[str], key: str, value: Any, tmp_path: Path) -> None:
    config = given(*words)
    found = config
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)
    if isinstance(value, list):
        assert [type(item) for item in found] == [type(item) for item in value]
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(SCHEMA, read_recipe(tmp_path / "config.yaml"), [], "config.yaml") == config


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_schema() -> None:
    recipe = {"seed": 1, "data": {"in_chans": 4}, "encoder": {"kwargs": {"depth": 2}}}
    config = given("seed=2", recipe=recipe)
    assert (config.seed, config.data.in_chans, config.data.workers) == (2, 4, RunConfig().data.workers)
    assert config.encoder.kwargs == {"depth": 2}


def test_defaults_stand_in_the_schema_alone() -> None:
    assert given() == SCHEMA()
    assert {key: default for key, default, _ in settings(SCHEMA)}["extra.share"] == [0.5, 0.5]
    # A list that a run changes is not the next run's default.
    given().data.image_size.append(1)
    assert SCHEMA().data.image_size == [224, 224]


def test_every_setting_says_what_it_means() -> None:
    named = list(settings(SCHEMA))
    assert len(named) > 40 and len({key for key, _, _ in named}) == len(named)
    assert [key for key, _, meaning in named if not meaning] == []


def test_recipes_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("seed: 1\n")
    assert list_recipes(tmp_path) == ["small"]
    assert (
        find_recipe("small", tmp_path) == find_recipe(str(tmp_path / "small.yaml"), tmp_path) == tmp_path / "small.yaml"
    )
    with pytest.raises(ConfigError, match=r"no recipe 'large'.*small"):
        find_recipe("large", tmp_path)


@pytest.mark.parametrize("text", ["- 1\n", "a: [", "a: 1\na: 2\n", "\x00"])
def test_an_unreadable_recipe_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml") as caught:
        read_recipe(path)
    assert len(str(caught.value).splitlines()) == 1


def runnable(tmp_path: Path, *words: str) -> Any:
    return given(f"data.path={tmp_path}", "optim.lr=1", "train.steps=1", f"output_dir={tmp_path}/run", *words)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["data.path="], "data.path is required"),
        (["optim.base_lr=1"], "optim.lr or optim.base_lr, got both"),
        (["optim.lr=null"], "optim.lr or optim.base_lr, got none"),
        (["train.epochs=1"], "train.epochs or train.steps, got both"),
        (["optim.nesterov=true"], "of SGD with momentum, not of optim.name=adamw"),
        (["optim.nesterov=true", "optim.name=sgd", "optim.momentum=0"], "with optim.momentum=0"),
        (["optim.lr=null", "optim.base_lr=1", "optim.lr_batch=8"], "optim.lr_batch"),
        (["optim.name=adamw", "optim.lamb_always_adapt=true"], "no effect with optim.name=adamw"),
        (["optim.name=sgd", "optim.lamb_bias_correction=false"], "no effect with optim.name=sgd"),
        (["data.in_chans=4", "data.mean=[0,0,0]"], "data.mean has 3 values for data.in_chans=4"),
        (["data.std=[1,1]"], "data.std has 2 values for data.in_chans=3"),
        (["data.value_range=[1,0]"], "data.value_range must be .low, high."),
        (["data.value_range=[1]"], "data.value_range must be .low, high."),
    ],
)
def test_settings_that_do_not_go_together_are_refused(words: list[str], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        check_run(runnable(tmp_path, *words))


def test_normalisation_follows_the_channels(tmp_path: Path) -> None:
    for chans, mean in ((3, [0.485, 0.456, 0.406]), (1, [0.5]), (5, [0.5] * 5)):
        config = runnable(tmp_path, f"data.in_chans={chans}")
        check_run(config)
        assert config.data.mean == mean and len(config.data.std) == chans
    config = runnable(tmp_path, "data.in_chans=1", "data.mean=[0.25]")
    check_run(config)
    assert config.data.mean == [0.25] and config.data.std == [0.5]


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step00000001").mkdir(parents=True)
    check_run(runnable(tmp_path))
    with pytest.raises(ConfigError, match="holds a run"):
        check_run(runnable(tmp_path, "resume=never"))


def test_exactly_one() -> None:
    exactly_one(a__b=None, c=0)
    with pytest.raises(ConfigError, match=r"a\.b or c, got none"):
        exactly_one(a__b=None, c=None)


def test_what_building_blocks_say_is_for_the_user() -> None:
    for error in (ValueError("bad"), FileNotFoundError("bad"), PermissionError("bad")):
        with pytest.raises(ConfigError, match="bad"), user_errors():
            raise error
    with pytest.raises(KeyError), user_errors():
        raise KeyError("a mistake of ours")


@pytest.mark.parametrize(
    ("recipe", "word", "gone"),
    [
        ({"train": {"epochs": 3}}, "train.steps=5", ["train.epochs"]),
        ({"train": {"steps": 3}}, "train.epochs=5", ["train.steps"]),
        ({"train": {"warmup_steps": 3}}, "train.warmup_epochs=5", ["train.warmup_steps"]),
        ({"optim": {"lr": 0.1, "lr_batch": 8}}, "optim.base_lr=0.2", ["optim.lr", "optim.lr_batch"]),
        ({"optim": {"base_lr": 0.1}}, "optim.lr=0.2", ["optim.base_lr"]),
    ],
)
def test_one_way_of_saying_it_replaces_the_recipes_other(recipe: dict[str, Any], word: str, gone: list[str]) -> None:
    config = load(BaseConfig, recipe, [word], "recipe")
    key, _, value = word.partition("=")
    assert getattr_path(config, key) == float(value)
    assert all(getattr_path(config, name) is None for name in gone)
    both = load(BaseConfig, {}, ["train.epochs=1", "train.steps=2"], "recipe")
    assert (both.train.epochs, both.train.steps) == (1.0, 2)  # said on the command line, refused by check_run


def test_paths_with_commas_and_of_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a,b").mkdir()
    for given in (str(tmp_path / "a,b"), "~/a,b", f"~/a,b/..,{tmp_path}"):
        if given.count(",") == 1:
            assert load(BaseConfig, {}, [f"data.path={given}"], "recipe").data.path == str(tmp_path / "a,b")
    config = load(RunConfig, {}, ["encoder.pretrained=~/a,b"], "recipe")
    assert config.encoder.pretrained == str(tmp_path / "a,b")
    with pytest.raises(ConfigError, match=r"/nothing' does not exist"):
        load(RunConfig, {}, ["encoder.pretrained=~/nothing"], "recipe")


def test_a_word_in_place_of_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``true`` is timm's own weights even beside a file of that name, in a resolved recipe too; ``./true`` is the file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"encoder\.pretrained: './true' does not exist; give a path or true"):
        load(RunConfig, {}, ["encoder.pretrained=./true"], "recipe")
    for _ in range(2):
        config = load(RunConfig, {}, ["encoder.pretrained=true"], "recipe")
        assert config.encoder.pretrained == "true"
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        assert load(RunConfig, read_recipe(tmp_path / "config.yaml"), [], "recipe").encoder.pretrained == "true"
        (tmp_path / "true").touch()
    assert load(RunConfig, {}, ["encoder.pretrained=./true"], "recipe").encoder.pretrained == "./true"
    with pytest.raises(ConfigError, match=r"encoder\.pretrained must be str, got True: put it in quotes"):
        load(RunConfig, {"encoder": {"pretrained": True}}, [], "recipe")
    with pytest.raises(ConfigError, match=r"data\.path: 'true' does not exist"):
        (tmp_path / "true").unlink()
        load(BaseConfig, {}, ["data.path=true"], "recipe")
