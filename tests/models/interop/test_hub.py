"""Folders for the Hugging Face hub load in timm, offline, as the same network; and ours read them again."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import models
from models.encoder import build_encoder
from models.interop.__main__ import main
from models.interop.card import read_card
from models.pretrained import describe, load_reported
from tests.launch import ROOT
from tests.models.interop import official

CASES: list[tuple[str, dict[str, Any], tuple[int, int], int, int]] = [
    ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 12, 16, 20]}, (64, 96), 3, 0),
    ("test_vit", {"patch_size": 8, "global_pool": "avg"}, (64, 96), 1, 4),
    ("test_convnext", {}, (64, 64), 5, 3),
    ("beit_base_patch16_224", official.BEIT, (64, 96), 3, 2),
    ("convnextv2_ablation", {"layer": "se", "depths": [1, 1, 1, 1], "dims": [8, 12, 16, 20]}, (64, 64), 3, 0),
    ("convvit_small", {**official.CONVVIT, "kernel_size": 7}, (64, 96), 2, 3),
]


def run_folder(
    folder: Path, name: str, kwargs: dict[str, Any], size: tuple[int, int], in_chans: int, classes: int
) -> Any:
    """What a run leaves; its network."""
    torch.manual_seed(3)
    model = build_encoder(
        name, in_chans=in_chans, image_size=size, drop_path_rate=0.0, num_classes=classes, kwargs=kwargs
    ).eval()
    noise = official.noise({key: value for key, value in model.state_dict().items() if value.is_floating_point()})
    model.load_state_dict(
        {k: v.abs() + 0.5 if k.endswith("running_var") else v for k, v in noise.items()}, strict=False
    )
    folder.mkdir()
    kind = "model" if classes else "encoder"
    save_file(model.state_dict(), folder / f"{kind}.safetensors")
    described = {"name": name, "kwargs": kwargs, "in_chans": in_chans, "image_size": list(size), "untouched": []}
    described |= {"mean": [0.1] * in_chans, "std": [0.2] * in_chans, "method": "spark", "drop_path_rate": 0.3}
    if classes:
        described["class_names"] = [f"class {i}" for i in range(classes)]
    (folder / f"{kind}.json").write_text(json.dumps(described))
    return model


@pytest.mark.parametrize(("name", "kwargs", "size", "in_chans", "classes"), CASES)
def test_a_folder_loads_in_timm(
    name: str, kwargs: dict[str, Any], size: tuple[int, int], in_chans: int, classes: int, tmp_path: Path
) -> None:
    """Identical outputs, image settings and class names; exported once more, the same files."""
    model = run_folder(tmp_path / "run", name, kwargs, size, in_chans, classes)
    out = tmp_path / "hub"
    assert main(["export", str(tmp_path / "run"), str(out), "--to", "hub", *(["--whole"] if classes else [])]) == 0
    assert models and sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded: Any = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    x = torch.randn(2, in_chans, *size)
    assert torch.equal(loaded(x), model(x)) and loaded(x).std() > 0
    cfg = loaded.pretrained_cfg
    assert (cfg["num_classes"], tuple(cfg["input_size"])) == (classes, (in_chans, *size))
    assert json.loads((out / "config.json").read_text())["architecture"] == name
    data = timm.data.resolve_model_data_config(loaded)
    assert (list(data["mean"]), list(data["std"])) == ([0.1] * in_chans, [0.2] * in_chans)
    assert cfg.get("label_names") == ([f"class {i}" for i in range(classes)] if classes else None)
    card = read_card(out / "model.safetensors")
    assert card["name"] == name and card["image_size"] == list(size) and card["in_chans"] == in_chans
    again = tmp_path / "again"
    assert main(["export", str(out), str(again), "--to", "hub"]) == 0
    for file in ("config.json", "model.safetensors"):
        assert (again / file).read_bytes() == (out / file).read_bytes(), file


@pytest.mark.parametrize(("name", "kwargs", "size", "in_chans", "classes"), CASES[1:2] + CASES[5:])
def test_ours_start_from_such_a_folder(
    name: str, kwargs: dict[str, Any], size: tuple[int, int], in_chans: int, classes: int, tmp_path: Path
) -> None:
    model = run_folder(tmp_path / "run", name, kwargs, size, in_chans, classes)
    hub = tmp_path / "hub"
    assert main(["export", str(tmp_path / "run"), str(hub), "--to", "hub", "--whole"]) == 0
    card = describe(str(hub), "")
    assert card["class_names"] == [f"class {i}" for i in range(classes)]
    asked: dict[str, Any] = dict(name=card["name"], in_chans=in_chans, image_size=size, kwargs=card["kwargs"])
    other = build_encoder(**asked, drop_path_rate=0.0, num_classes=classes).eval()
    report = load_reported(other, str(hub), **asked)
    assert not report.missing and not report.resized
    x = torch.randn(2, in_chans, *size)
    assert torch.equal(other(x), model(x))


def test_timms_own_saving_is_read(tmp_path: Path) -> None:
    """A folder that timm itself wrote."""
    made = timm.create_model("test_vit", img_size=(64, 96), num_classes=3, in_chans=1).eval()
    timm.models.save_for_hf(made, str(tmp_path / "hub"), safe_serialization=True)
    out = tmp_path / "out.safetensors"
    assert main(["export", str(tmp_path / "hub"), str(out), "--to", "timm"]) == 0
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in load_file(out).items())


def test_our_networks_need_one_import(tmp_path: Path) -> None:
    """In a fresh program ``import models`` is enough, as the model card says."""
    run_folder(tmp_path / "run", *CASES[5])
    out = tmp_path / "hub"
    assert main(["export", str(tmp_path / "run"), str(out), "--to", "hub", "--whole"]) == 0
    readme = (out / "README.md").read_text()
    assert "import models" in readme and "license: other" in readme and "Licence: to be chosen" in readme
    code = readme.partition("```python\n")[2].partition("```")[0].replace("local-dir:hub", f"local-dir:{out}")
    code += "\nassert output.shape == (1, 3) and transform is not None\n"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={"HF_HUB_OFFLINE": "1", "PATH": ""})


def test_a_released_file_becomes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ConvMAE's own names, its decoder left out and said so; resized for other images and channels."""
    torch.save({"model": official.convmae(classes=3, img_size=64)}, tmp_path / "a.pth")
    words = ["export", str(tmp_path / "a.pth"), str(tmp_path / "hub"), "--to", "hub", "--image_size", "96", "64"]
    named = ["--name", "convvit_base", "--kwargs", json.dumps(official.CONVVIT)]
    assert main([*words, "--in_chans", "1", *named]) == 0
    loaded: Any = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert loaded(torch.randn(1, 1, 96, 64)).shape == (1, 3)
    torch.save({"model": official.convmae()}, tmp_path / "b.pth")
    # What no tensor tells, the width of the heads, is as in the published sizes: 16 is one head of at most 64.
    out = tmp_path / "encoder.pth"
    assert main(["export", str(tmp_path / "b.pth"), str(tmp_path / "two"), "--to", "hub"]) == 0
    said = capsys.readouterr().out.splitlines()[-1].partition("left out: ")[2]
    assert set(said.split(", ")) == {"decoder (1)", "mask token (1)", "multi-scale layers of pre-training (1)"}
    assert main(["export", str(tmp_path / "b.pth"), str(out), "--to", "timm"]) == 2
    assert "--to hub can hold it" in capsys.readouterr().err and not out.exists()
