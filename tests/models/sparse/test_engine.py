"""The sparse engine's promises: exact, no leak, reversible, a mask per call, and every way of a convolution the same."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from models.masking import random_mask, upsample
from models.sparse import SparseError, dense, like_image, per_image, sparse_images, sparsify
from models.sparse.check import check, randomised
from models.sparse.conv import WAYS, Neighbourhood, tile_conv2d
from models.sparse.tensor import Pad, SparseTensor, plain
from models.sparse.tiles import Tiles
from tests.models.sparse.test_breadth import TOLERANCE, difference, run

BACKENDS = ("tiles", "masked")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_of(batch: int, channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=seeded(seed), dtype=torch.float64)


def small(name: str = "resnet10t", **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return randomised(timm.create_model(name, num_classes=0, **kwargs)).train()


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "convnextv2_atto", "mobilenetv3_small_050"])
@pytest.mark.parametrize(("batch", "channels", "grid"), [(1, 1, (2, 3)), (3, 4, (4, 2)), (5, 3, (3, 3))])
def test_tiles_are_masked_at_any_size(name: str, batch: int, channels: int, grid: tuple[int, int]) -> None:
    """Odd batches, other channel counts, non-square grids."""
    model = small(name, in_chans=channels)
    images = images_of(batch, channels, grid[0] * 32, grid[1] * 32)
    mask = random_mask(batch, grid, grid[0] * grid[1] // 2, seeded())
    ours, theirs = (run(model, sparse_images(images, mask, backend)) for backend in BACKENDS)
    assert difference(ours, theirs) < TOLERANCE


def test_mask_patches_need_not_be_square() -> None:
    """64 x 32 px patches: tiles of 2 x 1 sites at stride 32."""
    model, images, mask = small(), images_of(2, 3, 128, 96), random_mask(2, (2, 3), 3, seeded())
    assert difference(*(run(model, sparse_images(images, mask, backend)) for backend in BACKENDS)) < TOLERANCE


def test_masked_is_a_slow_loop_over_layers() -> None:
    """The reference itself against convolution, batch norm and pooling written out for this one network."""
    torch.manual_seed(0)
    conv1, conv2 = nn.Conv2d(3, 8, 3, 2, 1).double(), nn.Conv2d(8, 6, 5, 1, 2, groups=2).double()
    norm, pool = nn.BatchNorm2d(8).double(), nn.MaxPool2d(3, 2, 1)
    images, mask = images_of(3, 3, 32, 48), random_mask(3, (2, 3), 3, seeded())
    hidden = upsample(mask, (16, 16)).unsqueeze(1)
    x = conv1(images.masked_fill(hidden, 0))
    half = upsample(mask, (8, 8))
    seen = x.permute(0, 2, 3, 1)[~half]  # (sites, channels)
    mean, var = seen.mean(0), seen.var(0, unbiased=False)
    x = ((x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + norm.eps).sqrt()).relu()
    quarter = upsample(mask, (4, 4))
    pooled = torch.zeros(3, 8, 8, 12, dtype=torch.float64)
    for b in range(3):
        for i in range(8):
            for j in range(12):
                sites = [
                    x[b, :, r, c]
                    for r in range(2 * i - 1, 2 * i + 2)
                    for c in range(2 * j - 1, 2 * j + 2)
                    if 0 <= r < 16 and 0 <= c < 24 and not half[b, r, c]
                ]
                if not quarter[b, i, j]:
                    pooled[b, :, i, j] = torch.stack(sites).amax(0)
    expected = conv2(pooled).masked_fill(quarter.unsqueeze(1), 0)
    net = nn.Sequential(conv1, norm, nn.ReLU(inplace=True), pool, conv2)
    for backend in BACKENDS:
        norm.reset_running_stats()
        torch.testing.assert_close(dense(net(sparse_images(images, mask, backend))), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * seen.var(0, unbiased=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "groups"),
    [
        *[
            ((3, 3), (1, 1), (1, 1), 1),
            ((3, 3), (2, 2), (1, 1), 1),
            ((5, 3), (1, 1), (1, 1), 1),
            ((3, 3), (1, 1), (2, 2), 1),
        ],
        *[
            ((7, 7), (1, 1), (1, 1), 6),
            ((3, 3), (2, 2), (1, 1), 3),
            ((4, 4), (2, 2), (1, 1), 1),
            ((7, 7), (2, 2), (1, 1), 2),
        ],
    ],
)
def test_every_way_of_a_convolution_is_the_dense_one(
    way: str, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int], groups: int
) -> None:
    """Value and all three gradients against torch's convolution of the map with zeros at hidden sites."""
    if way == "pairs" and groups not in (1, 6):
        pytest.skip("pairs are for full and depthwise convolutions")
    side, grid, batch = (4, 4), (3, 2), 3
    mask = random_mask(batch, grid, 3, seeded())
    tiles = Tiles(mask, (grid[0] * 8, grid[1] * 8))
    whole = (
        images_of(batch, 6, grid[0] * 4, grid[1] * 4).masked_fill(upsample(mask, side).unsqueeze(1), 0).requires_grad_()
    )
    weight = images_of(9 if groups in (1, 3) else 6, 6 // groups, *kernel, seed=1).requires_grad_()
    bias = torch.randn(len(weight), dtype=torch.float64, generator=seeded(2)).requires_grad_()
    rows, columns = (d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    near = Neighbourhood(tiles, side, Pad((columns, columns, rows, rows)), stride, dilation, groups)
    expected = F.conv2d(whole, weight, bias, stride, (rows, columns), dilation, groups)
    expected = tiles.from_canvas(expected, near.out_side)
    found = tile_conv2d(tiles.from_canvas(whole, side), weight, bias, near, way)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    grad = torch.randn(found.shape, generator=seeded(3), dtype=found.dtype)
    for a, b in zip(*(torch.autograd.grad(y, (whole, weight, bias), grad) for y in (found, expected)), strict=True):
        hidden = upsample(mask, side).unsqueeze(1) if a.shape == whole.shape else torch.zeros(())
        torch.testing.assert_close(
            a.masked_fill(hidden.bool(), 0), b.masked_fill(hidden.bool(), 0), rtol=1e-10, atol=1e-10
        )


class Odd(nn.Module):
    """One layer that few networks have, between two convolutions."""

    def __init__(self, layer: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.first, self.layer = nn.Conv2d(3, 8, 3, 2, 1), layer
        self.last = nn.Conv2d(channels, 4, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.first(x).sigmoid()))


class Gate(nn.Module):
    """Squeeze and excitation with all kinds of pooling."""

    def forward(self, x: Tensor) -> Tensor:
        squeezed = F.adaptive_max_pool2d(x, 1) + x.std((2, 3), keepdim=True) - F.adaptive_avg_pool2d(x, (1, 1))
        return x * squeezed.softmax(1) + x.amax((2, 3), keepdim=True) * x.flatten(2).unsqueeze(2).flatten(2).view(
            x.shape
        )


@pytest.mark.parametrize(
    "layer",
    [
        *[nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True), nn.BatchNorm2d(8), Gate(), nn.AvgPool2d(3, 2, 1)],
        *[nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 2, ceil_mode=True)],
        *[nn.AvgPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(2), nn.Upsample(scale_factor=2), nn.LocalResponseNorm(3)],
        *[
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.ConvTranspose2d(8, 8, 2, 2),
            nn.ConvTranspose2d(8, 8, 4, 2, 1),
        ],
        *[nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.Conv2d(8, 8, 3, padding="same", dilation=2)],
        *[
            timm.layers.BlurPool2d(8),
            timm.layers.LayerNorm2d(8),
            timm.layers.create_conv2d(8, 8, 3, stride=2, padding="same"),
        ],
        *[
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
            timm.layers.grn.GlobalResponseNorm(8, channels_last=False),
        ],
        *[timm.layers.SEModule(8), timm.layers.EcaModule(8), nn.Conv2d(8, 8, (1, 5), padding=(0, 2), groups=8)],
    ],
    ids=lambda layer: f"{type(layer).__name__}",
)
def test_layers_are_exact(layer: nn.Module) -> None:
    """Through hidden values that are not zero in between (a sigmoid), features and gradients; and the plain layer without a mask."""
    model = randomised(Odd(layer)).train()
    model.forward_features = model.forward  # type: ignore[assignment]
    images, mask = images_of(3, 3, 48, 64), random_mask(3, (3, 4), 7, seeded())
    assert difference(*(run(model, sparse_images(images, mask, backend)) for backend in BACKENDS)) < TOLERANCE
    nothing = torch.zeros_like(mask)
    assert difference(run(model, sparse_images(images, nothing)), run(model, images)) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_pixels_do_not_matter(backend: str) -> None:
    """Nothing of a hidden patch reaches a feature."""
    model, images, mask = small("convnextv2_atto"), images_of(2, 3, 96, 64), random_mask(2, (3, 2), 3, seeded())
    other = torch.where(upsample(mask, (32, 32)).unsqueeze(1), images_of(2, 3, 96, 64, seed=9), images)
    a, b = (run(model, sparse_images(x, mask, backend))[0] for x in (images, other))
    assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_do_not_see_each_other(backend: str) -> None:
    """Without batch norm: GRN and squeeze-excite are per image, whatever else is in the batch."""
    model, images, mask = small("convnextv2_atto"), images_of(3, 3, 96, 64), random_mask(3, (3, 2), 3, seeded())
    other = images.clone()
    other[1] = images_of(1, 3, 96, 64, seed=5)[0]
    a, b = (run(model, sparse_images(x, mask, backend))[0] for x in (images, other))
    assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert not torch.equal(a[1], b[1])


def test_two_masks_in_flight() -> None:
    """Two forward passes before either goes back: each gradient is that of its own mask."""
    model, images = small(), images_of(2, 3, 96, 64)
    masks = [random_mask(2, (3, 2), 3, seeded(seed)) for seed in (0, 1)]
    alone = [run(model, sparse_images(images, mask))[1] for mask in masks]
    model.zero_grad()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    features = [dense(model.forward_features(sparse_images(images, mask))) for mask in masks]
    weights = [torch.randn(f.shape, generator=seeded(1), dtype=f.dtype) for f in features]
    sum((f * w).sum() for f, w in zip(features, weights, strict=True)).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, alone[0][name] + alone[1][name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointed_blocks_recompute_with_their_mask(backend: str, reentrant: bool) -> None:
    """Recomputation happens after forward returned, here even after an evaluation with another mask and one without."""
    timm.layers.set_reentrant_ckpt(reentrant)
    try:
        model, images = small("convnext_atto"), images_of(2, 3, 96, 64).requires_grad_()
        mask, other = (random_mask(2, (3, 2), 3, seeded(seed)) for seed in (0, 1))
        expected = run(model, sparse_images(images, mask, backend))[1]
        model.set_grad_checkpointing(True)
        model.zero_grad()
        features = dense(model.forward_features(sparse_images(images, mask, backend)))
        with torch.no_grad():
            model.eval()
            model.forward_features(sparse_images(images, other, backend))
            model.forward_features(images)
            model.train()
        (features * torch.randn(features.shape, generator=seeded(1), dtype=features.dtype)).sum().backward()
    finally:
        timm.layers.set_reentrant_ckpt(False)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reentrant_checkpoint_may_follow_a_convolution(backend: str) -> None:
    """The gradient that such a checkpoint hands on reaches the convolution before it."""
    images, mask = images_of(2, 3, 16, 16), random_mask(2, (2, 2), 2, seeded())
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 3, 2, 1).double(), nn.Conv2d(4, 4, 3, padding=1).double()
    grads = []
    for again in (False, True):
        x = first(sparse_images(images, mask, backend))
        out = checkpoint(second, x, use_reentrant=True) if again else second(x)
        first.zero_grad()
        plain(out).square().sum().backward()
        grads.append(first.weight.grad)
    torch.testing.assert_close(*grads)


def test_drop_path_is_drawn_per_image() -> None:
    """All tiles of an image lose a block together; tiles and masked draw alike."""
    path = timm.layers.DropPath(0.5).train()
    mask = random_mask(8, (2, 2), 1, seeded())
    found = {}
    for backend in BACKENDS:
        torch.manual_seed(3)
        found[backend] = dense(path(sparse_images(torch.ones(8, 1, 8, 8), mask, backend)))
    assert torch.equal(found["tiles"], found["masked"])
    kept = [
        set(image[~upsample(m[None], (4, 4))[0]].tolist()) for image, m in zip(found["tiles"][:, 0], mask, strict=True)
    ]
    assert all(len(values) == 1 for values in kept)
    assert {value for values in kept for value in values} == {0.0, 2.0}


def test_sparsify_is_reversible_and_leaves_no_trace() -> None:
    """In place: same keys, same weights, buffers and random states, same plain output, and gone afterwards."""
    model = timm.create_model("resnet10t", num_classes=5)
    before = copy.deepcopy(model.state_dict())
    random_state = torch.random.get_rng_state()
    images, mask = torch.randn(2, 3, 64, 96), random_mask(2, (2, 3), 3)
    state_after_draw = torch.random.get_rng_state()
    with sparsify(model, 32):
        assert torch.equal(torch.random.get_rng_state(), state_after_draw)
        assert model.training
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
        model.eval()
        logits = model(images, mask=mask)
        assert type(logits) is Tensor
        assert logits.shape == (2, 5)
        assert torch.allclose(logits, model(sparse_images(images, mask, "masked")).as_subclass(Tensor), atol=1e-5)
        assert not torch.allclose(logits, model(images), atol=1e-3)
    with pytest.raises(TypeError, match="mask"):
        model(images, mask=mask)
    assert not torch.equal(random_state, state_after_draw)


def test_pooled_values_go_to_and_from_images() -> None:
    """per_image and like_image: what statistics over the batch need."""
    images, mask = images_of(3, 4, 16, 16), random_mask(3, (2, 2), 1, seeded())
    for backend in BACKENDS:
        x = sparse_images(images, mask, backend)
        pooled = x.mean((2, 3), keepdim=True)
        assert per_image(pooled).shape == (3, 4, 1, 1)
        back = dense(x * 0 + like_image(per_image(pooled), x))
        seen = ~upsample(mask, (8, 8)).unsqueeze(1).expand_as(images)
        expected = per_image(pooled).expand_as(images)
        torch.testing.assert_close(back[seen], expected[seen])
        with pytest.raises(SparseError, match="pool it first"):
            per_image(x)
    assert per_image(images) is images


def test_autocast_runs_in_low_precision_and_goes_back() -> None:
    """bf16 convolutions, float32 weights and gradients."""
    model: Any = timm.create_model("resnet10t", num_classes=0)
    images, mask = torch.randn(2, 3, 64, 64), random_mask(2, (2, 2), 2)
    with torch.autocast("cpu", torch.bfloat16):
        features = model.forward_features(sparse_images(images, mask))
    assert plain(features).dtype == torch.bfloat16
    wide = plain(model.forward_features(sparse_images(images, mask)))
    assert float((plain(features) - wide).norm() / wide.norm()) < 0.05
    plain(features).float().square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 and bool(g.isfinite().all()) for g in grads)


def test_in_place_changes_of_what_backward_needs_are_noticed() -> None:
    """A sparse tensor shares its values' version: autograd complains as it does for plain tensors."""
    x = sparse_images(torch.rand(2, 3, 8, 8).requires_grad_(), random_mask(2, (2, 2), 2))
    y = x.sigmoid()
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        plain(y).sum().backward()


class Attention(nn.Module):
    """Sites that look at each other."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return F.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2).reshape(x.shape)


class Rolled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.roll(1, 3)


class Positions(nn.Module):
    """A map that knows where it is: right on the dense map alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight * torch.arange(x.shape[-1], dtype=x.dtype)


class Flipped(nn.Module):
    """Columns mixed by a matrix through a view: nothing in the names tells."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], -1).unflatten(2, (x.shape[3], x.shape[2])).reshape(x.shape).cumsum(3)


class PerTileNoise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (Attention(), "scaled_dot_product_attention"),
        (Rolled(), "roll"),
        (Positions(), r"layer \(Positions\)"),
        (Flipped(), "cumsum"),
        (PerTileNoise(), "plain tensor"),
        (nn.Conv2d(8, 8, 3), "padding moves sites"),
        (nn.Conv2d(8, 8, 3, stride=32, padding=1), "stride"),
        (nn.Softmax(dim=3), "softmax"),
        (nn.LayerNorm([8, 16, 16]), "layer_norm"),
        (nn.AdaptiveAvgPool2d(2), "one value per image"),
        (nn.MaxPool2d(2, return_indices=True), "max_pool2d_with_indices"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_is_not_exact_is_refused_with_its_path(layer: nn.Module, named: str) -> None:
    """The error names the module and what it did; the network is as it was."""
    model = Odd(layer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SparseError, match=rf"^layer \(.*{named}" if "layer" not in named else named):
        sparsify(model, 32)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[[True, False]], [[True, True]]]), "same number of patches"),
        (torch.ones(2, 2, 2, dtype=torch.bool), "at least one"),
        (torch.zeros(2, 3, 2, dtype=torch.bool), "does not divide"),
        (torch.zeros(2, 2, 2), "bool"),
    ],
)
def test_masks_that_do_not_fit(mask: Tensor, message: str) -> None:
    with pytest.raises(SparseError, match=message):
        sparse_images(torch.rand(2, 3, 64, 64), mask)


def test_unknown_backend_lists_the_known() -> None:
    with pytest.raises(SparseError, match="tiles, masked, minkowski, dense"):
        sparse_images(torch.rand(1, 3, 8, 8), torch.zeros(1, 2, 2, dtype=torch.bool), "spconv")


def test_dense_backend_is_zero_outing() -> None:
    images, mask = torch.rand(2, 3, 8, 8), random_mask(2, (2, 2), 2)
    x = sparse_images(images, mask, "dense")
    assert not isinstance(x, SparseTensor)
    assert torch.equal(x, images.masked_fill(upsample(mask, (4, 4)).unsqueeze(1), 0))


class Along(nn.Module):
    """Functions along the channels, in both orders of axes."""

    def forward(self, x: Tensor) -> Tensor:
        turned = F.normalize(x.softmax(1) + F.log_softmax(x, dim=1), dim=1).permute(0, 2, 3, 1)
        return F.glu(torch.cat([turned, turned.softmax(-1)], dim=-1)).permute(0, 3, 1, 2)


def test_functions_along_the_channels_are_local() -> None:
    model = randomised(Odd(Along())).train()
    model.forward_features = model.forward  # type: ignore[assignment]
    images, mask = images_of(3, 3, 48, 64), random_mask(3, (3, 4), 7, seeded())
    assert difference(*(run(model, sparse_images(images, mask, backend)) for backend in BACKENDS)) < TOLERANCE
    with pytest.raises(SparseError, match="not along its channels"):
        F.normalize(sparse_images(images, mask), dim=2)


def norm_relu_conv() -> tuple[Any, Any, Tensor, Tensor]:
    torch.manual_seed(0)
    norm, conv = nn.BatchNorm2d(3).double(), nn.Conv2d(3, 4, 3, padding=1).double()
    return norm, conv, images_of(2, 3, 16, 16), random_mask(2, (2, 2), 2, seeded())


@pytest.mark.parametrize(
    ("backend", "changed"), [("tiles", "weight"), ("tiles", "input"), ("masked", "weight"), ("masked", "output")]
)
def test_what_is_made_again_must_not_have_changed(backend: str, changed: str) -> None:
    """Tiles make batch norm's output again, from an input that must be as it was; masked keeps a copy of either."""
    norm, conv, images, mask = norm_relu_conv()
    x = sparse_images(images.requires_grad_(), mask, backend) * 1
    y = norm(x).relu()
    out = plain(conv(y))
    with torch.no_grad():
        {"weight": conv.weight, "input": x, "output": y}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        out.sum().backward()


def test_what_is_made_again_is_what_was_kept() -> None:
    """With and without, in place or not, twice over, beside another use: the gradients of masked, which keeps everything."""
    for inplace in (False, True):
        grads = []
        for backend in BACKENDS:
            norm, conv, images, mask = norm_relu_conv()
            y = F.relu(norm(sparse_images(images, mask, backend)), inplace=inplace)
            loss = plain(dense(conv(y))).square().sum() + dense(y).sum()
            for _ in range(2):
                loss.backward(retain_graph=True)
            grads.append([p.grad for p in (*norm.parameters(), *conv.parameters())])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_batch_norm_by_another_name_has_its_gradients() -> None:
    """torch.batch_norm takes its arguments in another order."""
    grads = []
    for backend in BACKENDS:
        norm, conv, images, mask = norm_relu_conv()
        with torch.no_grad():
            norm.weight.uniform_(0.5, 2, generator=seeded())
        x = sparse_images(images, mask, backend)
        y = torch.batch_norm(x, norm.weight, norm.bias, None, None, True, 0.1, 1e-5, False)
        plain(conv(y)).square().sum().backward()
        grads.append(conv.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


class PooledDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * F.dropout(x.mean((2, 3), keepdim=True) * 0 + 1, 0.5, True)


def test_what_is_drawn_for_pooled_values_is_drawn_per_image() -> None:
    images, mask = images_of(4, 8, 16, 16) * 0 + 1, random_mask(4, (2, 2), 1, seeded())
    torch.manual_seed(1)
    found = dense(PooledDropout()(sparse_images(images, mask)))
    for image, hidden in zip(found, mask, strict=True):
        for channel in image:
            assert len(set(channel[~upsample(hidden[None], (8, 8))[0]].tolist())) == 1
    assert set(found.unique().tolist()) == {0.0, 2.0}


class Hooked(nn.Module):
    """Right forwards; its gradient mixes sites."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda grad: grad + plain(grad).mean())
        return x * 1


class InDict(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return {"map": x + torch.arange(x.shape[-1], dtype=x.dtype)}


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(x.shape[0], 1, 1, 1) if self.training else x


@pytest.mark.parametrize("layer", [Hooked(), Random()])
@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_gradients_and_random_numbers_are_refused(layer: nn.Module, backend: str) -> None:
    with pytest.raises(SparseError):
        sparsify(Odd(layer), 32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_in_a_dict_are_compared(backend: str) -> None:
    with pytest.raises(SparseError, match="InDict"):
        sparsify(InDict(), 32, backend, in_chans=3)


def test_masked_is_told_what_changed_in_place_through_a_view() -> None:
    """Hidden sites count as zeros, whatever was added to them."""
    norm, conv, images, mask = norm_relu_conv()
    found = []
    for backend in BACKENDS:
        y = norm(sparse_images(images, mask, backend))
        y.permute(0, 2, 3, 1).add_(1)
        y[:, :2].add_(1)
        spread = y + y.mean((2, 3), keepdim=True).expand_as(y)
        found.append(dense(conv(spread)))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.adaptive_avg_pool2d(F.pad(x, (1, 1, 1, 1)), 1),
        lambda x: F.group_norm(F.pad(x, (1, 1, 1, 1)), 1),
        lambda x: x.std(True),
        lambda x: x.mT,
        lambda x: F.local_response_norm(x.permute(0, 2, 3, 1), 3),
        lambda x: F.conv2d(x.transpose(2, 3), torch.zeros(1, 3, 1, 1, dtype=x.dtype)),
        lambda x: F.conv2d(x[:, :, [1, 0, 2, 3, 4, 5, 6, 7]], torch.zeros(1, 3, 1, 1, dtype=x.dtype)),
        lambda x: F.rrelu(x, training=True),
        lambda x: F.feature_alpha_dropout(x, 0.5, True),
    ],
)
def test_traps_are_refused_at_once(function: Any) -> None:
    """Without a check of the whole network, too."""
    with pytest.raises(SparseError):
        function(sparse_images(images_of(2, 3, 16, 16), random_mask(2, (2, 2), 2, seeded())))


def test_var_takes_unbiased_by_position() -> None:
    images, mask = images_of(2, 3, 16, 16), random_mask(2, (2, 2), 2, seeded())
    seen = images.permute(0, 2, 3, 1)[~upsample(mask, (8, 8))].view(2, -1, 3)
    for backend in BACKENDS:
        found = sparse_images(images, mask, backend).var((2, 3), False)
        torch.testing.assert_close(per_image(found), seen.var(1, unbiased=False))


@pytest.mark.parametrize("mask", [torch.zeros(1, 2, 2, dtype=torch.bool), torch.zeros(4, 2, 2, dtype=torch.bool), None])
def test_a_mask_of_another_batch_is_refused(mask: Any) -> None:
    for backend in (*BACKENDS, "dense"):
        with pytest.raises(SparseError, match="images of shape"):
            sparse_images(torch.rand(2, 3, 8, 8), mask, backend)


def test_a_network_without_values_is_not_tried() -> None:
    """One on the meta device and a fake one have nothing to compare; the same network with numbers is refused."""

    class Rolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.roll(self.layer(x), 1, 2)

    def tried() -> None:
        check(Rolled(), Tiles, (8, 8), 1, lambda model, x: model(x))

    with torch.device("meta"):
        tried()
    with FakeTensorMode():
        tried()
    with pytest.raises(SparseError):
        tried()
