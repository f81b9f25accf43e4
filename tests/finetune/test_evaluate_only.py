"""``evaluate=true``: any checkpoint with a classifier, at any size, the same number however it is computed."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from data.decode import decode
from data.sources import ImageIndex
from engine.cli import read_config
from engine.config import ConfigError, check_run
from engine.world import World
from finetune import classify
from finetune.__main__ import PROGRAM
from finetune.config import ClassifyConfig
from models import pretrained
from tests.finetune.ranks import on_ranks

ALONE = World(0, 1, torch.device("cpu"))
SIZE, OTHER = (16, 24), (32, 16)
CLASSES = ["ape", "bat", "cat", "dog", "eel", "fox", "gnu"]
SMALL: dict[str, Any] = dict(patch_size=8, embed_dim=24, depth=2, num_heads=2, class_token=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 images of one channel in 7 classes, all of the size ``OTHER``, one of them broken."""
    folder = tmp_path_factory.mktemp("set")
    draw = np.random.default_rng(0)
    for i in range(23):
        path = folder / CLASSES[i % 7] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, OTHER, np.uint8)).save(path)
    (folder / "cat" / "09.png").write_text("broken")
    return folder


def vit(size: tuple[int, int], classes: int = 7) -> nn.Module:
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=classes, in_chans=1, img_size=size, **SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def configure(images: Path, folder: Path, weights: Path | str, *overrides: str) -> ClassifyConfig:
    kwargs = "{" + ", ".join(f"{key}: {str(value).lower()}" for key, value in SMALL.items()) + "}"
    words = [f"data.path={images}", f"output_dir={folder}", f"encoder.pretrained={weights}", "evaluate=true"]
    words += ["encoder.name=vit_tiny_patch16_224", f"encoder.kwargs={kwargs}", "data.in_chans=1", "data.mean=[0.5]"]
    words += ["data.std=[0.5]", f"data.image_size={list(SIZE)}", f"data.eval_image_size={list(OTHER)}"]
    words += ["data.max_broken=1", "data.workers=0", "encoder.drop_path_rate=0"]
    config = read_config(PROGRAM, "digits_vit", [*words, *overrides])
    check_run(config)
    PROGRAM.check(config)
    assert isinstance(config, ClassifyConfig)
    return config


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())[-1]
    return found


def slowly(model: Any, images: Path) -> tuple[list[int], list[Tensor]]:
    """Labels and logits, image by image."""
    index = ImageIndex.scan(images, classes=True)
    labels, logits = [], []
    for i in range(len(index)):
        if not index.path(i).endswith("09.png"):
            image = decode(index.path(i), 1)[None].float() / 255
            with torch.no_grad():
                logits.append(model((image - 0.5) / 0.5)[0].double())
            labels.append(index.label(i))
    return labels, logits


def wanted(labels: list[int], logits: list[Tensor]) -> dict[str, float]:
    ranks = [int((one > one[label]).sum()) for label, one in zip(labels, logits, strict=True)]
    loss = sum(float(torch.logsumexp(one, 0) - one[label]) for label, one in zip(labels, logits, strict=True))
    shares = {f"top{k}": 100 * sum(rank < k for rank in ranks) / len(ranks) for k in (1, 5)}
    return shares | {"eval_loss": loss / len(ranks), "eval_images": len(ranks)}


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_a_file_in_timms_keys_at_another_size(
    images: Path, tmp_path: Path, processes: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    square = vit((24, 24))
    torch.save({"model": square.state_dict(), "epoch": 3}, tmp_path / "tuned.pth")
    # By hand: the positions of the square grid resized to that of the images.
    model: Any = vit(OTHER)
    state = dict(square.state_dict())
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [4, 2], [3, 3], num_prefix_tokens=1)
    model.load_state_dict(state)
    building, lock = classify.weights.build, threading.Lock()

    def one_at_a_time(*args: Any, **kwargs: Any) -> nn.Module:  # threads share torch's random state, processes do not
        with lock:
            return building(*args, **kwargs)

    monkeypatch.setattr(classify.weights, "build", one_at_a_time)
    config = configure(
        images, tmp_path / "out", tmp_path / "tuned.pth", f"eval_batch_size={batch_size}", "train.batch_size=6"
    )
    on_ranks(processes, lambda world: classify.run(config, world))
    labels, logits = slowly(model, images)
    found = result(tmp_path / "out")
    assert {key: found[key] for key in wanted(labels, logits)} == pytest.approx(wanted(labels, logits), rel=1e-5)
    assert found["task"] == "evaluate" and found["image_size"] == "32x16" and found["eval_images"] == 22
    rows = json.loads((tmp_path / "out" / "per_class.json").read_text())
    assert [row["class"] for row in rows] == CLASSES
    for row in rows:
        own = [one for label, one in zip(labels, logits, strict=True) if CLASSES[label] == row["class"]]
        right = [one for one in own if CLASSES[int(one.argmax())] == row["class"]]
        assert row["images"] == len(own) and row["top1"] == pytest.approx(100 * len(right) / len(own))
    report = (tmp_path / "out" / "report.html").read_text()
    assert "per class (7 rows)" in report and "data:image/png;base64," in report


def test_a_class_list_orders_the_classifier(images: Path, tmp_path: Path) -> None:
    classes = ["zebra", *reversed(CLASSES), "yak"]  # two more than there are folders
    model = vit(OTHER, len(classes))
    torch.save(model.state_dict(), tmp_path / "tuned.pth")
    (tmp_path / "classes.txt").write_text("\n".join(classes) + "\n\n")
    size = f"data.image_size={list(OTHER)}"
    with pytest.raises(ConfigError, match=r"no classifier for these 7 classes: .* data\.class_list=FILE names"):
        classify.run(configure(images, tmp_path / "out", tmp_path / "tuned.pth", size), ALONE)
    config = configure(
        images, tmp_path / "out", tmp_path / "tuned.pth", size, f"data.class_list={tmp_path / 'classes.txt'}"
    )
    classify.run(config, ALONE)
    labels, logits = slowly(model, images)
    moved = [classes.index(CLASSES[label]) for label in labels]
    assert {key: result(tmp_path / "out")[key] for key in ("top1", "top5", "eval_loss")} == pytest.approx(
        {key: value for key, value in wanted(moved, logits).items() if key != "eval_images"}, rel=1e-5
    )
    (tmp_path / "classes.txt").write_text("ape\nbat\nape\n")
    with pytest.raises(ConfigError, match="names ape more than once"):
        classify.run(config, ALONE)
    (tmp_path / "classes.txt").write_text("ape\nbat\n")
    with pytest.raises(ConfigError, match="are not among the 2 known ones"):
        classify.run(config, ALONE)


def test_timms_own_weights_with_their_classifier(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit(OTHER)
    published = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    monkeypatch.setattr(pretrained, "_published", lambda name: published)
    monkeypatch.setattr(pretrained, "_timm_state", lambda *args: dict(model.state_dict()))
    classify.run(configure(images, tmp_path, "true", f"data.image_size={list(OTHER)}"), ALONE)
    assert result(tmp_path)["top1"] == pytest.approx(wanted(*slowly(model, images))["top1"])
    assert result(tmp_path)["init"] == "true"


def test_a_run_at_another_size_in_evaluation_is_evaluated_alike(digits: Path, tmp_path: Path, world: World) -> None:
    """In training the positions are resized at every image, afterwards once."""
    words = [f"data.path={digits}", f"output_dir={tmp_path}", "data.labels=0.1", "data.eval_image_size=[32,16]"]
    words += ["encoder.kwargs={patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2, global_pool: avg}"]
    words += ["optim.layer_decay=1", "train.epochs=1", "train.warmup_epochs=0", "train.batch_size=32"]
    config = read_config(PROGRAM, "digits_vit", words)
    check_run(config)
    PROGRAM.check(config)
    classify.run(config, world)
    trained = result(tmp_path)
    assert (tmp_path / "tables" / "per_class.csv").is_file() and (tmp_path / "plots" / "confusion.png").is_file()
    again = read_config(PROGRAM, "digits_vit", [*words, "evaluate=true", f"encoder.pretrained={tmp_path}"])
    check_run(again)
    PROGRAM.check(again)
    classify.run(again, world)
    evaluated = result(tmp_path)
    assert evaluated["task"] == "evaluate" and evaluated["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-5)
    assert (evaluated["top1"], evaluated["top5"]) == (trained["top1"], trained["top5"])
    report = (tmp_path / "report.html").read_text()
    assert "<h3>classify</h3>" in report and "<h3>evaluate</h3>" in report


def test_a_network_that_cannot_change_its_size_in_training_is_refused(
    digits: Path, tmp_path: Path, world: World
) -> None:
    words = [f"data.path={digits}", f"output_dir={tmp_path}", "data.image_size=32", "data.eval_image_size=[48,32]"]
    words += ["encoder.name=beit_base_patch16_224", "encoder.kwargs={embed_dim: 24, depth: 1, num_heads: 2}"]
    config = read_config(PROGRAM, "digits_vit", words)
    check_run(config)
    with pytest.raises(ConfigError, match=r"beit_base_patch16_224 takes images of \[32, 32\] only"):
        classify.build(config, world)


def test_a_list_of_other_classes_than_the_weights_is_refused(images: Path, tmp_path: Path) -> None:
    config = configure(images, tmp_path, "true", f"data.image_size={list(OTHER)}")
    classify.weights.save_model(vit(OTHER), config.encoder, config.data, CLASSES, tmp_path)
    (tmp_path / "classes.txt").write_text("\n".join(reversed(CLASSES)))
    wrong = configure(images, tmp_path / "out", tmp_path, f"data.class_list={tmp_path / 'classes.txt'}")
    with pytest.raises(ConfigError, match="is not the list of classes"):
        classify.run(wrong, ALONE)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    classify.run(wrong, ALONE)


def test_training_images_without_others_beside_them_are_not_taken_for_them(images: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(ConfigError, match=r"give data\.val_path"):
        classify.run(configure(tmp_path, tmp_path / "out", "true"), ALONE)
