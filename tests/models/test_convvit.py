"""ConvMAE's encoder: sizes, exactness on sparse images, and what timm and its users ask of a model."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import Tensor, nn

from models.convvit import ConvViT
from models.encoder import build_encoder, feature_stride, pooled_features, spatial_features, stage_features
from models.masking import random_mask, upsample
from models.sparse import SparseError, dense, sparse_images, sparsify
from models.sparse.check import check, randomised
from models.sparse.masked import Masked
from models.sparse.tiles import Tiles
from models.sparse.tokens import as_map, map_size, token_places, tokens_of

SMALL: dict[str, Any] = {"embed_dims": (8, 12, 16), "depths": (1, 2, 2), "num_heads": 2}
FINE = SMALL | {"patch_sizes": (2, 2, 2)}
BACKENDS = ("tiles", "masked")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_of(batch: int, channels: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=seeded(5), dtype=torch.float64)


def small(size: tuple[int, int] = (32, 48), in_chans: int = 3, num_classes: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "in_chans": in_chans,
        "image_size": size,
        "drop_path_rate": 0.0,
        "num_classes": num_classes,
    }
    return randomised(build_encoder("convvit_small", **given, kwargs=FINE | kwargs)).train()


@pytest.mark.parametrize(
    ("size", "millions"), [("small", 22), ("base", 84), ("base_star", 88), ("large", 322), ("huge", 666)]
)
def test_published_sizes(size: str, millions: float) -> None:
    """Parameters without the head, table 7, within 3 %."""
    with torch.device("meta"):
        model: Any = timm.create_model(f"convvit_{size}", num_classes=0)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16]


class Slow:
    """The network in plain words: dense maps, attention written out; hidden sites are zeros to a convolution, and no tokens."""

    def __init__(self, model: ConvViT, mask: Tensor) -> None:
        self.w, self.mask = dict(model.state_dict()), mask

    def __call__(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in range(3):
            x = self.embed(f"stages.{stage}.embed", x)
            cell = (x.shape[2] // self.mask.shape[1], x.shape[3] // self.mask.shape[2])
            visible = (~upsample(self.mask, cell)).unsqueeze(1).to(x.dtype)
            for number in range(SMALL["depths"][stage] if stage < 2 else 0):
                x = self.conv_block(f"stages.{stage}.blocks.{number}", x, visible)
            if stage == 2:
                x = torch.stack([self.transformer(*pair) for pair in zip(x, visible[:, 0].bool(), strict=True)])
            maps.append(x * visible)
        return maps

    def embed(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.w[f"{name}.proj.weight"], self.w[f"{name}.proj.bias"]
        return F.gelu(
            self.norm(f"{name}.norm", F.conv2d(x, weight, bias, stride=weight.shape[-1]).movedim(1, -1), 1e-5).movedim(
                -1, 1
            )
        )

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * self.w[f"{name}.weight"]
            + self.w[f"{name}.bias"]
        )

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].flatten(1).t() + self.w[f"{name}.bias"]

    def conv_block(self, name: str, x: Tensor, visible: Tensor) -> Tensor:
        x = x.movedim(1, -1)
        y = self.linear(f"{name}.conv1", self.norm(f"{name}.norm1", x, 1e-5)).movedim(-1, 1) * visible
        weight = self.w[f"{name}.conv_dw.weight"]
        y = F.conv2d(y, weight, self.w[f"{name}.conv_dw.bias"], padding=weight.shape[-1] // 2, groups=len(weight))
        x = x + self.linear(f"{name}.conv2", y.movedim(1, -1))
        return self.mlp(name, x, 1e-5).movedim(-1, 1)

    def mlp(self, name: str, x: Tensor, eps: float) -> Tensor:
        y = F.gelu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x, eps)))
        return x + self.linear(f"{name}.mlp.fc2", y)

    def transformer(self, x: Tensor, visible: Tensor) -> Tensor:
        """One image: map (D, h, w), bool (h, w)."""
        places = visible.flatten().nonzero().squeeze(1)
        tokens = self.linear("stages.2.proj", x.flatten(1).t()[places]) + self.w["pos_embed"][0, places]
        heads = SMALL["num_heads"]
        for number in range(SMALL["depths"][2]):
            name = f"stages.2.blocks.{number}"
            q, k, v = self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", tokens, 1e-6)).chunk(3, -1)
            out = [
                torch.softmax(a @ b.t() / a.shape[1] ** 0.5, -1) @ c
                for a, b, c in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True)
            ]
            tokens = tokens + self.linear(f"{name}.attn.proj", torch.cat(out, 1))
            tokens = self.mlp(name, tokens, 1e-6)
        whole = torch.zeros_like(x).flatten(1)
        whole[:, places] = tokens.t()
        return whole.view_as(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("batch", "channels", "patch", "hidden"),
    [(3, 3, (8, 8), 18), (1, 1, (16, 16), 4), (5, 5, (8, 16), 6), (2, 3, (8, 8), 0)],
)
def test_sparse_is_a_slow_loop(backend: str, batch: int, channels: int, patch: tuple[int, int], hidden: int) -> None:
    """Odd batches, other channel counts, a grid of 4 x 6; one site of the last stage per mask patch, or several."""
    model = small(in_chans=channels)
    images, grid = images_of(batch, channels, 32, 48), (32 // patch[0], 48 // patch[1])
    mask = random_mask(batch, grid, hidden, seeded())
    found = [dense(x) for x in stage_features(model, sparse_images(images, mask, backend))]
    for ours, theirs in zip(found, Slow(model, mask)(images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", [5, 7, 9])
@pytest.mark.parametrize("patch", [(8, 8), (16, 8)])
def test_the_check_of_sparse_encoding_accepts_it(kernel: int, patch: tuple[int, int]) -> None:
    """Also for another image size than the one it is built for; weights and size stay."""
    model = small((64, 64), kernel_size=kernel)
    before = copy.deepcopy(model.state_dict())
    for geometry in (Tiles, Masked):
        check(model, geometry, patch, 3, stage_features)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.grid_size == (8, 8) and model.stages[0].blocks[0].conv_dw.kernel_size == (kernel, kernel)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_slow_loop(backend: str) -> None:
    model = small()
    images, mask = images_of(3, 3, 32, 48), random_mask(3, (4, 6), 15, seeded())

    def total(maps: list[Tensor]) -> Tensor:
        draw = seeded(9)
        return torch.stack([(x * torch.randn(x.shape, generator=draw, dtype=x.dtype)).sum() for x in maps]).sum()

    total([dense(x) for x in stage_features(model, sparse_images(images, mask, backend))]).backward()
    slow = Slow(model, mask)
    slow.w = dict(model.named_parameters())
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total(slow(images)).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and "pos_embed" in found
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-8, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_whole_network_on_visible_patches(backend: str) -> None:
    """Pooled over visible sites; sparse dropout of whole images is drawn once for each."""
    torch.manual_seed(0)
    model = build_encoder(
        "convvit_small", in_chans=3, image_size=(32, 48), drop_path_rate=0.5, num_classes=4, kwargs=FINE
    )
    images, mask = images_of(3, 3, 32, 48).float(), random_mask(3, (4, 6), 12, seeded())
    with sparsify(model, 8, backend):
        torch.manual_seed(1)
        first = model(images, mask=mask)
        torch.manual_seed(1)
        again = model(images, mask=mask)
        assert first.shape == (3, 4) and torch.equal(first, again)
        assert model.eval()(images, mask=torch.zeros_like(mask)).allclose(model(images), atol=1e-5)


def test_tokens_and_maps() -> None:
    """Tokens are the visible sites, they know their places, and go back to where they came from."""
    values = torch.arange(2 * 3 * 8 * 12, dtype=torch.float64).view(2, 3, 8, 12)
    plain = tokens_of(values)
    assert torch.equal(plain[:, 13], values[:, :, 1, 1]) and token_places(values) is None
    assert torch.equal(as_map(plain, values), values) and map_size(values) == (8, 12)
    mask = random_mask(2, (2, 3), 4, seeded())
    for backend in BACKENDS:
        sparse = sparse_images(values, mask, backend)
        tokens, places = tokens_of(sparse), token_places(sparse)
        assert places is not None and map_size(sparse) == (8, 12) and tokens.shape == (2, 32, 3)
        assert torch.equal(tokens, plain.gather(1, places.unsqueeze(2).expand(-1, -1, 3)))
        assert torch.equal(dense(as_map(2 * tokens, sparse)), 2 * dense(sparse))
        with pytest.raises(SparseError, match="no map"):
            tokens_of(sparse.mean((2, 3)))


@pytest.mark.parametrize("pool", ["avg", "token", ""])
@pytest.mark.parametrize("fc_norm", [None, True, False])
def test_norm_and_pooling(pool: str, fc_norm: bool | None) -> None:
    """As timm's ViT: fc_norm after mean pooling unless said otherwise; the first token is normed before."""
    asked: dict[str, Any] = {"global_pool": pool} | ({} if fc_norm is None else {"fc_norm": fc_norm})
    model = small(num_classes=5, **asked)
    images = images_of(2, 3, 32, 48)
    after = fc_norm if fc_norm is not None else pool == "avg"
    assert isinstance(model.norm, nn.Identity) is after and isinstance(model.fc_norm, nn.Identity) is not after
    tokens = model.maps(images)[-1].flatten(2).transpose(1, 2)
    if not after:
        tokens = model.norm(tokens)
    pooled = {"avg": tokens.mean(1), "token": tokens[:, 0], "": tokens}[pool]
    expected = model.head(model.fc_norm(pooled) if after else pooled)
    if not pool:
        expected = expected.transpose(1, 2).unflatten(2, (4, 6))
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)
    model.reset_classifier(0)
    assert model(images).shape == {"avg": (2, 16), "token": (2, 16), "": (2, 16, 4, 6)}[pool]
    model.reset_classifier(7, "avg")
    assert model(images).shape == (2, 7) and model.head.weight.dtype == torch.float64


def test_feature_pyramid() -> None:
    """E1 to E3 as convnets give them; E4 is the largest of each 2x2 sites."""
    asked: dict[str, Any] = FINE | {"img_size": (32, 48), "in_chans": 1}
    torch.manual_seed(0)
    model: Any = timm.create_model("convvit_small", features_only=True, **asked)
    x = images_of(2, 1, 32, 48).float()
    maps = model(x)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 16, 24), (2, 12, 8, 12), (2, 16, 4, 6)]
    assert model.feature_info.reduction() == [2, 4, 8] and model.feature_info.channels() == [8, 12, 16]
    torch.manual_seed(0)
    four: Any = timm.create_model("convvit_small", features_only=True, out_indices=(0, 1, 2, 3), **asked)
    assert four.feature_info.reduction() == [2, 4, 8, 16] and four.feature_info.channels()[3] == 16
    found = four(x)
    assert all(torch.equal(a, b) for a, b in zip(maps, found[:3], strict=True))
    assert torch.equal(found[3], F.max_pool2d(found[2], 2)) and found[3].shape == (2, 16, 2, 3)
    whole: Any = timm.create_model("convvit_small", num_classes=0, **asked)
    last, chosen = whole.forward_intermediates(x, indices=2)
    assert [m.shape[1] for m in chosen] == [12, 16] and torch.equal(last, whole.forward_features(x))
    assert [m.shape[1] for m in whole.forward_intermediates(x, indices=[0], intermediates_only=True)] == [8]
    plain: Any = timm.create_model("convvit_small", num_classes=0, global_pool="", **asked)
    normed = plain.forward_intermediates(x, norm=True, intermediates_only=True)[-1]
    assert torch.equal(normed, plain.forward_features(x)) and not torch.equal(normed, plain.maps(x)[-1])


def test_house_functions_know_its_maps() -> None:
    model = small()
    images = images_of(2, 3, 32, 48)
    assert feature_stride(model) == (8, 8) and spatial_features(model, images).shape == (2, 16, 4, 6)
    assert pooled_features(model, images).shape == (2, 16)
    assert model.default_cfg["classifier"] == "head" and model.default_cfg["first_conv"] == "stages.0.embed.proj"


@pytest.mark.parametrize(("size", "patch_sizes"), [((32, 32), (1, 2, 2)), ((24, 24), (2, 2, 1)), ((48, 32), (4, 2, 2))])
def test_small_images_have_strides_of_their_own(size: tuple[int, int], patch_sizes: tuple[int, ...]) -> None:
    model = small(size, patch_sizes=patch_sizes)
    stride = patch_sizes[0] * patch_sizes[1] * patch_sizes[2]
    assert model.stride == stride and model.grid_size == (size[0] // stride, size[1] // stride)
    assert spatial_features(model, images_of(1, 3, *size)).shape == (1, 16, size[0] // stride, size[1] // stride)


def test_positions_follow_the_image_size() -> None:
    """set_input_size for good, dynamic_img_size as images come; the right size alone is left as it is."""
    fixed, flexible = small((32, 48)), small((32, 48), dynamic_img_size=True)
    larger = images_of(1, 3, 64, 48)
    with pytest.raises(
        ValueError, match=r"images of \(64, 48\).* is for \(32, 48\): set img_size, or dynamic_img_size"
    ):
        fixed(larger)
    with pytest.raises(ValueError, match=r"no multiple of the stride 8"):
        flexible(images_of(1, 3, 60, 48))
    free = flexible(larger)
    assert flexible.pos_embed.shape == (1, 24, 16)
    before = fixed.pos_embed.detach().clone()
    fixed.set_input_size(img_size=(32, 48))
    assert torch.equal(fixed.pos_embed, before)
    fixed.pos_embed.requires_grad_(False)
    fixed.set_input_size(img_size=(64, 48))
    assert fixed.pos_embed.shape == (1, 48, 16) and not fixed.pos_embed.requires_grad
    torch.testing.assert_close(fixed(larger), free)
    smooth = F.interpolate(before.view(1, 4, 6, 16).permute(0, 3, 1, 2).float(), (8, 6), mode="bicubic", antialias=True)
    torch.testing.assert_close(fixed.pos_embed[0].float(), smooth[0].flatten(1).t())


def test_layers_for_decay() -> None:
    """One layer before the transformer, one per block, and what follows: ids as of the released fine-tuning."""
    model = small(num_classes=3)
    groups: dict[int, list[str]] = group_parameters(model, model.group_matcher(), reverse=False)
    layers = {name: number for number, names in groups.items() for name in names}
    first = {layers[name] for name in layers if not name.startswith(("stages.2.blocks.", "fc_norm", "head"))}
    assert first == {0} and layers["stages.2.blocks.0.attn.qkv.weight"] == 1
    assert layers["stages.2.blocks.1.mlp.fc2.bias"] == 2 and layers["fc_norm.weight"] == layers["head.bias"] == 3
    assert model.no_weight_decay() == {"pos_embed"}


@pytest.mark.parametrize("backend", [*BACKENDS, "dense"])
def test_checkpointing_gives_the_same_gradients(backend: str) -> None:
    model = small()
    images, mask = images_of(3, 3, 32, 48), random_mask(3, (4, 6), 12, seeded())
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.stack(
            [dense(x).square().sum() for x in stage_features(model, sparse_images(images, mask, backend))]
        ).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-12, atol=1e-12)


def test_stochastic_depth_rises_over_all_blocks() -> None:
    model = build_encoder("convvit_small", in_chans=3, image_size=(32, 48), drop_path_rate=0.4, kwargs=FINE)
    rates: list[float] = [
        m.drop_prob for name, m in model.named_modules() if name.endswith("drop_path1") and hasattr(m, "drop_prob")
    ]
    assert rates[-1] == pytest.approx(0.4) and rates == sorted(rates)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"kernel_size": 4}, "kernel_size=4 must be odd"),
        ({"depths": (1, 2)}, "depths=.* must be a list of three"),
        ({"num_heads": 3}, "must be a multiple of num_heads=3"),
        ({"global_pool": "max"}, "global_pool='max' is unknown; there are: 'avg', 'token', ''"),
        ({"window": 3}, "takes no argument 'window'; its arguments are: .*kernel_size"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_encoder("convvit_small", in_chans=3, image_size=(32, 48), drop_path_rate=0.0, kwargs=FINE | wrong)
    with pytest.raises(ValueError, match="no multiple of the stride 8"):
        build_encoder("convvit_small", in_chans=3, image_size=(30, 48), drop_path_rate=0.0, kwargs=FINE)
