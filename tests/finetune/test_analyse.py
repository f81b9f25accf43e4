"""The analysis, whole: the right layers and channels, the same on any number of processes."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from data.decode import decode
from data.sources import ImageIndex
from engine.cli import read_config
from engine.config import ConfigError, check_run
from engine.world import World
from finetune import analyse
from finetune.__main__ import PROGRAM
from finetune.analyse import AnalyseConfig, as_channels, block_names
from finetune.channels import class_selectivity, cosine_distance
from models.encoder import build_encoder
from tests.finetune.ranks import on_ranks

ALONE = World(0, 1, torch.device("cpu"))
SIZE = (16, 24)
VIT = "encoder.kwargs={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 images of 5 channels in 3 classes under val/, of the size that is analysed, and one broken file."""
    folder = tmp_path_factory.mktemp("set")
    draw = np.random.default_rng(0)
    for i in range(12):
        path = folder / "val" / f"class{i % 3}" / f"{i:02d}.npy"
        path.parent.mkdir(exist_ok=True, parents=True)
        np.save(path, draw.integers(0, 256, (5, *SIZE), np.uint8))
    (folder / "val" / "class1" / "04.npy").write_text("broken")
    return folder


def configure(images: Path, folder: Path, *overrides: str) -> AnalyseConfig:
    words = [f"data.path={images}", f"output_dir={folder}", "encoder.name=vit_tiny_patch16_224", VIT]
    words += [f"data.image_size={list(SIZE)}", "data.in_chans=5", "data.eval_crop_ratio=1", "data.workers=0"]
    config = read_config(PROGRAM, "analyse", [*words, "data.max_broken=1", "eval_batch_size=4", *overrides])
    check_run(config)
    PROGRAM.check(config)
    assert isinstance(config, AnalyseConfig)
    return config


def slowly(images: Path) -> list[dict[str, float]]:
    """Both numbers of both blocks, image by image, the tokens split by hand."""
    analyse.weights.seed_step(0, -1, 0)
    kwargs = dict(patch_size=8, embed_dim=24, depth=2, num_heads=2)
    model = build_encoder("vit_tiny_patch16_224", in_chans=5, image_size=SIZE, drop_path_rate=0.0, kwargs=kwargs).eval()
    index = ImageIndex.scan(images / "val", classes=True)
    active: list[dict[int, list[torch.Tensor]]] = [{0: [], 1: [], 2: []} for _ in range(2)]
    distances: list[list[float]] = [[], []]
    for i in range(len(index)):
        if index.path(i).endswith("04.npy"):
            continue
        x = (decode(index.path(i), 5)[None].float() / 255 - 0.5) / 0.5
        with torch.no_grad():
            x = model._pos_embed(model.patch_embed(x))
            for depth, block in enumerate(model.blocks):
                x = block(x)
                sites = x[0, 1:].double().T  # (C, P)
                active[depth][index.label(i)].append(sites.clamp(min=0).mean(dim=1))
                distances[depth].append(cosine_distance(sites[None]).item())
    found = []
    for own, distance in zip(active, distances, strict=True):
        means = torch.stack([torch.stack(own[label]).mean(dim=0) for label in range(3)])
        found.append(
            {"selectivity": class_selectivity(means).mean().item(), "cosine_distance": sum(distance) / len(distance)}
        )
    return found


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_numbers_equal_a_loop_over_single_images(
    images: Path, tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    building, lock = analyse.weights.build, threading.Lock()

    def one_at_a_time(*args: Any, **kwargs: Any) -> nn.Module:  # threads share torch's random state, processes do not
        with lock:
            return building(*args, **kwargs)

    monkeypatch.setattr(analyse.weights, "build", one_at_a_time)
    config = configure(images, tmp_path)
    on_ranks(processes, lambda world: analyse.run(config, world))
    (network,) = json.loads((tmp_path / "analysis.json").read_text())
    assert [layer["layer"] for layer in network["layers"]] == ["blocks.0", "blocks.1"]
    for layer, wanted in zip(network["layers"], slowly(images), strict=True):
        assert layer["images"] == 11 and layer["channels"] == 24 == sum(layer["selectivity_histogram"])
        assert {key: layer[key] for key in wanted} == pytest.approx(wanted, abs=1e-5)
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert row["task"] == "analyse" and row["init"] == "random" and row["eval_images"] == 11
    assert row["selectivity"] == pytest.approx(sum(layer["selectivity"] for layer in network["layers"]) / 2)


def test_several_networks_in_one_plot(images: Path, tmp_path: Path) -> None:
    other = build_encoder(
        "resnet18", in_chans=5, image_size=SIZE, drop_path_rate=0.0, kwargs={"channels": (8, 8, 8, 8)}
    )
    torch.save(other.state_dict(), tmp_path / "other.pth")
    overrides = ["encoder.name=resnet18", "encoder.kwargs={channels: [8, 8, 8, 8]}", "analyse.num_images=8"]
    overrides += [f"analyse.compare=[random, {tmp_path / 'other.pth'}]", "data.eval_image_size=[64, 32]"]
    config = configure(images, tmp_path / "run", *overrides, "analyse.labels=[first, '<second>', third]")
    assert analyse.dry_run(config, ALONE)["layers"] == 8
    analyse.run(config, ALONE)
    found = json.loads((tmp_path / "run" / "analysis.json").read_text())
    assert [network["label"] for network in found] == ["first", "<second>", "third"]
    assert found[0]["layers"] == found[1]["layers"] != found[2]["layers"]
    plots = {path.name for path in (tmp_path / "run" / "plots").iterdir()}
    names = ("selectivity", "cosine_distance", "selectivity_histograms")
    assert plots == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    for name in names:
        with Image.open(tmp_path / "run" / "plots" / f"{name}.png") as picture:
            assert min(picture.size) > 200
        text = (tmp_path / "run" / "plots" / f"{name}.svg").read_text()
        assert "first" in text and "&lt;second&gt;" in text and "third" in text
    report = (tmp_path / "run" / "report.html").read_text()
    assert report.count("data:image/svg+xml;base64,") == 3 and "layer4.1" in report and "<second>" not in report


def test_networks_of_different_depth_and_name(images: Path, tmp_path: Path) -> None:
    from finetune.weights import save_model

    config = configure(images, tmp_path / "a", "encoder.name=resnet18", "encoder.kwargs={channels: [8, 8, 8, 8]}")
    model = build_encoder(
        "resnet18", in_chans=5, image_size=SIZE, drop_path_rate=0.0, num_classes=3, kwargs=config.encoder.kwargs
    )
    (tmp_path / "trained").mkdir()
    save_model(model, config.encoder, config.data, ["a", "b", "c"], tmp_path / "trained")
    mixed = configure(images, tmp_path / "b", f"analyse.compare=[{tmp_path / 'trained'}]")
    assert analyse.labels(mixed) == ["random", "trained"]
    analyse.run(mixed, ALONE)
    found = json.loads((tmp_path / "b" / "analysis.json").read_text())
    assert [(n["encoder"], len(n["layers"])) for n in found] == [("vit_tiny_patch16_224", 2), ("resnet18", 8)]


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("resnet50", 16, "layer1.0", "layer4.2"),
        ("vit_tiny_patch16_224", 12, "blocks.0", "blocks.11"),
        ("convnext_tiny", 18, "stages.0.blocks.0", "stages.3.blocks.2"),
        ("convnextv2_atto", 12, "stages.0.blocks.0", "stages.3.blocks.1"),
        ("convvit_small", 15, "stages.0.blocks.0", "stages.2.blocks.10"),
        ("swin_tiny_patch4_window7_224", 12, "layers.0.blocks.0", "layers.3.blocks.1"),
        ("efficientnet_b0", 16, "blocks.0.0", "blocks.6.0"),
        ("regnety_002", 5, "stem", "s4"),
    ],
)
def test_blocks_are_found(name: str, count: int, first: str, last: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    found = block_names(model, "")
    assert (len(found), found[0], found[-1]) == (count, first, last)


def test_layers_by_a_regular_expression() -> None:
    model = timm.create_model("resnet18", num_classes=0)
    assert block_names(model, r"^layer[12]\.\d\.conv2$") == [f"layer{i}.{j}.conv2" for i in (1, 2) for j in (0, 1)]
    with pytest.raises(ConfigError, match=r"in no module's name; blocks are called layer1\.0"):
        block_names(model, "blocks")


def test_outputs_of_every_shape_become_channels() -> None:
    class Model:
        num_prefix_tokens, output_fmt = 2, "NHWC"

    tokens, image = torch.rand(3, 8, 5), torch.rand(3, 2, 4, 5)
    assert torch.equal(as_channels(tokens, Model, "x")[1, 4], tokens[1, 2:, 4])
    assert torch.equal(as_channels((image,), Model, "x")[2, 3], image[2, :, :, 3].flatten())
    assert torch.equal(as_channels(image, nn.Identity(), "x")[2, 1], image[2, 1].flatten())
    with pytest.raises(ConfigError, match=r"x puts out \(3, 5\), no map"):
        as_channels(torch.rand(3, 5), Model, "x")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["analyse.compare=[nowhere]"], "'nowhere' does not exist"),
        (["analyse.labels=[one, two]"], "give a different one for"),
        (["analyse.compare=[random]", "analyse.labels=[one, one]"], "give a different one for"),
        (["analyse.layers=(["], "is no regular expression"),
        (["encoder.name="], r"encoder\.name is required"),
        (["analyse.split=train"], r"data\.val_path is required"),
        (["encoder.drop_path_rate=0.1"], "has no effect"),
    ],
)
def test_what_it_refuses(images: Path, tmp_path: Path, overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        configure(images, tmp_path, *overrides)
