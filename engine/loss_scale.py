"""The loss scale of float16: large enough that small gradients do not vanish, small enough that large ones stay finite.

A loss is multiplied by it before the backward pass, gradients are divided by it after. Where one of them is not finite all
the same the step is left out and the scale halved; after 2000 steps in a row without that it is doubled. At ZeRO-0 DeepSpeed
leaves this to torch's GradScaler. Its ZeRO optimisers have one, too, but see an overflow before it and never tell it, and
clip by a norm that still holds the scale: :class:`ZeroScaler` takes its place.
"""

import math
from typing import Any

import torch

LEAST = 1.0
"""Where gradients overflow at this scale or a smaller one, it is not the scale that is wrong."""


class ZeroScaler(torch.amp.GradScaler):
    """torch's rule of when the scale falls and grows, for an optimiser of ZeRO 1 to 3, which has a scale of its own.

    The optimiser multiplies the loss by that, divides the norm and the gradients, before it clips, and leaves out a step of
    which the norm over all processes is not finite: on all of them alike.
    """

    def __init__(self, zero: Any) -> None:
        super().__init__("cpu")  # two numbers; those on a GPU would have to be waited for
        self._zero, self._seen = zero, torch.zeros(())
        self._optimizer = torch.optim.SGD([self._seen])  # the public way to tell of an overflow is a gradient
        self.scale(self._seen)  # the numbers are made at the first use
        if not getattr(zero, "compute_grad_norm", True):
            zero.check_grad_overflow = True  # else it looks at the norm alone
        self._hand_over()

    def follow(self, overflow: bool) -> None:
        """After a step of the optimiser, that was left out for an ``overflow`` or taken."""
        self._seen.grad = torch.tensor(math.inf if overflow else 0.0)
        self.unscale_(self._optimizer)
        self.update()
        self._hand_over()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the scale of a run at any ZeRO stage."""
        super().load_state_dict(state_dict)
        self._hand_over()

    def _hand_over(self) -> None:
        self._zero.override_loss_scale(self.get_scale())


def grad_scaler(engine: Any) -> torch.amp.GradScaler | None:
    """The loss scaler of float16 under autocast, None for other types; DeepSpeed writes it into no checkpoint."""
    if engine.zero_optimization_stage():
        return getattr(engine, "zero_scaler", None)
    return engine.torch_autocast_z0_gradscaler


def adapt(engine: Any) -> None:
    """After DeepSpeed has taken a network: with float16, give its ZeRO optimiser a scaler that works."""
    if engine.zero_optimization_stage():
        engine.optimizer.torch_autocast_gradscaler = None  # in float32 that of a run before, in the same process
        if engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16:
            engine.zero_scaler = ZeroScaler(engine.optimizer)


def step(engine: Any) -> bool:
    """``engine.step()`` at the end of an accumulation -> whether it was left out for gradients that are really not finite.

    It may also be left out for a loss scale that is still too large: that passes, and is no fault of the run.
    """
    scaler = grad_scaler(engine)
    scale = math.inf if scaler is None else scaler.get_scale()
    engine.step()
    if scaler is None:
        return bool(getattr(engine.optimizer, "overflow", False))
    if isinstance(scaler, ZeroScaler):
        scaler.follow(engine.optimizer.overflow)
    return scaler.get_scale() < scale <= LEAST
