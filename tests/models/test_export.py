"""Encoders for other libraries: the same features there, or a refusal by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from models.encoder import build_encoder
from models.interop import InteropError, export_torchvision, torchvision_name
from models.interop.__main__ import main
from models.interop.torchvision import TORCHVISION

RESNETS = ["resnet18", "resnet50", "resnext50_32x4d"]


def roused(name: str, num_classes: int = 0, seed: int = 0, **kwargs: Any) -> Any:
    """A timm network in float64 whose every tensor matters: at first norms and layer scales hide whole branches."""
    model = build_encoder(
        name, in_chans=3, image_size=(64, 64), drop_path_rate=0.0, num_classes=num_classes, kwargs=kwargs
    ).double()
    draw = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=draw, dtype=value.dtype)
            value.copy_(noise / value[0].numel() ** 0.5 if value.ndim > 1 else 1 + 0.3 * noise.clamp(-2, 2))
    return model.eval()


def torchvision_network(kind: str, num_classes: int, size: int = 224) -> Any:
    """torchvision's, without its last layer where there are no classes."""
    twin = TORCHVISION[kind]
    sized = {"image_size": size} if kind.startswith("vit_") else {}
    model: Any = torchvision.models.get_model(twin.name, num_classes=num_classes or 1, **sized)
    if not num_classes:
        model.set_submodule(twin.last, nn.Identity())
    return model


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("kind", [*RESNETS, "convnext_tiny"])
def test_torchvision_gives_the_same(kind: str, num_classes: int) -> None:
    ours = roused(kind, num_classes)
    theirs = torchvision_network(kind, num_classes).double().eval()
    theirs.load_state_dict(export_torchvision(kind, ours.state_dict()), strict=True)
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        expected, found = ours(x), theirs(x)
    assert expected.std() > 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", list(TORCHVISION))
def test_every_torchvision_name_loads_strictly(kind: str) -> None:
    """By name and shape; the numbers are those of the smaller ones above."""
    with torch.device("meta"):
        ours = build_encoder(kind, in_chans=3, image_size=(224, 224), drop_path_rate=0.0)
        torchvision_network(kind, 0).load_state_dict(
            export_torchvision(kind, ours.state_dict()), strict=True, assign=True
        )


@pytest.mark.parametrize(
    ("name", "kwargs", "told"),
    [
        ("efficientnet_b0", {}, "efficientnet_b0 .*does not have that very network; it has resnet18, .*convnext_large"),
        ("resnet200", {}, "does not have that very network"),
        ("convnextv2_tiny", {}, "does not have that very network"),
        ("resnet50", {"output_stride": 8}, r"cannot be built with encoder\.kwargs={'output_stride': 8}"),
        ("resnet50", {"drop_block_rate": 0.1, "layers": [1, 1, 1, 1]}, r"encoder\.kwargs={'layers': \[1, 1, 1, 1\]}"),
    ],
)
def test_what_torchvision_does_not_have_is_refused(name: str, kwargs: dict[str, Any], told: str) -> None:
    with pytest.raises(InteropError, match=told):
        torchvision_name(name, kwargs)
    assert torchvision_name("resnet50.a1_in1k", {"drop_path_rate": 0.1}) == "resnet50"


def test_torchvision_is_given_all_or_nothing() -> None:
    with torch.device("meta"):
        grey = build_encoder("resnet18", in_chans=1, image_size=(64, 64), drop_path_rate=0.0).state_dict()
        state = build_encoder("resnet18", in_chans=3, image_size=(64, 64), drop_path_rate=0.0).state_dict()
    with pytest.raises(InteropError, match=r"another shape: conv1\.weight \(64, 1, 7, 7\).*3 input channels"):
        export_torchvision("resnet18", grey)
    del state["bn1.running_mean"]
    with pytest.raises(InteropError, match=r"missing keys: bn1\.running_mean"):
        export_torchvision("resnet18", state | {"fc.weight": torch.zeros(2, 512), "fc.bias": torch.zeros(2)})


# ----------------------------------------------------------------------------------------------------------- command line


def run_folder(folder: Path, model: nn.Module, name: str, **card: Any) -> Path:
    """What a run leaves."""
    folder.mkdir()
    save_file(model.state_dict(), folder / "encoder.safetensors")
    described = {"name": name, "kwargs": {}, "in_chans": 3, "image_size": [64, 64], "method": "spark", "untouched": []}
    (folder / "encoder.json").write_text(json.dumps(described | card))
    return folder


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_run_is_written_for_torchvision(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = roused("convnext_tiny")
    run = run_folder(tmp_path / "run", model, "convnext_tiny", untouched=["head.norm.weight", "head.norm.bias"])
    out = tmp_path / f"theirs{suffix}"
    assert main(["export", str(run), str(out), "--to", "torchvision"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"wrote {out}: torchvision.models.convnext_tiny() loads it after")
    assert "model.classifier[2] = torch.nn.Identity()" in said
    assert "no classifier.2.weight and classifier.2.bias" in said
    assert "never trained, as they were before pre-training: classifier.0.weight, classifier.0.bias" in said
    theirs = torchvision_network("convnext_tiny", 0).double().eval()
    theirs.load_state_dict(load_file(out) if suffix != ".pth" else torch.load(out, weights_only=True), strict=True)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), model(x), rtol=1e-9, atol=1e-9)


def test_a_fine_tuned_model_keeps_its_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "run", model := roused("resnet18", num_classes=5), "resnet18")
    (run / "encoder.safetensors").rename(run / "model.safetensors")
    out = tmp_path / "theirs.safetensors"
    words = ["export", str(run / "model.safetensors"), str(out), "--to", "torchvision", "--name", "resnet18"]
    assert main(words) == 0
    assert "torchvision.models.resnet18(num_classes=5) loads it\n" in capsys.readouterr().out
    assert torch.equal(load_file(out)["fc.weight"], model.fc.weight)


@pytest.mark.parametrize(
    ("name", "kwargs", "num_classes"),
    [
        ("resnet18", {"layers": [1, 1, 1, 1]}, 0),
        ("test_vit", {"patch_size": 8}, 0),
        ("test_convnext", {}, 4),
        ("mixer_s32_224", {}, 0),
    ],
)
def test_the_call_that_is_told_loads_it_in_timm(
    name: str, kwargs: dict[str, Any], num_classes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = roused(name, num_classes, **kwargs).float()
    run = run_folder(tmp_path / "run", model, name, kwargs=kwargs)
    out = tmp_path / "out.safetensors"
    assert main(["export", str(run), str(out), "--to", "timm"]) == 0
    call = capsys.readouterr().out.removeprefix(f"wrote {out}: ").removesuffix(" loads it\n")
    _, _, words = call.partition(f"timm.create_model('{name}', ")
    arguments: dict[str, Any] = eval(f"dict({words}", {"__builtins__": {}, "dict": dict})
    loaded = timm.create_model(name, **arguments).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(x), model(x))


def test_export_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = roused("test_convnext"), str(tmp_path / "out.safetensors")
    run = run_folder(tmp_path / "run", model, "test_convnext")
    save_file(model.state_dict(), bare := tmp_path / "bare.safetensors")
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = {
        "does not have that very network": [str(run), out, "--to", "torchvision"],
        "was made with test_convnext: leave out --name": [str(run), out, "--to", "timm", "--name", "resnet18"],
        "give --name": [str(bare), out, "--to", "timm"],
        "end in .safetensors or .pth": [str(run), str(tmp_path / "out.npz"), "--to", "timm"],
        "holds no encoder.safetensors": [str(empty), out, "--to", "timm"],
        "cannot be read as weights": [str(tmp_path / "nothing.pth"), out, "--to", "timm", "--name", "resnet18"],
        "network of ours": [str(bare), out, "--to", "timm", "--name", "convnextv2_ablation"],
        "no key of it is one of ResNet's": [str(bare), out, "--to", "timm", "--name", "test_resnet"],
        "is no timm model": [str(bare), out, "--to", "timm", "--name", "resnetx"],
    }
    for message, arguments in cases.items():
        assert main(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
    assert not Path(out).exists()
