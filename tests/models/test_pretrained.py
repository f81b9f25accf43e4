"""Where an encoder's weights come from: timm's own, a file, a run folder; and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import timm
import timm.models._builder as builder
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import nn

from engine.schema import EncoderConfig
from models.encoder import build_encoder
from models.pretrained import TIMM, check_card, describe, load_pretrained, read_card, weights_file
from tests.models.published import publish

SIZE = (64, 96)


def load(
    name: str,
    source: str,
    *,
    in_chans: int = 3,
    size: tuple[int, int] = SIZE,
    num_classes: int = 0,
    kwargs: dict[str, Any] | None = None,
) -> tuple[nn.Module, list[str]]:
    """A freshly built encoder that has loaded ``source``, and what stayed as it was."""
    asked: dict[str, Any] = dict(name=name, in_chans=in_chans, image_size=size, kwargs=kwargs or {})
    model = build_encoder(**asked, drop_path_rate=0.0, num_classes=num_classes)
    return model, load_pretrained(model, source, **asked)


def test_the_word_is_that_of_the_setting() -> None:
    assert EncoderConfig.__dataclass_fields__["pretrained"].metadata["words"] == (TIMM,)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_convnext.r160_in1k"])
def test_timms_own_weights_are_loaded_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor but the classifier's, which is ignored where the encoder has none."""
    published = publish(name, tmp_path, monkeypatch)
    model, fresh = load(name, TIMM)
    own = model.state_dict()
    assert fresh == [] and set(published) - set(own) and set(own) < set(published)
    assert all(torch.equal(value, published[key]) for key, value in own.items())


@pytest.mark.parametrize(("num_classes", "fitting"), [(1000, True), (7, False)])
def test_a_classifier_is_loaded_where_it_fits(
    num_classes: int, fitting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = publish("test_resnet", tmp_path, monkeypatch)
    model, fresh = load("test_resnet", TIMM, num_classes=num_classes)
    assert fresh == ([] if fitting else ["fc.weight", "fc.bias"])
    assert torch.equal(model.state_dict()["conv1.0.weight"], published["conv1.0.weight"])
    assert (model.state_dict()["fc.weight"].shape == published["fc.weight"].shape) == fitting


def test_other_channels_are_adapted_as_timm_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One channel sees the sum of three: a grey image, three times the same, gives the same features."""
    publish("test_convnext", tmp_path, monkeypatch)
    grey, _ = load("test_convnext", TIMM, in_chans=1)
    colour, _ = load("test_convnext", TIMM)
    x = torch.randn(2, 1, *SIZE)
    torch.testing.assert_close(grey.eval()(x), colour.eval()(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    five, _ = load("test_convnext", TIMM, in_chans=5)
    assert five.state_dict()["stem.0.weight"].shape[1] == 5


@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_another_image_size_is_adapted_as_timm_does(
    size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same number of tokens, the two grids differ."""
    published = publish("test_vit", tmp_path, monkeypatch)
    model, _ = load("test_vit", TIMM, size=size)
    wanted = resample_abs_pos_embed(published["pos_embed"], [size[0] // 16, size[1] // 16], num_prefix_tokens=1)
    assert torch.equal(model.state_dict()["pos_embed"], wanted)


def test_what_is_drawn_afterwards_does_not_depend_on_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("test_resnet", tmp_path, monkeypatch)
    asked: dict[str, Any] = dict(name="test_resnet", in_chans=3, image_size=SIZE, kwargs={})
    model = build_encoder(**asked, drop_path_rate=0.0)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_pretrained(model, TIMM, **asked)
    assert torch.equal(torch.rand(4), expected)


def test_weights_that_lack_a_tensor_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm alone would leave it at its initial value, without a word, as the number of classes differs."""
    publish("test_resnet", tmp_path, monkeypatch, drop="layer1.0.conv1.weight")
    with pytest.raises(ValueError, match=r"timm's test_resnet.r160_in1k does not fit .*layer1\.0\.conv1\.weight"):
        load("test_resnet", TIMM)


def test_weights_of_another_form_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish("test_resnet", tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"does not fit this encoder: .*layer1\.1"):
        load("test_resnet", TIMM, kwargs={"layers": (2, 1, 1, 1)})


@pytest.mark.parametrize("error", [OSError("no route to host"), ValueError("not in the cache"), RuntimeError("502")])
def test_without_a_network_it_says_what_to_do(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(builder, "load_state_dict_from_hf", fail)
    with pytest.raises(ValueError, match=r"encoder\.pretrained=true: test_resnet\.r160_in1k cannot be had") as told:
        load("test_resnet", TIMM)
    message = str(told.value)
    assert "timm/test_resnet.r160_in1k" in message and str(error) in message and "give a file" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("resnet50d_nothing", "timm has no weights of 'resnet50d_nothing'"),
        ("convnextv2_small", "timm has no weights of 'convnextv2_small'; it has of convnextv2_"),
        ("resnet50.of_my_own", r"Invalid pretrained tag \(of_my_own\)"),
        ("convnextv2_ablation", "timm has no weights"),
    ],
)
def test_a_model_without_weights_is_refused_before_it_is_built(name: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        describe(TIMM, name)


def test_timms_normalisation_is_known_and_another_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    card = describe(TIMM, "test_resnet")
    asked: dict[str, Any] = dict(name="test_resnet", in_chans=3, kwargs={})
    check_card(TIMM, card, **asked, mean=[0.5] * 3, std=[0.5] * 3)
    check_card(TIMM, card, **asked | {"in_chans": 1}, mean=[0.3], std=[0.3])  # other channels: nothing to compare
    assert not caplog.text
    check_card(TIMM, card, **asked, mean=[0.4] * 3, std=[0.5] * 3)
    assert "data.mean=[0.4, 0.4, 0.4], but the encoder was pre-trained with [0.5, 0.5, 0.5]" in caplog.text


def saved(path: Path, name: str = "test_resnet", in_chans: int = 3, **kwargs: Any) -> dict[str, torch.Tensor]:
    state = timm.create_model(name, in_chans=in_chans, **kwargs).state_dict()
    if path.suffix == ".pth":
        torch.save({"state_dict": state}, path)
    else:
        save_file(state, path)
    return state


@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pth"])
def test_a_plain_timm_file_with_its_classifier_is_loaded(file: str, tmp_path: Path) -> None:
    state = saved(tmp_path / file)
    model, fresh = load("test_resnet", str(tmp_path / file))
    assert not fresh and all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_file_named_like_the_word_is_given_as_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = saved(tmp_path / "weights.pth")
    (tmp_path / "weights.pth").rename("true")
    model, _ = load("test_resnet", "./true")
    assert torch.equal(model.state_dict()["conv1.0.weight"], state["conv1.0.weight"])


def test_a_file_of_other_channels_is_adapted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As timm does it, and told; with a description, too."""
    state = saved(tmp_path / "weights.safetensors", in_chans=1)
    model, _ = load("test_resnet", str(tmp_path / "weights.safetensors"))
    wanted = adapt_input_conv(3, state["conv1.0.weight"], base_chans=1)
    assert torch.equal(model.state_dict()["conv1.0.weight"], wanted)
    card: dict[str, Any] = {"name": "test_resnet", "kwargs": {}, "in_chans": 1, "image_size": [64, 96]}
    with caplog.at_level("WARNING"):
        check_card("run", card, name="test_resnet", in_chans=3, kwargs={}, mean=[0.5] * 3, std=[0.5] * 3)
    assert "data.in_chans=3, but run was made with 1: its first layer is adapted" in caplog.text


def test_a_file_of_another_network_is_not_blamed_on_its_channels(tmp_path: Path) -> None:
    saved(tmp_path / "weights.safetensors", name="test_convnext")
    with pytest.raises(ValueError, match=r"no key of it is one of ResNet's\. It holds head\.fc"):
        load("test_resnet", str(tmp_path / "weights.safetensors"))


def test_a_square_position_embedding_is_resized(tmp_path: Path) -> None:
    state = saved(tmp_path / "weights.safetensors", name="test_vit", img_size=96)
    model: Any
    model, _ = load("test_vit", str(tmp_path / "weights.safetensors"))
    wanted = resample_abs_pos_embed(state["pos_embed"], [4, 6], num_prefix_tokens=1)
    assert torch.equal(model.pos_embed, wanted) and model.patch_embed.grid_size == (4, 6)
    assert torch.equal(model.state_dict()["blocks.0.norm1.weight"], state["blocks.0.norm1.weight"])


def test_windows_of_attention_stay_as_asked_for(tmp_path: Path) -> None:
    """timm's ``set_input_size`` would scale them with the image, which no card would tell."""
    kwargs: dict[str, Any] = dict(
        embed_dim=12, depths=(1, 1), num_heads=(1, 1), window_size=2, img_size=(64, 64), num_classes=0
    )
    name = "swin_tiny_patch4_window7_224"
    state = saved(tmp_path / "encoder.safetensors", name=name, **kwargs)
    (tmp_path / "encoder.json").write_text(
        '{"name": "swin_tiny_patch4_window7_224", "kwargs": {}, "in_chans": 3, "image_size": [64, 64]}'
    )
    del kwargs["img_size"], kwargs["num_classes"]
    model: Any
    model, _ = load(name, str(tmp_path), size=(128, 64), kwargs=kwargs)
    assert model.layers[0].blocks[0].window_size == (2, 2)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_what_a_source_means(tmp_path: Path) -> None:
    assert weights_file("some.pth") == Path("some.pth")
    with pytest.raises(ValueError, match=r"holds no encoder\.safetensors: has that run saved"):
        weights_file(tmp_path)
    saved(tmp_path / "encoder.safetensors")
    assert weights_file(str(tmp_path)) == tmp_path / "encoder.safetensors"
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        weights_file(tmp_path, whole=True)
    assert describe(str(tmp_path), "any") == {} == describe("", "any")
    (tmp_path / "encoder.json").write_text("[]")
    with pytest.raises(ValueError, match="does not describe an encoder"):
        read_card(tmp_path / "encoder.safetensors")
