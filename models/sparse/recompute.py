"""Memory: what batch norm and a ReLU made is made again for the backward pass instead of being kept.

A convolution keeps its input for the backward pass, and batch norm keeps its own input too. The one follows from the
other by a scale, a shift and a ReLU, which cost next to nothing beside the convolution: only batch norm's input stays.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Again:
    """How to make the values of one map again, for whoever wants to keep them for the backward pass.

    ``make`` computes them from ``sources``, which must not change in place until then.
    """

    def __init__(self, make: Callable[[], Tensor], sources: Sequence[Tensor], values: Tensor | None = None) -> None:
        self.make, self.sources = make, sources
        self._versions = [source._version for source in sources]
        self._users = 0
        self._made: Tensor | None = None
        if values is not None:
            self.values_at(values)

    def values_at(self, values: Tensor) -> None:
        """These are the values, as they are now: a later change in place is noticed by its version."""
        self._where, self._size, self._version = values.data_ptr(), values.numel(), values._version

    def keeping(self) -> saved_tensors_hooks:
        """A context in which functions keep a note instead of these values."""
        return saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, kept: Tensor) -> Any:
        """A note, or what is no such value together with its version: autograd looks at neither under these hooks."""
        if (kept.data_ptr(), kept.numel(), kept._version) != (self._where, self._size, self._version):
            return kept, kept._version
        self._users += 1
        return kept.shape, kept.stride()

    def unpack(self, note: Any) -> Tensor:
        """What was packed.

        Raises:
            RuntimeError: it, or what it is made from, has changed in place since.
        """
        if isinstance(note[0], Tensor):
            _require_version(*note)
            return note[0]
        for source, version in zip(self.sources, self._versions, strict=True):
            _require_version(source, version)
        if self._made is None:
            with torch.no_grad():
                self._made = self.make()
        made = self._made
        self._users -= 1
        if self._users <= 0:  # the last one: a second backward pass makes them once more each time
            self._made = None
        return made.as_strided(*note)


def _require_version(tensor: Tensor, version: int) -> None:
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor of "
            f"{tuple(tensor.shape)} is at version {tensor._version}, expected {version}"
        )


def relu_again(again: Again, relu: Callable[[], Tensor]) -> tuple[Tensor, Again]:
    """``relu()`` of the values of ``again``, keeping a note of its result."""
    before = again.make
    after = Again(lambda: before().relu_(), again.sources)

    def pack(kept: Tensor) -> Any:  # the one thing a ReLU keeps: its result, the moment it is there
        after.values_at(kept)
        return after.pack(kept)

    with saved_tensors_hooks(pack, after.unpack):
        result = relu()
    after.values_at(result)
    return result, after


def worth_it() -> bool:
    """Gradients are asked for, and no checkpointing makes everything again anyway."""
    if not torch.is_grad_enabled():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is None or hooks[0].__module__ != "torch.utils.checkpoint"
