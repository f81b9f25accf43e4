"""What a pre-training run starts from, and that what it hands on is plain timm."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from engine.config import ConfigError, load
from models.encoder import stage_features
from pretrain.export import save_encoder
from pretrain.methods import METHODS, SCHEMAS
from tests.models.published import publish

H, W = 64, 96

NETWORKS: dict[str, dict[str, Any]] = {
    "resnet50": {"layers": [1, 1, 1, 1], "channels": [8, 12, 12, 16]},
    "convnext_tiny": {"depths": [1, 1, 2, 1], "dims": [8, 12, 12, 16]},
    "mobilenetv3_small_050": {},
}


def build(method: str, name: str, *overrides: str, kwargs: dict[str, Any] | None = None) -> Any:
    """A small run of SparK or FCMAE."""
    settings = [f"data.image_size=[{H},{W}]", "data.mean=[0.5,0.4,0.3]", "data.std=[0.2,0.25,0.3]", "optim.lr=1e-3"]
    settings += [f"encoder.name={name}", f"encoder.kwargs={json.dumps(kwargs or {})}", f"{method}.decoder_dim=64"]
    config: Any = load(SCHEMAS[method], {"method": method}, [*settings, *overrides], "test")
    METHODS[method].check(config)
    torch.manual_seed(0)
    return METHODS[method](config)


def images(count: int = 2) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {"image": torch.randint(0, 256, (count, 3, H, W), dtype=torch.uint8, generator=draw)}


@pytest.mark.parametrize(
    ("name", "untouched"),
    [
        ("resnet50", []),
        ("convnext_tiny", ["head.norm.weight", "head.norm.bias"]),
        ("mobilenetv3_small_050", ["conv_head.weight", "conv_head.bias"]),
    ],
)
def test_a_trained_encoder_is_plain_timm(name: str, untouched: list[str], tmp_path: Path) -> None:
    """The file alone, in timm alone, gives the features of every stage; what was never trained is named, and as it was."""
    method = build("spark", name, "spark.num_stages=3", kwargs=NETWORKS[name])
    before = {key: value.clone() for key, value in method.encoder.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for step in range(2):
        optimizer.zero_grad()
        method.train()(images(), torch.Generator().manual_seed(step))["loss"].backward()
        optimizer.step()
    method.export(tmp_path)
    card = json.loads((tmp_path / "encoder.json").read_text())
    assert card["untouched"] == untouched
    assert (card["method"], card["name"], card["image_size"]) == ("spark", name, [H, W])

    model = timm.create_model(
        name, num_classes=0, checkpoint_path=str(tmp_path / "encoder.safetensors"), **NETWORKS[name]
    ).eval()
    x = torch.randn(2, 3, H, W)
    found, expected = stage_features(model, x), stage_features(method.encoder.eval(), x)
    assert len(found) >= 4 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    whole: Any = model
    assert torch.equal(whole.forward_features(x), method.encoder.forward_features(x))

    state = load_file(tmp_path / "encoder.safetensors")
    trained = [key for key, _ in method.encoder.named_parameters() if key not in untouched]
    assert all(torch.equal(state[key], before[key]) for key in untouched)
    assert all(not torch.equal(state[key], before[key]) for key in trained if state[key].ndim > 1)


def test_a_moving_average_names_the_same_tensors(tmp_path: Path) -> None:
    """It is what is exported where there is one."""
    from timm.utils import ModelEmaV3

    method = build("spark", "convnext_tiny", kwargs=NETWORKS["convnext_tiny"])
    average: Any = ModelEmaV3(method).module
    save_encoder(average.encoder, method.config, tmp_path)
    assert json.loads((tmp_path / "encoder.json").read_text())["untouched"] == ["head.norm.weight", "head.norm.bias"]


@pytest.mark.parametrize(("method", "name"), [("spark", "test_resnet"), ("fcmae", "test_convnext")])
@pytest.mark.parametrize("in_chans", [3, 1])
def test_pre_training_starts_from_timms_own_weights(
    method: str, name: str, in_chans: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = publish(name, tmp_path, monkeypatch)
    norm = ["spark.densify_norm=layer"] if method == "spark" else []
    channels = [f"data.in_chans={in_chans}", f"data.mean={[0.5] * in_chans}", f"data.std={[0.5] * in_chans}"]
    built = build(method, name, "encoder.pretrained=true", *channels, *norm)
    own = built.encoder.state_dict()
    first = "stem.0.weight" if method == "fcmae" else "conv1.0.weight"
    assert own[first].shape[1] == in_chans
    assert all(torch.equal(value, published[key]) for key, value in own.items() if key != first)
    torch.testing.assert_close(own[first].sum(1), published[first].sum(1), rtol=1e-4, atol=1e-5)
    # What is drawn for the decoder is what it would be without.
    scratch = build(method, name, *channels, *norm)
    assert all(
        torch.equal(value, scratch.decoder.state_dict()[key]) for key, value in built.decoder.state_dict().items()
    )
    assert not torch.equal(scratch.encoder.state_dict()[first], own[first])


def test_a_run_continues_another_ones_encoder(tmp_path: Path) -> None:
    """From a run folder, or a plain file with a classifier; a network of another form is refused before it is built."""
    kwargs = NETWORKS["convnext_tiny"]
    first = build("spark", "convnext_tiny", "spark.densify_norm=layer", kwargs=kwargs)
    first.export(tmp_path)
    second = build("fcmae", "convnext_tiny", f"encoder.pretrained={tmp_path}", kwargs=kwargs)
    state = first.encoder.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in second.encoder.state_dict().items())

    whole = timm.create_model("convnext_tiny", num_classes=5, **kwargs).state_dict()
    save_file(whole, plain := tmp_path / "plain.safetensors")
    third = build("spark", "convnext_tiny", f"encoder.pretrained={plain}", kwargs=kwargs)
    assert all(torch.equal(value, whole[key]) for key, value in third.encoder.state_dict().items())

    with pytest.raises(ConfigError, match=r"encoder\.name is 'resnet50', but .* was made with 'convnext_tiny'"):
        build("spark", "resnet50", f"encoder.pretrained={tmp_path}", kwargs=NETWORKS["resnet50"])
    with pytest.raises(ConfigError, match=r"encoder\.kwargs is .* was made with"):
        build("spark", "convnext_tiny", f"encoder.pretrained={tmp_path}", kwargs=kwargs | {"kernel_sizes": 5})
    grey = ["data.in_chans=1", "data.mean=[0.5]", "data.std=[0.5]"]
    for source, key in ((tmp_path, state["stem.0.weight"]), (plain, whole["stem.0.weight"])):
        fourth = build("spark", "convnext_tiny", f"encoder.pretrained={source}", *grey, kwargs=kwargs)
        # One channel sees the sum of three, as timm has it.
        torch.testing.assert_close(fourth.encoder.state_dict()["stem.0.weight"], key.sum(dim=1, keepdim=True))


def test_another_normalisation_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    method = build("spark", "convnext_tiny", kwargs=NETWORKS["convnext_tiny"])
    changed = dataclasses.replace(method.config.data, mean=[0.1, 0.2, 0.3])
    save_encoder(method.encoder, dataclasses.replace(method.config, data=changed), tmp_path)
    caplog.clear()
    build("spark", "convnext_tiny", f"encoder.pretrained={tmp_path}", kwargs=NETWORKS["convnext_tiny"])
    assert "data.mean=[0.5, 0.4, 0.3], but the encoder was pre-trained with [0.1, 0.2, 0.3]" in caplog.text
    assert "data.std" not in caplog.text


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="timm has no weights of 'convnextv2_small'"):
        build("fcmae", "convnextv2_small", "encoder.pretrained=true")
