"""The command line that both entry points share: ``python -m PROGRAM [COMMAND] RECIPE [--flag] [key=value ...]``."""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import __version__, ds, faults, slurm
from engine.checkpoint import take_over
from engine.config import (
    ConfigError,
    check_run,
    fill_in,
    find_recipe,
    list_recipes,
    load,
    read_recipe,
    settings,
    to_yaml,
)
from engine.faults import EXIT_REQUEUE, LostProcessError, NonFiniteLossError, StoppedRunError, UnwrittenError
from engine.log import setup
from engine.world import World, join

log = logging.getLogger(__name__)

FLAGS = {
    "--list": "list the recipes",
    "--show": "print the resolved configuration",
    "--dry_run": "build everything and take one step on the real data, without writing",
    "--version": "print the version",
    "--help": "print this, and with a RECIPE every setting it has",
}


@dataclass(frozen=True)
class Shorthand:
    """A word, of the command line or at the top of a recipe, that stands for a setting.

    Attributes:
        key: the setting.
        meaning: of the word, for ``--help``.
        value: what the setting is given for the word's value; refuses it with a ConfigError.
    """

    key: str
    meaning: str
    value: Callable[[str], str]


@dataclass(frozen=True)
class Program:
    """What an entry point adds to the shared command line.

    Attributes:
        name: the module that is run.
        recipes: folder of its recipes.
        kind: the setting by which a recipe chooses its method or task.
        schemas: its values and the configuration schema of each.
        check: refuses settings that do not go together, before anything is built.
        run: does it.
        dry_run: builds it and takes one step -> what to report.
        commands: further words before RECIPE, and what each does: (program, flags, words that follow) -> exit code.
        shorthands: words that stand for settings.
    """

    name: str
    recipes: Path
    kind: str
    schemas: dict[str, type]
    check: Callable[[Any], None]
    run: Callable[[Any, World], None]
    dry_run: Callable[[Any, World], dict[str, Any]]
    commands: dict[str, Callable[["Program", list[str], list[str]], int]] = field(default_factory=dict)
    shorthands: dict[str, Shorthand] = field(default_factory=dict)


def main(program: Program, words: list[str]) -> int:
    """Do what the command line says -> exit code: 0 done, 1 the run failed, 2 the request was wrong, 75 continue it."""
    rank = 0
    try:
        slurm.environment()
        rank = int(os.environ.get("RANK", "0"))
        return _main(program, words, rank)
    except ConfigError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once per machine: a path may be missing on one of them
            say(f"{f'rank {rank}: ' if rank else ''}error: {' '.join(str(error).split())}", sys.stderr)
        return 2
    except (NonFiniteLossError, UnwrittenError) as error:
        if rank == 0:
            say(f"error: {error}", sys.stderr)
        return 1
    except LostProcessError as error:
        say(f"rank {rank}: error: {error}", sys.stderr)
        return 1
    except StoppedRunError as told:
        if rank == 0:
            say(str(told), sys.stderr)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of a launcher that ends; it would hide the exit code
        return EXIT_REQUEUE


def _main(program: Program, words: list[str], rank: int) -> int:
    flags = [word for word in words if word.startswith("-")]
    rest = [word for word in words if not word.startswith("-")]
    for flag in flags:
        if flag not in FLAGS:
            raise ConfigError(f"unknown flag {flag!r}; allowed: {', '.join(FLAGS)} (settings are given as key=value)")
    if "--version" in flags:
        say(f"palimpsest {__version__}")
        return 0
    if "--list" in flags:
        for name in list_recipes(program.recipes):
            say(f"{name:24s} {_headline(program.recipes / f'{name}.yaml')}")
        return 0
    if rest and rest[0] in program.commands:
        return program.commands[rest[0]](program, flags, rest[1:])
    if "--help" in flags:
        say(_usage(program))
        if rest:
            say_settings(program, *take_recipe(program, rest))
        return 0
    config = read_config(program, *take_recipe(program, rest))
    if "--show" in flags:
        fill_in(config)
        say(to_yaml(config).rstrip())
        return 0
    check_run(config)
    program.check(config)
    if "--dry_run" not in flags:
        make_folder(Path(config.output_dir))
    setup(rank)
    faults.listen()
    with join(config.threads) as world:
        if hasattr(config, "deepspeed"):
            ds.merge(config, world.size, world.device.type)  # refuses what does not fit before anything is built
        if "--dry_run" in flags:
            for key, value in program.dry_run(config, world).items():
                if world.is_main:
                    say(f"{key:24s} {value:,}" if isinstance(value, int) else f"{key:24s} {value:.6g}")
        else:
            take_over(config, world)
            program.run(config, world)
    return 0


def take_recipe(program: Program, words: list[str]) -> tuple[str, list[str]]:
    """The recipe, name or path, at the front of ``words``, and what follows it."""
    # A path may hold "=", as run folders named after their settings do.
    if not words or ("=" in words[0] and not Path(words[0]).is_file()):
        raise ConfigError(f"which recipe? {', '.join(list_recipes(program.recipes))} (or a path); see --help")
    return words[0], words[1:]


def read_config(program: Program, name: str, overrides: list[str]) -> Any:
    """The configuration of a recipe, by name or path, with its overrides."""
    path = find_recipe(name, program.recipes)
    recipe = read_recipe(path)
    kind = recipe.get(program.kind)
    if not isinstance(kind, str) or kind not in program.schemas:
        known = ", ".join(program.schemas)
        raise ConfigError(f"{path}: {program.kind} must be one of {known}, got {kind!r}")
    overrides = _written_out(program, recipe, overrides)
    config: Any = load(program.schemas[kind], recipe, overrides, source=str(path.name))
    config.recipe = config.recipe or path.stem
    if getattr(config, program.kind) != kind:
        raise ConfigError(f"{program.kind} belongs to the recipe ({kind}): choose another recipe instead")
    return config


def _written_out(program: Program, recipe: dict[str, Any], words: list[str]) -> list[str]:
    """``words`` with settings in place of shorthands; those of the recipe leave it and come first."""
    found = []
    for name, short in program.shorthands.items():
        keys = {word.partition("=")[0] for word in words}
        if {name, short.key} <= keys or (name in recipe and _holds(recipe, short.key)):
            raise ConfigError(f"{name} stands for {short.key}: give one of the two")
        if name in recipe:
            found.append(f"{short.key}={short.value(str(recipe.pop(name)))}")
    for word in words:
        name, equals, value = word.partition("=")
        wanted = program.shorthands.get(name) if equals else None
        found.append(f"{wanted.key}={wanted.value(value)}" if wanted else word)
    return found


def _holds(recipe: Any, key: str) -> bool:
    for part in key.split("."):
        recipe = recipe.get(part) if isinstance(recipe, dict) else None
    return recipe is not None


def make_folder(folder: Path) -> None:
    """The run folder, on every process: all of them find out together that it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"output_dir={folder} cannot be written: {error.strerror or error}") from None


def _headline(path: Path) -> str:
    """First comment line of a recipe."""
    first = path.read_text().partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def say_settings(program: Program, name: str, overrides: list[str]) -> None:
    """Every setting of a recipe, its meaning and default, and the words that stand for one."""
    config = read_config(program, name, overrides)
    say("\nsettings:")
    for word, short in program.shorthands.items():
        say(f"  {word:32s} {short.meaning}")
    for key, default, meaning in settings(type(config)):
        say(f"  {key:32s} {meaning} [{default}]")


def _usage(program: Program) -> str:
    commands = f"[{'|'.join(program.commands)}] " if program.commands else ""
    lines = [f"python -m {program.name} {commands}RECIPE [--flag ...] [key=value ...]", ""]
    lines += [f"  {flag:12s} {meaning}" for flag, meaning in FLAGS.items()]
    return "\n".join(lines)


def say(text: str, stream: Any = None) -> None:
    """One line for the user."""
    (stream or sys.stdout).write(text + "\n")
