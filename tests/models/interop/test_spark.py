"""SparK's checkpoints, whole and exported."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from models.interop import (
    InteropError,
    convert_spark,
)
from models.interop.__main__ import main
from tests.models.slow_spark import CNN, convnext_shapes, filled, keys_of, resnet_shapes, spark_shapes
from tests.shared import SHARED, needs_shared

SPARK_ENCODERS: dict[str, tuple[list[tuple[str, list[int]]], tuple[int, ...], str]] = {
    "resnet": (list(resnet_shapes((1, 2, 1, 1), (4, 6, 8, 10), bottleneck=True)), (16, 24, 32, 40), "batch"),
    "convnext": (list(convnext_shapes((1, 2, 1, 1), (8, 12, 16, 20))), (8, 12, 16, 20), "layer"),
}


def official_spark(name: str) -> dict[str, torch.Tensor]:
    """A whole released state of a small network."""
    encoder, widths, norm = SPARK_ENCODERS[name]
    return filled(keys_of(spark_shapes(encoder, widths, norm, dim=32, size=64)))


def official_export(name: str) -> dict[str, torch.Tensor]:
    """The weights-only export of the same."""
    return {key.removeprefix(CNN): value for key, value in official_spark(name).items() if key.startswith(CNN)}


@pytest.mark.parametrize("name", SPARK_ENCODERS)
def test_spark_settings_are_read_from_the_tensors(name: str) -> None:
    config, state = convert_spark(official_spark(name))
    sizes = {"layers": (1, 2, 1, 1), "channels": (4, 6, 8, 10)}
    assert config["kwargs"] == (sizes if name == "resnet" else {"depths": (1, 2, 1, 1), "dims": (8, 12, 16, 20)})
    assert config["name"] == {"resnet": "resnet50", "convnext": "convnext_tiny"}[name]
    assert (config["in_chans"], config["num_stages"], config["decoder_dim"]) == (3, 4, 32)
    assert config["densify_norm"] == SPARK_ENCODERS[name][2]
    assert {key.partition(".")[0] for key in state} == {
        "encoder",
        "densify",
        "decoder",
    }  # the three dead buffers are gone
    # The encoder is the export, under the same names but for the prefix.
    export_config, export = convert_spark(official_export(name))
    assert export_config["name"] == config["name"] and "decoder_dim" not in export_config
    assert export.keys() == {key.removeprefix("encoder.") for key in state if key.startswith("encoder.")}
    assert all(torch.equal(value, state[f"encoder.{key}"]) for key, value in export.items())
    encoder = timm.create_model(config["name"], num_classes=0, **config["kwargs"])
    encoder.load_state_dict(export, strict=True)
    assert list(export_config["initial"]) == (["head.norm.weight", "head.norm.bias"] if name == "convnext" else [])
    for key in export_config["initial"]:
        assert torch.equal(export[key], torch.full_like(export[key], float(key.endswith("weight"))))


@pytest.mark.parametrize("name", SPARK_ENCODERS)
@pytest.mark.parametrize("form", [official_spark, official_export], ids=["whole", "export"])
def test_spark_is_converted_strictly(form: Callable[[str], dict[str, torch.Tensor]], name: str) -> None:
    official = form(name)
    for key in [key for key in official if key not in ("imn_m", "imn_s", "norm_black")][
        :: 13 if len(official) > 99 else 7
    ]:
        # Where a size is read from the lost tensor the message may name others of its place; it is never silent.
        with pytest.raises(InteropError):
            convert_spark({other: value for other, value in official.items() if other != key})
        wrong = torch.zeros(*official[key].shape, 3)
        with pytest.raises(InteropError):
            convert_spark({**official, key: wrong})
    lost = next(key for key in official if key.endswith(("layer2.1.conv3.weight", "stages.1.1.pwconv2.bias")))
    with pytest.raises(InteropError) as caught:
        convert_spark({key: value for key, value in official.items() if key != lost})
    assert caught.value.missing == [lost] and not caught.value.unexpected and not caught.value.misshapen
    with pytest.raises(InteropError) as caught:
        convert_spark({**official, "fc.weight": torch.zeros(1000, 40)})
    assert caught.value.unexpected == ["fc.weight"] and not caught.value.missing
    with pytest.raises(InteropError, match=r"missing keys: conv1.weight \(found 1 keys: weight\)"):
        convert_spark({"weight": torch.zeros(1)})


@pytest.mark.parametrize(("name", "kind"), [("resnet50", "resnet"), ("convnext_small", "convnext")])
@needs_shared("goldens")
def test_released_spark_exports_have_plain_timm_names(name: str, kind: str) -> None:
    """Keys and shapes of the released files themselves."""
    listed = json.loads((SHARED / "goldens" / "spark_timm_style_keys.json").read_text())[name]
    config, state = convert_spark({key: torch.zeros(shape) for key, shape in listed})
    assert (config["name"], config["kwargs"]) == (name, {})
    with torch.device("meta"):
        own = timm.create_model(name, num_classes=0).state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in own.items()}
    assert len(config["initial"]) == (2 if kind == "convnext" else 0)


@pytest.mark.parametrize(("layers", "bottleneck", "name"), [((2, 2, 2, 2), False, "resnet18"), ((3, 4, 23, 3), True, "resnet101"), ((3, 8, 36, 3), True, "resnet152"), ((3, 24, 36, 3), True, "resnet200")])  # fmt: skip
def test_released_resnets_are_known_by_name(layers: tuple[int, ...], bottleneck: bool, name: str) -> None:
    shapes = resnet_shapes(layers, (64, 128, 256, 512), bottleneck)
    config, _ = convert_spark({key: torch.empty(shape, device="meta") for key, shape in shapes})
    assert (config["name"], config["kwargs"]) == (name, {})


@pytest.mark.parametrize(("dims", "name"), [((128, 256, 512, 1024), "base"), ((192, 384, 768, 1536), "large")])
def test_released_convnexts_are_known_by_name(dims: tuple[int, ...], name: str) -> None:
    shapes = convnext_shapes((3, 3, 27, 3), dims)
    config, _ = convert_spark({key: torch.empty(shape, device="meta") for key, shape in shapes})
    assert (config["name"], config["kwargs"]) == (f"convnext_{name}", {})


@pytest.mark.parametrize("name", SPARK_ENCODERS)
def test_spark_command_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A training checkpoint with all that the released code saves beside the weights, and the weights-only file."""
    whole, export = tmp_path / "spark_style.pth", tmp_path / "timm_style.pth"
    state: dict[str, Any] = {**official_spark(name), "config": {"hierarchy": 4, "sbn": True}}
    torch.save({"args": "{'bs': 4096}", "epoch": 1599, "module": state, "optimizer": {"state": {}}}, whole)
    torch.save(official_export(name), export)
    for number, source in enumerate((whole, export)):
        out = tmp_path / f"{number}.safetensors"
        assert main(["spark", str(source), str(out)]) == 0
        told = capsys.readouterr().out
        assert ("never trained, at their initial values: head.norm.weight, head.norm.bias" in told) == (
            name == "convnext"
        )
        words = dict(word.split("=", 1) for word in re.findall(r"encoder\.(?:name=\w+|kwargs={.*?})", told))
        kwargs: Any = OmegaConf.to_object(OmegaConf.create(words["encoder.kwargs"]))
        encoder = timm.create_model(words["encoder.name"], num_classes=0, checkpoint_path=str(out), **kwargs)
        assert torch.equal(next(encoder.parameters()), next(iter(official_export(name).values())))
    everything = tmp_path / "whole.safetensors"
    assert main(["spark", str(whole), str(everything), "--whole"]) == 0
    assert load_file(everything).keys() == convert_spark(official_spark(name))[1].keys()
    assert main(["spark", str(export), str(tmp_path / "none.safetensors"), "--whole"]) == 2
    assert "without --whole" in capsys.readouterr().err and not (tmp_path / "none.safetensors").exists()
    (tmp_path / "text.pth").write_text("hello")
    assert main(["spark", str(tmp_path / "text.pth"), str(tmp_path / "none.safetensors")]) == 2
    assert "cannot be read as weights" in capsys.readouterr().err
