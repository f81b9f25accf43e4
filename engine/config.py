"""Recipes: typed configuration from a YAML file and ``key=value`` overrides, checked before anything is built.

The schema, a dataclass per entry point, is built from engine/schema.py.
"""

import contextlib
import dataclasses
import math
import operator
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import BooleanNode, DictConfig, FloatNode, IntegerNode, ListConfig, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException

from engine.schema import BaseConfig
from formats.paths import is_pattern, is_stream, split_path

T = TypeVar("T")

_GIVEN_AS: dict[type, tuple[type, ...]] = {
    StringNode: (str,),
    IntegerNode: (int,),
    FloatNode: (int, float),
    BooleanNode: (bool,),
}
"""The YAML types a setting may be given in; OmegaConf alone would convert between them, with a warning or without."""


class ConfigError(ValueError):
    """A setting the user can mend; entry points print it as one line and exit with code 2."""


def load(schema: type[T], recipe: dict[str, Any], overrides: Iterable[str], source: str) -> T:
    """Merge schema, recipe and ``key=value`` overrides and check every value.

    Args:
        schema: dataclass that lists every setting.
        recipe: contents of a recipe's YAML file, nested.
        overrides: ``a.b=value`` words of the command line; the text after ``=`` is YAML, but taken literally where
            the setting is a string.
        source: name of the recipe, for messages.

    Raises:
        ConfigError: naming the key, what was given and what is allowed.
    """
    config = OmegaConf.structured(schema)
    OmegaConf.set_struct(config, True)
    for key, value in _leaves(config, recipe, source):
        _assign(config, key, value, source)
    given = [word.partition("=") for word in overrides]
    for key, found, text in given:
        if not found or not key:
            raise ConfigError(f"{key + found + text!r} is neither a flag nor key=value")
        parent, _, field = _locate(config, key, "the command line")
        for name in field.metadata.get("instead_of", ()) if field is not None else ():
            parent[name] = None
    for key, _, text in given:
        _assign(config, key, _parse(config, key, text), "the command line")
    try:
        result: Any = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # the text ???, which means "missing" to OmegaConf
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    _check(result, "")
    return result


def read_recipe(path: Path) -> dict[str, Any]:
    """Contents of a recipe file, as nested plain containers."""
    try:
        # OmegaConf's own YAML reader, because 1e-3 is a number to it and text to YAML 1.1.
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:
        raise ConfigError(f"{path} is no readable YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold settings as 'key: value'")
    return {str(key): value for key, value in content.items()}


def to_yaml(config: Any) -> str:
    """A checked configuration as YAML that is itself a recipe."""
    return OmegaConf.to_yaml(OmegaConf.create(_literal(dataclasses.asdict(config))), resolve=True)


def find_recipe(name: str, folder: Path) -> Path:
    """Path of a recipe given by its name in ``folder`` or by its path."""
    for path in (folder / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    known = ", ".join(list_recipes(folder))
    raise ConfigError(f"no recipe {name!r}: give a path or one of {known}")


def list_recipes(folder: Path) -> list[str]:
    """Names of the recipes in ``folder``."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _leaves(node: Any, values: dict[str, Any], source: str, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        inner = node._get_node(key) if isinstance(node, DictConfig) and key in node else None
        sections = isinstance(inner, DictConfig) and dataclasses.is_dataclass(OmegaConf.get_type(inner))
        if sections and isinstance(value, dict):
            yield from _leaves(inner, value, source, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _locate(config: DictConfig, key: str, source: str) -> tuple[Any, str, Any]:
    """Parent node, last name and dataclass field (None inside free-form dictionaries) of a dotted key."""
    node: Any = config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        kind = OmegaConf.get_type(node)
        if not dataclasses.is_dataclass(kind):
            if kind is not dict:
                raise ConfigError(f"{source}: {'.'.join(parts[:depth])} has no settings of its own, got {key!r}")
            if depth < len(parts) - 1:
                raise ConfigError(
                    f"{source}: {key} is too deep: give {'.'.join(parts[: depth + 1])} as a whole, {{name: value, ...}}"
                )
            return node, part, None
        fields = {field.name: field for field in dataclasses.fields(kind)}
        if part not in fields:
            where = f" in {'.'.join(parts[:depth])}" if depth else ""
            raise ConfigError(f"{source}: unknown key {key!r}; allowed{where}: {', '.join(fields)}")
        if depth == len(parts) - 1:
            return node, part, fields[part]
        node = node._get_node(part)
    raise ConfigError(f"{source}: empty key")


def _literal(value: Any) -> Any:
    """``value`` with every text in it protected from OmegaConf's interpolation: text is taken as it stands."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", value)
    if isinstance(value, dict):
        return {key: _literal(inner) for key, inner in value.items()}
    return [_literal(inner) for inner in value] if isinstance(value, list) else value


def _parse(config: DictConfig, key: str, text: str) -> Any:
    """Value of an override: literal for string settings, YAML for all others."""
    parent, name, field = _locate(config, key, "the command line")
    if field is not None and isinstance(parent._get_node(name), StringNode):
        return text
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)
        return parsed["value"]
    except Exception:
        raise ConfigError(f"{key}={text}: the value is no valid YAML") from None


def _assign(config: DictConfig, key: str, value: Any, source: str) -> None:
    parent, name, field = _locate(config, key, source)
    if field is None:
        OmegaConf.set_struct(parent, False)
    elif dataclasses.is_dataclass(field.type):
        raise ConfigError(f"{source}: {key} is a section; set {key}.<name> instead")
    else:
        node = type(parent._get_node(name))
        if value is not None and type(value) not in _GIVEN_AS.get(node, (type(value),)):
            hint = ": put it in quotes" if node is StringNode else ""
            raise ConfigError(f"{source}: {key} must be {_type_name(field.type)}, got {value!r}{hint}")
        if field.metadata.get("kind") == "pair" and type(value) in (int, float):
            value = [value, value]
        if node is FloatNode and value is not None:
            value = float(value)
    value = _literal(value)
    try:
        if field is not None and isinstance(parent._get_node(name), DictConfig | ListConfig):
            OmegaConf.update(parent, name, value, merge=False)
        else:
            parent[name] = value
    except (OmegaConfBaseException, ValueError) as error:
        wanted = _type_name(field.type) if field is not None else "a YAML value"
        raise ConfigError(f"{source}: {key} must be {wanted}, got {value!r} ({str(error).splitlines()[0]})") from None


def _type_name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind)) if not hasattr(kind, "__args__") else str(kind)


def _check(config: Any, prefix: str) -> None:
    """Ranges, choices, pairs and existing paths of every setting."""
    for field in dataclasses.fields(config):
        value, key, meta = getattr(config, field.name), prefix + field.name, field.metadata
        if dataclasses.is_dataclass(value):
            _check(value, f"{key}.")
            continue
        if value is None:
            continue
        for item in value if isinstance(value, list) else [value]:
            _check_value(key, item, value, meta)
        if meta.get("kind") in ("pair", "two", "range") and len(value) != 2:
            raise ConfigError(
                f"{key} must be {'one number or two' if meta['kind'] == 'pair' else 'two numbers'}, got {value}"
            )
        if meta.get("kind") == "range" and value[0] > value[1]:
            raise ConfigError(f"{key} must be a smaller and a larger number, got {value}")
        words = meta.get("words", ())
        if meta.get("kind") in ("path", "paths", "folder") and value and value not in words:
            setattr(config, field.name, _expand(key, value, meta["kind"], words))


def _expand(key: str, value: str, kind: str, words: tuple[str, ...]) -> str:
    """A path with ~ written out, or the list of paths; all of them must exist, unless it is a folder to be made."""
    whole = os.path.expanduser(value)
    if kind == "folder" or os.path.exists(whole):
        return whole
    parts = [whole]
    if kind == "paths":
        parts = [os.path.expanduser(part) for part in split_path(value)]
    for part in parts:
        several = kind == "paths" and (is_stream(part) or is_pattern(part))  # which the data itself looks up
        if not (several or os.path.exists(part)):
            other = f"; give a path or {' or '.join(words)}" if words else ""
            raise ConfigError(f"{key}: {part!r} does not exist{other}")
    return ",".join(parts)


_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _check_value(key: str, item: Any, value: Any, meta: Any) -> None:
    if isinstance(item, float) and not math.isfinite(item):
        raise ConfigError(f"{key} must be finite, got {value}")
    for name in _SIGNS:
        bound = meta.get(name)
        if bound is not None and not getattr(operator, name)(item, bound):
            allowed = " and ".join(f"{sign} {meta[n]}" for n, sign in _SIGNS.items() if meta.get(n) is not None)
            raise ConfigError(f"{key} must be {allowed}, got {value}")
    if meta.get("choices") and item not in meta["choices"]:
        raise ConfigError(f"{key} must be one of {', '.join(meta['choices'])}, got {item!r}")


def settings(schema: type, prefix: str = "") -> Iterable[tuple[str, Any, str]]:
    """Every setting of a schema as (key, default, meaning), for ``--help`` and for the test of dead settings."""
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.type):
            yield from settings(field.type, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            yield prefix + field.name, default, field.metadata.get("help", "") + _allowed(field.metadata)


def _allowed(meta: Any) -> str:
    limits = [f"{sign} {meta[name]}" for name, sign in _SIGNS.items() if meta.get(name) is not None]
    allowed = ["|".join(meta["choices"])] if meta.get("choices") else limits
    return f" ({', '.join(allowed)})" if allowed else ""


def getattr_path(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def exactly_one(**values: Any) -> None:
    """Refuse settings of which none or several are given."""
    given = [key for key, value in values.items() if value is not None]
    if len(given) != 1:
        names = " or ".join(key.replace("__", ".") for key in values)
        raise ConfigError(f"give exactly one of {names}, got {'none' if not given else 'both'}")


def check_run(config: Any) -> None:
    """What a run needs besides valid settings, whatever the method."""
    if not config.data.path:
        raise ConfigError("data.path is required: a folder, a text file of paths, or a comma-separated list of these")
    fill_in(config)
    if isinstance(config, BaseConfig):
        _check_training(config)


def fill_in(config: Any) -> None:
    """Settings that follow from others, and must agree with them, whatever the method."""
    chans = config.data.in_chans
    for name in ("mean", "std"):
        given = getattr(config.data, name)
        if given and len(given) != chans:
            raise ConfigError(f"data.{name} has {len(given)} values for data.in_chans={chans}: give one per channel")
    imagenet = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    for name, values in imagenet.items():
        if not getattr(config.data, name):
            setattr(config.data, name, values if chans == 3 else [0.5] * chans)
    value_range = config.data.value_range
    if value_range and (len(value_range) != 2 or value_range[0] >= value_range[1]):
        raise ConfigError(f"data.value_range must be [low, high] with low < high, got {value_range}")
    if not config.output_dir:
        config.output_dir = f"output/{config.recipe}"


def _check_training(config: BaseConfig) -> None:
    exactly_one(optim__lr=config.optim.lr, optim__base_lr=config.optim.base_lr)
    if config.optim.lr_batch is not None and config.optim.lr is None:
        raise ConfigError("optim.lr_batch says what optim.lr was given for: with optim.base_lr remove it")
    if config.optim.name != "lamb" and (not config.optim.lamb_bias_correction or config.optim.lamb_always_adapt):
        raise ConfigError(
            f"optim.lamb_bias_correction and optim.lamb_always_adapt have no effect with optim.name={config.optim.name}: "
            "remove them"
        )
    if config.optim.nesterov and (config.optim.name != "sgd" or not config.optim.momentum):
        raise ConfigError(
            f"optim.nesterov=true is of SGD with momentum, not of optim.name={config.optim.name} with "
            f"optim.momentum={config.optim.momentum}: remove it"
        )
    exactly_one(train__epochs=config.train.epochs, train__steps=config.train.steps)
    if config.resume == "never" and any(Path(config.output_dir, "checkpoints").glob("step*")):
        raise ConfigError(
            f"output_dir={config.output_dir} holds a run: continue it with resume=auto or give another folder"
        )


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Report what building blocks say about their arguments or files as a :class:`ConfigError`."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise ConfigError(str(error)) from error
