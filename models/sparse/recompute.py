"""Memory: what batch norm and a ReLU made is made again for the backward pass instead of being kept.

A convolution keeps its input for the backward pass, and batch norm keeps its own input too. The one follows from the
other by a scale, a shift and a ReLU, which cost next to nothing beside the convolution: only batch norm's input stays.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Again:
    """How to make the values of one map again, for whoever wants to keep them for the backward pass."""

    def __init__(self, make: Callable[[], Tensor], values: Tensor) -> None:
        self.make = make
        self.values_at(values)
        self._users = 0
        self._made: Tensor | None = None

    def values_at(self, values: Tensor) -> None:
        """These are the values, as they are now: a later change in place is noticed by its version."""
        self._where, self._size, self._version = values.data_ptr(), values.numel(), values._version

    def keeping(self) -> saved_tensors_hooks:
        """A context in which functions keep a note instead of these values."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, kept: Tensor) -> Any:
        if (kept.data_ptr(), kept.numel(), kept._version) != (self._where, self._size, self._version):
            return kept
        self._users += 1
        return (kept.shape, kept.stride())

    def _unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if self._made is None:
            with torch.no_grad():
                self._made = self.make()
        made = self._made
        self._users -= 1
        if self._users <= 0:  # the last one: a second backward pass makes them once more each time
            self._made = None
        return made.as_strided(*kept)


def relu_again(again: Again, relu: Callable[[], Tensor]) -> tuple[Tensor, Again]:
    """``relu()`` of the values of ``again``, keeping a note of its result."""
    before = again.make
    after = Again(lambda: before().relu_(), torch.empty(0))
    result: Tensor

    def pack(kept: Tensor) -> Any:  # the one thing a ReLU keeps: its result, the moment it is there
        after.values_at(kept)
        return after._pack(kept)

    with saved_tensors_hooks(pack, after._unpack):
        result = relu()
    after.values_at(result)
    return result, after


def worth_it() -> bool:
    """Gradients are asked for, and no checkpointing makes everything again anyway."""
    if not torch.is_grad_enabled():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is None or hooks[0].__module__ != "torch.utils.checkpoint"
