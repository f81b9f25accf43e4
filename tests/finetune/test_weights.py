"""Strict loading, image sizes, heads and exports."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from engine.config import ConfigError
from engine.schema import EncoderConfig
from finetune.config import FinetuneData
from finetune.weights import build, resolve, save_model
from tests.models.published import publish

VIT = {"patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
POOLED = VIT | {"global_pool": "avg", "fc_norm": False}


def encoder(
    pretrained: Path | str = "", name: str = "vit_tiny_patch16_224", kwargs: dict[str, Any] | None = None
) -> EncoderConfig:
    return EncoderConfig(name=name, pretrained=str(pretrained), kwargs=dict(POOLED if kwargs is None else kwargs))


def images(height: int = 16, width: int = 24, **changes: Any) -> FinetuneData:
    data = FinetuneData(image_size=[height, width], in_chans=2, mean=[0.5, 0.5], std=[0.5, 0.5])
    for key, value in changes.items():
        setattr(data, key, value)
    return data


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """A run folder with an encoder without classifier, as pre-training leaves it, of the usual (token) pooling."""
    model = build(encoder(kwargs=VIT), images(), seed=5, num_classes=0)
    save_model(model, encoder(kwargs=VIT), images(), [], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.json").unlink()
    return tmp_path


def change(folder: Path, drop: str = "", add: str = "", tensors: dict[str, torch.Tensor] | None = None) -> None:
    file = folder / "encoder.safetensors"
    state = {key: value for key, value in load_file(file).items() if key != drop} | (tensors or {})
    save_file(state | ({add: torch.ones(2)} if add else {}), file)


def test_pretraining_keys_are_those_of_fine_tuning_with_mean_pooling(
    pretrained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model = build(encoder(pretrained), images(), seed=0, num_classes=7)
    saved = load_file(pretrained / "encoder.safetensors")
    own = model.state_dict()
    assert set(own) - set(saved) == {"head.weight", "head.bias"} and set(saved) <= set(own)
    assert all(torch.equal(own[key], saved[key]) for key in saved)
    assert own["head.weight"].shape == (7, 12)
    assert "new: head.weight, head.bias" in caplog.text


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (dict(drop="blocks.1.mlp.fc1.weight"), "1 missing: blocks.1.mlp.fc1.weight"),
        (dict(add="blocks.2.norm1.weight"), "1 unexpected: blocks.2.norm1.weight"),
        (dict(tensors={"cls_token": torch.ones(1, 1, 13)}), "1 of another shape: cls_token"),
    ],
)
def test_every_other_difference_is_refused(pretrained: Path, damage: dict[str, Any], told: str) -> None:
    change(pretrained, **damage)
    with pytest.raises(ConfigError, match=told):
        build(encoder(pretrained), images(), seed=0, num_classes=7)


def test_a_moved_norm_is_refused_with_a_hint(pretrained: Path) -> None:
    with pytest.raises(ConfigError, match="fc_norm=false"):
        build(encoder(pretrained, kwargs=VIT | {"global_pool": "avg"}), images(), seed=0, num_classes=7)


def test_a_foreign_classifier_is_left_out_and_a_fitting_one_loaded(pretrained: Path) -> None:
    change(pretrained, tensors={"head.weight": torch.ones(7, 12), "head.bias": torch.ones(7)})
    assert (
        float(build(encoder(pretrained), images(), seed=0, num_classes=7).get_parameter("head.bias").detach().sum())
        == 7
    )
    assert (
        float(build(encoder(pretrained), images(), seed=0, num_classes=3).get_parameter("head.bias").detach().sum())
        == 0
    )
    build(encoder(pretrained), images(), seed=0, num_classes=0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (dict(name="vit_small_patch16_224"), "encoder.name is 'vit_small_patch16_224'"),
        (dict(kwargs=POOLED | {"num_heads": 4}), "encoder.kwargs"),  # the shapes would not tell
        (dict(kwargs={k: v for k, v in POOLED.items() if k != "num_heads"}), "encoder.kwargs"),
    ],
)
def test_the_description_must_agree(
    pretrained: Path, given: dict[str, Any], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    resolve(encoder(pretrained), images())
    resolve(encoder(pretrained, kwargs=POOLED | {"drop_rate": 0.1}), images())
    with pytest.raises(ConfigError, match=told):
        resolve(encoder(pretrained, **given), images())
    resolve(encoder(pretrained), images(in_chans=3))
    assert "data.in_chans=3, but" in caplog.text and "its first layer is adapted" in caplog.text


def test_the_description_fills_in_the_network(pretrained: Path) -> None:
    asked = encoder(pretrained, name="", kwargs={"global_pool": "avg"})
    resolve(asked, images())
    assert asked.name == "vit_tiny_patch16_224" and asked.kwargs == VIT | {"global_pool": "avg"}
    with pytest.raises(ConfigError, match=r"encoder\.name is required"):
        resolve(encoder("", name=""), images())


def test_another_normalisation_is_warned_about(pretrained: Path, caplog: pytest.LogCaptureFixture) -> None:
    resolve(encoder(pretrained), images())
    assert not caplog.text
    resolve(encoder(pretrained), images(mean=[0.1, 0.2]))
    assert "data.mean=[0.1, 0.2]" in caplog.text


def test_a_folder_without_weights_is_refused(pretrained: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        resolve(encoder(pretrained), images(), whole=True)
    (pretrained / "encoder.json").write_text("[]")
    with pytest.raises(ConfigError, match="does not describe an encoder"):
        resolve(encoder(pretrained), images())


@pytest.mark.parametrize("described", [True, False])
def test_the_position_embedding_is_resized_for_another_image_size(
    tmp_path: Path, described: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    square = images(24, 24)
    source = build(encoder(kwargs=VIT), square, seed=1, num_classes=0)
    save_model(source, encoder(kwargs=VIT), square, [], tmp_path)
    if not described:
        (tmp_path / "encoder.json").unlink()
    model = build(encoder(tmp_path / "encoder.safetensors"), images(32, 20), seed=0, num_classes=3)
    wanted = resample_abs_pos_embed(
        source.get_parameter("pos_embed"), new_size=[8, 5], old_size=[6, 6], num_prefix_tokens=1
    )
    assert torch.equal(model.get_parameter("pos_embed"), wanted)
    assert "32 x 20 instead of 24 x 24" in caplog.text
    assert model(torch.rand(2, 2, 32, 20)).shape == (2, 3)


def test_a_position_embedding_of_unknown_shape_is_refused(pretrained: Path) -> None:
    (pretrained / "encoder.json").unlink()  # a grid of 4 x 6: not to be guessed
    with pytest.raises(ConfigError, match="no square grid"):
        build(encoder(pretrained), images(32, 32), seed=0, num_classes=3)


def test_a_convnet_takes_any_image_size(tmp_path: Path) -> None:
    asked = encoder(name="resnet18", kwargs={})
    save_model(build(asked, images(64, 32), seed=1, num_classes=0), asked, images(64, 32), [], tmp_path)
    model = build(
        encoder(tmp_path, name="resnet18", kwargs={}), images(32, 96, eval_image_size=[64, 64]), seed=0, num_classes=3
    )
    assert model.eval()(torch.rand(1, 2, 32, 96)).shape == (1, 3)


def test_evaluation_at_another_size_resizes_the_positions_of_every_image() -> None:
    data = images(eval_image_size=[32, 32])
    fixed, free = (build(encoder(), d, seed=0, num_classes=3).eval() for d in (images(), data))
    size = images().image_size
    assert free(torch.rand(1, 2, 32, 32)).shape == (1, 3)
    x = torch.rand(2, 2, *size)
    assert torch.allclose(free(x), fixed(x), atol=1e-6)  # the same initial weights
    assert free.state_dict().keys() == fixed.state_dict().keys()
    with pytest.raises(ConfigError, match=r"takes images of \[\d+, \d+\] only; leave it unset"):
        build(encoder(name="beit_base_patch16_224", kwargs={}), data, seed=0, num_classes=3)


def test_only_a_new_classifier_on_a_pretrained_encoder_starts_small(
    pretrained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def size(pretrained: Path | str, scale: float) -> float:
        model = build(encoder(pretrained), images(), seed=0, num_classes=5, head_init_scale=scale)
        return float(model.get_parameter("head.weight").detach().abs().mean())

    assert size(pretrained, 0.001) == pytest.approx(0.001 * size(pretrained, 1.0))
    assert "left out" not in caplog.text
    assert size("", 0.001) == size("", 1.0)
    assert "left out" in caplog.text
    change(pretrained, tensors={"head.weight": torch.ones(5, 12), "head.bias": torch.ones(5)})
    assert size(pretrained, 0.001) == 1.0


def test_initial_weights_follow_from_the_seed() -> None:
    def first(seed: int) -> torch.Tensor:
        torch.rand(3)  # what was drawn before does not matter
        return build(encoder(), images(), seed, num_classes=3).get_parameter("head.weight")

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))


@pytest.mark.parametrize(("num_classes", "kept"), [(1000, True), (3, False)])
def test_timms_own_weights_are_fine_tuned(
    num_classes: int, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two channels and 32 x 48 pixels instead of timm's three and 160 x 160; its classifier stays if it fits."""
    published = publish("test_vit", tmp_path, monkeypatch)
    asked = encoder("true", "test_vit", {})
    resolve(asked, images())
    assert not caplog.text  # its images were normalised by 0.5, too
    model = build(asked, images(32, 48), seed=0, num_classes=num_classes, head_init_scale=0.5)
    own = model.state_dict()
    assert torch.equal(own["blocks.1.attn.qkv.weight"], published["blocks.1.attn.qkv.weight"])
    assert own["pos_embed"].shape[1] == 1 + 2 * 3 and own["patch_embed.proj.weight"].shape[1] == 2
    assert (num_classes == 1000 and torch.equal(own["head.weight"], published["head.weight"])) == kept
    if not kept:
        with pytest.raises(ConfigError, match=r"encoder\.pretrained=true has no classifier for these 3 classes"):
            build(asked, images(32, 48), seed=0, num_classes=num_classes, whole=True)


def test_timms_own_weights_need_a_name_that_has_some() -> None:
    with pytest.raises(ConfigError, match=r"say of which encoder\.name"):
        resolve(encoder("true", ""), images())
    with pytest.raises(ConfigError, match="timm has no weights of 'convnextv2_small'"):
        resolve(encoder("true", "convnextv2_small"), images())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "convnext_atto"])
def test_saved_models_load_again_whole_or_as_an_encoder(tmp_path: Path, name: str) -> None:
    kwargs = POOLED if name.startswith("vit") else {}
    asked, data = encoder(name=name, kwargs=kwargs), images(32, 64)
    model = build(asked, data, seed=3, num_classes=3).eval()
    save_model(model, asked, data, ["a", "b", "c"], tmp_path)
    assert json.loads((tmp_path / "model.json").read_text())["class_names"] == ["a", "b", "c"]
    x = torch.rand(2, 2, 32, 64)
    loaded = build(encoder(tmp_path, name, kwargs), data, seed=4, num_classes=3, whole=True).eval()
    assert torch.equal(loaded(x), model(x))
    body: Any = build(encoder(tmp_path, name, kwargs), data, seed=4, num_classes=0).eval()
    whole: Any = model
    assert torch.equal(body.forward_features(x), whole.forward_features(x))
    heads = [key for key in load_file(tmp_path / "encoder.safetensors") if key.startswith(("head.fc", "fc."))]
    assert not heads
    with pytest.raises(ConfigError, match="has no classifier for these 4 classes"):
        build(encoder(tmp_path, name, kwargs), data, seed=4, num_classes=4, whole=True)
    assert isinstance(model, nn.Module)
