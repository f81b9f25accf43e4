"""The MinkowskiEngine backend against the other two, what it refuses, and that nothing changes behind autograd's back."""

import importlib.util
import os
import sys
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from models.masking import random_mask, upsample
from models.sparse import SparseError, dense, sparse_images, sparsify
from models.sparse.check import randomised
from models.sparse.tensor import plain
from tests.models.sparse.test_breadth import TOLERANCE, difference, run

needs_minkowski = pytest.mark.skipif(
    importlib.util.find_spec("MinkowskiEngine") is None,
    reason="needs MinkowskiEngine, which is not installed: bash run/install_minkowski.sh",
)
RESNET: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 8, 12, 16)}
CONVNEXT: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 12, 16)}
NETWORKS = {
    "resnet18": RESNET,
    "resnet50": RESNET,
    "resnet50d": RESNET,
    "convnext_atto": CONVNEXT,
    "convnextv2_atto": CONVNEXT,
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def network(name: str, in_chans: int = 3) -> Any:
    """A small one with random weights, in float64."""
    torch.manual_seed(0)
    return randomised(timm.create_model(name, num_classes=0, in_chans=in_chans, **NETWORKS[name])).train()


def found(model: Any, images: Tensor, mask: Tensor, backend: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The last feature map, dense, and the gradients of every parameter and of the images."""
    images = images.clone().requires_grad_()
    features, grads = run(model, sparse_images(images, mask, backend))
    assert images.grad is not None
    return features, grads | {"images": images.grad}


class Widened(nn.Module):
    """A float32 network whose features are handed out in float64."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.float()

    def forward_features(self, x: Tensor) -> Tensor:
        features = self.model.forward_features(x.float())
        assert features.dtype == torch.float32
        return features.double()


class Odd(nn.Module):
    """A layer between two convolutions, fed with hidden values that are not zero (sigmoid)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Conv2d(3, 8, 3, 2, 1), layer, nn.Conv2d(8, 4, 3, 1, 1)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.first(x).sigmoid()))


def test_without_minkowskiengine_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is installed or not: its import fails here."""
    path, threads = list(sys.path), os.environ.get("OMP_NUM_THREADS")
    monkeypatch.delitem(sys.modules, "models.sparse.minkowski", raising=False)
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", None)
    expected = r"^backend=minkowski needs MinkowskiEngine: run `bash run/install_minkowski.sh`$"
    with pytest.raises(SparseError, match=expected):
        sparse_images(torch.zeros(1, 3, 8, 8), torch.zeros(1, 2, 2, dtype=torch.bool), "minkowski")
    with pytest.raises(SparseError, match=expected):
        sparsify(nn.Conv2d(3, 4, 3, padding=1), 4, "minkowski")
    assert sys.path == path
    assert os.environ.get("OMP_NUM_THREADS") == threads


@needs_minkowski
def test_the_process_stays_as_it_was() -> None:
    """No folder of MinkowskiEngine in the search path, and torch's threads untouched."""
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x = sparse_images(torch.zeros(1, 3, 8, 8), torch.zeros(1, 2, 2, dtype=torch.bool), "minkowski")
            nn.Conv2d(3, 4, 3, padding=1)(x)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert not any(entry.endswith("MinkowskiEngine") for entry in sys.path)


@needs_minkowski
@pytest.mark.parametrize("hidden", [3, 7])
@pytest.mark.parametrize(("in_chans", "batch"), [(3, 3), (1, 2)])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_the_others(name: str, in_chans: int, batch: int, hidden: int) -> None:
    """3 x 4 patches, of which a quarter or 0.6 are hidden."""
    model, mask = network(name, in_chans), random_mask(batch, (3, 4), hidden, seeded())
    images = draw(batch, in_chans, 96, 128)
    ours, masked, tiles = (found(model, images, mask, backend) for backend in ("minkowski", "masked", "tiles"))
    assert difference(ours, masked) < TOLERANCE
    assert difference(ours, tiles) < TOLERANCE
    assert float(ours[0].abs().max()) > 1e-3  # not zeros against zeros


@needs_minkowski
@pytest.mark.parametrize("name", ["resnet50", "convnextv2_atto"])
def test_float32_is_off_by_rounding_only(name: str) -> None:
    """From float64 no farther than four times what the other backends are."""
    model, mask, images = network(name), random_mask(2, (3, 4), 7, seeded()), draw(2, 3, 96, 128)
    features, grads = found(model, images, mask, "masked")
    exact = features, {key if key == "images" else f"model.{key}": grad for key, grad in grads.items()}
    rounded = Widened(model)
    off = {
        backend: difference(found(rounded, images, mask, backend), exact)
        for backend in ("minkowski", "masked", "tiles")
    }
    assert 0 < off["minkowski"] < 4 * max(off["masked"], off["tiles"]) < 1e-2


@needs_minkowski
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, 5, stride=2, padding=2, bias=False),
        nn.Conv2d(8, 8, 3, padding="same", dilation=2),
        nn.Conv2d(8, 8, (1, 5), padding=(0, 2)),
        nn.Conv2d(8, 8, (3, 1), stride=(1, 2), padding=(1, 0)),
        nn.Conv2d(8, 8, 1, stride=2),
        nn.Conv2d(8, 8, 2, stride=2),
        nn.Conv2d(8, 8, 4, stride=4),
        nn.Conv2d(8, 8, 7, padding=3, groups=8),
        nn.Conv2d(8, 8, (5, 3), stride=2, padding=(4, 2), dilation=2, groups=8, bias=False),
        nn.Conv2d(8, 8, 2, stride=2, groups=8),
        nn.Conv2d(8, 8, 1, groups=4),
        nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3)),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(2),
        nn.MaxPool2d(1, 2),
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AvgPool2d((3, 1), 1, (1, 0), divisor_override=5),
        nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
    ],
    ids=str,
)
def test_layers_are_exact(layer: nn.Module) -> None:
    """And without a mask they are the plain layer: averages divide as it does, at borders too."""
    model = randomised(Odd(layer)).train()
    images, mask = draw(3, 3, 48, 64), random_mask(3, (3, 4), 7, seeded())
    masked = found(model, images, mask, "masked")
    assert difference(found(model, images, mask, "minkowski"), masked) < TOLERANCE
    nothing = torch.zeros_like(mask)
    dense_network = found(model, images, nothing, "dense")
    assert difference(found(model, images, nothing, "minkowski"), dense_network) < TOLERANCE


@needs_minkowski
def test_average_pooling_counts_what_the_dense_one_counts() -> None:
    """Ones in the visible left half: a site beside the hidden half, one inside, one at the border."""
    mask = torch.tensor([[[False, True]]])
    x = sparse_images(torch.ones(1, 1, 4, 8, dtype=torch.float64), mask, "minkowski")
    padded = dense(nn.AvgPool2d(3, 1, 1)(x))[0, 0]
    assert padded[1].tolist() == pytest.approx([6 / 9, 1, 1, 6 / 9, 0, 0, 0, 0])
    counted = dense(nn.AvgPool2d(3, 1, 1, count_include_pad=False)(x))[0, 0]
    assert counted[1].tolist() == pytest.approx([1, 1, 1, 6 / 9, 0, 0, 0, 0])


@needs_minkowski
def test_max_pooling_ignores_hidden_sites() -> None:
    """Of negative numbers the largest visible one, not the zero of a hidden site."""
    images, mask = -1 - draw(2, 3, 16, 16).abs(), random_mask(2, (2, 2), 2, seeded())
    pooled = dense(nn.MaxPool2d(3, 2, 1)(sparse_images(images, mask, "minkowski")))
    hidden = upsample(mask, (4, 4)).unsqueeze(1).expand_as(pooled)
    assert bool((pooled[~hidden] <= -1).all())
    assert bool((pooled[hidden] == 0).all())


@needs_minkowski
def test_max_pooling_hands_nan_on() -> None:
    """MinkowskiEngine by itself gives the least number and writes its gradient before the array's beginning."""
    images = torch.full((1, 2, 8, 8), float("nan")).requires_grad_()
    pooled = nn.MaxPool2d(3, 2, 1)(sparse_images(images, torch.tensor([[[False, True]]]).expand(1, 2, 2), "minkowski"))
    assert bool(plain(pooled).isnan().all())
    plain(pooled).sum().backward()


@needs_minkowski
def test_sparsify_runs_the_networks_it_is_for() -> None:
    for name, options in NETWORKS.items():
        model = timm.create_model(name, num_classes=0, **options).eval()
        images, mask = torch.randn(2, 3, 64, 96), random_mask(2, (2, 3), 3)
        with sparsify(model, 32, "minkowski"), torch.no_grad():
            ours = model(images, mask=mask)
        with sparsify(model, 32, "masked"), torch.no_grad():
            torch.testing.assert_close(ours, model(images, mask=mask), rtol=1e-3, atol=1e-4)


@needs_minkowski
def test_grouped_convolutions_are_refused_by_name() -> None:
    model = timm.create_model("resnext50_32x4d", layers=(1, 1, 1, 1), num_classes=0)
    message = r"layer1\.0\.conv2 \(Conv2d\): MinkowskiEngine has no grouped convolution \(32 groups of 128 channels"
    with pytest.raises(SparseError, match=message):
        sparsify(model, 32, "minkowski")


@needs_minkowski
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(8, 16, 3, padding=1, groups=8), r"8 groups of 8 channels, 16 out"),
        (nn.Conv2d(8, 8, 4, stride=2, padding=1), r"padding of \(1, 1\) of 0.0: MinkowskiEngine can pad by \(0, 0\)"),
        (nn.Conv2d(8, 8, 3, stride=3), r"a stride of \(3, 3\) does not divide tiles"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), r"by reflect: MinkowskiEngine can pad"),
        (nn.Sequential(nn.ConstantPad2d(1, 1.0), nn.Conv2d(8, 8, 3)), r"of 1.0: MinkowskiEngine can pad"),
        (nn.Sequential(nn.ConstantPad2d((0, 2, 0, 2), 0.0), nn.Conv2d(8, 8, 3)), r"can pad by \(1, 1\)"),
        (nn.MaxPool2d(4, 2, 1), r"max_pool2d with a kernel of \(4, 4\).*can pad by \(0, 0\)"),
        (nn.AvgPool2d(4, 2, 1), r"avg_pool2d with a kernel of \(4, 4\).*can pad by \(0, 0\)"),
        (nn.MaxPool2d(2, 2, dilation=2), r"makes a map of"),
        (nn.MaxPool2d(3, 1, 1, dilation=2), r"can pad by \(2, 2\)"),
        (nn.Conv2d(8, 8, 2, padding=0), r"makes a map of"),
        (nn.Sequential(nn.ZeroPad2d(1), nn.MaxPool2d(3, 2)), r"max_pool2d of a map that was padded before"),
        (nn.ConvTranspose2d(8, 8, 2, 2), r"conv_transpose2d is not computed by backend=minkowski: use backend=tiles"),
        (nn.Upsample(scale_factor=2), r"interpolate is not computed by backend=minkowski: use backend=tiles"),
    ],
    ids=str,
)
def test_what_minkowskiengine_has_not_is_refused_with_its_path(layer: nn.Module, message: str) -> None:
    with pytest.raises(SparseError, match=r"^layer.*" + message):
        sparsify(Odd(layer), 16, "minkowski")


@needs_minkowski
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("changed", ["input", "weight"])
def test_in_place_changes_of_what_backward_needs_are_noticed(changed: str, groups: int) -> None:
    """MinkowskiEngine's own function would use the changed values without a word."""
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=groups)
    images = torch.randn(2, 4, 8, 8).requires_grad_()
    x = sparse_images(images, random_mask(2, (2, 2), 2), "minkowski") * 2
    y = conv(x)
    if changed == "input":
        x.relu_()
    else:
        with torch.no_grad():
            conv.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        plain(y).sum().backward()


class InPlace(nn.Module):
    """What residual networks do in place: activations, and sums into a result."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.act, self.pool = nn.ReLU(inplace), nn.MaxPool2d(3, 2, 1)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.norms[0](self.convs[0](x))))
        y = self.norms[2](self.convs[2](self.act(self.norms[1](self.convs[1](x)))))
        if self.inplace:
            y += x
        else:
            y = y + x
        return self.act(y)


@needs_minkowski
def test_in_place_layers_are_the_others() -> None:
    """Features bit for bit what they are with copies, gradients too but for the order of sums; and like masked."""
    changed, kept = (randomised(InPlace(inplace)).train() for inplace in (True, False))
    images, mask = draw(3, 4, 24, 32), random_mask(3, (3, 4), 7, seeded())
    ours, theirs = (found(model, images, mask, "minkowski") for model in (changed, kept))
    assert torch.equal(ours[0], theirs[0])
    assert difference(ours, theirs) < 1e-12
    assert difference(ours, found(changed, images, mask, "masked")) < TOLERANCE


@needs_minkowski
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_recompute_with_their_mask(reentrant: bool) -> None:
    model, mask = network("convnextv2_atto"), random_mask(2, (3, 4), 7, seeded())
    images = draw(2, 3, 96, 128)
    expected = found(model, images, mask, "minkowski")
    timm.layers.set_reentrant_ckpt(reentrant)
    try:
        model.set_grad_checkpointing(True)
        assert difference(found(model, images, mask, "minkowski"), expected) < 1e-12
    finally:
        timm.layers.set_reentrant_ckpt(False)


@needs_minkowski
@pytest.mark.parametrize("autocast", [True, False])
def test_low_precision_is_computed_in_float32(autocast: bool) -> None:
    """Under autocast, and with weights of bfloat16; results have the type that torch's would have."""
    model, mask, images = network("convnext_atto"), random_mask(2, (3, 4), 7, seeded()), draw(2, 3, 96, 128)
    exact = found(model, images, mask, "minkowski")[0]
    model, images = (model.float(), images.float()) if autocast else (model.bfloat16(), images.bfloat16())
    off = {}
    for backend in ("minkowski", "tiles"):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            x = sparse_images(images, mask, backend)
            assert model.stem[0](x).dtype == torch.bfloat16
            features = plain(dense(model.forward_features(x)))
        features.float().square().mean().backward()
        assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.stages.parameters())
        off[backend] = float((features.detach().double() - exact).norm() / exact.norm())
    assert off["minkowski"] < 2 * off["tiles"] < 0.1


@needs_minkowski
def test_more_threads_give_the_same() -> None:
    model, mask, images = network("resnet18"), random_mask(2, (3, 4), 7, seeded()), draw(2, 3, 96, 128)
    one = found(model, images, mask, "minkowski")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert difference(found(model, images, mask, "minkowski"), one) < TOLERANCE
    finally:
        torch.set_num_threads(before)


@needs_minkowski
def test_images_elsewhere_are_refused() -> None:
    with pytest.raises(SparseError, match="backend=minkowski runs on the CPU, the images are on meta"):
        sparse_images(torch.zeros(1, 3, 8, 8, device="meta"), torch.zeros(1, 2, 2, dtype=torch.bool), "minkowski")


@needs_minkowski
def test_tiles_are_square_or_not() -> None:
    """64 x 32 px patches, and sites between pixels are refused."""
    model, images, mask = network("resnet18"), draw(2, 3, 128, 96), random_mask(2, (2, 3), 3, seeded())
    assert difference(*(found(model, images, mask, backend) for backend in ("minkowski", "masked"))) < TOLERANCE
    x = nn.PixelShuffle(3)(sparse_images(torch.zeros(1, 9, 8, 8), torch.zeros(1, 2, 2, dtype=torch.bool), "minkowski"))
    with pytest.raises(SparseError, match=r"tiles of \(12, 12\) sites lie between the pixels"):
        nn.Conv2d(1, 1, 3, padding=1)(x)
