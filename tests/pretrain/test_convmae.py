"""ConvMAE: what is seen and what is not, the loss, every ablation of the paper, and what is handed on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from engine import cli
from engine.config import ConfigError, load
from engine.log import read_log
from engine.optim import param_groups
from engine.schema import EncoderConfig
from finetune import weights
from finetune.__main__ import PROGRAM as FINETUNE
from finetune.config import FinetuneData
from models.encoder import build_encoder, load_encoder
from models.interop.convmae import official_convmae_key
from models.masking import upsample
from models.pixels import patchify
from models.sincos import sincos_positions
from models.sparse import dense
from pretrain.__main__ import PROGRAM
from pretrain.convmae import ConvMAE
from pretrain.methods import SCHEMAS
from tests.pretrain.autoencoders import image_and_mask, roused, seeded
from tests.shared import SHARED, needs_shared

H, W, PATCH = 32, 48, 8
"""Not square; a grid of 4 x 6."""
SIZES = "patch_sizes: [2, 2, 2], embed_dims: [8, 12, 16], depths: [1, 1, 2], num_heads: 2"
SMALL = f"encoder.kwargs={{{SIZES}}}"


def build(*overrides: str) -> ConvMAE:
    in_chans = next((int(word.partition("=")[2]) for word in overrides if word.startswith("data.in_chans=")), 3)
    settings = [f"data.image_size=[{H},{W}]", "encoder.name=convvit_small", SMALL, f"convmae.mask_patch={PATCH}"]
    settings += ["convmae.decoder_dim=16", "convmae.decoder_depth=1", "convmae.decoder_heads=2"]
    settings += [f"data.mean={[0.4] * in_chans}", f"data.std={[0.25] * in_chans}", "optim.base_lr=1e-3"]
    config: Any = load(SCHEMAS["convmae"], {"method": "convmae"}, [*settings, *overrides], "test")
    ConvMAE.check(config)
    torch.manual_seed(0)
    return ConvMAE(config)


def batch(images: int = 3, in_chans: int = 3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {"image": torch.randint(0, 256, (images, in_chans, H, W), dtype=torch.uint8, generator=draw)}


RANDOM = ("convmae.masking=random", "convmae.backend=dense")
ABLATIONS: list[tuple[str, ...]] = [
    ("convmae.backend=dense",),
    RANDOM,
    ("encoder.kwargs.kernel_size=7",),
    ("encoder.kwargs.kernel_size=9",),
    ("convmae.multi_scale=false",),
    ("convmae.mask_ratio=0.5",),
    ("convmae.decoder_depth=2",),
    ("convmae.norm_target=false",),
    ("convmae.loss_on=all",),
]
OPTIONS: list[tuple[str, ...]] = [
    (),
    *ABLATIONS,
    ("convmae.backend=masked",),
    ("convmae.backend=dense", "convmae.multi_scale=false"),
    ("encoder.drop_path_rate=0.2",),
    ("encoder.kwargs.global_pool=token",),
    ("convmae.mask_patch=[8,16]",),
    ("data.in_chans=1",),
    ("data.in_chans=5",),
]


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("overrides", OPTIONS, ids=lambda words: ",".join(words) or "default")
def test_every_option_trains_what_it_should(overrides: tuple[str, ...]) -> None:
    """An odd batch: a finite loss that falls, and a gradient in every trained parameter; positions alone are fixed."""
    method = build(*overrides)
    images = batch(3, method.config.data.in_chans)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(6):
        output = method(images, seeded())
        assert output["loss"].ndim == 0 and output["loss"].isfinite()
        optimizer.zero_grad()
        output["loss"].backward()
        trained = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
        assert all(grad is not None and grad.isfinite().all() for grad in trained.values())
        optimizer.step()
        losses.append(output["loss"].item())
    assert losses[-1] < losses[0]
    assert [name for name, p in method.named_parameters() if not p.requires_grad] == ["encoder.pos_embed"]


def outcome(method: ConvMAE) -> tuple[Tensor, Tensor, Tensor]:
    """Mask, prediction and loss."""
    image, mask = image_and_mask(method)
    with torch.no_grad():
        prediction = method.predict(image, mask)
        return mask, prediction, method.loss(prediction, image, mask)


@pytest.mark.parametrize("overrides", ABLATIONS, ids=",".join)
def test_every_ablation_changes_what_comes_out(overrides: tuple[str, ...]) -> None:
    """Loss or prediction differ, with every weight that both have being the same."""
    plain, changed = roused(build()), roused(build(*overrides))
    own = changed.state_dict()
    common = {k: v for k, v in plain.state_dict().items() if k in own and v.shape == own[k].shape}
    changed.load_state_dict(common, strict=False)
    (_, one, loss_one), (_, other, loss_other) = outcome(plain), outcome(changed)
    same = one.shape == other.shape and torch.allclose(one, other, rtol=1e-6)
    assert not torch.allclose(loss_one, loss_other, rtol=1e-6) or not same


def test_ablations_change_nothing_else() -> None:
    """Which weights there are, and the mask, stay the same where they have no reason not to."""
    plain = build()
    shapes = {name: value.shape for name, value in plain.state_dict().items()}
    mask = plain.draw_mask(3, seeded())
    for overrides in (("convmae.backend=dense",), RANDOM, ("convmae.mask_ratio=0.5",)):
        assert {name: value.shape for name, value in build(*overrides).state_dict().items()} == shapes
    single = {name for name in shapes if not name.startswith("fuse.")}
    assert set(build("convmae.multi_scale=false").state_dict()) == single
    wide = build("encoder.kwargs.kernel_size=9").state_dict()
    assert {name for name, value in wide.items() if value.shape != shapes[name]} == {
        name for name in shapes if name.endswith("conv_dw.weight")
    }
    for overrides in (("convmae.backend=dense",), ("convmae.multi_scale=false",), ("encoder.kwargs.kernel_size=7",)):
        assert torch.equal(build(*overrides).draw_mask(3, seeded()), mask)


@pytest.mark.parametrize(
    "overrides",
    [(), ("convmae.multi_scale=false",), ("convmae.mask_patch=16",), ("convmae.mask_patch=[8,16]", "data.in_chans=1")],
    ids=lambda words: ",".join(words) or "default",
)
def test_tiles_equal_masked(overrides: tuple[str, ...]) -> None:
    """Prediction, loss and every gradient in float64 to 1e-9."""
    results = []
    for backend in ("tiles", "masked"):
        method = roused(build(*overrides, f"convmae.backend={backend}"))
        image, mask = image_and_mask(method)
        prediction = method.predict(image, mask)
        loss = method.loss(prediction, image, mask)
        loss.backward()
        results.append((prediction, loss, {n: p.grad for n, p in method.named_parameters() if p.requires_grad}))
    (pred, loss, grads), (reference, expected, expected_grads) = results
    torch.testing.assert_close(pred, reference, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    largest = max(float(grad.abs().max()) for grad in expected_grads.values() if grad is not None)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-9, atol=1e-9 * largest, msg=name)


@pytest.mark.parametrize("backend", ["tiles", "masked", "dense"])
def test_what_leaks_through_the_mask(backend: str) -> None:
    """Nothing, to the bit, but where the ablation lets convolutions look; seen pixels always count."""
    method = roused(build(f"convmae.backend={backend}"))
    image, mask = image_and_mask(method)
    hidden = upsample(mask, method.patch).unsqueeze(1).expand_as(image)
    other = torch.where(hidden, torch.randn(image.shape, generator=seeded(8), dtype=image.dtype), image)
    for one, two in zip(method.encode(image, mask), method.encode(other, mask), strict=True):
        assert torch.equal(dense(one), dense(two)) is (backend != "dense")
    assert torch.equal(method.predict(image, mask), method.predict(other, mask)) is (backend != "dense")
    seen = torch.where(hidden, image, image + 1)
    assert not torch.allclose(method.predict(image, mask), method.predict(seen, mask))


def test_dense_convolutions_are_those_of_the_whole_image() -> None:
    """No masked convolution: maps of the plain network, of which the transformer takes what is visible."""
    method = roused(build("convmae.backend=dense"))
    image, mask = image_and_mask(method)
    first, second, last = method.encode(image, mask)
    plain = method.encoder.stages[0](image)
    shown = (~upsample(mask, (4, 4))).unsqueeze(1)
    torch.testing.assert_close(dense(first), plain * shown, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        dense(second), method.encoder.stages[1](plain) * (~upsample(mask, (2, 2))).unsqueeze(1), rtol=1e-9, atol=1e-9
    )
    assert not dense(last)[mask.unsqueeze(1).expand(-1, 16, -1, -1)].any()
    whole = method.encoder.maps(image)[-1]
    assert not torch.allclose(dense(last), whole * (~mask).unsqueeze(1))  # attention saw visible tokens only
    nothing = torch.zeros_like(mask)
    torch.testing.assert_close(dense(method.encode(image, nothing)[-1]), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["tiles", "masked", "dense"])
def test_with_nothing_hidden_it_is_the_plain_network(backend: str) -> None:
    method = roused(build(f"convmae.backend={backend}"))
    image, mask = image_and_mask(method)
    for ours, plain in zip(method.encode(image, torch.zeros_like(mask)), method.encoder.maps(image), strict=True):
        torch.testing.assert_close(dense(ours), plain, rtol=1e-9, atol=1e-9)


def test_random_masking_hides_sites_of_the_first_stage() -> None:
    """Hidden pixels are zeros, all tokens stay, the target is normalised as ever, and hidden pixels alone count."""
    method = roused(build(*RANDOM))
    assert method.patch == (2, 2) and method.grid == (16, 24) and method.sites == (4, 6)
    image, mask = image_and_mask(method)
    assert mask.shape == (3, 16, 24) and (mask.sum((1, 2)) == 384 - 96).all()
    hidden = upsample(mask, (2, 2)).unsqueeze(1).expand_as(image)
    zeros = torch.where(hidden, 0.0, image)
    for ours, plain in zip(method.encode(image, mask), method.encoder.maps(zeros), strict=True):
        assert torch.equal(ours, plain)
    prediction = method.predict(image, mask)
    target = method.target(image)
    blockwise = roused(build())
    torch.testing.assert_close(
        target,
        patchify(
            torch.nn.functional.fold(
                blockwise.target(image).unflatten(2, (8, 8, 3)).permute(0, 4, 2, 3, 1).flatten(1, 3),
                (H, W),
                8,
                stride=8,
            ),
            (2, 2),
        ),
    )
    expected = torch.stack(
        [(prediction[b, n] - target[b, n]).square().mean() for b, n in mask.flatten(1).nonzero().tolist()]
    )
    torch.testing.assert_close(method.loss(prediction, image, mask), expected.mean())
    with pytest.raises(ConfigError, match=r"set convmae\.backend=dense, or masking=blockwise"):
        build("convmae.masking=random")


def test_patches_hidden_altogether_get_the_mask_token() -> None:
    for overrides, cell in (((), (1, 1)), (("convmae.mask_patch=[8,16]",), (1, 2)), (RANDOM, None)):
        method = roused(build(*overrides))
        image, mask = image_and_mask(method)
        if cell is None:  # the upper half is hidden altogether, of the lower one some sites of each patch
            mask = torch.ones_like(mask)
            mask[:, 8:, ::2] = False
        seen: list[Tensor] = []
        method.decoder.blocks.register_forward_pre_hook(lambda _m, inputs, seen=seen: seen.append(inputs[0]))
        method.predict(image, mask)
        hidden = method.hidden_sites(mask).flatten(1)
        expected = upsample(mask, cell) if cell else mask.view(3, 4, 4, 6, 4).permute(0, 1, 3, 2, 4).flatten(3).all(-1)
        assert torch.equal(hidden, expected.flatten(1)) and hidden.any() and not hidden.all()
        token = method.decoder.mask_token.view(-1) + method.decoder.pos_embed.expand(3, -1, -1)
        torch.testing.assert_close(seen[0][hidden], token[hidden])
        assert not torch.isclose(seen[0][~hidden], token[~hidden]).all(-1).any()


def test_the_sum_of_scales_is_normed_and_decoded() -> None:
    """Strided convolutions bring each map to the tokens; their sum, at visible sites only, meets the last norm."""
    method = roused(build())
    image, mask = image_and_mask(method)
    first, second, last = (dense(x) for x in method.encode(image, mask))
    assert [m.get_parameter("weight").shape[2:] for m in method.fuse] == [(4, 4), (2, 2)]
    total = last + method.fuse[0](first) + method.fuse[1](second)
    seen: list[Tensor] = []
    method.decoder.embed.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    method.predict(image, mask)
    rows = total.permute(0, 2, 3, 1)[~mask].view(3, 6, 16)
    torch.testing.assert_close(seen[0], method.encoder.norm(rows), rtol=1e-9, atol=1e-9)


def test_positions_are_fixed_sines_and_cosines() -> None:
    """Columns in the first half of the channels, rows in the second; of each the sines first."""
    method = build()
    for found, dim in ((method.encoder.pos_embed, 16), (method.decoder.pos_embed, 16)):
        assert found.shape == (1, 24, dim)
        for row, column, channel in ((0, 0, 5), (3, 1, 2), (2, 5, 6), (3, 4, 11), (1, 2, 15)):
            place = (column, row)[channel // 8]
            wave = (torch.sin, torch.cos)[channel % 8 // 4]
            expected = wave(torch.tensor(place / 10000 ** (channel % 4 / 4), dtype=torch.float64))
            assert float(found[0, row * 6 + column, channel]) == pytest.approx(float(expected), abs=1e-7)
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions((2, 2), 6)


def test_a_fixed_number_is_visible() -> None:
    """int(L (1 - ratio)) as released."""
    assert [ConvMAE.num_visible(196, ratio) for ratio in (0.75, 0.6, 0.9)] == [49, 78, 19]
    mask = build().draw_mask(5, seeded())
    assert mask.shape == (5, 4, 6) and (mask.sum((1, 2)) == 18).all()
    assert len({tuple(row.flatten().tolist()) for row in mask}) > 1


def slow_loss(image: Tensor, prediction: Tensor, mask: Tensor) -> float:
    """Patch by patch: mean over a patch, then over hidden patches of the whole batch."""
    errors = []
    for b, i, j in mask.nonzero().tolist():
        pixels = image[b, :, i * PATCH : (i + 1) * PATCH, j * PATCH : (j + 1) * PATCH].permute(1, 2, 0).flatten()
        target = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
        errors.append((prediction[b, i * mask.shape[2] + j] - target).square().mean())
    return float(sum(errors) / len(errors))


def test_loss_is_on_hidden_patches_only() -> None:
    method = roused(build())
    image, mask = image_and_mask(method)
    prediction = method.predict(image, mask).detach()
    loss = method.loss(prediction, image, mask)
    assert float(loss) == pytest.approx(slow_loss(image, prediction, mask), rel=1e-12)
    elsewhere = prediction + 5 * (~mask.flatten(1)).unsqueeze(-1)
    assert torch.equal(method.loss(elsewhere, image, mask), loss)


@pytest.mark.parametrize("patch", [(8, 8), (16, 8), (8, 16)])
def test_each_site_predicts_its_own_pixels(patch: tuple[int, int]) -> None:
    """Whatever the mask patch: a decoder that says where it is puts each pixel in its place, (row, column, channel)."""
    method = build(f"convmae.mask_patch={list(patch)}")
    picture = torch.arange(3 * H * W, dtype=torch.float32).view(1, 3, H, W)

    class Known(nn.Module):
        def forward(self, tokens: Tensor, like: Tensor, hidden: Tensor) -> Tensor:
            assert hidden.shape == (1, 4, 6)
            return patchify(picture, (8, 8))

    method.decoder = Known()  # type: ignore[assignment]
    assert torch.equal(method.predict(picture, method.draw_mask(1, seeded(4))), patchify(picture, patch))


# ------------------------------------------------------------------------------------------------ weights and their decay


def test_initial_weights() -> None:
    """Linear layers by Glorot's rule with zero biases, the last embedding as one of them; other convolutions torch's own."""
    method = build()
    for name, module in method.named_modules():
        if isinstance(module, nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert 0.85 * bound < float(module.weight.detach().abs().max()) <= bound, name
            assert not module.bias.any(), name
    weight = method.encoder.stages[2].get_parameter("embed.proj.weight").detach()
    bound = (6 / (16 + 12 * 4)) ** 0.5
    assert 0.85 * bound < float(weight.abs().max()) <= bound
    first = method.encoder.stages[0].get_parameter("embed.proj.weight").detach()
    assert float(first.abs().max()) <= 1 / (3 * 4) ** 0.5


@needs_shared("goldens")
def test_decay_as_released() -> None:
    """Which parameters the released pre-training trains and decays: the mask token, too."""
    case = json.loads((SHARED / "goldens" / "layer_decay.json").read_text())["convmae_base_pretrain"]
    method = build(
        "encoder.name=convvit_base",
        "encoder.kwargs={}",
        "data.image_size=64",
        "convmae.mask_patch=16",
        "convmae.decoder_depth=8",
        "convmae.backend=dense",
    )
    groups = param_groups(method, method.config.optim)
    found = {official_convmae_key(name): group["wd_scale"] for group in groups for name in group["names"]}
    assert found == {name: float(decayed) for name, (_, _, decayed) in case["params"].items()}


@pytest.mark.parametrize("size", ["large", "huge"])
def test_the_largest_can_be_built(size: str) -> None:
    """On the meta device: encoder, fusion and decoder of the published size."""
    config: Any = cli.read_config(PROGRAM, f"convmae_{size}", [])
    with torch.device("meta"):
        encoder: Any = build_encoder(
            config.encoder.name, in_chans=3, image_size=(224, 224), drop_path_rate=0.0, kwargs=config.encoder.kwargs
        )
        maps = encoder.maps(torch.empty(2, 3, 224, 224))
    assert [tuple(x.shape[2:]) for x in maps] == [(56, 56), (28, 28), (14, 14)]
    assert config.convmae.mask_patch == [encoder.stride] * 2


# ------------------------------------------------------------------------------------------------------ what is handed on


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_export_is_the_plain_encoder(pool: str, tmp_path: Path) -> None:
    """Fine-tuning loads it strictly with the norm of pre-training, and gives our encoder's features."""
    method = build(f"encoder.kwargs.global_pool={pool}")
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        method(batch(), seeded())["loss"].backward()
        optimizer.step()
    method.eval().export(tmp_path)
    card = json.loads((tmp_path / "encoder.json").read_text())
    assert card["name"] == "convvit_small" and card["method"] == "convmae" and card["untouched"] == ["pos_embed"]
    encoder, data = EncoderConfig(name="", pretrained=str(tmp_path)), FinetuneData(image_size=[H, W])
    encoder.kwargs = {"fc_norm": False}
    weights.resolve(encoder, data)
    model: Any = weights.build(encoder, data, seed=0, num_classes=5).eval()
    x = torch.randn(2, 3, H, W, generator=seeded(5))
    features = model.forward_features(x)
    torch.testing.assert_close(features, method.encoder.forward_features(x), rtol=1e-5, atol=1e-6)
    pooled = features.mean((2, 3)) if pool == "avg" else features[:, :, 0, 0]
    torch.testing.assert_close(model(x), model.head(pooled))
    larger = FinetuneData(image_size=[64, 64])
    grown: Any = weights.build(encoder, larger, seed=0, num_classes=0)
    assert grown.pos_embed.shape == (1, 64, 16) and grown.pos_embed.requires_grad
    state = load_file(tmp_path / "encoder.safetensors")
    assert "norm.weight" in state and not any(name.startswith(("fc_norm", "head")) for name in state)


def test_it_starts_from_given_weights(tmp_path: Path) -> None:
    first = roused(build()).float()
    first.export(tmp_path)
    second = build(f"encoder.pretrained={tmp_path / 'encoder.safetensors'}")
    for name, value in first.encoder.state_dict().items():
        assert torch.equal(second.encoder.state_dict()[name], value), name
    with pytest.raises(ValueError, match="does not fit"):
        load_encoder(build("encoder.kwargs.kernel_size=7").encoder, tmp_path / "encoder.safetensors")


def test_pictures_show_what_was_hidden() -> None:
    for overrides in ((), RANDOM):
        pictures = build(*overrides).eval().pictures(batch(2), seeded())
        assert len(pictures) == 2
        for picture in pictures.values():
            assert picture.shape == (3, 2 * (H + 2) + 2, 3 * (W + 2) + 2)
            assert float(picture.min()) >= 0 and float(picture.max()) <= 1


def test_mixed_precision() -> None:
    """Target and loss in float32; close to float32; gradients everywhere."""
    method = build()
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(batch(), seeded())["loss"]
    assert loss.dtype == torch.float32
    with torch.no_grad():
        assert loss.item() == pytest.approx(method(batch(), seeded())["loss"].item(), rel=2e-2)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in method.parameters() if p.requires_grad)


@pytest.mark.usefixtures("world")
def test_a_run_from_the_command_line(digits: Path, tmp_path: Path) -> None:
    """The loss falls on digits within a few steps, and k-NN loads the encoder."""
    words = [f"data.path={digits / 'train'}", f"output_dir={tmp_path / 'run'}", "train.steps=30", "train.log_steps=1"]
    assert cli.main(PROGRAM, ["digits_convmae", *words, "train.warmup_epochs=0", "train.batch_size=16"]) == 0
    losses = [line["loss"] for line in read_log(tmp_path / "run" / "log.jsonl") if line["event"] == "train"]
    assert sum(losses[-5:]) / 5 < 0.95 * sum(losses[:3]) / 3
    knn = [f"data.path={digits / 'train'}", f"data.val_path={digits / 'val'}", "data.image_size=24", "data.workers=0"]
    knn += ["data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]", "knn.k=[5]", f"encoder.pretrained={tmp_path / 'run'}"]
    assert json.loads((tmp_path / "run/encoder.json").read_text())["kwargs"]["fc_norm"] is False
    assert cli.main(FINETUNE, ["knn", *knn, f"output_dir={tmp_path / 'knn'}"]) == 0


# ---------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("convmae.mask_patch=10",), "does not divide"),
        (("convmae.mask_ratio=0.99",), "leaves 0 of 24 patches visible"),
        (("convmae.mask_patch=4",), "must be a multiple of the stride 8 of convvit_small"),
        (("convmae.mask_patch=4", "convmae.backend=dense"), "must be a multiple of the stride 8 of convvit_small"),
        (("convmae.decoder_heads=3",), "a decoder of width 16 with 3 heads"),
        (("encoder.name=resnet10t", "encoder.kwargs={}"), "resnet10t has no convolution stages before a transformer"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, tuple) else None,
)
def test_misfits_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(*overrides)
