"""Norms, softmax sampling and losses in float32 under bfloat16 autocast, in every method."""

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from finetune import targets
from models.encoder import build_encoder
from models.grn import GRN, GRNForm
from models.masking import random_mask
from models.sparse import sparse_images
from pretrain import cim, dvae
from tests.precision import Recorder, in_float32, watched
from tests.pretrain.small import SMALL, batch_of, build

SPEAKS: dict[str, set[str]] = {"cim": {"log_softmax", "nll_loss_forward"}, "dvae": {"softmax", "log_softmax"}}
"""Functions that a method's step must have been seen to use, lest nothing be watched."""


@pytest.mark.parametrize("name", SMALL)
def test_norms_and_losses_are_float32(name: str, tokenizer: Path) -> None:
    method = build(name, tokenizer)
    with torch.autocast("cpu", torch.bfloat16), watched(method) as norms, Recorder() as losses:
        output = method(batch_of(method), torch.Generator().manual_seed(0))
    assert all(value.dtype == torch.float32 for value in output.values())
    assert {norm for norm, right in norms.items() if not right} == set()
    assert norms or name in ("dvae", "cim_respix", "cim_revdet"), "a method whose norms were not seen"
    assert SPEAKS.get(name.partition("_")[0], set()) <= losses.found.keys()
    assert all(kinds == {torch.float32} for kinds in losses.found.values()), losses.found


@pytest.mark.parametrize("name", ["spark_resnet", "fcmae", "convmae"])
def test_the_pixels_loss_is_float32_of_bfloat16_predictions(name: str, tokenizer: Path) -> None:
    """Its target and every step of the mean, too: the same as of the same prediction in float32."""
    method = build(name, tokenizer)
    image = method.normalised(batch_of(method)["image"].float() / 255)
    mask = method.draw_mask(len(image), torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        prediction = method.predict(image, mask).bfloat16()
        found = method.loss(prediction, image, mask)
        target = method.target(image)
    assert target.dtype == found.dtype == torch.float32
    assert torch.equal(found, method.loss(prediction.float(), image, mask))
    assert not torch.equal(found.bfloat16().float(), found), "a mean that has bfloat16's digits only"


def test_tokens_are_sampled_in_float32(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator's logits reach the softmax, the noise and the cross entropy as float32."""
    seen: list[torch.dtype] = []
    sample = cim.sample_tokens

    def note(logits: Tensor, *rest: Any) -> Tensor:
        seen.append(logits.dtype)
        return sample(logits, *rest)

    monkeypatch.setattr(cim, "sample_tokens", note)
    method = build("cim_respix", tokenizer)
    with torch.autocast("cpu", torch.bfloat16):
        method(batch_of(method), torch.Generator().manual_seed(0))
    assert seen == [torch.float32]
    logits = torch.randn(4000, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = cim.sample_tokens(logits, "softmax", torch.Generator().manual_seed(2))
    assert torch.equal(found, cim.sample_tokens(logits.float(), "softmax", torch.Generator().manual_seed(2)))


def test_the_enhancers_predictions_are_compared_in_float32(tokenizer: Path) -> None:
    for name in ("cim_respix", "cim_revdet"):
        method = build(name, tokenizer)
        image = method._normalised(batch_of(method)["image"].float() / 255)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = method.enhance(image)
            mean, std = method.target_statistics(image)
            loss = method.enhancer_loss(prediction, image, torch.ones(len(image), *method.grid, dtype=torch.bool))
        assert prediction.dtype == mean.dtype == std.dtype == loss.dtype == torch.float32


def test_the_tokenizers_relaxation_is_float32() -> None:
    logits = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        soft = dvae.relax(logits, 0.5, torch.Generator().manual_seed(1))
        divergence = dvae.kl_to_uniform(logits)
    assert soft.dtype == divergence.dtype == torch.float32
    assert torch.equal(soft, dvae.relax(logits, 0.5, torch.Generator().manual_seed(1)))


def test_classification_losses_are_float32() -> None:
    logits = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    target = targets.soft_target(torch.arange(64) % 10, 10, 0.1)
    with torch.autocast("cpu", torch.bfloat16), Recorder() as losses:
        found = targets.cross_entropy(logits, target), targets.binary_cross_entropy(logits, target, None)
    assert torch.equal(found[0], targets.cross_entropy(logits.float(), target))
    assert torch.equal(found[1], targets.binary_cross_entropy(logits.float(), target, None))
    assert losses.found and all(kinds == {torch.float32} for kinds in losses.found.values())


class LastNorm(nn.Module):
    """A norm of the last axis on the channels of a map."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


C = 8
LAYERS: dict[str, Any] = {
    "batch": lambda: nn.BatchNorm2d(C),
    "group": lambda: nn.GroupNorm(2, C),
    "instance": lambda: nn.InstanceNorm2d(C, affine=True),
    "layer": lambda: LastNorm(nn.LayerNorm(C)),
    "rms": lambda: LastNorm(nn.RMSNorm(C)),
    "grn": lambda: GRN(C, GRNForm(), channels_last=False),
    "grn_last": lambda: LastNorm(GRN(C, GRNForm(), channels_last=True)),
}


def awake(layer: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw))
    return layer


@pytest.mark.parametrize("backend", ["", "tiles", "masked"])
@pytest.mark.parametrize("name", LAYERS)
def test_norms_of_maps_are_float32(name: str, backend: str) -> None:
    """Also over visible sites."""
    layer = awake(LAYERS[name]())
    draw = torch.Generator().manual_seed(1)
    x = (2 * torch.randn(4, C, 24, 32, generator=draw) + 1).bfloat16()
    if backend:
        x = sparse_images(x, random_mask(4, (3, 4), 6, draw), backend)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert in_float32(layer, x, out)


def test_the_check_sees_bfloat16_arithmetic() -> None:
    """timm's GRN as it comes, a norm written out, and a softmax, all in bfloat16: none of them passes."""

    def by_hand(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()

    x = (2 * torch.randn(4, 24, 32, C, generator=torch.Generator().manual_seed(1)) + 1).bfloat16()
    timms: Any = awake(GlobalResponseNorm(C))
    with torch.autocast("cpu", torch.bfloat16):
        assert not in_float32(timms, x, timms(x))
        assert not in_float32(by_hand, x, by_hand(x))
        with Recorder() as losses:
            x.softmax(-1)
    assert losses.found == {"softmax": {torch.bfloat16}}


def test_timms_grn_is_widened_and_otherwise_itself() -> None:
    """Wherever an encoder is built: fine-tuning, too."""
    kwargs = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
    encoder = build_encoder("convnextv2_atto", in_chans=3, image_size=(32, 32), drop_path_rate=0.0, kwargs=kwargs)
    layers = [module for module in encoder.modules() if isinstance(module, GlobalResponseNorm)]
    assert len(layers) == 4
    for layer in layers:
        awake(layer)
        plain = GlobalResponseNorm(layer.weight.shape[0], channels_last=layer.channel_dim == -1)
        plain.load_state_dict(layer.state_dict())
        shape = [2, 6, 6, 6]
        shape[layer.channel_dim] = layer.weight.shape[0]
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        assert torch.equal(layer(x), plain(x)), "float32 stays bit for bit what timm computes"
        with torch.autocast("cpu", torch.bfloat16):
            assert in_float32(layer, x.bfloat16(), layer(x.bfloat16()))
