"""SparK: what is seen and what is not, the loss, every ablation of the paper, the optimiser, and what is handed on."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.optim import Lamb
from torch import Tensor, nn

from engine.config import ConfigError, load
from engine.log import read_log
from engine.loop import Hooks, fit
from engine.optim import param_groups
from engine.schedule import Plan
from engine.world import World, seed_step
from models.encoder import spatial_features, stage_features
from models.interop import convert_spark
from models.masking import upsample
from models.pixels import unpatchify
from models.sparse import dense
from pretrain.methods import SCHEMAS
from pretrain.spark import SparK
from tests.models.slow_spark import (
    SlowSparK,
    convnext_shapes,
    filled,
    keys_of,
    resnet_shapes,
    slow_loss,
    spark_shapes,
)
from tests.parity import fill
from tests.parity.__main__ import main as parity
from tests.pretrain.autoencoders import image_and_mask, roused, seeded

H, W = 64, 96
"""Not square; a grid of 2 x 3 patches of 32, or 8 x 12 of 8."""
SMALL = "encoder.kwargs={layers: [1, 1, 1, 1], channels: [8, 12, 12, 16]}"
CONVNEXT = (
    "encoder.name=convnext_tiny",
    "encoder.kwargs={depths: [1, 1, 2, 1], dims: [8, 12, 12, 16]}",
    "spark.densify_norm=layer",
)


def config(*overrides: str) -> Any:
    in_chans = next((int(word.partition("=")[2]) for word in overrides if word.startswith("data.in_chans=")), 3)
    settings = [f"data.image_size=[{H},{W}]", "encoder.name=resnet18", SMALL, "spark.decoder_dim=64", "optim.lr=1e-3"]
    settings += [f"data.mean={[0.4] * in_chans}", f"data.std={[0.25] * in_chans}"]
    return load(SCHEMAS["spark"], {"method": "spark"}, [*settings, *overrides], "test")


def build(*overrides: str) -> SparK:
    settings = config(*overrides)
    SparK.check(settings)
    torch.manual_seed(0)
    return SparK(settings)


def batch(method: SparK, images: int = 3) -> dict[str, Tensor]:
    data = method.config.data
    image = torch.randint(0, 256, (images, data.in_chans, *data.image_size), dtype=torch.uint8, generator=seeded(1))
    return {"image": image}


def hidden_pixels(method: SparK, mask: Tensor) -> Tensor:
    return upsample(mask, method.patch).unsqueeze(1)


ABLATIONS: list[tuple[str, ...]] = [  # table 5
    ("spark.backend=dense",),
    ("spark.hierarchy=false",),
    ("spark.pos_embed=true",),
    ("spark.loss_on=all",),
]
STRIDE_8 = "encoder.kwargs={layers: [1, 1, 1, 1], channels: [8, 12, 12, 16], output_stride: 8}"
OPTIONS: list[tuple[str, ...]] = [
    (),
    *ABLATIONS,
    ("spark.backend=masked",),
    ("spark.num_stages=2",),
    ("spark.num_stages=5",),  # down to the stem
    ("spark.densify_norm=layer",),
    ("spark.densify_norm=none",),
    ("spark.norm_target=false",),
    ("spark.mask_ratio=0.8",),
    ("spark.decoder_dim=33",),
    ("spark.mask_patch=[32,96]", "spark.mask_ratio=0.5"),  # not square
    ("encoder.drop_path_rate=0.2",),
    CONVNEXT,
    (*CONVNEXT, "spark.hierarchy=false"),
    ("data.in_chans=1",),
    ("data.in_chans=4",),
    (STRIDE_8, "spark.mask_patch=8"),  # scales of equal strides
    (STRIDE_8, "spark.mask_patch=16"),  # a patch of several sites at every scale
    (
        "encoder.name=convnext_tiny",
        "encoder.kwargs={depths: [1, 1, 1, 1], dims: [8, 8, 8, 8], patch_size: 3}",
        "data.image_size=[48,72]",
        "spark.mask_patch=24",
        "spark.densify_norm=layer",
    ),  # strides 24, 12, 6, 3
    ("encoder.name=test_efficientnet", "encoder.kwargs={}"),  # squeeze and excite
]


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("overrides", OPTIONS, ids=lambda words: ",".join(words) or "default")
def test_every_option_trains_what_it_should(overrides: tuple[str, ...]) -> None:
    """An odd batch: a finite loss that falls, and a gradient in every trained parameter of a single step."""
    method = build(*overrides)
    images = batch(method)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(5):
        output = method(images, seeded())
        assert set(output) == {"loss"} and output["loss"].ndim == 0 and output["loss"].isfinite()
        optimizer.zero_grad()
        output["loss"].backward()
        trained = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
        assert not [name for name, grad in trained.items() if grad is None or not grad.isfinite().all()]
        optimizer.step()
        losses.append(float(output["loss"].detach()))
    assert losses[-1] < losses[0]
    # What comes after the last scale keeps its initial value: ConvNeXt's last norm, EfficientNet's last convolution.
    kind = method.config.encoder.name.rpartition("_")[2 if "efficientnet" in str(overrides) else 0]
    heads = {
        "convnext": ["head.norm.weight", "head.norm.bias"],
        "efficientnet": ["conv_head.weight", "bn2.weight", "bn2.bias"],
    }
    frozen = {name for name, p in method.named_parameters() if not p.requires_grad}
    assert frozen == {f"encoder.{name}" for name in heads.get(kind, [])}


@pytest.mark.parametrize("overrides", [(), *ABLATIONS[:3], ("spark.backend=masked",), CONVNEXT], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_hidden_pixels_change_nothing_but_the_target(overrides: tuple[str, ...], training: bool) -> None:
    method = roused(build(*overrides)).train(training)
    image, mask = image_and_mask(method)
    hidden = hidden_pixels(method, mask)
    other = torch.where(hidden, torch.randn(image.shape, generator=seeded(5), dtype=torch.float64), image)
    with torch.no_grad():
        first, second = method.predict(image, mask), method.predict(other, mask)
        assert torch.equal(first, second)
        assert not torch.equal(method.loss(first, image, mask), method.loss(second, other, mask))
        seen = torch.where(hidden, image, image + 1)
        assert not torch.equal(method.predict(seen, mask), first)


@pytest.mark.parametrize("loss_on", ["masked", "all"])
def test_only_hidden_patches_count_unless_all_do(loss_on: str) -> None:
    method = build(f"spark.loss_on={loss_on}")
    image, mask = image_and_mask(method)
    prediction = torch.randn(3, 6, 32 * 32 * 3, generator=seeded(4), dtype=torch.float64, requires_grad=True)
    loss = method.loss(prediction, image, mask)
    loss.backward()
    assert prediction.grad is not None
    counted = prediction.grad.abs().sum(-1) > 0
    assert torch.equal(counted, mask.flatten(1) if loss_on == "masked" else torch.ones_like(counted))
    if loss_on == "masked":
        assert float(loss.detach()) == pytest.approx(float(slow_loss(prediction, image, mask).detach()), rel=1e-12)


def test_visible_patches_are_rounded_as_released() -> None:
    """20 of 49 at 0.6, where FCMAE and ConvMAE round down to 19."""
    assert SparK.num_visible(49, 0.6) == 20
    assert SparK.num_visible(144, 0.75) == 36
    method = build("spark.mask_patch=32", "data.image_size=224")
    assert (~method.draw_mask(2, seeded())).flatten(1).sum(1).tolist() == [20, 20]


@pytest.mark.parametrize(
    "overrides",
    [(), CONVNEXT, ("spark.pos_embed=true",), ("spark.hierarchy=false",), (STRIDE_8, "spark.mask_patch=16")],
    ids=lambda words: ",".join(words) or "default",
)
def test_tiles_and_masked_agree(overrides: tuple[str, ...]) -> None:
    """Prediction, loss, every gradient and running statistic, in float64."""
    found = {}
    for backend in ("tiles", "masked"):
        method = roused(build(*overrides, f"spark.backend={backend}"))
        image, mask = image_and_mask(method)
        prediction = method.predict(image, mask)
        loss = method.loss(prediction, image, mask)
        loss.backward()
        grads = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
        found[backend] = {"prediction": prediction, "loss": loss, **grads, **dict(method.named_buffers())}
    largest = max(float(value.abs().max()) for name, value in found["masked"].items() if name in grads)
    assert found["tiles"].keys() == found["masked"].keys()
    for name, value in found["tiles"].items():
        torch.testing.assert_close(value, found["masked"][name], rtol=1e-9, atol=1e-9 * largest, msg=name)


def test_zero_outing_differs_in_the_encoder_only() -> None:
    """With backend=dense the encoder looks through the mask at zeros; what it makes of hidden sites is not decoded."""
    methods = {backend: roused(build(f"spark.backend={backend}")).eval() for backend in ("masked", "dense")}
    image, mask = image_and_mask(methods["dense"])
    with torch.no_grad():
        maps = {backend: method.encode(image, mask) for backend, method in methods.items()}
        assert type(maps["dense"][0]) is Tensor
        erased = image.masked_fill(hidden_pixels(methods["dense"], mask), 0.0)
        plain = stage_features(methods["dense"].encoder, erased, 4)
        for found, expected, sparse in zip(maps["dense"], plain, maps["masked"], strict=True):
            assert torch.equal(found, expected)
            assert not torch.allclose(found, dense(sparse))
        # The same features at visible sites would give the same pixels, whatever stands at hidden ones.
        methods["dense"].encode = lambda image, mask: [dense(found) + 1e3 * hidden for found, hidden in hidden_maps]  # type: ignore[method-assign]
        hidden_maps = [
            (found, upsample(mask, (side // 2, side // 2)).unsqueeze(1))
            for found, side in zip(maps["masked"], (16, 8, 4, 2), strict=True)
        ]
        expected = methods["masked"].predict(image, mask)
        torch.testing.assert_close(methods["dense"].predict(image, mask), expected, rtol=1e-12, atol=1e-12)


def test_hierarchy_is_one_switch() -> None:
    """Without it the coarsest map alone is decoded, by as many blocks."""
    whole, single = build(), build("spark.hierarchy=false")
    assert [len(list(stage.children())) for stage in whole.decoder.stages] == [1, 1, 1, 2]
    assert [len(list(stage.children())) for stage in single.decoder.stages] == [5]
    assert (len(whole.densify), len(single.densify)) == (4, 1)
    blocks = [sum(p.numel() for p in method.decoder.parameters()) for method in (whole, single)]
    assert blocks[0] == blocks[1]


def test_positions_are_told_at_hidden_sites_only() -> None:
    plain, placed = roused(build()).eval(), roused(build("spark.pos_embed=true")).eval()
    assert plain.state_dict().keys() == placed.state_dict().keys()  # they are fixed
    image, mask = image_and_mask(plain)
    found: list[Tensor] = []
    for method in (plain, placed):
        method.decoder.register_forward_pre_hook(lambda _module, inputs: found.extend(inputs[0]))
        for densify in method.densify:
            densify.proj = nn.Identity()
    for method in (plain, placed):
        method.decoder.forward = lambda maps, size=image.shape: torch.zeros(size)  # type: ignore[method-assign, misc]
        method.predict(image, mask)
    for before, after, cell in zip(found[:4], found[4:], plain.cells, strict=True):
        changed = (before != after).any(dim=1)
        assert torch.equal(changed, upsample(mask, cell))


def test_what_does_not_fit_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"spark.mask_patch=\[48, 48\] does not divide"):
        build("spark.mask_patch=48")
    with pytest.raises(ConfigError, match=r"spark.mask_ratio=0.99 leaves 0 of 6 patches visible"):
        build("spark.mask_ratio=0.99")
    for backend in ("tiles", "masked", "dense"):
        with pytest.raises(ValueError, match=r"mask.patch.* must be a multiple"):
            build("spark.mask_patch=16", f"spark.backend={backend}")
    with pytest.raises(ValueError, match="has 5 scales, 6 asked for"):
        build("spark.num_stages=6")
    with pytest.raises(ConfigError, match=r"spark.num_stages=2 has no effect with spark.hierarchy=false"):
        build("spark.num_stages=2", "spark.hierarchy=false")
    with pytest.raises(ValueError, match="give at least 32"):
        build("spark.decoder_dim=20")
    with pytest.raises(ConfigError, match=r"spark\.densify_norm"):
        build("spark.densify_norm=group")
    build()
    assert "a mask grid of 2 x 3 is very coarse" in caplog.text


def test_every_step_can_be_repeated() -> None:
    method = build()
    images = batch(method)
    assert torch.equal(method.eval()(images, seeded(5))["loss"], method(images, seeded(5))["loss"])
    assert not torch.equal(method(images, seeded(5))["loss"], method(images, seeded(6))["loss"])


@pytest.mark.parametrize("in_chans", [1, 3])
def test_pictures(in_chans: int) -> None:
    """Visible pixels are the original's; hidden ones are predicted, with and without help from the target."""
    method = build(f"data.in_chans={in_chans}").eval()
    images = batch(method, 2)
    pictures = method.pictures(images, seeded(8))
    assert [name.rpartition("reconstruction_")[2] for name in pictures] == [
        "with_target_statistics",
        "without_target_statistics",
    ]
    mask = method.draw_mask(2, seeded(8))
    hidden = hidden_pixels(method, mask)
    unit = images["image"].float() / 255
    image = (unit - 0.4) / 0.25
    with torch.no_grad():
        prediction = unpatchify(method.predict(image, mask), method.patch, method.grid)
    for name, picture in pictures.items():
        assert picture.shape == (3, 2 * (H + 2) + 2, 3 * (W + 2) + 2) and picture.min() >= 0 and picture.max() <= 1
        rows = [picture[:, 2 + i * (H + 2) :][:, :H] for i in range(2)]
        for i, row in enumerate(rows):
            original, masked, filled_in = (row[:, :, 2 + j * (W + 2) :][..., :W] for j in range(3))
            shown = unit[i].expand(3, -1, -1)
            torch.testing.assert_close(original, shown)
            torch.testing.assert_close(masked, shown.masked_fill(hidden[i], 0.5))
            torch.testing.assert_close(filled_in[:, ~hidden[i, 0]], shown[:, ~hidden[i, 0]])
            if "without" in name:
                seen = image[i][:, ~hidden[i, 0]]
                own = (prediction[i] * seen.std() + seen.mean()) * 0.25 + 0.4
                expected = own.clamp(0, 1).expand(3, -1, -1)[:, hidden[i, 0]]
                torch.testing.assert_close(filled_in[:, hidden[i, 0]], expected, rtol=1e-4, atol=1e-4)


def test_mixed_precision_keeps_statistics_and_loss_in_float32() -> None:
    method, images = build(), {}
    images = batch(method)
    expected = method(images, seeded())["loss"]
    again = build()
    with torch.autocast("cpu", torch.bfloat16):
        output = again(images, seeded())
    output["loss"].backward()
    assert output["loss"].dtype == torch.float32
    assert float(output["loss"].detach()) == pytest.approx(float(expected.detach()), rel=2e-2)
    for value in (*again.parameters(), *again.buffers()):
        assert value.dtype in (torch.float32, torch.int64)


def test_embeddings_norms_and_biases_are_not_decayed() -> None:
    """As the released code groups them."""
    method = build(*CONVNEXT, "spark.pos_embed=true")
    groups = {group["wd_scale"]: set(group["names"]) for group in param_groups(method, method.config.optim)}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim == 1 or name.endswith(("bias", "mask_embed", "gamma"))
            assert name in groups[0.0 if spared else 1.0], name
    assert sum("mask_embed" in name for name in groups[0.0]) == 4


# --- the released code ------------------------------------------------------------------------------------------------

RESNET = (list(resnet_shapes((1, 1, 2, 1), (8, 12, 16, 20), bottleneck=False)), (8, 12, 16, 20))
BOTTLENECK = (list(resnet_shapes((1, 1, 1, 1), (4, 6, 8, 10), bottleneck=True)), (16, 24, 32, 40))
SMALL_CONVNEXT = (list(convnext_shapes((1, 2, 1, 1), (8, 12, 16, 20))), (8, 12, 16, 20))
RELEASED = {
    "resnet": (RESNET, "batch", 64),
    "bottleneck": (BOTTLENECK, "batch", 32),
    "convnext": (SMALL_CONVNEXT, "layer", 32),
    "convnext, no norm, equal widths": (
        (list(convnext_shapes((1, 1, 1, 1), (8, 16, 32, 64))), (8, 16, 32, 64)),
        "none",
        64,
    ),
}


def released(name: str, size: int) -> list[fill.Key]:
    (encoder, widths), norm, dim = RELEASED[name]
    return keys_of(spark_shapes(encoder, widths, norm, dim, size))


def golden_case(path: Path, name: str, **changes: Any) -> Path:
    """A file of the golden format from the slow form: 96 px, two images, 4 of 9 patches visible."""
    keys = released(name, 96)
    hidden = torch.from_numpy(fill.masks(12, 2, 9, 4))
    arrays: dict[str, Any] = {"mask": hidden.numpy()}
    trained = [key for key, _, kind in keys if kind not in ("unused", "count", "running_mean", "running_var")]
    arrays["grad_keys"] = json.dumps(trained)
    for dtype, suffix in ((torch.float32, ""), (torch.float64, "_f64")):
        weights = {key: value.to(dtype) if value.is_floating_point() else value for key, value in filled(keys).items()}
        for key in trained:
            weights[key].requires_grad_()
        image = torch.from_numpy(fill.images(11, 2, 96, 96)).to(dtype)
        slow = SlowSparK(weights, hidden.view(2, 3, 3), training=True)
        prediction = slow(image)
        loss = slow_loss(prediction, image, hidden)
        loss.backward()
        with torch.no_grad():
            still = SlowSparK(weights, hidden.view(2, 3, 3), training=False)(image)
        outputs = {"loss": loss, "pred": prediction, "pred_eval": still, "loss_eval": slow_loss(still, image, hidden)}
        outputs |= {f"feat.{key}": value for key, value in slow.maps.items()}
        outputs |= {f"bn_after.{key}": value for key, value in slow.after.items()}
        grads = {key: weight.grad for key, weight in weights.items() if weight.grad is not None}
        outputs |= {f"grad.{key}": grads[key] for key in trained[:2] + trained[-1:]}
        arrays |= {f"{key}{suffix}": value.detach().numpy() for key, value in outputs.items()}
        arrays[f"grad_norms{suffix}"] = np.asarray([float(grads[key].double().norm()) for key in trained])
    meta = {"case": path.stem, "input_size": 96, "batch": 2, "seed": 11, "mask_seed": 12, "mask_ratio": 0.6}
    meta |= {"len_keep": 4, "weights_sha256": fill.digest(keys)}
    np.savez(path, meta=json.dumps(meta), keys=json.dumps(keys), **{**arrays, **changes})
    return path


@pytest.mark.parametrize("name", RELEASED)
def test_a_second_implementation_agrees(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything a golden file holds, in both precisions and on both backends, and every official key is used."""
    assert parity([str(golden_case(tmp_path / "small.npz", name))]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "small (SparK)" in out and "FAIL" not in out
    for quantity in ("loss", "pred_eval", "feat.stage1", "feat.densify3", "feat.dec4", "grad_norms"):
        assert all(f"  {quantity} ({backend})" in out for backend in ("tiles", "masked"))


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({"loss_f64": np.asarray(1.25)}, "loss"),
        ({"bn_after.densify_norms.0.running_var_f64": np.ones(20)}, "bn_after.densify_norms.0.running_var"),
        ({"feat.stage5": np.ones(3, np.float32)}, "feat.stage5"),
    ],
)
def test_differences_from_the_released_code_are_noticed(
    changes: dict[str, Any], failing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parity([str(golden_case(tmp_path / "case.npz", "resnet", **changes))]) == 1
    failed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert failed == [failing, failing]  # on either backend


def test_a_converted_state_is_the_whole_module(tmp_path: Path) -> None:
    weights = filled(released("resnet", 64))
    converted, state = convert_spark(weights)
    kwargs = {key: list(value) for key, value in converted["kwargs"].items()}
    method = build(
        f"encoder.name={converted['name']}",
        f"encoder.kwargs={json.dumps(kwargs)}",
        f"spark.decoder_dim={converted['decoder_dim']}",
    )
    method.load_state_dict(state, strict=True)
    hidden = torch.from_numpy(fill.masks(3, 2, 6, 2)).view(2, 2, 3)
    image = torch.randn(2, 3, H, W, generator=seeded(2), dtype=torch.float64)
    slow = SlowSparK(
        {k: v.double() if v.is_floating_point() else v for k, v in weights.items()}, hidden, training=False
    )
    torch.testing.assert_close(method.double().eval().predict(image, hidden), slow(image), rtol=1e-9, atol=1e-9)


# --- what is handed on, and how it is trained -------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [(), CONVNEXT], ids=["resnet", "convnext"])
def test_the_export_is_a_plain_timm_encoder(overrides: tuple[str, ...], tmp_path: Path) -> None:
    """Loaded strictly by timm itself, after a step; norms that pre-training never touched have their initial values."""
    method = build(*overrides)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    method(batch(method), seeded())["loss"].backward()
    optimizer.step()
    method.config.data.mean, method.config.data.std = [0.4] * 3, [0.25] * 3
    method.export(tmp_path)
    card = json.loads((tmp_path / "encoder.json").read_text())
    plain = timm.create_model(
        card["name"], num_classes=0, checkpoint_path=str(tmp_path / "encoder.safetensors"), **card["kwargs"]
    )
    assert plain.state_dict().keys() == method.encoder.state_dict().keys()
    image = torch.randn(2, 3, H, W, generator=seeded(2))
    with torch.no_grad():
        expected = spatial_features(method.encoder.eval(), image)
        assert torch.equal(spatial_features(plain.eval(), image), expected) and expected.std() > 0
    for name, value in plain.state_dict().items():
        if name.startswith("head.norm"):
            assert torch.equal(value, torch.full_like(value, float(name.endswith("weight"))))


class Loader:
    """Eight random images, in two batches."""

    broken: dict[str, str] = {}  # noqa: RUF012

    def __len__(self) -> int:
        return 2

    def name_broken(self, broken: Mapping[str, str]) -> None:
        assert not broken

    def batches(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        for i in range(start, 2):
            yield {"image": torch.randint(0, 256, (4, 3, H, W), dtype=torch.uint8, generator=seeded(10 * epoch + i))}


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_lamb_has_the_trust_ratios_of_whole_tensors(world: World, tmp_path: Path) -> None:
    """A run through DeepSpeed (ZeRO 0) gives the weights of timm's Lamb in a plain loop, clipping and schedules included."""
    words = [
        *["optim.name=lamb", "optim.lr=null", "optim.base_lr=0.5", "optim.warmup_lr=0.001", "optim.min_lr=1e-4"],
        *["optim.betas=[0.9,0.95]", "optim.eps=1e-6", "optim.weight_decay=0.04", "optim.weight_decay_end=0.2"],
        *["optim.clip_grad=0.5", "train.steps=6", "train.warmup_steps=2", "train.batch_size=4", "train.log_steps=1"],
        *["train.picture_epochs=0", "deepspeed=zero0_fp32", f"output_dir={tmp_path / 'run'}"],
    ]
    method, reference = build(*words), build(*words)
    fit(method, Loader(), method.config, world, Hooks(), "random images")

    spared = {name for name, p in reference.named_parameters() if p.ndim == 1 or name.endswith("mask_embed")}
    named = dict(reference.named_parameters())
    optimizer = Lamb(
        [{"params": [p for name, p in named.items() if (name in spared) == still]} for still in (True, False)],
        betas=(0.9, 0.95),
        eps=1e-6,
        max_grad_norm=0.5,
    )
    plan = Plan.make(reference.config.optim, reference.config.train, 2)
    expected, batches = [], (images for epoch in range(3) for images in Loader().batches(epoch))
    for step, images in enumerate(batches):
        for group, decay in zip(optimizer.param_groups, (0.0, plan.weight_decay[step]), strict=True):
            group.update(lr=float(plan.lr[step]), weight_decay=float(decay))
        seed_step(reference.config.seed, step, 0)
        loss = reference.train()(images)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    found = [line["loss"] for line in read_log(tmp_path / "run/log.jsonl") if line["event"] == "train"]
    assert found == pytest.approx(expected, rel=1e-4)
    fresh, moved = dict(build(*words).named_parameters()), 0
    for name, value in method.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], rtol=1e-3, atol=1e-4, msg=name)
        moved += name in fresh and not torch.allclose(value, fresh[name], rtol=1e-2, atol=1e-3)
    assert moved > 0.8 * len(fresh)  # the test can tell a trained network from a still one
