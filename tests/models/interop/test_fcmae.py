"""ConvNeXt V2's checkpoints in all their forms."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models.convnext import checkpoint_filter_fn
from torch import nn

from models.encoder import build_encoder, load_encoder
from models.interop import (
    InteropError,
    convert_fcmae,
    export_fcmae,
)
from models.interop.__main__ import main
from tests.shared import SHARED, needs_shared

FCMAE_DEPTHS, FCMAE_DIMS, FCMAE_DECODER = (1, 2, 1, 1), (4, 6, 8, 10), 12


def official_fcmae(decoder: bool = True, in_chans: int = 3) -> dict[str, torch.Tensor]:
    """The names and shapes of the released pre-training with ordinary convolutions, written out, with random numbers."""
    depths, dims, width = FCMAE_DEPTHS, FCMAE_DIMS, FCMAE_DECODER

    def block(prefix: str, d: int) -> dict[str, tuple[int, ...]]:
        shapes = {"dwconv.weight": (d, 1, 7, 7), "norm.weight": (d,), "grn.gamma": (1, 1, 1, 4 * d)}
        shapes |= {"pwconv1.weight": (4 * d, d), "pwconv2.weight": (d, 4 * d), "grn.beta": (1, 1, 1, 4 * d)}
        shapes |= {
            f"{name}.bias": (4 * d if name == "pwconv1" else d,) for name in ("dwconv", "norm", "pwconv1", "pwconv2")
        }
        return {f"{prefix}.{name}": shape for name, shape in shapes.items()}

    shapes: dict[str, tuple[int, ...]] = {}
    for stage, d in enumerate(dims):
        before = dims[stage - 1]
        here = f"encoder.downsample_layers.{stage}"
        norm, conv = (f"{here}.{int(stage == 0)}", f"{here}.{int(stage > 0)}")
        shapes[f"{conv}.weight"] = (d, before, 2, 2) if stage else (d, in_chans, 4, 4)
        shapes |= {f"{conv}.bias": (d,), **{f"{norm}.{kind}": (before if stage else d,) for kind in ("weight", "bias")}}
        for number in range(depths[stage]):
            shapes |= block(f"encoder.stages.{stage}.{number}", d)
    if decoder:
        shapes |= {"mask_token": (1, width, 1, 1), "proj.weight": (width, dims[-1], 1, 1), "proj.bias": (width,)}
        shapes |= {"pred.weight": (32 * 32 * in_chans, width, 1, 1), "pred.bias": (32 * 32 * in_chans,)}
        shapes |= block("decoder.0", width) | block("decoder.1", width)
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def sparse_form(official: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As MinkowskiEngine's layers hold it (goldens: official_sparse_keys); the stem and the decoder are ordinary there too."""
    found = {}
    for name, value in official.items():
        head, _, kind = name.rpartition(".")
        if not name.startswith("encoder.") or name.startswith("encoder.downsample_layers.0."):
            found[name] = value
        elif value.dim() == 4 and "grn" not in name:
            out, inner, rows, columns = value.shape
            kernel = torch.empty((rows * columns, out) if inner == 1 else (rows * columns, inner, out))
            for row in range(rows):
                for column in range(columns):
                    site = value[:, :, row, column]  # (out, in); the first coordinate of a site runs fastest
                    kernel[column * rows + row] = site[:, 0] if inner == 1 else site.t()
            found[f"{head}.kernel"] = kernel
        elif "pwconv" in name:
            found[f"{head}.linear.{kind}"] = value
        elif "norm" in name or (
            value.dim() == 1 and f"{head}.weight" in official and official[f"{head}.weight"].dim() == 1
        ):
            found[f"{head}.ln.{kind}"] = value
        else:  # gamma, beta and the convolutions' biases
            found[name] = value.reshape(1, -1)
    return found


def exported_form(official: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The authors' export: no ``encoder.``, and two more axes on the decoder's gamma and beta."""
    return {
        name.removeprefix("encoder."): value[None, None] if "decoder" in name and "grn" in name else value
        for name, value in official.items()
    }


FCMAE_FORMS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "ordinary": dict,
    "sparse": sparse_form,
    "exported": exported_form,
}


@pytest.mark.parametrize("form", FCMAE_FORMS)
def test_fcmae_round_trip(form: str) -> None:
    """Every form holds the same network; nothing is lost on the way there and back."""
    official = official_fcmae()
    config, state = convert_fcmae(FCMAE_FORMS[form](official))
    assert config["name"] == "convnextv2_tiny" and config["kwargs"] == {"depths": FCMAE_DEPTHS, "dims": FCMAE_DIMS}
    assert {k: config[k] for k in ("in_chans", "num_classes", "decoder_dim", "decoder_depth", "decoder_grn")} == {
        **{"in_chans": 3, "num_classes": 0, "decoder_dim": FCMAE_DECODER},
        **{"decoder_depth": 2, "decoder_grn": True},
    }
    assert config["initial"] == ["encoder.head.norm.weight", "encoder.head.norm.bias"]
    assert state["encoder.head.norm.weight"].eq(1).all() and not state["encoder.head.norm.bias"].any()
    again = export_fcmae(state)
    assert again.keys() == official.keys()
    assert all(torch.equal(again[name], value) for name, value in official.items())


def fcmae_network(config: dict[str, Any], **kwargs: Any) -> nn.Module:
    return build_encoder(
        config["name"],
        in_chans=config["in_chans"],
        num_classes=config["num_classes"],
        kwargs=config["kwargs"] | kwargs,
        image_size=(64, 64),
        drop_path_rate=0.0,
    )


@pytest.mark.parametrize("conv_mlp", [False, True])
@pytest.mark.parametrize("decoder", [True, False])
def test_fcmae_encoder_is_plain_timm(decoder: bool, conv_mlp: bool) -> None:
    """With or without a decoder in the file; as timm's own reading of the authors' names has it."""
    official = official_fcmae(decoder, in_chans=1)
    config, state = convert_fcmae(official)
    if decoder:
        state = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    else:
        assert "decoder_dim" not in config and config["initial"] == ["head.norm.weight", "head.norm.bias"]
    model: Any = fcmae_network(config)
    model.load_state_dict(state, strict=True)
    timms = fcmae_network(config, conv_mlp=conv_mlp)
    known = exported_form(official_fcmae(decoder=False, in_chans=1)) if not decoder else exported_form(official)
    known = {name: value for name, value in known.items() if name.startswith(("downsample_layers.", "stages."))}
    missing = timms.load_state_dict(checkpoint_filter_fn(known, timms), strict=False)
    assert missing.missing_keys == ["head.norm.weight", "head.norm.bias"] and not missing.unexpected_keys
    x = torch.randn(2, 1, 64, 64)
    torch.testing.assert_close(model.forward_features(x), timms.forward_features(x), rtol=1e-4, atol=1e-4)  # type: ignore[operator]


def test_fine_tuned_convnextv2_keeps_its_head() -> None:
    official = exported_form(official_fcmae(decoder=False))
    draw = torch.Generator().manual_seed(1)
    for name, shape in {"norm.weight": (10,), "norm.bias": (10,), "head.weight": (7, 10), "head.bias": (7,)}.items():
        official[name] = torch.randn(shape, generator=draw)
    config, state = convert_fcmae(official)
    assert config["num_classes"] == 7 and config["initial"] == []
    assert torch.equal(state["head.fc.weight"], official["head.weight"])
    assert torch.equal(state["head.norm.bias"], official["norm.bias"])
    model = fcmae_network(config)
    model.load_state_dict(state, strict=True)
    timms = fcmae_network(config)
    timms.load_state_dict(checkpoint_filter_fn(official, timms), strict=True)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), timms(x), rtol=1e-4, atol=1e-4)


def test_published_convnextv2_sizes_are_known_by_name() -> None:
    """The sizes of a file find timm's model, whose 1x1 convolutions the small ones have are filled from matrices."""
    for name in ("atto", "femto", "pico", "nano", "tiny", "base", "large", "huge"):
        with torch.device("meta"):
            model = build_encoder(
                f"convnextv2_{name}", in_chans=3, num_classes=1000, image_size=(64, 64), drop_path_rate=0.0
            )
        official = {
            key.removeprefix("encoder."): torch.empty(value.shape, device="meta")
            for key, value in export_fcmae(
                {f"encoder.{key}": value for key, value in model.state_dict().items() if not key.startswith("head.")}
            ).items()
        }
        dim = model.num_features
        for key, shape in {
            "norm.weight": (dim,),
            "norm.bias": (dim,),
            "head.weight": (1000, dim),
            "head.bias": (1000,),
        }.items():
            official[key] = torch.empty(shape, device="meta")
        config, state = convert_fcmae(official)
        assert (config["name"], config["kwargs"]) == (f"convnextv2_{name}", {})
        assert {key: value.shape for key, value in state.items()} == {
            key: value.shape for key, value in model.state_dict().items()
        }


@needs_shared("goldens")
@pytest.mark.parametrize("form", ["keys", "official_sparse_keys", "official_export_keys"])
def test_released_fcmae_names_are_read(form: str) -> None:
    """The names and shapes that the released code itself writes, in its three forms."""
    with np.load(SHARED / "goldens" / "fcmae_atto.npz", allow_pickle=False) as file:
        names = [(name, shape) for name, shape, *_ in json.loads(str(file[form]))]
    config, state = convert_fcmae({name: torch.empty(shape) for name, shape in names})
    assert config["name"] == "convnextv2_atto" and config["kwargs"] == {}
    assert (config["decoder_dim"], config["decoder_depth"], config["decoder_grn"]) == (512, 1, True)
    assert len(state) == len(names) + len(config["initial"]) == 153


@pytest.mark.parametrize("form", FCMAE_FORMS)
def test_fcmae_is_converted_strictly(form: str) -> None:
    official = FCMAE_FORMS[form](official_fcmae())
    key = next(name for name in official if "stages.1.1.pwconv2" in name and name.endswith("weight"))
    ours = "stages.1.1.pwconv2.weight"
    with pytest.raises(InteropError, match=f"ConvNeXt V2 checkpoint does not fit; 1 missing keys: {ours}") as caught:
        convert_fcmae({name: value for name, value in official.items() if name != key})
    assert caught.value.missing == [ours] and caught.value.unexpected == []
    with pytest.raises(InteropError, match=r"1 unexpected keys: stages\.0\.0\.extra"):
        convert_fcmae({**official, "stages.0.0.extra": torch.zeros(1)})
    with pytest.raises(InteropError, match=rf"another shape: {ours} \(1, 1\), expected"):
        convert_fcmae({**official, key: torch.zeros(1, 1)})
    with pytest.raises(InteropError, match=r"missing keys: decoder\.0\.dwconv\.weight"):
        convert_fcmae({name: value for name, value in official.items() if not name.startswith("decoder.0.")})
    gamma = next(name for name in official if "decoder.1.grn.gamma" in name)
    with pytest.raises(InteropError, match=r"another shape: decoder\.1\.grn\.gamma"):
        convert_fcmae({**official, gamma: torch.zeros(2, 24)})
    twice = "encoder.downsample_layers.0.0.bias" if form == "exported" else "downsample_layers.0.0.bias"
    with pytest.raises(InteropError, match="that tensor twice"):
        convert_fcmae({**official, twice: torch.zeros(4)})
    with pytest.raises(InteropError, match=r"missing keys: downsample_layers.0.0.weight"):
        convert_fcmae({"head.weight": torch.zeros(1)})


@pytest.mark.parametrize("whole", [False, True])
def test_fcmae_command(whole: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint of the released training, its command line beside the weights, becomes what encoder.pretrained loads."""
    official, out = official_fcmae(), tmp_path / "out.safetensors"
    saved = {
        "model": sparse_form(official),
        "epoch": 3,
        "args": argparse.Namespace(blr=1.5e-4),
        "scaler": {"scale": 1.0},
    }
    torch.save(saved, tmp_path / "checkpoint-3.pth")
    words = ["fcmae", str(tmp_path / "checkpoint-3.pth"), str(out), *(["--whole"] if whole else [])]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "encoder.name=convnextv2_tiny" in said and "initial values: head.norm.weight, head.norm.bias" in said
    config, state = convert_fcmae(official)
    if whole:
        assert all(torch.equal(value, state[name]) for name, value in load_file(out).items())
        assert load_file(out).keys() == state.keys()
        return
    model = fcmae_network(config)
    load_encoder(model, out)
    assert torch.equal(model.state_dict()["stem.0.weight"], official["encoder.downsample_layers.0.0.weight"])
    torch.save({"model": exported_form(official_fcmae(decoder=False))}, tmp_path / "encoder.pt")
    assert main(["fcmae", str(tmp_path / "encoder.pt"), str(tmp_path / "whole.safetensors"), "--whole"]) == 2
    assert "holds the encoder alone" in capsys.readouterr().err
