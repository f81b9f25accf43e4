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
BESIDE = sorted(path for folder in ("run", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
"""What is run as well, and belongs to no room."""


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


UNPICKLERS = (
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "hickle", "jsonpickle"),
    *("torch.jit.load", "torch.package", "torch.hub.load", "torch.serialization.unsafe_globals"),
    *("pandas.read_pickle", "numpy.lib.format.read_array", "scipy.io.loadmat"),
    *("yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all"),
    *("os.system", "os.popen", "runpy", "eval", "exec", "compile", "builtins.eval", "builtins.exec"),
)
"""Functions, and modules of functions, that run what a file holds."""
HARMLESS = ("dumps", "dump", "PickleError", "UnpicklingError")
"""Of those modules."""
WEIGHTS_ONLY = (
    *("torch.load", "torch.serialization.load", "load_checkpoint"),
    *("torch.hub.load_state_dict_from_url", "torch.utils.model_zoo.load_url"),
)
"""What takes ``weights_only``, and must be given it."""


def full_names(tree: ast.AST) -> dict[str, str]:
    """Name in a file -> what it stands for, of all that is imported or assigned from a name."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                known[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):  # read = torch.load
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Name, ast.Attribute)):
            told = ast.unparse(node.value)
            if told.partition(".")[0] in known:
                known |= {target.id: resolved(told, known) for target in node.targets if isinstance(target, ast.Name)}
    return known


def resolved(name: str, known: dict[str, str]) -> str:
    """The full name of ``t.load`` where ``import torch as t`` stands above it."""
    first, dot, rest = name.partition(".")
    return known.get(first, first) + dot + rest


def unsafe_calls(source: str) -> list[str]:
    """Calls that run code found in a file, under whatever name they were imported."""
    tree = ast.parse(source)
    known, wrong = full_names(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            wrong.append(f"{node.module}.*")  # what it brings cannot be seen
        if not isinstance(node, ast.Call):
            continue
        name = resolved(ast.unparse(node.func), known)
        if name == "functools.partial" and node.args:
            name = resolved(ast.unparse(node.args[0]), known)
        last = name.rpartition(".")[2]
        options = {keyword.arg: resolved(ast.unparse(keyword.value), known) for keyword in node.keywords}
        hidden = None in options  # **options
        if any(within(name, one) for one in UNPICKLERS) and last not in HARMLESS:
            wrong.append(name)
        if name in WEIGHTS_ONLY and options.get("weights_only") != "True":
            wrong.append(name)
        if name in ("numpy.load", "numpy.lib.npyio.load", "numpy.lib.npyio.NpzFile"):
            asked = options.get("allow_pickle", ast.unparse(node.args[2]) if len(node.args) > 2 else "False")
            if hidden or asked != "False":
                wrong.append(name)
        if name in ("yaml.load", "yaml.load_all"):
            loader = options.get("Loader", resolved(ast.unparse(node.args[1]), known) if len(node.args) > 1 else "")
            if loader not in ("yaml.SafeLoader", "yaml.CSafeLoader"):
                wrong.append(name)
        if within(name, "subprocess") and (hidden or options.get("shell", "False") != "False"):
            wrong.append(name)
    return wrong


def test_there_is_something_to_look_at() -> None:
    assert len(FILES) > 30 and {path.relative_to(ROOT).parts[0] for path in FILES} == set(ROOMS)
    assert {path.relative_to(ROOT).parts[0] for path in BESIDE} == {"run", "benchmarks"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    assert wrong_imports(path.relative_to(ROOT).parts[0], path.name, path.read_text()) == []


@pytest.mark.parametrize("path", [*FILES, *BESIDE], ids=lambda path: str(path.relative_to(ROOT)))
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


UNSAFE = """
import torch; torch.load(path)
import torch; torch.load(path, weights_only=False)
import torch; torch.load(path, **options)
import torch as t; t.load(path)
from torch import load; load(path)
from torch import load as read; read(path, map_location="cpu")
from torch import serialization; serialization.load(path)
import torch.serialization as s; s.load(path)
import torch; read = torch.load; read(path)
import functools, torch; functools.partial(torch.load, map_location="cpu")
import torch; torch.jit.load(path)
from torch import jit; jit.load(path)
import torch; torch.hub.load("someone/code", "net")
import torch; torch.hub.load_state_dict_from_url(address)
import pickle; pickle.load(file)
import pickle as p; p.loads(content)
from pickle import loads; loads(content)
from pickle import load as f; f(file)
from pickle import *
import pickle; pickle.Unpickler(file).load()
import _pickle; _pickle.loads(content)
import dill; dill.load(file)
import cloudpickle; cloudpickle.loads(content)
import joblib; joblib.load(path)
from joblib import load; load(path)
import shelve; shelve.open(path)
import marshal; marshal.loads(content)
import numpy as np; np.load(path, allow_pickle=True)
import numpy as np; np.load(path, None, True)
import numpy as np; np.load(path, **options)
import numpy; numpy.load(path, allow_pickle=asked)
from numpy import load; load(path, allow_pickle=True)
import pandas as pd; pd.read_pickle(path)
import yaml; yaml.load(text)
import yaml; yaml.load(text, Loader=yaml.Loader)
import yaml; yaml.load(text, yaml.UnsafeLoader)
import yaml as y; y.full_load(text)
from yaml import load, Loader; load(text, Loader=Loader)
from yaml import unsafe_load; unsafe_load(text)
import subprocess; subprocess.run(text, shell=True)
from subprocess import Popen; Popen(text, shell=asked)
from os import system; system(text)
eval(text)
exec(text)
"""
SAFE = """
import torch; torch.load(path, map_location="cpu", weights_only=True)
import torch as t; t.load(path, weights_only=True)
from torch import load; load(path, weights_only=True)
from safetensors.torch import load_file; load_file(path)
import numpy as np; np.load(path)
import numpy as np; np.load(path, allow_pickle=False)
from numpy import load; load(path, None, False)
import json; json.loads(text)
from json import load; load(file)
import pickle; pickle.dumps(value)
import yaml; yaml.safe_load(text)
import yaml; yaml.load(text, Loader=yaml.SafeLoader)
from yaml import load, CSafeLoader; load(text, CSafeLoader)
import subprocess; subprocess.run(["ls", folder])
import re; re.compile(text)
model.eval()
self.load(path)
"""


@pytest.mark.parametrize(
    ("source", "unsafe"),
    [(line, text is UNSAFE) for text in (UNSAFE, SAFE) for line in text.strip().splitlines()],
)
def test_the_search_for_code_sees(source: str, unsafe: bool) -> None:
    assert bool(unsafe_calls(source)) == unsafe


def test_rooms_are_importable_names() -> None:
    assert not set(ROOMS) & set(sys.stdlib_module_names)
