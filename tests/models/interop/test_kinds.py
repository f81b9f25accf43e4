"""Released files of every kind go straight into an encoder: told apart, renamed, strict, and every key accounted for."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.beit import checkpoint_filter_fn as beit_filter
from timm.models.convnext import checkpoint_filter_fn as convnext_filter
from torch import Tensor, nn

from models.convvit import ConvViT
from models.encoder import build_encoder
from models.interop import convert_convmae, convert_fcmae, convert_spark, export_torchvision
from models.interop.kinds import kind_of
from models.interop.source import read_weights
from models.pretrained import load_pretrained, load_reported
from tests.models.interop import official
from tests.models.interop.test_fcmae import FCMAE_DEPTHS, FCMAE_DIMS, exported_form, official_fcmae, sparse_form
from tests.models.interop.test_spark import SPARK_ENCODERS, official_export, official_spark
from tests.shared import SHARED, needs_shared

BEIT, VIT = "beit_base_patch16_224", "vit_base_patch16_224"


def into(
    path: Path,
    state: dict[str, Any],
    name: str,
    kwargs: dict[str, Any],
    num_classes: int = 0,
    size: int = 64,
    **top: Any,
) -> tuple[Any, Any]:
    """Save a state as the released codes do, and load it into a new network -> (the network, the report)."""
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(lr=1.0), **top}, path)
    torch.manual_seed(5)
    asked: dict[str, Any] = dict(name=name, in_chans=3, image_size=(size, size), kwargs=kwargs)
    model = build_encoder(**asked, drop_path_rate=0.0, num_classes=num_classes)
    return model.eval(), load_reported(model, str(path), **asked)


def accounted(report: Any, state: dict[str, Any], model: nn.Module) -> None:
    """Each key of both sides is in exactly one group."""
    left = [key for what, keys in report.left_out.items() if what != "beside the weights" for key in keys]
    assert sorted(report.matched + report.missing) == sorted(model.state_dict())
    assert len(left) == len(set(left)) and report.fits
    expanded = sum("relative_position_bias_table" in key for key in report.matched) - 1 if report.notes else 0
    if not report.notes:
        assert len(report.matched) + len(left) == len(state)
    else:
        assert len(report.matched) - max(expanded, 0) + len(left) <= len(state)


def test_spark(tmp_path: Path) -> None:
    for kind, (name, kwargs) in {
        "resnet": ("resnet50", {"layers": (1, 2, 1, 1), "channels": (4, 6, 8, 10)}),
        "convnext": ("convnext_tiny", {"depths": (1, 2, 1, 1), "dims": (8, 12, 16, 20)}),
    }.items():
        assert kind in SPARK_ENCODERS
        model, report = into(tmp_path / "a.pth", official_spark(kind), name, kwargs)
        assert report.kind == "SparK, pre-training"
        accounted(report, official_spark(kind), model)
        assert report.left_out["buffers that nobody reads"] == ["imn_m", "imn_s", "norm_black"]
        assert "decoder" in report.left_out and report.left_out["beside the weights"] == ["epoch", "args"]
        wanted = convert_spark(official_export(kind))[1]
        assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
        again, report = into(tmp_path / "b.pth", official_export(kind), name, kwargs)
        assert all(torch.equal(value, wanted[key]) for key, value in again.state_dict().items())
        assert report.missing == (["head.norm.weight", "head.norm.bias"] if kind == "convnext" else [])


@pytest.mark.parametrize("form", [dict, sparse_form, exported_form])
def test_fcmae(form: Any, tmp_path: Path) -> None:
    state = form(official_fcmae())
    kwargs = {"depths": FCMAE_DEPTHS, "dims": FCMAE_DIMS, "conv_mlp": form is dict}
    model, report = into(tmp_path / "a.pth", state, "convnextv2_tiny", kwargs)
    assert report.kind == "ConvNeXt V2, pre-training (FCMAE)" and report.missing == [
        "head.norm.weight",
        "head.norm.bias",
    ]
    accounted(report, state, model)
    _, wanted = convert_fcmae(state)
    for key, value in model.state_dict().items():
        assert torch.equal(value.flatten(), wanted[f"encoder.{key}"].flatten()), key


def test_a_fine_tuned_convnextv2_brings_its_classes(tmp_path: Path) -> None:
    state = exported_form(official_fcmae(decoder=False))
    state |= official.noise({"norm.weight": (10,), "norm.bias": (10,), "head.weight": (7, 10), "head.bias": (7,)})
    kwargs = {"depths": FCMAE_DEPTHS, "dims": FCMAE_DIMS}
    model, report = into(tmp_path / "a.pth", state, "convnextv2_tiny", kwargs, num_classes=7)
    assert report.kind == "ConvNeXt V2, with its classifier" and not report.missing
    timms = build_encoder(
        "convnextv2_tiny", in_chans=3, image_size=(64, 64), drop_path_rate=0.0, num_classes=7, kwargs=kwargs
    ).eval()
    timms.load_state_dict(convnext_filter(dict(state), timms), strict=True)
    x = torch.randn(2, 3, 64, 96)
    assert torch.equal(model(x), timms(x))
    _, report = into(tmp_path / "b.pth", state, "convnextv2_tiny", kwargs, num_classes=6)
    assert report.missing == ["head.fc.weight", "head.fc.bias"] and "classifier of other classes" in report.left_out
    _, report = into(tmp_path / "c.pth", state, "convnextv2_tiny", kwargs)
    assert report.left_out["classifier"] == ["head.fc.weight", "head.fc.bias"] and not report.missing


def test_convnext_in_its_authors_names(tmp_path: Path) -> None:
    kwargs = SPARK_ENCODERS["convnext"]
    state = official_export("convnext") | official.noise({"norm.weight": (20,), "norm.bias": (20,)})
    state |= official.noise({"head.weight": (3, 20), "head.bias": (3,)})
    asked = {"depths": (1, 2, 1, 1), "dims": (8, 12, 16, 20)}
    model, report = into(tmp_path / "a.pth", state, "convnext_tiny", asked, num_classes=3)
    assert report.kind == "ConvNeXt in its authors' names" and kwargs and not report.missing
    timms = build_encoder(
        "convnext_tiny", in_chans=3, image_size=(64, 64), drop_path_rate=0.0, num_classes=3, kwargs=asked
    ).eval()
    timms.load_state_dict(convnext_filter(dict(state), timms), strict=True)
    x = torch.randn(2, 3, 64, 96)
    assert torch.equal(model(x), timms(x))


def test_beit_pretraining_with_relative_positions(tmp_path: Path) -> None:
    """One table for all blocks, or a copy of it for each: the same features. The final norm is new, as in unilm."""
    state = official.beit_pretraining()
    model, report = into(tmp_path / "a.pth", state, BEIT, official.BEIT | {"use_fc_norm": False})
    assert report.kind == "BEiT, pre-training" and not report.missing
    assert "copied to 3 of them" in report.notes[0]
    shared = timm.create_model(
        BEIT,
        **official.BEIT,
        img_size=64,
        num_classes=0,
        use_fc_norm=False,
        use_rel_pos_bias=False,
        use_shared_rel_pos_bias=True,
    ).eval()
    kept = {key: value for key, value in state.items() if key in shared.state_dict()}
    shared.load_state_dict(kept, strict=True)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), shared(x))
    pooled, report = into(tmp_path / "b.pth", state, BEIT, official.BEIT)
    assert report.missing == ["fc_norm.weight", "fc_norm.bias"]
    assert report.left_out["norm before pooling, which fine-tuning replaces by fc_norm"] == ["norm.weight", "norm.bias"]
    assert report.left_out["head of pre-training"] == ["lm_head.weight", "lm_head.bias"]
    assert report.left_out["buffers that are computed anew"] == ["rel_pos_bias.relative_position_index"]
    accounted(report, state, pooled)


@pytest.mark.parametrize("plain", [False, True])
def test_beit_pretraining_with_absolute_positions(plain: bool, tmp_path: Path) -> None:
    """Into timm's BEiT, or a plain transformer: the same features."""
    state = official.beit_pretraining(relative=False)
    absolute: dict[str, Any] = {"use_abs_pos_emb": True, "use_rel_pos_bias": False, "use_fc_norm": False}
    name, kwargs = (VIT, {}) if plain else (BEIT, absolute)
    model, report = into(tmp_path / "a.pth", state, name, official.BEIT | kwargs)
    assert report.kind == "BEiT, pre-training" and not report.missing and bool(report.notes) == plain
    timms: Any = timm.create_model(BEIT, **official.BEIT, **absolute, img_size=64, num_classes=0).eval()
    timms.load_state_dict({key: state[key] for key in timms.state_dict()}, strict=True)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.forward_features(x), timms.forward_features(x), rtol=1e-4, atol=1e-5)


def test_fine_tuned_beit(tmp_path: Path) -> None:
    state = official.beit_finetuned()
    model, report = into(tmp_path / "a.pth", state, BEIT, official.BEIT, num_classes=5)
    assert report.kind == "BEiT, fine-tuned" and not report.missing and not report.resized
    accounted(report, state, model)
    timms = timm.create_model(BEIT, **official.BEIT, img_size=64, num_classes=5).eval()
    timms.load_state_dict(beit_filter(dict(state), timms), strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), timms(x))
    with pytest.raises(
        ValueError, match=r"unexpected: .*it has relative position biases: choose one of timm's beit_\*"
    ):
        into(tmp_path / "b.pth", state, VIT, official.BEIT | {"global_pool": "avg"}, num_classes=5)
    state = official.beit_pretraining(relative=False)
    with pytest.raises(ValueError, match=r"it has absolute positions: set encoder\.kwargs=\{use_abs_pos_emb: true"):
        into(tmp_path / "c.pth", state, BEIT, official.BEIT)


@needs_shared("goldens")
@pytest.mark.parametrize(
    ("golden", "name", "kwargs", "kind", "left"),
    [
        ("beit_mim", VIT, {"embed_dim": 192, "depth": 4, "num_heads": 3}, "BEiT, pre-training", 3),
        ("convmae_base", "convvit_base", {"fc_norm": False}, "ConvMAE, pre-training", 108),
        ("convvit_base_cls", "convvit_base", {}, "ConvMAE, fine-tuned", 2),
    ],
)
def test_keys_of_the_released_codes_are_known(
    golden: str, name: str, kwargs: dict[str, Any], kind: str, left: int, tmp_path: Path
) -> None:
    """The names and shapes that the codes themselves write."""
    with np.load(SHARED / "goldens" / f"{golden}.npz", allow_pickle=False) as file:
        state = {key: torch.zeros(shape) for key, shape, _ in json.loads(str(file["keys"]))}
    _, report = into(tmp_path / "a.pth", state, name, kwargs, size=224)
    assert report.kind == kind and not report.missing and report.fits
    assert sum(len(keys) for what, keys in report.left_out.items() if what != "beside the weights") == left


def test_mae_pretraining(tmp_path: Path) -> None:
    state = official.mae_pretraining()
    model, report = into(tmp_path / "a.pth", state, VIT, official.VIT)
    assert report.kind == "MAE, pre-training" and not report.missing
    accounted(report, state, model)
    assert len(report.left_out["decoder"]) == 6 and report.left_out["mask token"] == ["mask_token"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    _, report = into(tmp_path / "b.pth", state, VIT, official.VIT | {"global_pool": "avg"}, num_classes=4)
    assert report.missing == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]  # as MAE's own code asserts


def test_fine_tuned_mae_is_timms(tmp_path: Path) -> None:
    kwargs = official.VIT | {"global_pool": "avg"}
    state = official.noise(timm.create_model(VIT, **kwargs, img_size=64, num_classes=4).state_dict())
    model, report = into(tmp_path / "a.pth", state, VIT, kwargs, num_classes=4)
    assert not report.missing and all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("classes", [0, 4])
def test_convmae(classes: int, tmp_path: Path) -> None:
    state = official.convmae(classes, img_size=64)
    kwargs = official.CONVVIT | ({} if classes else {"fc_norm": False})
    model, report = into(tmp_path / "a.pth", state, "convvit_base", kwargs, num_classes=classes)
    assert report.kind == ("ConvMAE, fine-tuned" if classes else "ConvMAE, pre-training") and not report.missing
    accounted(report, state, model)
    encoder = {
        key: value for key, value in state.items() if key in state and "decode" not in key and key != "mask_token"
    }
    _, wanted = convert_convmae(encoder, num_heads=2)
    assert isinstance(model, ConvViT)
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
    if not classes:
        _, report = into(tmp_path / "b.pth", state, "convvit_base", official.CONVVIT, num_classes=3)
        assert report.missing == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize("kind", ["convnext_tiny", "resnet18", "densenet121", "vit_base_patch32_224"])
def test_torchvision_there_and_back(kind: str, tmp_path: Path) -> None:
    """timm -> torchvision -> timm, bit for bit."""
    size = 64 if kind.startswith("vit") else 224
    model = build_encoder(kind, in_chans=3, image_size=(size, size), drop_path_rate=0.0, num_classes=3)
    state = model.state_dict()
    noise = official.noise({key: value for key, value in state.items() if value.is_floating_point()})
    theirs = export_torchvision(kind, state | noise)
    again, report = into(tmp_path / "a.pth", theirs, kind, {}, num_classes=3, size=size)
    assert report.kind == ("torchvision" if kind[:3] in ("con", "vit") else "timm's names") and not report.missing
    assert all(torch.equal(value, (state | noise)[key]) for key, value in again.state_dict().items())


def test_wrappers_and_averages(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=0)
    state, average = model.state_dict(), {key: value * 2 for key, value in model.state_dict().items()}
    path = tmp_path / "a.pth"
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in state.items()}, "state_dict_ema": average, "lr": 0.1},
        path,
    )
    asked: dict[str, Any] = dict(name="test_resnet", in_chans=3, image_size=(64, 64), kwargs={})
    report = load_reported(model, str(path), **asked)
    assert report.left_out == {"beside the weights": ["state_dict_ema", "lr"]}
    assert torch.equal(model.state_dict()["conv1.0.weight"], state["conv1.0.weight"])
    load_reported(model, str(path), **asked, ema=True)
    assert torch.equal(model.state_dict()["conv1.0.weight"], average["conv1.0.weight"])
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"a\.pth keeps no moving average: none of model_ema"):
        read_weights(path, ema=True)


def test_a_file_of_which_nothing_fits_names_both_sides(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"\(MAE, pre-training\) does not fit .* It holds cls_token, .*; the encoder has conv1\.0"
    ) as told:
        into(tmp_path / "a.pth", official.mae_pretraining(), "test_resnet", {})
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"blocks.1.mlp.fc1.weight": None}, r"1 missing: blocks\.1\.mlp\.fc1\.weight"),
        ({"blocks.3.norm1.weight": torch.zeros(24)}, r"1 unexpected: blocks\.3\.norm1\.weight"),
        (
            {"blocks.1.norm1.weight": torch.zeros(25)},
            r"1 of another shape: blocks\.1\.norm1\.weight \(25,\), here \(24,\)",
        ),
        ({"fc_norm.weight": torch.zeros(24)}, r"1 unexpected: fc_norm\.weight"),
    ],
)
def test_nothing_is_skipped_silently(change: dict[str, Tensor | None], told: str, tmp_path: Path) -> None:
    state = {key: value for key, value in (official.mae_pretraining() | change).items() if value is not None}
    with pytest.raises(ValueError, match=told):
        into(tmp_path / "a.pth", state, VIT, official.VIT)


def test_kinds_are_not_mixed_up() -> None:
    """timm's own networks of the same families are timm's."""
    for name in ("vit_tiny_patch16_224", "convnext_atto", "convnextv2_atto", "resnet18", "convvit_small", "test_vit2"):
        with torch.device("meta"):
            state = timm.create_model(name).state_dict()
        assert kind_of(state).name == "timm's names", name


def test_the_plain_call_still_returns_what_is_new(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=4)
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    save_file(state, tmp_path / "a.safetensors")
    asked: dict[str, Any] = dict(name="test_resnet", in_chans=3, image_size=(64, 64), kwargs={})
    assert load_pretrained(model, str(tmp_path / "a.safetensors"), **asked) == ["fc.weight", "fc.bias"]
