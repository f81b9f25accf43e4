"""What the tests of masked autoencoders share: a method that is awake, and repeatable images and masks for it."""

from typing import TypeVar

import torch
from torch import Tensor

from pretrain.masked import MaskedAutoencoder

Method = TypeVar("Method", bound=MaskedAutoencoder)


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def roused(method: Method) -> Method:
    """Gains, biases and layer scales of moderate size, in float64.

    At first whole branches are multiplied by nothing: GRN is the identity, and ConvNeXt's layer scales are 1e-6.
    """
    draw = seeded(7)
    for name, parameter in method.named_parameters():
        if parameter.ndim == 1:
            near = 0.0 if name.endswith("bias") else 0.7
            parameter.data.copy_(near + 0.3 * torch.randn(parameter.shape, generator=draw))
    return method.double()


def image_and_mask(method: MaskedAutoencoder, images: int = 3) -> tuple[Tensor, Tensor]:
    """Normalised images (B, C, H, W) of the method's size, float64, and a mask (B, h, w)."""
    data = method.config.data
    image = torch.randn(images, data.in_chans, *data.image_size, generator=seeded(2), dtype=torch.float64)
    return image, method.draw_mask(images, seeded(3))
