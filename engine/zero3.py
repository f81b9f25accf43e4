"""Two habits of DeepSpeed's ZeRO-3 that networks of ours cannot live with as they are."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


def adapt(engine: Any) -> None:
    """After DeepSpeed has taken a network at ZeRO-3.

    * It puts a linear layer of its own in the place of torch's, which does not hand over to tensors that take part in
      torch's functions (``__torch_function__``), as the sparse maps of visible patches do: they would be refused.
    * It keeps a list of the modules that are running. A block that is computed again stops as soon as all is there that
      its backward pass needs, and those inside of it that had not come to their end would stay on that list for ever.
    """
    from deepspeed.runtime.zero import parameter_offload

    _hand_over()
    running = parameter_offload.FWD_MODULE_STACK
    known = len(running)
    engine.module.register_forward_pre_hook(lambda *_: running.__delitem__(slice(known, None)), prepend=True)


def _hand_over() -> None:
    """Wrap ``torch.nn.functional.linear`` once, if it is DeepSpeed's."""
    theirs = torch.nn.functional.linear
    if not getattr(theirs, "__module__", "").startswith("deepspeed"):
        return

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if has_torch_function_unary(input):
            return handle_torch_function(linear, (input,), input, weight, bias)
        return theirs(input, weight, bias)

    torch.nn.functional.linear = linear
