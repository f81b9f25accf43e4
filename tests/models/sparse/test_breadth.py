"""Which timm networks sparse encoding computes exactly, family by family: docs/sparse_models.md is what this found.

``python -m tests.models.sparse.test_breadth`` writes the page anew.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from models.masking import random_mask
from models.sparse import SparseError, dense, sparse_images, sparsify
from models.sparse.check import randomised
from models.sparse.tensor import plain

PAGE = Path(__file__).parents[3] / "docs" / "sparse_models.md"
MASK_PATCH = 32
GRID = (3, 4)
HIDDEN = (4, 8)
"""Hidden of 12 patches: mask ratios 0.33 and 0.67."""
TOLERANCE = 1e-9

FAMILIES = {
    "ResNet": "resnet10t",
    "ResNet-D, ECA": "ecaresnet26t",
    "ResNet, bottleneck": "resnet26",
    "ResNet, anti-aliased": "resnetblur18",
    "ResNetV2, pre-activation": "resnetv2_18",
    "ResNet-RS": "resnetrs50",
    "ResNeXt": "resnext26ts",
    "SE-ResNeXt": "seresnext26ts",
    "SENet (legacy)": "legacy_seresnet18",
    "SKNet": "skresnet18",
    "ResNeSt": "resnest14d",
    "Res2Net": "res2net50_26w_4s",
    "ReXNet": "rexnet_100",
    "RegNetX": "regnetx_002",
    "RegNetY": "regnety_002",
    "RegNetZ": "regnetz_005",
    "DenseNet": "densenet121",
    "DPN": "dpn48b",
    "VGG": "vgg11_bn",
    "EfficientNet": "efficientnet_b0",
    "EfficientNet, TF padding": "tf_efficientnet_b0",
    "EfficientNetV2": "efficientnetv2_rw_t",
    "MixNet": "mixnet_s",
    "MNASNet": "mnasnet_small",
    "FBNet": "fbnetc_100",
    "MobileNetV1": "mobilenetv1_100",
    "MobileNetV2": "mobilenetv2_050",
    "MobileNetV3": "mobilenetv3_small_050",
    "MobileNetV4": "mobilenetv4_conv_small_050",
    "LCNet": "lcnet_050",
    "TinyNet": "tinynet_e",
    "HardCoRe-NAS": "hardcorenas_a",
    "GhostNet": "ghostnet_100",
    "GhostNetV2": "ghostnetv2_100",
    "RepGhost": "repghostnet_050",
    "RepVGG": "repvgg_a0",
    "MobileOne": "mobileone_s0",
    "ConvNeXt": "convnext_atto",
    "ConvNeXt V2": "convnextv2_atto",
    "InceptionNeXt": "inception_next_atto",
    "HRNet": "hrnet_w18_small",
    "DLA": "dla34",
    "CSPResNet": "cspresnet50",
    "CSPDarkNet": "cspdarknet53",
    "DarkNet": "darknet53",
    "VoVNet": "ese_vovnet19b_dw",
    "NFNet": "dm_nfnet_f0",
    "NF-RegNet": "nf_regnet_b0",
    "NF-ResNet": "nf_resnet26",
    "Xception": "xception41p",
    "HGNet": "hgnetv2_b0",
    "StarNet": "starnet_s1",
    "FastViT": "fastvit_t8",
    "PoolFormer": "poolformerv2_s12",
    "FocalNet": "focalnet_tiny_srf",
    "RDNet": "rdnet_tiny",
    "TResNet": "tresnet_m",
    "SelecSLS": "selecsls42",
    "GCNet": "gcresnet50t",
    "Inception-V3": "inception_v3",
    "EdgeNeXt": "edgenext_xx_small",
    "EfficientViT": "efficientvit_b0",
    "LambdaResNet": "lambda_resnet26t",
}
"""One small network of each family."""

EXACT = "exact"


@functools.cache
def network(name: str) -> nn.Module:
    """A randomised float64 network in training mode."""
    torch.manual_seed(0)
    return randomised(timm.create_model(name, num_classes=0)).train()


def inputs(hidden: int) -> tuple[Tensor, Tensor]:
    """Non-square images and their mask."""
    generator = torch.Generator().manual_seed(hidden)
    images = torch.randn(2, 3, GRID[0] * MASK_PATCH, GRID[1] * MASK_PATCH, generator=generator, dtype=torch.float64)
    return images, random_mask(2, GRID, hidden, generator)


def run(model: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The last feature map, dense, and the gradient of every parameter."""
    model.zero_grad(set_to_none=True)
    features = dense(model.forward_features(x))
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(1), dtype=features.dtype)
    (plain(features) * weights).sum().backward()
    return features.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def difference(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]]) -> float:
    """Largest relative difference of features and gradients.

    A gradient is compared relative to its own largest value, at least a thousandth of the largest of all: that of a
    bias before a batch norm is zero but for rounding.
    """
    assert a[1].keys() == b[1].keys() and a[1]
    assert a[0].shape == b[0].shape
    largest = max(float(g.abs().max()) for g in b[1].values())
    worst = float((a[0] - b[0]).abs().max() / b[0].abs().max())
    for name, grad in b[1].items():
        scale = max(float(grad.abs().max()), 1e-3 * largest)
        worst = max(worst, float((a[1][name] - grad).abs().max()) / scale)
    return worst


def verdict(name: str) -> str:
    """ "exact", or why the network is refused."""
    model = timm.create_model(name, num_classes=0)
    try:
        with sparsify(model, MASK_PATCH, in_chans=3, head=False):
            return EXACT
    except SparseError as error:
        return str(error)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_exact_or_refused(family: str) -> None:
    """Features and gradients of tiles are those of masked at two ratios, and without a mask those of the plain network."""
    stated = rows_of_page()[family]
    assert stated[0] == FAMILIES[family]
    if stated[1] != EXACT:
        assert verdict(stated[0]) == stated[1]
        return
    model = network(stated[0])
    for hidden in HIDDEN:
        images, mask = inputs(hidden)
        ours, theirs = (run(model, sparse_images(images, mask, backend)) for backend in ("tiles", "masked"))
        assert difference(ours, theirs) < TOLERANCE
        assert float(ours[0].abs().max()) > 1e-3  # not zeros against zeros
    images, mask = inputs(0)
    assert difference(run(model, sparse_images(images, mask)), run(model, images)) < TOLERANCE
    network.cache_clear()


def test_enough_families_are_exact() -> None:
    """The engine is for any convnet, not for a few."""
    assert sum(row[1] == EXACT for row in rows_of_page().values()) >= 40


def rows_of_page() -> dict[str, tuple[str, str]]:
    """Family -> (model, verdict) as the page says."""
    found = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and len(cells) == 3 and cells[0] in FAMILIES:
            found[cells[0]] = (cells[1].strip("`"), cells[2])
    return found


def page() -> str:
    """The page's text."""
    lines = [
        "# Networks that run on visible patches",
        "",
        "One network of each timm family, tried by `tests/models/sparse/test_breadth.py` with randomised weights in float64:",
        "features and all gradients of `backend=tiles` agree with `backend=masked` to 1e-9 at two mask ratios, and without a",
        "mask with the plain network, on non-square images with mask patches of 32 px. The others are refused when a run",
        "starts, with the reason given here. Written by `python -m tests.models.sparse.test_breadth`.",
        "",
        "| family | tried | result |",
        "| --- | --- | --- |",
        *(f"| {family} | `{name}` | {verdict(name)} |" for family, name in FAMILIES.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
