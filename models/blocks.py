"""The repeated blocks of any network: computed again in the backward pass instead of kept, or compiled, in place.

Both happen where a block is called, so that names, keys, hooks, copies and printed networks stay what they were: the
block's class is exchanged for a sub-class of the same name that runs differently while it is being trained.
"""

import functools
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from models.sparse.tensor import SparseTensor, known, plain, wrap

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers that a forward pass changes."""


def blocks(network: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a network by name: the innermost elements of its lists that hold two layers with weights or more.

    A module whose children are all of one class is such a list, too. In a network without any list (DLA, NASNet) blocks
    are the innermost modules of that size of whose class there are several. A block that stands in two places has two
    names.
    """
    uniform = {type(m) for m in network.modules() if len({type(child) for child in m.children()}) == 1 < _children(m)}
    found = _elements(network, (*_CONTAINERS, *uniform))
    if found:
        return found
    kinds = Counter(type(module) for module in network.modules())
    large = {
        name: module
        for name, module in network.named_modules()
        if kinds[type(module)] > 1 and not isinstance(module, _CONTAINERS) and _layers(module) > 1
    }
    return {name: block for name, block in large.items() if not any(other.startswith(f"{name}.") for other in large)}


def _children(module: nn.Module) -> int:
    return len(list(module.children()))


def _layers(module: nn.Module) -> int:
    """Modules inside that have a matrix or kernel of their own."""
    own = ((p.dim() > 1 for p in m.parameters(recurse=False)) for m in module.modules())
    return sum(map(any, own))


def _elements(module: nn.Module, containers: tuple[type, ...]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if inner := _elements(child, containers):
            found |= {f"{name}.{path}": block for path, block in inner.items()}
        elif isinstance(module, containers) and not isinstance(child, nn.ModuleList) and _layers(child) > 1:
            found[name] = child
    return found


def arrange(method: Any, *, recompute: bool, compiled: bool) -> int:
    """Have the blocks of a method's networks computed again in the backward pass, compiled, or both -> how many there are.

    ``method`` is an nn.Module that has an ``encoder``. Training gives what it gives without, bit for bit where nothing is
    compiled: random numbers are drawn once, running statistics move once. Evaluation stays as it is, and so do copies in
    evaluation mode.

    Raises:
        ValueError: the encoder has no blocks that are told; or there is no compiler.
    """
    if not (recompute or compiled):
        return 0
    if not blocks(method.encoder):
        raise ValueError(
            f"{type(method.encoder).__name__} is not made of blocks, so that there is nothing to compute again or to compile: "
            "leave out train.checkpoint_blocks and train.compile, or choose another encoder"
        )
    # Network by network: what is a list, and a block, is told by what else a network holds.
    parts = [blocks(network).values() for network in method.children()]
    found = {id(block): block for part in parts for block in part}
    if compiled:
        _require_compiler()
        # Each block may be a program of its own, where widths or rates of stochastic depth differ; torch gives up after 8.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 4 * len(found))
        limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 16 * len(found))
    for block in found.values():
        if not isinstance(block, Arranged):
            block.__class__ = _arranged(type(block))  # type: ignore[arg-type]
        block.recompute, block.compiled = recompute, compiled  # type: ignore[assignment]
    return len(found)


class Arranged(nn.Module):
    """What a block's class is extended by. Hooks of the block itself run as ever, once and around all of this."""

    recompute: bool
    compiled: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block computes."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        # As single tensors, each of which is kept and checked; a list might have grown by the backward pass (DenseNet's).
        values, structure = tree_flatten((args, kwargs))
        sites = [known(value) if isinstance(value, SparseTensor) else None for value in values]
        run = super().forward
        if self.compiled and not any(sites):  # a sparse map goes through Python at every function
            run = functools.partial(_program(type(self).__mro__[2]), self)
        if not self.recompute:
            return run(*args, **kwargs)

        first = [(args, kwargs)]

        def pass_through(*values: Any) -> Any:
            if first:
                args, kwargs = first.pop()  # as they came, so that gradients are added up in the order they always are
            else:
                whole = [value if s is None else wrap(value, s) for value, s in zip(values, sites, strict=True)]
                args, kwargs = tree_unflatten(whole, structure)
            return run(*args, **kwargs)

        contexts = nullcontext(), _statistics_kept(self)
        # Of what autograd keeps only the values are sure to come back, not what Python knows of them.
        bare = [plain(value) if isinstance(value, SparseTensor) else value for value in values]
        return checkpoint(pass_through, *bare, use_reentrant=False, context_fn=lambda: contexts)


@functools.cache
def _arranged(kind: type[nn.Module]) -> type[nn.Module]:
    """``kind`` as :class:`Arranged`, under its own name."""
    return type(kind.__name__, (Arranged, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


@functools.cache
def _program(kind: type[nn.Module]) -> Callable[..., Any]:
    """The compiled ``forward`` of a class of blocks."""

    def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(block, *args, **kwargs)

    # Random numbers as without compilation: the same whether a run is compiled, or continued with another setting.
    return torch.compile(forward, dynamic=False, options={"fallback_random": True})


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Running statistics move in the first pass; the second has copies of them."""
    own = [(m._buffers, name, m._buffers[name]) for m in block.modules() for name in _STATISTICS if name in m._buffers]
    try:
        for buffers, name, value in own:
            buffers[name] = None if value is None else value.clone()
        yield
    finally:
        for buffers, name, value in own:
            buffers[name] = value


def _require_compiler() -> None:
    """torch.compile writes C++ that includes Python's headers: looked for now instead of in the middle of the first step."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    header = Path(sysconfig.get_path("include"), "Python.h")
    try:
        get_cpp_compiler()
        missing = "" if header.is_file() else f"Python's headers ({header}): install python3-dev"
    except InvalidCxxCompiler:
        missing = f"a C++ compiler ({os.environ.get('CXX', 'g++')}): install g++, or name another in the variable CXX"
    if missing:
        raise ValueError(f"train.compile=true needs {missing}; or leave out train.compile")
