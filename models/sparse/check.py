"""Is sparse encoding of a network exact? Tried on the network itself before it is used.

A float64 copy with *randomised* weights runs on random images three ways: tiles against masked at two mask ratios,
gradients too, and without a mask against the plain network. At initialisation zero gains and layer scales of 1e-6 would hide whole
branches, and with them what is wrong there: hence the random weights, which only the copy ever sees.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from models.masking import random_mask
from models.sparse.geometry import Geometry
from models.sparse.masked import Masked
from models.sparse.tensor import SparseError, dense
from models.sparse.tiles import Tiles

TOLERANCE = 1e-9
"""Largest difference, relative to the largest value, that rounding in float64 may explain."""
GRID = (3, 4)
"""Patches of the images the check looks at: as few as can hold hidden and visible neighbours; not square."""
HIDDEN = (4, 8)
"""Hidden patches of the two masks."""


def check(
    model: nn.Module,
    geometry: type[Geometry],
    mask_patch: tuple[int, int],
    in_chans: int,
    run: Callable[[Any, Tensor], Any],
) -> None:
    """Compare a randomised float64 copy of ``model`` on ``geometry`` with the masked and the plain dense network.

    ``run(model, x)`` gives the features. Weights, buffers, random states and the training flag stay as they are.
    A network without values, which has shapes alone, is not looked at: there is nothing to compare.

    Raises:
        SparseError: naming the module that is not exact, or what it does that cannot be done on visible patches.
    """
    if not all(_has_values(parameter) for parameter in model.parameters()):
        return
    size = (GRID[0] * mask_patch[0], GRID[1] * mask_patch[1])
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, in_chans, *size, generator=generator, dtype=torch.float64)
    tried = Tiles if geometry is Masked else geometry  # the reference is compared with another backend, too
    with torch.random.fork_rng(devices=[]):
        double = randomised(model)
        resize = getattr(double, "set_input_size", None)
        if resize is not None:  # positions are for images of one size
            with _named_errors(double):
                resize(img_size=size)
        mask = random_mask(2, GRID, HIDDEN[0], generator)
        _try_random(double, model, run, tried(mask, size).enter(images))
        double.train()
        _compare_gradients(double, run, tried(mask, size).enter(images), Masked(mask, size).enter(images), tried)
        for training in (True, False):
            double.train(training)
            for hidden in HIDDEN:
                mask = random_mask(2, GRID, hidden, generator)
                _compare(double, run, tried(mask, size).enter(images), Masked(mask, size).enter(images), tried)
            nothing = torch.zeros_like(mask)
            _compare(double, run, tried(nothing, size).enter(images), images, tried)


def _has_values(tensor: Tensor) -> bool:
    """Whether computing on a tensor gives numbers: not on the meta device, as a fake tensor, or where shapes alone are traced."""
    try:
        return tensor.new_ones(()).item() == 1
    except RuntimeError:  # that is what each of them says when a number is asked for
        return False


def randomised(model: nn.Module) -> nn.Module:
    """A float64 copy on the CPU with random weights and statistics of moderate size, and nothing dropped at random."""
    double = copy.deepcopy(model).to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(1)
    for name, value in [*double.named_parameters(), *double.named_buffers()]:
        if not value.is_floating_point():
            continue
        if value.dim() > 1 and value.numel() > max(value.shape):  # a kernel or matrix: keeps the size of what it sees
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64) / value[0].numel() ** 0.5
        elif name.endswith(("bias", "beta", "running_mean")):
            drawn = 0.2 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        else:  # gains, layer scales, variances
            drawn = 0.5 + torch.rand(value.shape, generator=generator, dtype=torch.float64)
        value.data.copy_(drawn)
    for module in double.modules():
        for rate in _rates(module):
            setattr(module, rate, 0.0)
    return double


def _rates(module: nn.Module) -> dict[str, float]:
    """A module's rates of dropout and stochastic depth."""
    found = {rate: getattr(module, rate, None) for rate in ("p", "drop_prob", "drop_rate")}
    return {rate: value for rate, value in found.items() if isinstance(value, float)}


def _try_random(double: nn.Module, model: nn.Module, run: Callable[[Any, Tensor], Any], x: Tensor) -> None:
    """What is drawn at random must know of tiles, too: one pass with the rates there are, whose values mean nothing."""
    for copied, module in zip(double.modules(), model.modules(), strict=True):
        for rate, value in _rates(module).items():
            setattr(copied, rate, value)
    with torch.no_grad(), _named_errors(double.train()):
        run(double, x)
    for copied in double.modules():
        for rate in _rates(copied):
            setattr(copied, rate, 0.0)


def _compare(
    model: nn.Module, run: Callable[[Any, Tensor], Any], x: Tensor, reference: Tensor, geometry: type[Geometry]
) -> None:
    with torch.no_grad(), _named_errors(model):
        found = _tensors(dense(run(model, x)))
        expected = _tensors(dense(run(model, reference)))
    if not found:
        raise SparseError(f"{type(model).__name__} returns no tensor that could be compared")
    if all(_close(a, b) for a, b in zip(found, expected, strict=True)):
        return
    with torch.no_grad(), _trace(model) as ours:
        run(model, x)
    with torch.no_grad(), _trace(model) as theirs:
        run(model, reference)
    for (path, call), a in ours.items():
        b = theirs.get((path, call))
        if b is not None and not _close(a, b):
            raise SparseError(
                f"{_described(model, path)} is not exact on {geometry.backend}: it looks beyond the visible part of a "
                "map in a way that is not known here; use backend=dense, or another encoder"
            )
    raise SparseError(f"{type(model).__name__} is not exact on {geometry.backend}, and no module of it shows where")


def _compare_gradients(
    model: nn.Module, run: Callable[[Any, Tensor], Any], x: Tensor, reference: Tensor, geometry: type[Geometry]
) -> None:
    """Gradients of all parameters: a function of its own may have a backward pass that knows nothing of tiles."""
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)

    def gradients(x: Tensor) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(2)
        total = torch.zeros((), dtype=torch.float64)
        for out in _tensors(dense(run(model, x))):
            total = total + (out * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum()
        return list(torch.autograd.grad(total, list(parameters.values()), allow_unused=True))

    with _named_errors(model):
        found, expected = gradients(x), gradients(reference)
    largest = max((float(g.abs().max()) for g in expected if g is not None), default=0.0)
    for name, a, b in zip(parameters, found, expected, strict=True):
        if (a is None) != (b is None) or (a is not None and b is not None and not _close(a, b, floor=1e-3 * largest)):
            path = name.rpartition(".")[0]
            raise SparseError(
                f"the gradient of {name} is not exact on {geometry.backend}: {_described(model, path)}, or what follows it, "
                "has a backward pass that looks beyond the visible part of a map"
            )


def _close(a: Tensor, b: Tensor, floor: float = 1e-30) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max().clamp(min=floor))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _described(model: nn.Module, path: str) -> str:
    return f"{path} ({type(model.get_submodule(path)).__name__})" if path else type(model).__name__


@contextmanager
def _named_errors(model: nn.Module) -> Iterator[None]:
    """Whatever is refused inside says in which module."""
    inside: list[str] = []

    def leave(*_: Any) -> None:
        inside.pop()

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: inside.append(path)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    except SparseError as error:
        raise SparseError(f"{_described(model, inside[-1] if inside else '')}: {error}") from error
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError) as error:
        where = _described(model, inside[-1] if inside else "")
        raise SparseError(
            f"{where} does not run on visible patches alone: {str(error).partition(chr(10))[0]}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _trace(model: nn.Module) -> Iterator[dict[tuple[str, int], Tensor]]:
    """Outputs of all modules as they are made, by path and number of the output; maps dense."""
    found: dict[tuple[str, int], Tensor] = {}

    def keep(path: str, output: Any) -> None:
        with suppress(SparseError):  # a view, such as a map's flattened axes: the module around it shows the same
            for tensor in _tensors(dense(output)):
                found[path, sum(known == path for known, _ in found)] = tensor.detach().clone()

    handles = [
        module.register_forward_hook(lambda _m, _i, output, path=path: keep(path, output))
        for path, module in model.named_modules()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
