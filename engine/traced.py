"""A training step without its numbers: how much memory is alive at each moment of it, and how many operations it takes.

Tensors have a shape, a type and a place in memory that is never touched, so that it costs address space and nothing
else. What decides about shapes keeps its values: masks, and the index maps that follow from them. Counted is every
storage that an operation makes, from then until nothing refers to it any more; what an operation needs inside itself
is not seen.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._meta_registrations  # shapes of results, for functions that have no C++ of their own for it
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.flop_counter import flop_registry

_FLOAT32_ON_GPU = {
    *("layer_norm", "group_norm", "softmax", "log_softmax", "softplus", "norm", "cosine_similarity"),
    *("pow", "__pow__", "exp", "log", "rsqrt", "sum", "prod", "cumsum"),
    *(
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "cross_entropy",
        "nll_loss",
        "kl_div",
        "binary_cross_entropy_with_logits",
    ),
}
"""What autocast runs in float32 on a GPU, but not on the CPU that a step is traced on."""

_FLOATS_FROM_NOTHING = ("empty", "empty_strided", "zeros", "ones", "full", "randn", "normal")
"""Functions whose results nothing depends on where they are floating point; not rand, which draws masks."""

_VIEWS = ("_unsafe_view", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes")
"""Views that do not say so."""

_INDEXING = ("index", "index_put", "index_put_", "_unsafe_index")


class ValueNeededError(RuntimeError):
    """A step asked for a number of a tensor that has none."""


@dataclass
class Step:
    """What a traced step of ``images`` images keeps and does, on one process.

    Attributes:
        moments: (activations, gradients) in bytes: the most activations while there were that many gradients.
        flops: operations of forward and backward pass, a multiplication and an addition being two.
    """

    images: int
    moments: list[tuple[int, int]] = field(default_factory=list)
    flops: int = 0

    @property
    def activations(self) -> int:
        """Most bytes alive at once beside weights and gradients."""
        return max(activations for activations, _ in self.moments)

    def stretched(self, other: "Step", images: int) -> "Step":
        """A step of ``images`` images: straight lines through the moments of this step and ``other``."""
        share = (images - self.images) / (other.images - self.images)

        def between(one: float, two: float) -> int:
            return max(0, round(one + share * (two - one)))

        pairs = zip(self.moments, other.moments, strict=True)
        moments = [(between(one, two), made) for (one, made), (two, _) in pairs]
        return Step(images, moments, between(self.flops, other.flops))

    def peak(self, gradients: Callable[[int], float]) -> float:
        """Most bytes at once where gradients of n bytes occupy ``gradients(n)``."""
        return max(activations + gradients(made) for activations, made in self.moments)


class Shapes(TorchDispatchMode):
    """Operations on shapes alone, and a count of the storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.counting = False
        self.alive = self.gradients = self.flops = 0
        self.moments: list[tuple[int, int]] = []
        self._empty: set[int] = set()  # storages without values
        self._sizes: dict[int, int] = {}  # of what is counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        name = func._schema.name.removeprefix("aten::")
        if any(self.is_empty(value) for value in tensors):
            out = self._on_shapes(func, name, args, kwargs)
        elif not tensors and name in _FLOATS_FROM_NOTHING and _is_float(kwargs):
            out = self.emptied(
                torch.empty(func(*args, **(kwargs | {"device": "meta"})).shape, dtype=kwargs.get("dtype"))
            )
        else:
            out = func(*args, **kwargs)
        if self.counting:
            self.flops += _flops(func, args, kwargs, out)
            for value in tree_leaves(out):
                if isinstance(value, Tensor):
                    self.hold(value)
            self._note()
        return out

    def _on_shapes(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """The result of ``func``, of which nothing is computed."""
        if name == "_local_scalar_dense":
            if self.counting:
                raise ValueNeededError("the step depends on a value that it computes")
            return torch.zeros((), dtype=args[0].dtype).item()  # an initialiser asks whether it is content
        if name in _VIEWS or (func.is_view and not func._schema.is_mutable):
            return func(*args, **kwargs)  # touches no value
        given = {formal.name: value for formal, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        written = [
            given[formal.name]
            for formal in func._schema.arguments
            if formal.name in given and formal.alias_info is not None and formal.alias_info.is_write
        ]
        for value in tree_leaves(written):
            if isinstance(value, Tensor):
                self.emptied(value)
        if name in _INDEXING:
            args = (args[0], _places(args[1], self.is_empty), *args[2:])
        returns = func._schema.returns
        if all(one.alias_info is not None for one in returns):  # done in place
            return written[0] if len(written) == 1 and returns else tuple(written) if returns else None
        as_meta = tree_map(lambda v: _meta(v) if isinstance(v, Tensor) else v, (args, kwargs))
        if "device" in kwargs:
            as_meta[1]["device"] = "meta"
        found = func(*as_meta[0], **as_meta[1])
        return tree_map(lambda v: self._made(v) if isinstance(v, Tensor) else v, found)

    def _made(self, meta: Tensor) -> Tensor:
        return self.emptied(torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype))

    def emptied(self, tensor: Tensor) -> Tensor:
        """The tensor, from now on one without values."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._empty:
            self._empty.add(storage._cdata)
            weakref.finalize(storage, self._empty.discard, storage._cdata)
        return tensor

    def is_empty(self, tensor: Tensor) -> bool:
        """Whether the tensor has no values."""
        return tensor.is_meta or tensor.untyped_storage()._cdata in self._empty

    def start(self, known: Iterable[Tensor]) -> None:
        """Count from now on, from nothing; ``known`` is not counted."""
        self.alive = self.gradients = self.flops = 0
        self.moments = []
        self._sizes = dict.fromkeys(self._sizes, 0)  # what is left of before
        for tensor in known:
            self.hold(tensor, 0)
        self.counting = True

    def stop(self) -> None:
        """Count no longer."""
        self.counting = False

    def hold(self, tensor: Tensor, size: int | None = None) -> None:
        """Count a tensor's storage (as ``size`` bytes) from now on until it is gone."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes() if size is None else size
            self.alive += self._sizes[key]
            weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)

    def make_gradient(self, tensor: Tensor) -> None:
        """A tensor has become the gradient of a parameter."""
        key = tensor.untyped_storage()._cdata
        size = self._sizes[key]
        self._sizes[key] = 0
        self.alive -= size
        self.gradients += size
        self._note()

    def _note(self) -> None:
        if self.moments and self.moments[-1][1] == self.gradients:
            self.moments[-1] = (max(self.moments[-1][0], self.alive), self.gradients)
        else:
            self.moments.append((self.alive, self.gradients))


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Operations of a function, by the formulas of torch's own counter."""
    aten = torch.ops.aten
    if func._overloadpacket is aten.convolution_backward:
        # Each of the two gradients takes what the convolution took. torch's formula forgets the groups.
        grad, x, weight, _, *geometry, asked = args
        once = flop_registry[aten.convolution](x, weight, None, *geometry, out_val=grad)
        return int(once) * sum(asked[:2])
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _is_float(kwargs: dict[str, Any]) -> bool:
    return (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _places(indices: Any, is_empty: Callable[[Tensor], bool]) -> list[Any]:
    """Indices with places instead of masks: how many there are decides about the shape of the result."""
    places: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
            if is_empty(index):
                raise ValueNeededError("the step selects by a mask that it computes")
            places.extend(index.nonzero(as_tuple=True))
        else:
            places.append(index)
    return places


_IS_CPU: Any = getattr(Tensor.is_cpu, "__get__")  # noqa: B009
"""What ``tensor.is_cpu`` calls."""


class _Functions(TorchFunctionMode):
    """What differs between the CPU that is traced on and the GPU that is planned for."""

    def __init__(self, mode: Shapes, gpu: bool) -> None:
        super().__init__()
        self.mode, self.gpu = mode, gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if func == _IS_CPU:
            return not self.gpu  # whoever chooses a way by the device takes the one of that device
        if name in ("tolist", "numpy") and self.mode.is_empty(args[0]):
            raise ValueNeededError("the step depends on values that it computes")
        if self.gpu and name in _FLOAT32_ON_GPU and torch.is_autocast_enabled("cpu"):
            flat, tree = tree_flatten((args, kwargs or {}))
            half = (torch.bfloat16, torch.float16)
            wide = [v.float() if isinstance(v, Tensor) and v.dtype in half else v for v in flat]
            args, kwargs = tree_unflatten(wide, tree)
        return func(*args, **(kwargs or {}))


@contextmanager
def without_weights() -> Iterator[Shapes]:
    """Modules built inside have parameters without values."""
    mode = Shapes()
    register = nn.Module.register_parameter

    def register_shape(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not mode.is_empty(param):
            shape = mode.emptied(torch.empty_like(param.detach(), memory_format=torch.contiguous_format))
            param = nn.Parameter(shape, param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_shape  # type: ignore[assignment, method-assign]
    try:
        with mode:
            yield mode
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def trace(
    method: nn.Module,
    batch: dict[str, Tensor],
    mode: Shapes,
    dtype: torch.dtype | None,
    *,
    apart: Iterable[nn.Module] = (),
    accumulated: bool = False,
    gpu: bool = True,
) -> Step:
    """One step of ``method``, forward and backward, on ``batch``; the method was built under ``mode``.

    Args:
        dtype: of autocast, None for float32.
        apart: networks of the method that are not among its modules.
        accumulated: look at a step that finds gradients from one before it.
        gpu: what autocast does on one; else what it does on a CPU.

    Raises:
        ValueNeededError: the step depends on values other than those of its masks.
    """
    trained = [p for p in method.parameters() if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(lambda p: mode.make_gradient(p.grad)) for p in trained]
    step = Step(len(batch["image"]))
    mode.start(value for network in (method, *apart) for value in (*network.parameters(), *network.buffers()))
    try:
        with torch.random.fork_rng(devices=[]), _Functions(mode, gpu), mode:
            torch.manual_seed(0)  # as many hidden patches, whatever the number of images
            for _ in range(2 if accumulated else 1):
                mode.moments, mode.flops = [], 0  # of the last one
                values = {key: mode.emptied(value.clone()) for key, value in batch.items()}
                with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                    loss = method(values)["loss"]
                loss.backward()
                del loss, values
    finally:
        mode.stop()
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.grad = None
    step.moments, step.flops = mode.moments, mode.flops
    return step
