"""GRN and what the paper compares it with: against slow forms, on plain maps and on visible sites alone."""

import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from models.grn import AGGREGATIONS, GRN, LAYERS, NORMALISATIONS, GRNForm, InPlaceOfGRN, make_layer, replace_grn
from models.masking import random_mask, upsample
from models.sparse import dense, sparse_images
from tests.launch import ROOT

C = 5
BATCH = "batch"
FORMS: list[dict[str, Any]] = [
    {},
    *({"aggregation": name} for name in AGGREGATIONS[1:]),
    *({"normalisation": name} for name in NORMALISATIONS[1:]),
    {"residual": False},
    *({"scope": BATCH, "aggregation": name} for name in AGGREGATIONS),
]
SMALL: dict[str, Any] = dict(depths=(1, 1, 1, 1), dims=(8, 8, 12, 16), num_classes=0)


def grn(channels_last: bool = True, **form: Any) -> GRN:
    """In float64, with gamma and beta that leave nothing hidden."""
    layer = GRN(C, GRNForm(**form), channels_last=channels_last).double()
    draw = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(C, generator=draw))
    return layer


def slow(layer: GRN, x: Tensor, visible: Tensor) -> Tensor:
    """The paper's algorithm 1 and its variants, image by image; ``x`` (B, C, h, w), ``visible`` bool (B, h, w)."""
    form = layer.form

    def response(values: Tensor) -> Tensor:  # (C, sites) -> (C,)
        if form.aggregation == "mean":
            return values.mean(1)
        return values.abs().sum(1) if form.aggregation == "l1" else values.square().sum(1).sqrt()

    out = torch.zeros_like(x)
    seen = [image[:, sites] for image, sites in zip(x, visible, strict=True)]
    for index, values in enumerate(seen):
        g = response(values if form.scope == "image" else torch.cat(seen, 1))
        n = {
            "divisive": lambda g: g / (g.mean() + 1e-6),
            "inverse": lambda g: torch.ones_like(g) / (g.mean() + 1e-6),
            "standardise": lambda g: (g - g.mean()) / (g.var(unbiased=False) + 1e-6).sqrt(),
            "none": lambda g: g,
        }[form.normalisation](g)
        scaled = layer.weight[:, None] * values * n[:, None] + layer.bias[:, None]
        out[index][:, visible[index]] = scaled + values if form.residual else scaled
    return out


def maps(images: int = 3) -> tuple[Tensor, Tensor]:
    """Random maps (B, C, 4, 6) and a mask (B, 2, 3) that hides 4 of 6 patches."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(images, C, 4, 6, generator=draw, dtype=torch.float64)
    return x, random_mask(images, (2, 3), 4, draw)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_is_the_slow_one(form: dict[str, Any], channels_last: bool) -> None:
    """On plain maps, on tiles and on masked maps; a hidden site counts nowhere."""
    layer, (x, mask) = grn(channels_last, **form), maps()

    def run(value: Tensor) -> Tensor:
        return layer(value.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if channels_last else layer(value)

    everything = torch.ones(3, 4, 6, dtype=torch.bool)
    torch.testing.assert_close(run(x), slow(layer, x, everything), rtol=1e-12, atol=1e-12)
    visible = ~upsample(mask, (2, 2))
    expected = slow(layer, x, visible)
    for backend in ("tiles", "masked"):
        found = dense(run(sparse_images(x, mask, backend)))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_default_is_timms(channels_last: bool) -> None:
    ours, timms = grn(channels_last), GlobalResponseNorm(C, channels_last=channels_last).double()
    timms.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 4, 6, C).double() if channels_last else torch.randn(2, C, 4, 6).double()
    torch.testing.assert_close(ours(x), timms(x), rtol=1e-12, atol=1e-12)
    fresh = GRN(C, GRNForm(), channels_last=channels_last).double()
    assert torch.equal(fresh(x), x)  # gamma and beta start at zero


def test_a_batch_of_one_has_no_other_image_to_look_at() -> None:
    x, _ = maps(1)
    by_image, by_batch = grn(channels_last=False), grn(channels_last=False, scope=BATCH)
    torch.testing.assert_close(by_image(x), by_batch(x), rtol=1e-12, atol=1e-12)
    x, _ = maps(3)
    assert (by_image(x) - by_batch(x)).abs().amax(dim=(1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_silent_channel_has_a_finite_gradient(form: dict[str, Any]) -> None:
    layer, (x, mask) = grn(channels_last=False, **form), maps()
    x[:, 2] = 0
    x.requires_grad_()
    dense(layer(sparse_images(x, mask, "tiles"))).square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_half_precision_is_summed_in_float32() -> None:
    """4000 squares of 0.1 near 1e4: bfloat16 sums stop growing, and float16 squares overflow."""
    for dtype, size in ((torch.bfloat16, 1.0), (torch.float16, 300.0)):
        x = (size * (torch.rand(1, C, 64, 64) + 0.5)).to(dtype)
        layer = grn(channels_last=False).float()
        out = layer(x)
        assert out.dtype == dtype
        torch.testing.assert_close(out, layer(x.float()).to(dtype), rtol=0, atol=0)
        assert out.isfinite().all()


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("grn", "none")])
def test_other_layers_see_channels_as_channels(name: str, channels_last: bool) -> None:
    """The same in both orders of axes, on tiles and masked maps, and different from doing nothing."""
    x, mask = maps()
    torch.manual_seed(0)
    layer = make_layer(C, GRNForm(layer=name), channels_last=False).double()
    last = make_layer(C, GRNForm(layer=name), channels_last=True).double()
    last.load_state_dict(layer.state_dict(), strict=True)
    assert isinstance(layer, InPlaceOfGRN)

    def run(value: Tensor) -> Tensor:
        return last(value.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if channels_last else layer(value)

    torch.testing.assert_close(run(x), layer(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(run(x), x)
    tiles, masked = (dense(run(sparse_images(x, mask, backend))) for backend in ("tiles", "masked"))
    torch.testing.assert_close(tiles, masked, rtol=1e-12, atol=1e-12)


def test_norms_are_the_named_ones() -> None:
    x = torch.randn(2, C, 4, 6).double()
    layers = {name: make_layer(C, GRNForm(layer=name), channels_last=False).double() for name in ("bn", "ln", "lrn")}
    torch.testing.assert_close(
        layers["bn"](x),
        (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt(),
    )
    torch.testing.assert_close(
        layers["ln"](x), (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    )
    squares = torch.nn.functional.pad(x.square(), (0, 0, 0, 0, 2, 2)).unfold(1, 5, 1).sum(-1)
    torch.testing.assert_close(layers["lrn"](x), x / (2 + 1e-4 / 5 * squares) ** 0.75)


@pytest.mark.parametrize("base", ["convnextv2_atto", "convnextv2_tiny"])  # 1x1 convolutions; linear layers
def test_replacement_keeps_a_plain_network(base: str) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model(base, **SMALL).double()
    for name, parameter in model.named_parameters():
        if ".grn." in name:
            nn.init.normal_(parameter)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(2, 3, 64, 64).double()
    expected = model.forward_features(x)
    assert replace_grn(model, GRNForm()) == 4
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(model.forward_features(x), expected, rtol=1e-12, atol=1e-12)
    assert replace_grn(timm.create_model("convnext_atto", **SMALL), GRNForm()) == 0


def test_without_grn_it_is_timms_network_without_grn() -> None:
    model, without = (timm.create_model("convnextv2_atto", use_grn=use, **SMALL) for use in (True, False))
    replace_grn(model, GRNForm(layer="none"))
    assert model.state_dict().keys() == without.state_dict().keys()


def test_the_ablation_is_a_timm_model() -> None:
    """So that fine-tuning builds the network that was pre-trained."""
    torch.manual_seed(0)
    model = timm.create_model("convnextv2_ablation", base="convnextv2_atto", aggregation="l1", residual=False, **SMALL)
    grns = [module for module in model.modules() if isinstance(module, GRN)]
    assert {module.form for module in grns} == {GRNForm(aggregation="l1", residual=False)} and len(grns) == 4
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 16)
    with pytest.raises(ValueError, match="resnet18 has no GRN"):
        timm.create_model("convnextv2_ablation", base="resnet18")


def test_fine_tuning_knows_the_ablation_without_pre_training() -> None:
    words = "import sys, timm, finetune.weights; print('pretrain' in sys.modules, timm.is_model('convnextv2_ablation'))"
    told = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("layer", ["se", "cbam"])
def test_gates_cost_what_the_paper_says(layer: str) -> None:
    """89 M parameters with GRN, 109 M with either gate (remembered of the paper's table)."""
    with torch.device("meta"):
        model = timm.create_model("convnextv2_ablation", base="convnextv2_base", layer=layer, num_classes=1000)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) in (109, 110)


def test_misfits_are_refused() -> None:
    wrongs: list[dict[str, Any]] = [
        {"layer": "gn"},
        {"aggregation": "l3"},
        {"normalisation": "sum"},
        {"scope": "world"},
    ]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"is no .* of GRN; there are"):
            GRNForm(**wrong)
    with pytest.raises(ValueError, match="aggregation, residual: a choice about GRN, which layer='bn' replaces"):
        GRNForm(layer="bn", aggregation="l1", residual=False)
    assert GRNForm(scope=BATCH).is_plain and not GRNForm(normalisation="none").is_plain
