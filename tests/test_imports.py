"""Who may import whom (DESIGN: the house), and that nothing unpickles code."""

import ast
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT

ROOMS = ("formats", "data", "models", "engine", "pretrain", "finetune")
ALLOWED = {
    "formats": {"formats"},
    "data": {"data", "formats"},
    "models": {"models", "formats"},
    "engine": {"engine", "formats"},
    "pretrain": {"pretrain", "engine", "models", "data", "formats"},
    "finetune": {"finetune", "engine", "models", "data", "formats"},
}
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    """Full names of all that a module imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports here are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            names.add(ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else "unknown")
    return names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def wrong_imports(room: str, file: str, source: str) -> list[str]:
    """Imports that a file of a room may not have."""
    wrong = []
    for name in imported(ast.parse(source)):
        top = name.partition(".")[0]
        if top in (*ROOMS, "tests", "benchmarks", "run") and top not in ALLOWED[room]:
            wrong.append(name)
        joins = room == "engine" or (room in ("pretrain", "finetune") and file == "__main__.py")
        if not joins and (within(name, "deepspeed") or within(name, "torch.distributed")):
            wrong.append(name)
    return sorted(set(wrong))


def unsafe_calls(source: str) -> list[str]:
    """Calls that run code found in a file."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in ("pickle.load", "pickle.loads", "dill.load", "joblib.load", "torch.jit.load", "yaml.unsafe_load"):
            wrong.append(name)
        if name in ("torch.load", "load_checkpoint") and options.get("weights_only") != "True":
            wrong.append(name)
        if name in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
            wrong.append(name)
        if name in ("yaml.load",) and "Safe" not in options.get("Loader", ""):
            wrong.append(name)
        if name in ("eval", "exec", "os.system"):
            wrong.append(name)
    return wrong


def test_there_is_something_to_look_at() -> None:
    assert len(FILES) > 30 and {path.relative_to(ROOT).parts[0] for path in FILES} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    assert wrong_imports(path.relative_to(ROOT).parts[0], path.name, path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_trusted_with_code(path: Path) -> None:
    assert unsafe_calls(path.read_text()) == []


@pytest.mark.parametrize("room", ["formats", "data", "models", "pretrain", "finetune"])
def test_methods_know_neither_device_nor_rank_nor_precision(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                assert node.attr not in ("cuda", "half", "bfloat16", "local_rank") or ast.unparse(node).startswith(
                    ("torch.cuda", "torch.half", "torch.bfloat16")
                ), f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    ("room", "file", "source", "wrong"),
    [
        ("data", "x.py", "import engine.config", ["engine.config"]),
        ("models", "x.py", "def f():\n    from data.decode import decode", ["data.decode", "data.decode.decode"]),
        ("engine", "x.py", "import models", ["models"]),
        ("engine", "x.py", "import deepspeed, torch.distributed as dist", []),
        ("pretrain", "cim.py", "from torch import distributed", ["torch.distributed"]),
        ("pretrain", "cim.py", "import deepspeed.ops", ["deepspeed.ops"]),
        ("pretrain", "__main__.py", "import deepspeed", []),
        ("pretrain", "cim.py", "import finetune.knn", ["finetune.knn"]),
        ("finetune", "knn.py", "from engine.world import World\nfrom tests import launch", ["tests", "tests.launch"]),
        ("models", "x.py", "import importlib\nimportlib.import_module('engine')", ["engine"]),
        ("models", "x.py", "import torch.distributions, dataclasses, runpy", []),
    ],
)
def test_the_rule_sees(room: str, file: str, source: str, wrong: list[str]) -> None:
    assert wrong_imports(room, file, source) == wrong


@pytest.mark.parametrize(
    ("source", "unsafe"),
    [
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, map_location='cpu', weights_only=True)", False),
        ("pickle.load(file)", True),
        ("np.load(path)", False),
        ("np.load(path, allow_pickle=True)", True),
        ("json.loads(text)", False),
        ("eval(text)", True),
        ("model.eval()", False),
    ],
)
def test_the_search_for_code_sees(source: str, unsafe: bool) -> None:
    assert bool(unsafe_calls(source)) == unsafe


def test_rooms_are_importable_names() -> None:
    assert not set(ROOMS) & set(sys.stdlib_module_names)
