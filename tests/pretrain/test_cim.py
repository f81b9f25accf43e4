"""CIM: what is hidden, what is replaced, where gradients go, and every option of the paper."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import ConfigError, load
from models.dvae import DVAE, save_tokenizer
from models.encoder import load_encoder, spatial_features
from models.pixels import normalise, to_unit
from pretrain.cim import CIM, sample_tokens
from pretrain.methods import SCHEMAS
from tests.models.published import publish

H, W, PATCH = 32, 48, 8
"""Not square; a grid of 4 x 6 tokens."""


def config(tokenizer: Path, *overrides: str) -> Any:
    settings = [f"cim.tokenizer={tokenizer}", f"data.image_size=[{H},{W}]", f"cim.patch_size={PATCH}", "optim.lr=1e-3"]
    settings += ["data.mean=[0.5,0.4,0.3]", "data.std=[0.2,0.25,0.3]", "cim.num_masked=0.5", "cim.target_window=4"]
    settings += [
        "encoder.name=test_vit",
        f"encoder.kwargs={{patch_size: {PATCH}, embed_dim: 32, num_heads: 2, depth: 3}}",
    ]
    settings += ["cim.generator_dim=32", "cim.generator_heads=2", "cim.generator_depth=2", "cim.shared_blocks=1"]
    return load(SCHEMAS["cim"], {"method": "cim"}, [*settings, *overrides], "test")


def build(tokenizer: Path, *overrides: str) -> CIM:
    settings = config(tokenizer, *overrides)
    CIM.check(settings)
    torch.manual_seed(0)
    return CIM(settings)


def batch(images: int = 3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (images, 3, H, W), dtype=torch.uint8, generator=draw)
    token_image = F.avg_pool2d(image.float(), 2).to(torch.uint8)  # 4 px a token
    return {"image": image, "token_image": token_image}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


UNSHARED = "cim.shared_blocks=-1"
RESNET = ("encoder.name=test_resnet", "encoder.kwargs={}", UNSHARED)
OPTIONS = [
    (),
    ("cim.target=non_overlapping",),
    ("cim.target=none",),
    ("cim.target_per_channel=true",),
    ("cim.objective=revdet",),
    ("cim.masking=blockwise",),
    ("cim.num_masked=[5,9]",),
    ("cim.num_masked=7",),
    ("cim.sampling=argmax",),
    ("cim.sampling=uniform",),
    ("cim.corruption=erase",),
    ("cim.corruption=erase", "cim.objective=revdet"),
    ("cim.generator_depth=1", "cim.shared_blocks=0"),
    ("cim.generator_init_values=0.1", UNSHARED, "cim.generator_dim=16"),
    (*RESNET, f"data.image_size=[{2 * H},{2 * W}]", "cim.patch_size=16"),  # stride 32: 2 x 2 tokens a cell
    (*RESNET, f"data.image_size=[{2 * H},{2 * W}]", "cim.patch_size=16", "cim.objective=revdet"),
    (
        "encoder.kwargs={patch_size: 4, embed_dim: 32, num_heads: 2, depth: 1}",
        UNSHARED,
        "cim.objective=revdet",
    ),  # finer
    ("encoder.kwargs={patch_size: 4, embed_dim: 32, num_heads: 2, depth: 1}", UNSHARED),
]


@pytest.mark.parametrize("overrides", OPTIONS, ids=lambda words: ",".join(words) or "default")
def test_every_option_trains_what_it_should(tokenizer: Path, overrides: tuple[str, ...]) -> None:
    """A finite loss that falls on one batch, and a gradient in every parameter of a single step."""
    method = build(tokenizer, *overrides)
    size = tuple(method.config.data.image_size)
    images = batch()
    if size != (H, W):
        images = {
            "image": F.interpolate(images["image"].float(), size).to(torch.uint8),
            "token_image": images["token_image"],
        }
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-3)
    losses = []
    for _ in range(6):
        output = method(images, seeded())
        assert all(value.ndim == 0 and value.isfinite() for value in output.values())
        optimizer.zero_grad()
        output["loss"].backward()
        missing = [name for name, p in method.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not missing
        optimizer.step()
        losses.append(float(output["loss"]))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("objective", ["respix", "revdet"])
@pytest.mark.parametrize("shared", [-1, 1])
def test_the_enhancers_loss_does_not_reach_the_generator(tokenizer: Path, objective: str, shared: int) -> None:
    """Only parameters that the enhancer itself uses learn from it (section 3.1: no gradient through the sampling)."""
    method = build(tokenizer, f"cim.objective={objective}", f"cim.shared_blocks={shared}")
    images = batch()
    image = normalise(to_unit(images["image"]), method.config.data.mean, method.config.data.std)
    mask = method.draw_mask(len(image), seeded())
    corrupted, replaced, _ = method.corrupt(image, images["token_image"], mask, seeded())
    assert not corrupted.requires_grad
    method.enhancer_loss(method.enhance(corrupted), image, replaced).backward()
    own = {id(p) for p in method.encoder.parameters()} | {id(p) for p in method.head.parameters()}
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in own), name
    generator_only = [p for p in method.generator.parameters() if id(p) not in own]
    assert generator_only
    assert (len(generator_only) < len(list(method.generator.parameters()))) == (shared >= 0)


def test_tokenizer_is_no_part_of_the_run_and_never_changes(tokenizer: Path) -> None:
    method = build(tokenizer)
    before = {key: value.clone() for key, value in method.tokenizer._dvae.state_dict().items()}  # type: ignore[union-attr]
    owned = {id(p) for p in method.parameters()} | {id(b) for b in method.buffers()}
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        method.train()(batch(), seeded())["loss"].backward()
        optimizer.step()
    for key, value in method.tokenizer._dvae.state_dict(keep_vars=True).items():  # type: ignore[union-attr]
        assert torch.equal(value, before[key])
        assert id(value) not in owned
        assert not value.requires_grad
    assert not any("tokenizer" in key or "dvae" in key for key in method.state_dict())


def test_visible_tokens_stay_golden_and_the_rest_is_painted(tokenizer: Path) -> None:
    method, images = build(tokenizer), batch()
    image = normalise(to_unit(images["image"]), method.config.data.mean, method.config.data.std)
    mask = method.draw_mask(3, seeded())
    assert mask.shape == (3, 4, 6)
    assert (mask.sum((1, 2)) == 12).all()
    _, replaced, scalars = method.corrupt(image, images["token_image"], mask, seeded())
    assert not (replaced & ~mask).any()
    assert replaced.any()
    # With nothing hidden but one token, everything else is the tokenizer's own reconstruction.
    golden = method.tokenizer.tokens(to_unit(images["token_image"]))  # type: ignore[union-attr]
    painted = F.interpolate(method.tokenizer.paint(golden), (H, W), mode="bicubic", antialias=True).clamp(0, 1)  # type: ignore[union-attr]
    expected = normalise(painted, method.config.data.mean, method.config.data.std)
    one = torch.zeros_like(mask)
    one[:, 0, 0] = True
    almost, _, _ = method.corrupt(image, images["token_image"], one, seeded())
    torch.testing.assert_close(almost[:, :, -8:, -8:], expected[:, :, -8:, -8:])
    assert scalars["generator_loss"] > 0


def test_generator_does_not_see_what_is_hidden(tokenizer: Path) -> None:
    """Changing pixels under the mask changes no prediction."""
    method = build(tokenizer)
    image = torch.randn(2, 3, H, W, generator=seeded())
    mask = method.draw_mask(2, seeded())
    hidden = mask.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2).unsqueeze(1)
    other = torch.where(hidden, torch.randn(2, 3, H, W, generator=seeded(5)), image)
    assert torch.equal(method.generator(image, mask), method.generator(other, mask))


def test_respix_loss_against_its_formula(tokenizer: Path) -> None:
    """With a head of zeros the loss is mean |target| + mean target^2, times 10, plus the generator's."""
    method, images = build(tokenizer), batch()
    torch.nn.init.zeros_(method.head.get_parameter("weight"))
    output = method(images, seeded())
    image = normalise(to_unit(images["image"]), method.config.data.mean, method.config.data.std)
    padded = F.pad(image, (2, 1, 2, 1), mode="reflect")
    target = torch.empty_like(image)
    for i in range(H):
        for j in range(W):
            window = padded[:, :, i : i + 4, j : j + 4].flatten(1)
            scale = (window.var(dim=1) + 1e-6).sqrt().view(-1, 1)
            target[:, :, i, j] = (image[:, :, i, j] - window.mean(1, keepdim=True)) / scale
    expected = target.abs().mean() + target.square().mean()
    torch.testing.assert_close(output["respix_loss"], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(output["loss"], 10 * expected + output["generator_loss"])
    weighted = build(tokenizer, "cim.enhancer_weight=2.5")
    torch.nn.init.zeros_(weighted.head.get_parameter("weight"))
    torch.testing.assert_close(weighted(images, seeded())["loss"], 2.5 * expected + output["generator_loss"])


def test_revdet_loss_against_its_formula_and_label(tokenizer: Path) -> None:
    method, images = build(tokenizer, "cim.objective=revdet"), batch()
    torch.nn.init.zeros_(method.head.get_parameter("weight"))
    torch.nn.init.constant_(method.head.get_parameter("bias"), 1.0)
    output = method(images, seeded())
    share, p = output["replaced"], torch.tensor(1.0).sigmoid()
    expected = -(share * p.log() + (1 - share) * (1 - p).log())
    torch.testing.assert_close(output["revdet_loss"], expected)
    torch.testing.assert_close(output["loss"], expected + output["generator_loss"])


def test_a_coarse_enhancer_predicts_its_cell_in_row_order(tokenizer: Path) -> None:
    """A stride of 32 over patches of 16: 2 x 2 tokens a cell; the same order for pixels."""
    size = f"data.image_size=[{2 * H},{2 * W}]"
    method = build(tokenizer, *RESNET, size, "cim.patch_size=16", "cim.objective=revdet")
    torch.nn.init.zeros_(method.head.get_parameter("weight"))
    method.head.get_parameter("bias").data = torch.arange(4.0)
    logits = method.enhance(torch.zeros(1, 3, 2 * H, 2 * W))
    assert logits.shape == (1, 1, 4, 6)
    assert torch.equal(logits[0, 0, :2, :2], torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    assert torch.equal(logits[0, 0], logits[0, 0, :2, :2].repeat(2, 3))
    pixels = build(tokenizer, *RESNET, size, "cim.patch_size=16")
    torch.nn.init.zeros_(pixels.head.get_parameter("weight"))
    pixels.head.get_parameter("bias").data = torch.arange(32.0 * 32 * 3)
    picture = pixels.enhance(torch.zeros(1, 3, 2 * H, 2 * W))
    assert picture.shape == (1, 3, 2 * H, 2 * W)
    assert picture[0, 2, 5, 7] == (5 * 32 + 7) * 3 + 2


def test_sampling_follows_the_softmax() -> None:
    """20,000 draws against the float64 probabilities, within five standard errors; the ablations against theirs."""
    logits = torch.tensor([[2.0, 0.0, -1.0, 0.5]])
    rows = logits.expand(20_000, -1)
    probabilities = logits.double().softmax(-1)[0]
    for how, expected in (("softmax", probabilities), ("uniform", torch.full((4,), 0.25, dtype=torch.float64))):
        counts = torch.bincount(sample_tokens(rows, how, seeded()), minlength=4).double() / 20_000
        assert ((counts - expected).abs() < 5 * (expected * (1 - expected) / 20_000).sqrt()).all(), how
    assert (sample_tokens(rows, "argmax") == 0).all()
    half = sample_tokens(rows.bfloat16(), "softmax", seeded())
    assert torch.equal(half, sample_tokens(rows.bfloat16().float(), "softmax", seeded()))


def test_a_step_repeats_under_the_same_seed(tokenizer: Path) -> None:
    method = build(tokenizer).eval()
    first, again, other = (method(batch(), seeded(seed))["loss"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("overrides", [(), ("cim.objective=revdet",), ("cim.corruption=erase",), ("cim.target=none",)])
def test_pictures_show_the_original_first(tokenizer: Path, overrides: tuple[str, ...]) -> None:
    method, images = build(tokenizer, *overrides).eval(), batch()
    (name, picture), *rest = method.pictures(images, seeded()).items()
    assert not rest
    assert picture.shape == (3, 3 * (H + 2) + 2, 4 * (W + 2) + 2)
    assert picture.min() >= 0 and picture.max() <= 1
    torch.testing.assert_close(picture[:, 2 : 2 + H, 2 : 2 + W], to_unit(images["image"])[0])
    # Half of the second column is grey, and says which half.
    masked = picture[:, 2 : 2 + H, 4 + W : 4 + 2 * W]
    assert ((masked == 0.5).all(0).float().mean() - 0.5).abs() < 0.01
    assert name.startswith("original_masked_corrupted")
    assert ("statistics" in name) == (method.cim.objective == "respix" and method.cim.target != "none")


def test_exported_encoder_is_plain_timm(tokenizer: Path, tmp_path: Path) -> None:
    method = build(tokenizer).eval()
    method.export(tmp_path)
    kwargs: Any = dict(patch_size=PATCH, embed_dim=32, num_heads=2, depth=3, img_size=(H, W))
    encoder = timm.create_model("test_vit", num_classes=0, **kwargs).eval()
    assert load_encoder(encoder, tmp_path / "encoder.safetensors") == []
    x = torch.randn(2, 3, H, W)
    assert torch.equal(spatial_features(encoder, x), spatial_features(method.encoder, x))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("cim.tokenizer=",), "cim.tokenizer is required"),
        (("cim.patch_size=7",), "does not divide"),
        (("cim.num_masked=[100,120]",), "a share below 1"),
        (("cim.num_masked=[9,5]",), "rising range"),
        (("cim.num_masked=0.01",), "hides no patch"),
        (("cim.num_masked=[0.5,1]",), "rising range"),
        (("cim.target_window=64",), "does not fit"),
        (("cim.target_window=5", "cim.target=non_overlapping"), "does not fit"),
        (("cim.shared_blocks=3",), "exceeds"),
        (("cim.generator_heads=5",), "does not divide"),
        (("cim.target_per_channel=true", "cim.target=none"), "no effect"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_built(
    tokenizer: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        CIM.check(config(tokenizer, *overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("encoder.name=test_resnet", "encoder.kwargs={}"), "cim.shared_blocks=-1"),
        (("cim.generator_dim=64",), "cim.generator_dim=32"),
        (("cim.generator_depth=9", "cim.shared_blocks=4"), "the enhancer has 3 blocks"),
        (("data.in_chans=1", "data.mean=[0.5]", "data.std=[0.5]"), "tokenizer has 3 channels"),
        (
            ("encoder.kwargs={patch_size: 6, embed_dim: 32}", "data.image_size=24", UNSHARED),
            "one must divide the other",
        ),
    ],
)
def test_networks_that_do_not_fit_say_what_to_do(tokenizer: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(tokenizer, *overrides)


@pytest.mark.parametrize("shared", [-1, 1])
def test_it_starts_from_timms_own_weights(
    tokenizer: Path, shared: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The enhancer's; of the generator only what it shares."""
    published = publish("test_vit", tmp_path, monkeypatch)
    words = [f"cim.shared_blocks={shared}", "cim.generator_dim=64", "cim.patch_size=16", "encoder.kwargs={}"]
    words += ["data.image_size=[64,96]"]
    method = build(tokenizer, *words, "encoder.pretrained=true")
    own = method.encoder.state_dict()
    assert own["pos_embed"].shape[1] == 1 + 4 * 6  # timm's is of 10 x 10 patches
    assert all(torch.equal(value, published[key]) for key, value in own.items() if key != "pos_embed")
    mine = method.generator.state_dict()
    assert torch.equal(mine["patch_embed.proj.weight"], own["patch_embed.proj.weight"]) == (shared == 1)
    scratch = build(tokenizer, *words).head.state_dict()
    assert torch.equal(scratch["weight"], method.head.state_dict()["weight"])
    with pytest.raises(ConfigError, match="has no weights of 'beit_nothing'"):
        CIM.check(config(tokenizer, "encoder.name=beit_nothing", "encoder.pretrained=true"))


def test_other_channel_counts(tmp_path: Path) -> None:
    """Two channels from the images to the loss."""
    path = tmp_path / "tokenizer.safetensors"
    save_tokenizer(DVAE(vocab_size=5, width=8, blocks_per_group=1, groups=3, in_chans=2, decoder_init_width=8), path)
    method = build(path, "data.in_chans=2", "data.mean=[0.5,0.5]", "data.std=[0.5,0.5]")
    images = {key: value[:, :2] for key, value in batch().items()}
    method(images, seeded())["loss"].backward()
    assert method.pictures(images, seeded())


def test_what_pre_training_does_not_use_is_left_alone(tokenizer: Path, tmp_path: Path) -> None:
    """DeepSpeed gives unused parameters a gradient of zero, with which they would decay."""
    method = build(tokenizer, "encoder.name=mobilenetv3_small_050", "encoder.kwargs={}", UNSHARED, "data.image_size=64")
    frozen = {name for name, p in method.encoder.named_parameters() if not p.requires_grad}
    assert frozen == {"conv_head.weight", "conv_head.bias"}
    assert all(p.requires_grad for name, p in build(tokenizer).named_parameters()), "a ViT uses all it has"
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=0.1)
    before = method.encoder.conv_head.weight.clone()
    images = {"image": torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "token_image": torch.zeros(2, 3, 32, 32)}
    method(images, seeded())["loss"].backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    optimizer.step()
    assert torch.equal(method.encoder.conv_head.weight, before)
