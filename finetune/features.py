"""Features of an encoder that is only looked through: what k-NN, probes and analyses work on.

Shapes: ``B`` images of a batch, ``M`` images of one process, ``D`` features.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.loader import Loader
from engine.faults import until_stopped
from engine.log import progress
from engine.world import World, to_device
from finetune.config import FinetuneData
from finetune.evaluate import Census
from finetune.sets import eval_size
from models.encoder import pooled_features
from models.pixels import normalise, to_unit

KINDS = ("mean", "token", "head")
"""``mean`` of the last map over its sites; the class ``token``; what the model's own classifier, its ``head``, is given."""


class Frozen:
    """An encoder in evaluation mode, without gradients.

    No ``nn.Module``: what holds one neither trains it, nor saves it, nor switches it to training mode, in which batch
    norms would drift (MAE's issue 54).
    """

    def __init__(self, encoder: nn.Module, data: FinetuneData, kind: str, device: torch.device) -> None:
        """``kind`` is one of :data:`KINDS`.

        Raises:
            ValueError: the encoder has no class token.
        """
        if kind == "token" and getattr(encoder, "cls_token", None) is None:
            raise ValueError(f"{type(encoder).__name__} has no class token: use mean or head instead of token")
        self.encoder: Any = prepare(encoder, device)
        self.data, self.kind = data, kind
        size = eval_size(data)
        self.dim = self(torch.zeros(1, data.in_chans, *size, device=device)).shape[1]

    def __call__(self, image: Tensor) -> Tensor:
        """Images (B, C, H, W), uint8 or float in [0, 1] -> (B, D) float32."""
        with torch.inference_mode():
            found = self._look(lay_out(normalise(to_unit(image), self.data.mean, self.data.std), self.encoder))
        return found.float().clone()  # no inference tensor: a head may be trained on it

    def _look(self, x: Tensor) -> Tensor:
        if self.kind == "mean":
            return pooled_features(self.encoder, x)
        found: Tensor = self.encoder.forward_features(x)
        return found[:, 0] if self.kind == "token" else self.encoder.forward_head(found, pre_logits=True)

    def digest(self) -> str:
        """sha256 of the weights and buffers: what a run that is continued must find again."""
        found = hashlib.sha256()
        for name, value in sorted(self.encoder.state_dict().items()):
            found.update(
                name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
        return found.hexdigest()


def prepare(encoder: nn.Module, device: torch.device) -> nn.Module:
    """The encoder on its device, frozen, in evaluation mode and in the memory layout that suits it."""
    return encoder.to(device, memory_format=layout(encoder)).eval().requires_grad_(False)  # type: ignore[call-overload]


def layout(encoder: nn.Module) -> torch.memory_format:
    """channels_last where a convnet has batch norms, else torch's own.

    Images per second on one CPU core in torch's own layout and in channels_last, at 64 px and at 224 px: resnet18
    192, 215 and 15.7, 17.5; resnet50 116, 125 and 9.0, 9.5; convnext_tiny 95, 101 and 8.2, 8.1; convnextv2_atto 175,
    166 and 28.4, 26.2; vit_small 76, 77 and 5.7, 5.7.
    """
    faster = any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    return torch.channels_last if faster else torch.contiguous_format


def lay_out(x: Tensor, encoder: nn.Module) -> Tensor:
    """The images (B, C, H, W) in the encoder's memory layout."""
    return x.contiguous(memory_format=layout(encoder))


@dataclass(frozen=True)
class Extracted:
    """This process's share of a set.

    Attributes:
        features: (M, D) float32, on its device.
        labels: (M,) int64, on the CPU.
        indices: (M,) int64, each image's place in the whole set, rising, on the CPU.
    """

    features: Tensor
    labels: Tensor
    indices: Tensor


def stream(frozen: Frozen, loader: Loader, world: World) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Features (B, D), labels (B,) and indices (B,) of each batch of an evaluation loader, all on the device.

    Taken to its end it has made sure that every image was looked at once by all processes together; broken files are
    missing.
    """
    census = Census(loader)
    batches = progress(loader.batches(0), world, "features", total=len(loader), leave=False, unit="batch")
    for batch in until_stopped(batches, world):
        census.add(batch["index"])
        there = to_device(batch, world.device)
        yield frozen(there["image"]), there["label"], there["index"]
    loader.close()
    census.close(world)


def extract(frozen: Frozen, loader: Loader, world: World) -> Extracted:
    """This process's share of a set; memory for the features is taken once, 4 D bytes per image."""
    most = len(range(world.rank, len(loader.index), world.size))
    features = torch.empty(most, frozen.dim, device=world.device)
    labels, indices = torch.empty(most, dtype=torch.int64), torch.empty(most, dtype=torch.int64)
    count = 0
    for found, label, index in stream(frozen, loader, world):
        here = slice(count, count + len(label))
        features[here], labels[here], indices[here] = found, label.cpu(), index.cpu()
        count = here.stop
    return Extracted(features[:count], labels[:count], indices[:count])
