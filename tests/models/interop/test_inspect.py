"""``python -m models.interop inspect``, and files that are no weights at all."""

import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from models.interop.__main__ import main
from tests.models.interop import official
from tests.models.interop.test_fcmae import official_fcmae
from tests.models.interop.test_spark import official_spark

VIT = "vit_base_patch16_224"


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["inspect", *words]) == 0
    return capsys.readouterr().out


def test_a_released_file_tells_its_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without being asked for one: the kind, the setting, and all groups with counts and first names."""
    file = tmp_path / "a.pth"
    torch.save({"module": official_spark("convnext"), "epoch": 1}, file)
    said = told(capsys, str(file))
    assert "SparK, pre-training" in said and "encoder.name=convnext_tiny" in said
    assert "2 missing, so new: head.norm.weight, head.norm.bias" in said
    assert "3 left out: buffers that nobody reads: imn_m, imn_s, norm_black" in said
    assert "1 left out: beside the weights: epoch" in said
    torch.save({"model": official_fcmae()}, file)
    said = told(capsys, str(file))
    assert "ConvNeXt V2, pre-training (FCMAE)" in said and "encoder.name=convnextv2_tiny" in said
    torch.save({"model": official.convmae(classes=2, img_size=96)}, file)
    said = told(capsys, str(file))
    assert "ConvMAE, fine-tuned" in said and "data.image_size=[96, 96]" in said and "encoder.name=convvit_base" in said


@pytest.mark.parametrize(("make", "name"), [(official.mae_pretraining, "vit"), (official.beit_pretraining, "beit")])
def test_transformers_of_the_usual_sizes_tell_theirs(
    make: Any, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(official.VIT, "embed_dim", 192)
    monkeypatch.setitem(official.BEIT, "embed_dim", 768)
    for settings in (official.VIT, official.BEIT):
        monkeypatch.setitem(settings, "depth", 12)
        monkeypatch.setitem(settings, "num_heads", settings["embed_dim"] // 64)
    monkeypatch.setattr(official, "BEIT", official.BEIT)
    state = make(64)
    torch.save({"model": state}, tmp_path / "a.pth")
    said = told(capsys, str(tmp_path / "a.pth"))
    asked = "vit_tiny_patch16_224" if name == "vit" else "beit_base_patch16_224"
    assert f"encoder.name={asked} data.image_size=[64, 64] data.in_chans=3" in said


def test_what_does_not_fit_is_listed_and_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.pth"
    torch.save(official.mae_pretraining(), file)
    said = told(capsys, str(file))  # of no usual size: the groups alone
    assert "give --name" in said and "6 left out: decoder: decoder_pos_embed" in said
    kwargs = "{embed_dim: 24, depth: 3, num_heads: 2}"
    said = told(capsys, str(file), "--name", VIT, "--kwargs", kwargs, "--image_size", "64", "96", "--in_chans", "1")
    assert "2 of these resized: " in said and "pos_embed (1, 17, 24) -> (1, 25, 24)" in said
    assert "patch_embed.proj.weight (24, 3, 16, 16) -> (24, 1, 16, 16)" in said
    assert main(["inspect", str(file), "--name", VIT, "--kwargs", "{embed_dim: 24, depth: 2, num_heads: 2}"]) == 2
    output = capsys.readouterr()
    assert "12 UNEXPECTED: blocks.2." in output.out
    assert output.err == f"error: {file} does not fit this encoder\n"
    assert main(["inspect", str(file), "--name", VIT, "--kwargs", "{oops: ["]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_arguments_are_added_to_those_of_the_description(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kwargs: dict[str, Any] = {"embed_dim": 24, "depth": 3, "num_heads": 2, "class_token": True}
    model = timm.create_model(VIT, num_classes=0, img_size=(64, 96), **kwargs)
    file = tmp_path / "encoder.safetensors"
    save_file(model.state_dict(), file)
    card = {"name": VIT, "kwargs": kwargs, "in_chans": 3, "image_size": [64, 96]}
    file.with_suffix(".json").write_text(json.dumps(card))
    said = told(capsys, str(file), "--kwargs", "{dynamic_img_size: true}")
    both = {**kwargs, "dynamic_img_size": True}
    assert f"encoder.kwargs={both}" in said
    words = ["export", str(file), str(tmp_path / "hub"), "--to", "hub", "--kwargs", "{dynamic_img_size: true}"]
    assert main([*words, "--image_size", "96", "64"]) == 0
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["model_args"].items() >= both.items()
    assert config["pretrained_cfg"]["input_size"] == [3, 96, 64]


def test_plain_files_are_not_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some of timm's networks differ in activations alone."""
    save_file(timm.create_model("test_convnext").state_dict(), tmp_path / "a.safetensors")
    said = told(capsys, str(tmp_path / "a.safetensors"))
    assert "timm's names" in said and "give --name" in said and "encoder.name" not in said
    said = told(capsys, str(tmp_path / "a.safetensors"), "--name", "test_convnext")
    assert "encoder.name=test_convnext" in said and re.search(r"\n  \d+ matched: ", said)


class Whole(nn.Module):
    """What a person saves who saves the module itself."""


def test_what_is_no_file_of_weights_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = io.BytesIO()
    torch.save(official.mae_pretraining(), good)
    module = io.BytesIO()
    torch.save(Whole(), module)
    safe = tmp_path / "whole.safetensors"
    save_file(official.mae_pretraining(), safe)
    cases: dict[str, tuple[str, bytes]] = {
        "it is a web page": ("a.pth", b"\n<!DOCTYPE html><html>sign in</html>"),
        "web page": ("a.safetensors", b"<html>"),
        "Git LFS's pointer": ("b.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "it is empty": ("c.pth", b""),
        "damaged or cut short": ("d.pth", good.getvalue()[: len(good.getvalue()) // 2]),
        "Whole, which are not loaded: save the state_dict() alone": ("e.pth", module.getvalue()),
        "cannot be read as weights": ("f.safetensors", safe.read_bytes()[:300]),
        "it is a plain pickle, which is not loaded": ("g.pth", pickle.dumps([1, 2], protocol=2)),
        "it does not exist": ("h.pth", b""),
        "holds no encoder.safetensors": ("folder", b""),
    }
    for message, (name, content) in cases.items():
        path = tmp_path / name
        if name == "folder":
            path.mkdir()
        elif name != "h.pth":
            path.write_bytes(content)
        assert main(["inspect", str(path)]) == 2, message
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error


def test_the_content_counts_not_the_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """safetensors called .bin."""
    save_file(official.mae_pretraining(), tmp_path / "a.bin")
    assert "MAE, pre-training" in told(capsys, str(tmp_path / "a.bin"))
