"""FCMAE: what is seen and what is not, the loss, every ablation of the paper, and what is handed on."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from engine import cli
from engine.config import ConfigError, load
from engine.log import read_log
from engine.optim import param_groups
from engine.schema import EncoderConfig
from finetune import weights
from finetune.__main__ import PROGRAM as FINETUNE
from finetune.config import FinetuneData
from models.encoder import load_encoder
from models.grn import GRN, LAYERS
from models.interop import official_fcmae_key
from models.masking import random_mask, upsample
from models.pixels import patchify
from models.sparse import dense
from pretrain.__main__ import PROGRAM
from pretrain.fcmae import FCMAE
from pretrain.methods import SCHEMAS
from tests.pretrain.autoencoders import image_and_mask, roused, seeded
from tests.shared import SHARED, needs_shared

H, W, PATCH = 96, 128, 32
"""Not square; a grid of 3 x 4."""
SMALL = "encoder.kwargs={depths: [1, 1, 2, 1], dims: [8, 12, 12, 16]}"
OS8 = "encoder.kwargs={depths: [1, 1, 2, 1], dims: [8, 12, 12, 16], output_stride: 8}"


def build(*overrides: str) -> FCMAE:
    in_chans = next((int(word.partition("=")[2]) for word in overrides if word.startswith("data.in_chans=")), 3)
    settings = [f"data.image_size=[{H},{W}]", "encoder.name=convnextv2_atto", SMALL, "fcmae.decoder_dim=16"]
    settings += [f"data.mean={[0.4] * in_chans}", f"data.std={[0.25] * in_chans}", "optim.base_lr=1e-3"]
    config: Any = load(SCHEMAS["fcmae"], {"method": "fcmae"}, [*settings, *overrides], "test")
    FCMAE.check(config)
    torch.manual_seed(0)
    return FCMAE(config)


def batch(images: int = 3, in_chans: int = 3, size: tuple[int, int] = (H, W)) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {"image": torch.randint(0, 256, (images, in_chans, *size), dtype=torch.uint8, generator=draw)}


V1 = ("encoder.name=convnext_tiny",)
OTHERS = [("fcmae.grn=" + name,) for name in LAYERS[1:]]
ABLATIONS: list[tuple[str, ...]] = [
    *OTHERS,
    ("fcmae.grn_aggregation=l1",),
    ("fcmae.grn_aggregation=mean",),
    ("fcmae.grn_normalisation=inverse",),
    ("fcmae.grn_normalisation=standardise",),
    ("fcmae.grn_normalisation=none",),
    ("fcmae.grn_residual=false",),
    ("fcmae.grn_scope=batch",),
    ("fcmae.decoder_grn=false",),
    ("fcmae.decoder_depth=2",),
    ("fcmae.norm_target=false",),
    ("fcmae.loss_on=all",),
    ("fcmae.backend=dense",),
    ("fcmae.init=released",),
    ("fcmae.mask_ratio=0.75",),
    V1,
]
OPTIONS: list[tuple[str, ...]] = [
    (),
    *ABLATIONS,
    ("fcmae.backend=masked",),
    ("encoder.name=convnextv2_tiny",),  # linear layers where the small sizes have 1x1 convolutions
    ("encoder.drop_path_rate=0.2",),
    ("encoder.name=test_resnet", "encoder.kwargs={}"),
    ("data.in_chans=1",),
    ("data.in_chans=4",),
    (OS8, "fcmae.mask_patch=[8,16]"),
    (OS8, "fcmae.mask_patch=32"),
    ("fcmae.mask_patch=16", "fcmae.backend=dense"),
]


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("overrides", OPTIONS, ids=lambda words: ",".join(words) or "default")
def test_every_option_trains_what_it_should(overrides: tuple[str, ...]) -> None:
    """An odd batch: a finite loss that falls, and a gradient in every trained parameter of a single step."""
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
    frozen = [name for name, p in method.named_parameters() if not p.requires_grad]
    assert all(name.startswith("encoder.head.") for name in frozen)


@pytest.mark.parametrize("overrides", ABLATIONS, ids=",".join)
def test_every_ablation_changes_what_comes_out(overrides: tuple[str, ...]) -> None:
    """Loss or prediction differ, with every weight that both have being the same."""
    plain, changed = roused(build()), roused(build(*overrides))
    common = {
        k: v for k, v in plain.state_dict().items() if k in (own := changed.state_dict()) and v.shape == own[k].shape
    }
    if overrides not in (("fcmae.init=released",), V1):
        changed.load_state_dict(common, strict=False)
    outcomes = []
    for method in (plain, changed):
        image, mask = image_and_mask(method)
        with torch.no_grad():
            prediction = method.predict(image, mask)
            outcomes.append((prediction, method.loss(prediction, image, mask)))
    (one, loss_one), (other, loss_other) = outcomes
    assert not torch.allclose(loss_one, loss_other, rtol=1e-6) or not torch.allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize(
    "overrides",
    [(), ("fcmae.grn_scope=batch",), V1, ("encoder.name=convnextv2_tiny",), (OS8, "fcmae.mask_patch=[8,16]"), *OTHERS],
    ids=lambda words: ",".join(words) or "default",
)
def test_tiles_equal_masked(overrides: tuple[str, ...]) -> None:
    """Prediction, loss and every gradient in float64 to 1e-9, whatever hidden pixels hold."""
    results = []
    for backend in ("tiles", "masked"):
        method = roused(build(*overrides, f"fcmae.backend={backend}"))
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


@pytest.mark.parametrize("backend", ["tiles", "masked"])
@pytest.mark.parametrize("overrides", [(), V1, ("fcmae.grn=se",)], ids=lambda words: ",".join(words) or "default")
def test_nothing_leaks_through_the_mask(overrides: tuple[str, ...], backend: str) -> None:
    """Features and prediction are the same, to the bit, whatever stands at hidden pixels."""
    method = roused(build(*overrides, f"fcmae.backend={backend}"))
    image, mask = image_and_mask(method)
    hidden = upsample(mask, method.patch).unsqueeze(1).expand_as(image)
    other = torch.where(hidden, 100 * torch.randn_like(image), image)
    assert not torch.equal(other, image)
    assert torch.equal(method.predict(image, mask), method.predict(other, mask))
    seen = torch.where(hidden, image, image + 1)
    assert not torch.allclose(method.predict(image, mask), method.predict(seen, mask))


@pytest.mark.parametrize("backend", ["tiles", "masked"])
def test_images_are_encoded_each_for_itself(backend: str) -> None:
    """With grn_scope=image, image B does not change image A; over the batch, as released, it does."""
    for scope, alone in (("image", True), ("batch", False)):
        method = roused(build(f"fcmae.backend={backend}", f"fcmae.grn_scope={scope}"))
        image, mask = image_and_mask(method, 2)
        features = dense(method.encode(image, mask)[-1])
        single = dense(method.encode(image[:1], mask[:1])[-1])
        difference = ((features[:1] - single).abs().max() / single.abs().max()).item()
        assert (difference < 1e-12) if alone else (difference > 1e-6)


@pytest.mark.parametrize("backend", ["tiles", "masked"])
@pytest.mark.parametrize("overrides", [(), V1], ids=["v2", "v1"])
def test_with_nothing_hidden_it_is_the_plain_network(overrides: tuple[str, ...], backend: str) -> None:
    method = roused(build(*overrides, f"fcmae.backend={backend}"))
    image, mask = image_and_mask(method)
    features = dense(method.encode(image, torch.zeros_like(mask))[-1])
    encoder: Any = method.encoder
    torch.testing.assert_close(features, encoder.forward_features(image), rtol=1e-9, atol=1e-9)


def test_a_fixed_number_is_visible() -> None:
    """int(L (1 - ratio)) as released: 19 of 49 at 0.6, where rounding gives 20."""
    assert [FCMAE.num_visible(49, ratio) for ratio in (0.6, 0.5, 0.75)] == [19, 24, 12]
    mask = build().draw_mask(5, seeded())
    assert mask.shape == (5, 3, 4) and (mask.sum((1, 2)) == 12 - int(12 * 0.4)).all()
    assert len({tuple(row.flatten().tolist()) for row in mask}) > 1


def slow_loss(image: Tensor, prediction: Tensor, mask: Tensor, patch: int) -> float:
    """Patch by patch, as the released code's words: mean over a patch, then over hidden patches of the whole batch."""
    errors = []
    for b, i, j in mask.nonzero().tolist():
        pixels = image[b, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].permute(1, 2, 0).flatten()
        target = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
        errors.append((prediction[b, i * mask.shape[2] + j] - target).square().mean())
    return float(sum(errors) / len(errors))


def test_loss_is_on_hidden_patches_only() -> None:
    method = roused(build())
    image, mask = image_and_mask(method)
    prediction = method.predict(image, mask).detach()
    loss = method.loss(prediction, image, mask)
    assert float(loss) == pytest.approx(slow_loss(image, prediction, mask, PATCH), rel=1e-12)
    elsewhere = prediction + 5 * (~mask.flatten(1)).unsqueeze(-1)
    assert torch.equal(method.loss(elsewhere, image, mask), loss)
    assert method.loss(prediction + 0.1 * mask.flatten(1).unsqueeze(-1), image, mask) != loss


@pytest.mark.parametrize(
    ("stride", "patch", "backend"),
    [(8, (8, 8), "tiles"), (8, (32, 16), "tiles"), (32, (32, 32), "tiles"), (32, (8, 16), "dense")],
)
def test_each_site_predicts_its_own_pixels(stride: int, patch: tuple[int, int], backend: str) -> None:
    """Whatever the mask patch: a decoder that says where it is puts each pixel in its place, (row, column, channel)."""
    method = build(OS8 if stride == 8 else SMALL, f"fcmae.mask_patch={list(patch)}", f"fcmae.backend={backend}")
    picture = torch.arange(3 * H * W, dtype=torch.float32).view(1, 3, H, W)
    cells = patchify(picture, (stride, stride)).view(1, H // stride, W // stride, -1).permute(0, 3, 1, 2)

    class Known(nn.Module):
        def forward(self, features: Tensor, hidden: Tensor) -> Tensor:
            assert features.shape[2:] == hidden.shape[1:] == cells.shape[2:]
            self.hidden = hidden
            return cells

    decoder = Known()
    method.decoder = decoder  # type: ignore[assignment]
    mask = method.draw_mask(1, seeded(4))
    assert torch.equal(method.predict(picture, mask), patchify(picture, patch))
    pixels = upsample(mask, patch)
    whole = pixels.unfold(1, stride, stride).unfold(2, stride, stride).flatten(3).all(-1)
    assert torch.equal(decoder.hidden, whole)


def test_hidden_sites_get_the_mask_token_and_visible_ones_do_not() -> None:
    method = roused(build())
    image, mask = image_and_mask(method)
    seen: list[Tensor] = []
    method.decoder.blocks.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    method.predict(image, mask)
    token = method.decoder.mask_token.view(-1)
    maps = seen[0].permute(0, 2, 3, 1)
    assert (maps[mask] == token).all()
    features = dense(method.encode(image, mask)[-1])
    torch.testing.assert_close(maps[~mask], method.decoder.proj(features).permute(0, 2, 3, 1)[~mask])


SIZES = {
    "atto": 3.71,
    "femto": 5.23,
    "pico": 9.07,
    "nano": 15.62,
    "tiny": 28.64,
    "base": 88.7,
    "large": 198.0,
    "huge": 660.3,
}
"""Million parameters with the 1000-class head (ConvNeXt V2, appendix)."""


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"convnextv2_{size}", num_classes=1000)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(count, 2 if SIZES[size] < 50 else 1) == SIZES[size]


# ------------------------------------------------------------------------------------------------ weights and their decay


def decays(method: FCMAE) -> dict[str, float]:
    groups = param_groups(method, method.config.optim)
    return {name: group["wd_scale"] for group in groups for name in group["names"]}


def test_grn_is_decayed_only_where_asked_for() -> None:
    spared, also = decays(build()), decays(build("fcmae.grn_decay=true"))
    grns = {name for name in spared if ".grn." in name}
    assert len(grns) == 2 * (5 + 1)  # weight and bias of five blocks and the decoder's
    assert {spared[name] for name in grns} == {0.0} and {also[name] for name in grns} == {1.0}
    assert {name: scale for name, scale in spared.items() if name not in grns} == {
        name: scale for name, scale in also.items() if name not in grns
    }


@needs_shared("goldens")
def test_decay_as_released() -> None:
    """Which parameters the released pre-training decays: GRN's, too, and the mask token."""
    case = json.loads((SHARED / "goldens" / "layer_decay.json").read_text())["fcmae_atto_pretrain"]
    method = build("encoder.kwargs={}", "fcmae.decoder_dim=512", "fcmae.grn_decay=true")
    found = {official_fcmae_key(name): scale for name, scale in decays(method).items()}
    assert found == {name: float(decayed) for name, (_, _, decayed) in case["params"].items()}


def test_initial_weights() -> None:
    """Deviation 0.02 by default; as released, most are 1 cut at two, and the decoder's linear layers torch's own."""
    settings = ("encoder.kwargs={depths: [1, 1, 1, 1], dims: [32, 64, 64, 64]}", "fcmae.decoder_dim=64")
    matrices = {name: value.detach() for name, value in build(*settings).named_parameters() if value.ndim > 1}
    for name, value in matrices.items():
        if name != "decoder.mask_token":
            assert float(value.std()) == pytest.approx(0.02, rel=0.15), name
            assert float(value.abs().max()) <= 2.0
    released = build(*settings, "fcmae.init=released")
    for name, parameter in released.named_parameters():
        value = parameter.detach()
        if name.endswith("bias") and not (name.startswith("decoder") and ".mlp.fc" in name):
            assert not value.any(), name
        if value.ndim == 1 or name == "decoder.mask_token":
            continue
        if ".downsample." in name:
            assert float(value.std()) == pytest.approx(0.02, rel=0.15), name
        elif ".mlp.fc" in name and name.startswith("decoder"):
            assert float(value.abs().max()) <= 1 / value[0].numel() ** 0.5, name  # uniform
        else:
            assert float(value.std()) == pytest.approx(0.88, rel=0.1) and float(value.abs().max()) <= 2, name
    assert {name for name, _ in released.named_parameters()} >= set(matrices)


# ------------------------------------------------------------------------------------------------------ what is handed on


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_export_is_plain_timm(scope: str, tmp_path: Path) -> None:
    """timm's own function loads it strictly, and gives our encoder's features, image by image."""
    method = build(f"fcmae.grn_scope={scope}")
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        method(batch(), seeded())["loss"].backward()
        optimizer.step()
    method.eval().export(tmp_path)
    card = json.loads((tmp_path / "encoder.json").read_text())
    assert card["name"] == "convnextv2_atto" and card["method"] == "fcmae"
    model: Any = timm.create_model(
        card["name"], num_classes=0, checkpoint_path=str(tmp_path / "encoder.safetensors"), **card["kwargs"]
    )
    assert any(isinstance(module, GlobalResponseNorm) and bool(module.weight.any()) for module in model.modules())
    state = load_file(tmp_path / "encoder.safetensors")
    assert state.keys() == model.state_dict().keys()
    # The norm before the classifier is not part of pre-training.
    assert state["head.norm.weight"].eq(1).all() and not state["head.norm.bias"].any()
    x = torch.randn(2, 3, H, W, generator=seeded(5))
    encoder: Any = method.encoder
    expected = torch.cat([encoder.forward_features(image) for image in x.split(1)])
    torch.testing.assert_close(model.eval().forward_features(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [*OTHERS, ("fcmae.grn_aggregation=l1",), ("fcmae.grn_normalisation=standardise",), ("fcmae.grn_residual=false",)],
    ids=",".join,
)
def test_another_form_of_grn_is_fine_tuned_as_it_was_trained(overrides: tuple[str, ...], tmp_path: Path) -> None:
    """The card beside the weights names a network of the same function; the plain one is refused."""
    method = roused(build(*overrides)).float().eval()
    method.export(tmp_path)
    encoder, data = EncoderConfig(name="", pretrained=str(tmp_path)), FinetuneData(image_size=[H, W])
    weights.resolve(encoder, data)
    assert encoder.name == ("convnextv2_atto" if overrides == ("fcmae.grn=none",) else "convnextv2_ablation")
    model: Any = weights.build(encoder, data, seed=0, num_classes=0).eval()
    x = torch.randn(2, 3, H, W, generator=seeded(5))
    own: Any = method.encoder
    torch.testing.assert_close(model.forward_features(x), own.forward_features(x), rtol=1e-5, atol=1e-6)
    plain = EncoderConfig(name="convnextv2_atto", pretrained=str(tmp_path), kwargs=method.config.encoder.kwargs)
    with pytest.raises(ConfigError, match="was made with"):
        weights.resolve(plain, data)


def test_it_starts_from_given_weights(tmp_path: Path) -> None:
    first = roused(build()).float()
    first.export(tmp_path)
    second = build(f"encoder.pretrained={tmp_path / 'encoder.safetensors'}", "fcmae.init=released")
    for name, value in first.encoder.state_dict().items():
        assert torch.equal(second.encoder.state_dict()[name], value), name
    with pytest.raises(ValueError, match="does not fit"):
        load_encoder(build(*V1).encoder, tmp_path / "encoder.safetensors")


# ------------------------------------------------------------------------------------------------- evaluation and pictures


def test_report_counts_each_image_once_over_any_split() -> None:
    """Masks follow from an image's number: the sums of two processes with uneven batches make the report of one."""
    method = build().eval()
    image, index = batch(5)["image"], torch.tensor([11, 3, 8, 0, 7])
    together = method.report(method.evaluate([{"image": image, "index": index}]))
    parts = [
        method.evaluate([{"image": image[:1], "index": index[:1]}]),
        method.evaluate([{"image": image[at], "index": index[at]} for at in (slice(1, 3), slice(3, 5))]),
    ]
    assert method.report([a + b for a, b in zip(*parts, strict=True)]) == pytest.approx(together)
    assert method.report(method.evaluate([{"image": image, "index": index}])) == together
    assert len(method.evaluate([])) == 3  # a process without a batch adds nothing
    unnumbered = method.report(method.evaluate([{"image": image}]))
    assert unnumbered["reconstruction_loss"] == pytest.approx(together["reconstruction_loss"], rel=0.1)


@pytest.mark.parametrize("normalised", ["true", "false"])
def test_reconstruction_error_is_of_hidden_pixels(normalised: str) -> None:
    """In [0, 1], with the target's normalisation undone: the same scale for every mask patch and target."""
    method = build(f"fcmae.norm_target={normalised}").eval()
    image, index = batch(2)["image"], torch.tensor([4, 5])
    report = method.report(method.evaluate([{"image": image, "index": index}]))
    unit = image.float() / 255
    x = (unit - 0.4) / 0.25
    masks = torch.cat([random_mask(1, (3, 4), 8, seeded(n)) for n in (4, 5)])
    with torch.no_grad():
        prediction = method.predict(x, masks)
    errors = []
    for b, i, j in masks.nonzero().tolist():
        rows, columns = slice(i * PATCH, (i + 1) * PATCH), slice(j * PATCH, (j + 1) * PATCH)
        true = x[b, :, rows, columns].permute(1, 2, 0).flatten()
        guess = prediction[b, i * 4 + j]
        if normalised == "true":
            guess = guess * (true.var() + 1e-6).sqrt() + true.mean()
        errors.append((((guess - true) * 0.25) ** 2).mean())
    assert report["reconstruction_mse"] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)


def test_pictures_show_what_was_hidden() -> None:
    method = build().eval()
    pictures = method.pictures(batch(2), seeded())
    assert set(pictures) == {
        "original_masked_reconstruction_with_target_statistics",
        "original_masked_reconstruction_without_target_statistics",
    }
    for picture in pictures.values():
        assert picture.shape == (3, 2 * (H + 2) + 2, 3 * (W + 2) + 2)
        assert float(picture.min()) >= 0 and float(picture.max()) <= 1


def test_norms_and_loss_are_in_float32_in_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    method = build()
    seen: list[torch.dtype] = []
    for module in method.modules():
        if isinstance(module, GRN):
            module.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].dtype))
    responses: list[torch.dtype] = []
    original = GRN.response

    def watched(self: GRN, x: Tensor) -> Tensor:
        responses.append(x.dtype)
        return original(self, x)

    monkeypatch.setattr(GRN, "response", watched)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(batch(), seeded())["loss"]
    assert torch.bfloat16 in seen and set(responses) == {torch.float32} and len(responses) == 6
    assert loss.dtype == torch.float32
    with torch.no_grad():
        assert loss.item() == pytest.approx(method(batch(), seeded())["loss"].item(), rel=2e-2)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in method.parameters() if p.requires_grad)


# ---------------------------------------------------------------------------------------------------------- as it is started


@pytest.mark.usefixtures("world")
def test_a_run_from_the_command_line(digits: Path, tmp_path: Path) -> None:
    """Pictures at start and end, an evaluation on the images named for it, and an encoder that k-NN can load."""
    small = ["encoder.kwargs={depths: [1, 1, 1, 1], dims: [8, 12, 12, 16], output_stride: 8}", "fcmae.decoder_dim=8"]
    steps = ["train.steps=3", "train.warmup_epochs=0", "train.batch_size=8"]
    found = []
    for name, val in (("own", f"data.val_path={digits / 'val' / '3'}"), ("part", "")):
        words = [f"data.path={digits / 'train'}", f"output_dir={tmp_path / name}", *([val] if val else [])]
        assert cli.main(PROGRAM, ["digits_fcmae", *small, *steps, *words]) == 0
        found.append(json.loads((tmp_path / name / "results.json").read_text())[0])
    own, part = found
    assert own["task"] == "pretrain" and own["steps"] == 3
    assert 0 < own["reconstruction_mse"] < 1 and own["reconstruction_mse"] != part["reconstruction_mse"]
    assert len(list((tmp_path / "own" / "pictures").glob("*_with_target_statistics_step*.png"))) == 2
    losses = [line["loss"] for line in read_log(tmp_path / "own" / "log.jsonl") if line["event"] == "train"]
    assert losses == [line["loss"] for line in read_log(tmp_path / "part" / "log.jsonl") if line["event"] == "train"]
    knn = [f"data.path={digits / 'train'}", f"data.val_path={digits / 'val'}", "data.image_size=48", "data.workers=0"]
    knn += ["data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]", "knn.k=[5]", f"encoder.pretrained={tmp_path / 'own'}"]
    assert cli.main(FINETUNE, ["knn", *knn, f"output_dir={tmp_path / 'knn'}"]) == 0


def test_images_to_evaluate_on_are_refused_where_nothing_is_evaluated(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["digits_cim", f"data.path={tmp_path}", f"data.val_path={tmp_path}", f"cim.tokenizer={tokenizer}"]
    assert cli.main(PROGRAM, words) == 2
    assert "data.val_path has no effect on cim" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("fcmae.mask_patch=40",), "does not divide"),
        (("fcmae.mask_ratio=0.99",), "leaves 0 of 12 patches visible"),
        (("fcmae.mask_patch=16",), "must be a multiple of the network's stride"),
        (("fcmae.grn=bn", "fcmae.grn_residual=false"), "residual: a choice about GRN, which layer='bn' replaces"),
        (("encoder.name=convnext_tiny", "fcmae.grn_scope=batch"), "which convnext_tiny does not have"),
        (("encoder.name=convnext_tiny", "fcmae.grn=none"), "which convnext_tiny does not have"),
        (("encoder.name=convnext_tiny", "fcmae.decoder_grn=false", "fcmae.grn_decay=true"), "nothing here has GRN"),
        (("encoder.name=test_resnet", "encoder.kwargs={}", "fcmae.init=released"), "is ConvNeXt's, not ResNet's"),
        (
            ("fcmae.backend=dense", "fcmae.mask_patch=[24,32]", "data.image_size=[96,128]"),
            "one of stride and patch must",
        ),
        (("fcmae.backend=dense", "fcmae.mask_patch=8", "data.image_size=[104,128]"), "and the stride the image"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, tuple) else None,
)
def test_misfits_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(*overrides)
