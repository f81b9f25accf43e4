"""The command line: what it prints, and that a wrong request is one line and exit code 2 before anything is built."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import __version__, cli
from engine.config import ConfigError, fill_in, load, read_recipe
from engine.faults import NonFiniteLossError
from engine.schema import BaseConfig, option
from engine.world import World
from finetune.__main__ import PROGRAM as FINETUNE
from pretrain.__main__ import PROGRAM as PRETRAIN
from tests.launch import ROOT


@dataclasses.dataclass
class ToySettings(BaseConfig):
    """A program of one method."""

    method: str = option("", "the method")
    power: int = option(2, "of the toy", ge=1)


class Toy:
    """A program that notes what it is asked to do."""

    def __init__(self, folder: Path) -> None:
        self.done: list[tuple[str, Any]] = []
        self.folder = folder
        (folder / "small.yaml").write_text("# A small toy\nmethod: toy\noptim: {lr: 1}\ntrain: {steps: 3}\n")
        (folder / "large.yaml").write_text("method: toy\npower: 9\n")
        self.program = cli.Program(
            name="toys",
            recipes=folder,
            kind="method",
            schemas={"toy": ToySettings},
            check=self.check,
            run=self.note("run"),
            dry_run=lambda config, world: {"parameters": 1234567, "seconds": 0.25},
            commands={"plan": self.plan},
            shorthands={"twice": cli.Shorthand("power", "power=2 times that", lambda value: str(2 * int(value)))},
        )

    def note(self, what: str) -> Callable[[Any, World], None]:
        return lambda config, world: self.done.append((what, config))

    def plan(self, program: cli.Program, flags: list[str], words: list[str]) -> int:
        self.done.append((f"plan {flags}", cli.read_config(program, *cli.take_recipe(program, words))))
        return 7

    def check(self, config: ToySettings) -> None:
        if config.power == 13:
            raise ConfigError("power=13 brings\n  bad luck")

    def __call__(self, *words: str) -> int:
        return cli.main(self.program, list(words))


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: World) -> Toy:
    monkeypatch.setattr(cli, "setup", lambda rank: None)  # pytest keeps its own logging
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "recipes").mkdir()
    return Toy(tmp_path / "recipes")


def test_a_recipe_is_run_with_its_overrides(toy: Toy, tmp_path: Path) -> None:
    assert toy("small", f"data.path={tmp_path}", "power=3") == 0
    assert toy("plan", "small", "--show", "power=4", f"data.path={tmp_path}") == 7
    (what, config), (command, planned) = toy.done
    assert (what, config.power, config.train.steps, config.recipe) == ("run", 3, 3, "small")
    assert (command, planned.power) == ("plan ['--show']", 4)
    assert config.output_dir == "output/small" and config.data.mean == [0.485, 0.456, 0.406]


def test_a_word_may_stand_for_a_setting(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    def power(name: str, *words: str) -> int:
        return int(cli.read_config(toy.program, name, list(words)).power)

    (toy.folder / "short.yaml").write_text("method: toy\ntwice: 4\n")
    (toy.folder / "both.yaml").write_text("method: toy\ntwice: 4\npower: 3\n")
    assert power("small", "twice=3") == 6 and power("large", "twice=3") == 6
    assert power("short") == 8 and power("short", "twice=5") == 10 and power("short", "power=3") == 3
    for words in (["small", "twice=3", "power=6"], ["both"]):
        with pytest.raises(ConfigError, match="twice stands for power: give one of the two"):
            power(*words)
    assert toy("--help", "short") == 0 and "power=2 times that" in capsys.readouterr().out


def test_a_recipe_is_also_a_path_even_one_with_an_equals_sign(toy: Toy, tmp_path: Path) -> None:
    folder = tmp_path / "lr=1"
    folder.mkdir()
    (folder / "config.yaml").write_text((toy.folder / "small.yaml").read_text() + "recipe: of_a_run\n")
    assert toy(str(folder / "config.yaml"), f"data.path={tmp_path}") == 0
    assert toy.done[0][1].recipe == "of_a_run"


def test_list(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    assert toy("--list") == 0
    assert [line.split(None, 1) for line in capsys.readouterr().out.splitlines()] == [
        ["large"],
        ["small", "A small toy"],
    ]


def test_version(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    assert toy("--version") == 0
    assert capsys.readouterr().out == f"palimpsest {__version__}\n"


def test_help_names_the_flags_and_with_a_recipe_every_setting(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    assert toy("--help") == 0
    usage = capsys.readouterr().out
    assert "python -m toys [plan] RECIPE" in usage and all(flag in usage for flag in cli.FLAGS)
    assert toy("--help", "small") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line.split()[:1] == ["power"]] == [
        ["power", "of", "the", "toy", "(>=", "1)", "[2]"]
    ]
    assert any(line.split()[:1] == ["train.warmup_epochs"] for line in lines)


def test_show_prints_a_recipe(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert toy("small", "power=5", "optim.betas=[0.5,0.6]", "--show") == 0
    path = tmp_path / "shown.yaml"
    path.write_text(capsys.readouterr().out)
    shown = load(ToySettings, read_recipe(path), [], "shown")
    expected = cli.read_config(toy.program, "small", ["power=5", "optim.betas=[0.5,0.6]"])
    assert shown != expected  # what follows from other settings is shown too
    fill_in(expected)
    assert shown == expected
    assert toy.done == []


def test_dry_run_reports(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert toy("small", f"data.path={tmp_path}", "--dry_run") == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["parameters", "1,234,567"],
        ["seconds", "0.25"],
    ]
    assert toy.done == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "which recipe? large, small"),
        (["power=3"], "which recipe?"),
        (["tiny"], "no recipe 'tiny': give a path or one of large, small"),
        (["small", "--fast"], "unknown flag '--fast'; allowed: --list"),
        (["small", "data.path=."], None),
        (["small"], "data.path is required"),
        (["small", "data.path=/no/such/folder"], "'/no/such/folder' does not exist"),
        (["small", "data.path=.", "powr=3"], "unknown key 'powr'; allowed: recipe"),
        (["small", "data.path=.", "power=x"], "power must be int, got 'x'"),
        (["small", "data.path=.", "power=0"], "power must be >= 1, got 0"),
        (["small", "data.path=.", "method=other"], "method belongs to the recipe (toy)"),
        (["small", "data.path=.", "power=13"], "power=13 brings bad luck"),
        (["small", "data.path=.", "deepspeed=zero9"], "deepspeed=zero9: no such file"),
        (["small", "data.path=.", "deepspeed=zero3_fp16"], "deepspeed=zero3_fp16: a CPU has no fp16"),
        (["large", "data.path=."], "give exactly one of optim.lr or optim.base_lr, got none"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(
    toy: Toy, words: list[str], named: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = toy(*words), capsys.readouterr()
    if named is None:
        assert (code, said.err) == (0, "")
        return
    assert (code, said.out, toy.done) == (2, "", [])
    assert said.err.startswith("error: ") and named in said.err and len(said.err.splitlines()) == 1


@pytest.mark.parametrize(
    "text", ["", "method: other\n", "method: [toy]\n", "- toy\n", "method: toy\nmethod: toy\n", "method: toy\nx: 1\n"]
)
def test_a_wrong_recipe_is_one_line_and_exit_code_2(toy: Toy, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (toy.folder / "wrong.yaml").write_text(text)
    assert toy("wrong", "data.path=.") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "wrong.yaml" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(("local_rank", "lines"), [("1", 0), ("0", 1)])
def test_one_process_of_each_machine_tells(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], local_rank: str, lines: int
) -> None:
    """What is wrong may be so on one machine only: a path that is not there."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert toy("tiny") == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == lines
    assert said.err.startswith("rank 3: error: ") == bool(lines)


def test_a_run_that_fails_is_exit_code_1(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(config: Any, world: World) -> None:
        raise NonFiniteLossError("the loss is not finite at step 3")

    program = dataclasses.replace(toy.program, run=fail)
    assert cli.main(program, ["small", f"data.path={tmp_path}"]) == 1
    assert capsys.readouterr().err == "error: the loss is not finite at step 3\n"


# The real programs.


def test_the_programs_refuse_in_one_line() -> None:
    """As a person starts them; together, because most of their time is Python's imports."""
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    requests = {
        "data.path: '/no/such/folder' does not exist": ["pretrain", "dvae", "data.path=/no/such/folder"],
        "unknown key 'augment.mixupp'; allowed in augment: ": [
            "finetune",
            "vit_small",
            "data.path=.",
            "augment.mixupp=1",
        ],
    }
    started = {
        named: subprocess.Popen(
            [sys.executable, "-m", *words], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for named, words in requests.items()
    }
    for named, process in started.items():
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (2, "")
        assert err.startswith("error: ") and named in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("program", "words", "named"),
    [
        (PRETRAIN, ["cim_vit_small"], "data.path is required"),
        (PRETRAIN, ["cim_vit_small", "data.path=."], "cim.tokenizer is required"),
        (PRETRAIN, ["dvae", "data.path=.", "deepspeed=zero9"], "deepspeed=zero9: no such file"),
        (
            PRETRAIN,
            ["dvae", "data.path=.", "train.batch_size=2", "train.accumulation=4"],
            "train.batch_size=2 does not split",
        ),
        (FINETUNE, ["vit_small", "data.path=."], "data.val_path is required"),
        (FINETUNE, ["vit_small", "data.path=.", "data.val_path=.", "deepspeed=zero2_fp16"], "a CPU has no fp16"),
        (FINETUNE, ["knn", "data.path=.", "data.val_path=.", "knn.k=[]"], "knn.k is empty"),
    ],
)
def test_the_programs_refuse_before_anything_is_built(
    program: cli.Program,
    words: list[str],
    named: str,
    toy: Toy,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was built")

    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    assert cli.main(program, words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and named in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("program", [PRETRAIN, FINETUNE], ids=lambda program: program.name)
def test_every_recipe_has_a_headline_settings_and_a_resolved_form(
    program: cli.Program, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(program, ["--list"]) == 0
    listed = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()]
    assert listed and all(len(words) == 2 for words in listed)
    for name, _ in listed:
        assert cli.main(program, [name, "--help"]) == 0
        assert "  data.path " in capsys.readouterr().out
        assert cli.main(program, [name, "--show"]) == 0
        path = tmp_path / "shown.yaml"
        path.write_text(capsys.readouterr().out)
        expected = cli.read_config(program, name, [])
        fill_in(expected)
        assert cli.read_config(program, str(path), []) == expected
