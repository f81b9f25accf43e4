"""No dead settings: each one in a schema is read by code that does something with it.

Found in the syntax tree: an attribute access whose owner is the setting's section (``config.cim.sampling``,
``self.cim.sampling``, ``train.save_steps`` of ``train = config.train``, ``optim.eps`` of a parameter of that name or
type). That a check looks at a setting does not count, nor does writing it.
"""

import ast
import dataclasses
import functools
from collections.abc import Iterable, Iterator

import pytest

from finetune.tasks import SCHEMAS as TASKS
from pretrain.methods import SCHEMAS as METHODS
from tests.launch import ROOT

CHECKED_ONLY = {"config.resume"}
"""Settings that are nothing but a check: resume=never refuses a folder that holds a run."""

ROOMS = ("data", "engine", "pretrain", "finetune")
SOURCES = {path: path.read_text() for room in ROOMS for path in sorted((ROOT / room).glob("*.py"))}
ALL_SCHEMAS = {f"pretrain {name}": schema for name, schema in METHODS.items()} | {
    f"finetune {name}": schema for name, schema in TASKS.items()
}


def sections(schema: type, name: str = "config") -> Iterator[tuple[str, type]]:
    """(name of the section, its dataclass), the schema itself as "config"."""
    yield name, schema
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.type):
            assert isinstance(field.type, type)
            yield from sections(field.type, field.name)


def classes_of(schema: type) -> frozenset[str]:
    """Names by which annotations call a section: its class and what that is made of."""
    return frozenset(kind.__name__ for kind in schema.__mro__ if dataclasses.is_dataclass(kind))


def owner_text(node: ast.expr) -> str:
    """``self.cim`` and ``cim`` as they stand; anything else by its last attribute, ``.cim``."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"self.{node.attr}" if ast.unparse(node.value) == "self" else f".{node.attr}"
    return ""


def assignments(tree: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """(target, value) of every assignment, tuples taken apart."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    yield from zip(target.elts, node.value.elts, strict=False)
                else:
                    yield target, node.value


def aliases(tree: ast.AST, section: str, classes: frozenset[str]) -> set[str]:
    """What a module calls a section: ``.section``, names annotated with its type, and whatever is assigned from these."""
    found = {"config"} if section == "config" else {f".{section}"}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            names = {part.id for part in ast.walk(node.annotation or node) if isinstance(part, ast.Name)}
            if names & classes or node.arg == section:
                found.add(node.arg)
        elif (
            isinstance(node, ast.AnnAssign) and isinstance(node.annotation, ast.Name) and node.annotation.id in classes
        ):
            found.add(owner_text(node.target))
    pairs = list(assignments(tree))
    while True:
        more = {owner_text(target) for target, value in pairs if owner_text(value) in found} - found - {""}
        if not more:
            return found
        found |= more


@functools.cache
def doing(source: str) -> ast.Module:
    """A module without its schemas and its checks, where a setting may be named and yet do nothing."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
            return None if node.name.lstrip("_").startswith("check") else self.generic_visit(node)

    return Strip().visit(ast.parse(source))


@functools.cache
def reads(source: str, section: str, classes: frozenset[str]) -> set[str]:
    """Names read from a section in a module."""
    tree = doing(source)
    owners = aliases(tree, section, classes)
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and owner_text(node.value) in owners
    }


def dead(schema: type, sources: Iterable[str]) -> list[str]:
    """Settings of a schema that nothing in ``sources`` reads."""
    texts = list(sources)
    found = []
    for name, section in sections(schema):
        used = set().union(*(reads(text, name, classes_of(section)) for text in texts))
        own = (field.name for field in dataclasses.fields(section) if not dataclasses.is_dataclass(field.type))
        found += [f"{name}.{field}" for field in own if field not in used]
    return found


def of(kind: str) -> list[str]:
    """The sources that one method or task runs through; not those of the others."""
    program, name = kind.split()
    others = {"pretrain": set(METHODS), "finetune": set(TASKS)}[program] - {name}
    return [
        text
        for path, text in SOURCES.items()
        if path.parent.name in ("data", "engine", program) and path.stem not in others
    ]


@pytest.mark.parametrize("kind", ALL_SCHEMAS)
def test_every_setting_is_read(kind: str) -> None:
    assert set(dead(ALL_SCHEMAS[kind], of(kind))) <= CHECKED_ONLY


@pytest.mark.parametrize(
    ("kind", "text", "setting"),
    [
        ("pretrain cim", "self.cim.sampling", "cim.sampling"),
        ("pretrain cim", "self.cim.target_window", "cim.target_window"),
        ("pretrain cim", "config.crop.hflip", "crop.hflip"),
        ("pretrain dvae", "s.kl_steps", "dvae.kl_steps"),
        ("finetune classify", "augment.cutmix", "augment.cutmix"),
        ("finetune knn", "config.knn.temperature", "knn.temperature"),
        ("pretrain cim", "optim.momentum", "optim.momentum"),
        ("pretrain cim", "train.save_minutes", "train.save_minutes"),
        ("pretrain cim", "config.threads", "config.threads"),
    ],
)
def test_the_search_notices_when_a_setting_is_no_longer_read(kind: str, text: str, setting: str) -> None:
    texts = of(kind)
    assert any(text in source for source in texts)
    found = dead(ALL_SCHEMAS[kind], [source.replace(text, "nothing") for source in texts])
    assert set(found) - CHECKED_ONLY == {setting}


@dataclasses.dataclass
class Part:
    used: int = 0
    aliased: int = 0
    typed: int = 0
    only_checked: int = 0
    only_written: int = 0
    of_another: int = 0


@dataclasses.dataclass
class Whole:
    name: str = ""
    unread: str = ""
    part: Part = dataclasses.field(default_factory=Part)


SOURCE = """
class Method:
    def __init__(self, config):
        self.settings = config.part
        other = config.elsewhere
        print(other.of_another, self.of_another, config.name, name.unread)
        config.part.only_written = 1
    def forward(self):
        s, t = self.settings, 1
        return s.aliased + self.settings.used
def helper(p: Part | None):
    return p.typed
def check(config: Whole):
    assert config.part.only_checked
"""


def test_the_search_tells_reading_from_the_rest() -> None:
    assert dead(Whole, [SOURCE]) == ["config.unread", "part.only_checked", "part.only_written", "part.of_another"]
